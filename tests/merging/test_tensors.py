"""Every kind of tensor is merged as what it is."""

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import (
    BASE,
    TOWER,
    Oddities,
    OpenClipLike,
    didi,
    family,
    floats,
    merge_settings,
    normal,
    same_bits,
    task_vectors,
)
from merged_tasks import assert_task_weights, gpt2
from torch import nn

from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.results import MergeReport
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models import DiDiModel


def test_convolution_and_fused_attention_are_matrices():
    models = family(OpenClipLike())
    model = didi(models, budget=0.9, allocation="uniform", residual="full")
    ranks = model.info["ranks"]["shared"]
    assert {"conv1.weight", "attn.in_proj_weight", "proj"} <= set(ranks)
    expert = model.modulators["mnist"].deltas
    assert isinstance(expert["conv1.weight"], LowRankDelta)
    assert expert["conv1.weight"].shape == (16, 3, 8, 8)
    assert expert["conv1.weight"].down.shape[1] == 3 * 8 * 8
    assert expert["attn.in_proj_weight"].up.shape[0] == 3 * 16
    for vector in ("attn.in_proj_bias", "ln.weight", "logit_scale"):
        assert isinstance(expert[vector], DenseDelta)
    images = torch.randn(2, 3, 32, 32)
    model.set_task("mnist")
    assert model(images).equal(model.materialize("mnist")(images))
    model.set_task("svhn")
    assert model(images).equal(model.materialize("svhn")(images))


def test_conv1d_of_gpt2_is_a_matrix():
    model = didi(family(gpt2()), budget=0.9)
    attention = model.modulators["svhn"].deltas["h.0.attn.c_attn.weight"]
    assert isinstance(attention, LowRankDelta)
    assert attention.shape == (16, 48)  # in x out, unlike nn.Linear


def test_integer_buffers_and_tied_weights_survive():
    base = Oddities()
    models = family(base)
    for tuned in (models["mnist"], models["svhn"]):
        tuned(torch.arange(5))
        tuned.train()(torch.arange(5))  # running statistics move too
        tuned.eval()
    model = didi(models, budget=float("inf"))
    plain = model.materialize("mnist")
    assert plain.head.weight is plain.embedding.weight
    assert (
        plain.positions.equal(base.positions) and plain.positions.dtype == torch.int64
    )
    assert_task_weights(model, {"mnist": models["mnist"]}, atol=1e-6)
    # tied weights are counted once, the count of batches as the integer of 64 bits that it is
    numbers = sum(p.numel() for p in base.parameters()) + 2 * 8
    assert model.storage.unit_bits == 32 * numbers + 64
    model.set_task("svhn")
    assert model.backbone.head.weight is model.backbone.embedding.weight


def test_untouched_tensors_cost_nothing(tiny_clip):
    name = f"{TOWER}embeddings.patch_embedding.weight"
    base = dict(tiny_clip.base.named_parameters())[name].detach()
    for tuned in tiny_clip.tuned.values():
        dict(tuned.named_parameters())[name].data.copy_(base)
    model = didi(tiny_clip.pool_models(), budget=0.8)
    assert name not in model.touched and name not in model.storage.layer_bits
    changed = sum(p.numel() for p in tiny_clip.base.parameters()) - base.numel()
    assert model.storage.unit_bits == 32 * changed


def test_task_that_left_a_vector_alone_stores_no_copy():
    models = family(OpenClipLike())
    models["svhn"].ln.bias.data.copy_(models[BASE].ln.bias.data)
    model = didi(models, budget=0.9)
    assert "ln.bias" in model.modulators["mnist"].deltas
    assert "ln.bias" not in model.modulators["svhn"].deltas


def test_ranks_may_be_zero_and_vectors_are_still_exact(tiny_clip):
    models = tiny_clip.pool_models()
    vectors = sum(p.numel() for p in tiny_clip.base.parameters() if p.ndim < 2)
    unit = sum(p.numel() for p in tiny_clip.base.parameters())
    model = didi(models, budget=3 * vectors / unit + 1e-9)
    ranks = model.info["ranks"]
    assert not any(ranks["shared"].values())
    assert not any(r for expert in ranks["experts"].values() for r in expert.values())
    plain = floats(model.materialize("svhn"))
    for name, value in floats(tiny_clip.tuned["svhn"]).items():
        expected = value if value.ndim < 2 else floats(tiny_clip.base)[name]
        torch.testing.assert_close(plain[name], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", ["expert", "shared", "pretrained"])
def test_policies_for_vectors(tiny_clip, policy):
    model = didi(tiny_clip.pool_models(), budget=0.8, vectors=policy)
    name = f"{TOWER}post_layernorm.weight"
    base = floats(tiny_clip.base)[name]
    tuned = {t: floats(m)[name] for t, m in tiny_clip.tuned.items()}
    mean = torch.stack(list(tuned.values())).mean(0)
    for task, own in tuned.items():
        expected = {"expert": own, "shared": mean, "pretrained": base}[policy]
        found = floats(model.materialize(task))[name]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    copies = {"expert": 3, "shared": 1, "pretrained": 0}[policy]
    assert model.storage.layer_bits.get(name, 0) == copies * 32 * base.numel()


def test_patterns_exclude_and_store_whole(tiny_clip):
    model = didi(
        tiny_clip.pool_models(),
        budget=0.8,
        exclude=["*mlp.fc2*"],
        as_vectors=["*position_embedding*"],
    )
    assert not [name for name in model.touched if "mlp.fc2" in name]
    name = f"{TOWER}embeddings.position_embedding.weight"
    delta = model.modulators["mnist"].deltas[name]
    assert isinstance(delta, DenseDelta) and model.shared.get(name) is None


def test_bfloat16_checkpoints_are_the_unit(tiny_clip):
    models = {n: m.bfloat16() for n, m in tiny_clip.pool_models().items()}
    model = didi(models, budget=1.0)
    assert model.storage.unit_bits == 16 * sum(
        p.numel() for p in tiny_clip.base.parameters()
    )
    assert 0.95 < model.storage.x_excl <= 1.0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.materialize("mnist").dtype == torch.bfloat16
    exact = didi(models, budget=float("inf"), factor_dtype="float32")
    for task, tuned in tiny_clip.tuned.items():
        assert same_bits(floats(exact.materialize(task)), floats(tuned))


def test_names_of_tasks_with_dots_and_dashes(tiny_clip):
    models = {BASE: tiny_clip.base}
    tuned = dict(zip(("llama-3.1", "a/b.c", "x"), tiny_clip.tuned.values()))
    model = didi({**models, **tuned}, budget=float("inf"))
    assert model.tasks == ["llama-3.1", "a/b.c", "x"]
    assert_task_weights(model, tuned, atol=1e-6)
    model.set_task("llama-3.1")
    assert model.current_task == "llama-3.1" and "a/b.c" in model.modulators


def test_the_models_of_the_pool_are_left_alone(tiny_clip):
    before = {name: floats(m) for name, m in tiny_clip.pool_models().items()}
    model = didi(tiny_clip.pool_models(), budget=0.8)
    model.set_task("mnist")
    for name, live in tiny_clip.pool_models().items():
        assert same_bits(before[name], floats(live)), name
        assert all(p.requires_grad for p in live.parameters())


CHOICES = [
    {},
    {"shared": "mean"},
    {"allocation": "uniform", "residual": "full"},
    {"vectors": "shared"},
]
KINDS = ["all stored whole", "all in one shape", "no matrix changed", "one task's only"]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merges_without_a_matrix(kind, choice):
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    models = family(base)
    if kind == "no matrix changed" or kind == "one task's only":
        for model in list(models.values())[1:]:
            model[0].weight = base[0].weight
    if kind == "one task's only":
        list(models.values())[1].load_state_dict(base.state_dict())
    if kind == "all stored whole":
        choice = {**choice, "as_vectors": ["*"]}
    elif kind == "all in one shape":
        choice = {**choice, "exclude": ["0.*"]}
    merged = didi(models, budget=6, **choice)
    error = 0.0
    for task in merged.tasks:
        found, want = merged.materialize(task).state_dict(), models[task].state_dict()
        for name in merged.touched:
            error += float((found[name] - want[name]).square().sum())
    assert error < 1e-3 or choice.get("vectors") == "shared"
    assert merged.touched and merged.storage.x_excl <= 6


def test_vectors_take_bits_but_have_no_ranks(tiny_clip, capsys):
    """What matrices and vectors are told apart by: ranks, forms and energy kept are of matrices, the error is of both."""
    models = tiny_clip.pool_models()
    sides = {n: p.ndim for n, p in tiny_clip.base.named_parameters()}
    model = didi(models, budget=0.3, factor_dtype="auto")
    matrices = {n for n in model.touched if sides[n] > 1}
    assert matrices < set(model.touched)
    assert set(model.info["ranks"]["shared"]) == matrices
    assert set(model.info["forms"]) == set(model.info["energy_kept"]) == matrices
    vectors = {n for n in model.info["precision"]} - matrices
    assert vectors and all(sides[n] == 1 for n in vectors)
    assert DiDiMerging(budget=0.3, dry_run=True).run(BaseModelPool(models)) is None
    printed = capsys.readouterr().out
    assert (
        f"{len(matrices)} matrices, {sum(d < 2 for d in sides.values())} vectors"
        in printed
    )


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.3, 2.0])
def test_rows_columns_and_vectors_of_the_same_numbers_are_stored_alike(
    budget, tmp_path
):
    """Also where there is nothing else, as where biases alone are trained, and in less than two bits per number."""
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(3000, generator=generator) for _ in range(2)]
    found = []
    for shape in ((3000,), (1, 3000), (3000, 1)):
        base = nn.ParameterList([torch.zeros(shape)])
        models = {BASE: base}
        for task, change in zip(("mnist", "svhn"), changes):
            models[task] = nn.ParameterList([change.view(shape)])
        model = didi(models, budget=budget, factor_dtype="auto", allocation="greedy")
        model.save_pretrained(tmp_path / str(shape))
        model = DiDiModel.from_pretrained(tmp_path / str(shape), backbone=base)
        expert = model.modulators["svhn"].deltas["0"]
        value = torch.zeros(expert.sides)
        for rows, part in expert.blocks():
            value[rows] += part
        assert value.equal(expert.own().view(expert.sides))
        found.append((model.storage.excl_bits, expert.own().flatten()))
    (bits, values), *others = found
    assert bits
    assert all(bits == other and values.equal(same) for other, same in others)


HUGE = {"a matrix": "weight", "a vector": "bias"}


@pytest.mark.parametrize("what", HUGE)
@pytest.mark.parametrize(
    "choice",
    [
        {"factor_dtype": "float16", "vectors": "expert"},
        {"factor_dtype": "float16", "vectors": "shared"},
        {"factor_dtype": "checkpoint"},
        {"factor_dtype": "auto"},
    ],
    ids=str,
)
def test_a_change_beyond_the_range_of_its_type_is_refused(choice, what):
    """It was stored as infinity."""
    half = choice["factor_dtype"] != "float16"
    dtype = torch.float16 if half else torch.float32
    models = family(nn.Linear(12, 12).to(dtype))
    size = 4e4 if half else 1e5  # of both signs, their difference is beyond 65504
    with torch.no_grad():
        for name, model in models.items():
            value = getattr(model, HUGE[what])
            signs = normal(*value.shape).sign()
            value.copy_(signs * (size if name == BASE else -size))
    with pytest.raises(DiDiError, match=f"^{HUGE[what]}: .* float16, up to 65504"):
        didi(models, budget=float("inf"), **choice)
    for wider in ("bfloat16", "float32"):
        model = didi(models, budget=float("inf"), **{**choice, "factor_dtype": wider})
        for value in floats(model.materialize("mnist")).values():
            assert bool(value.isfinite().all())


@pytest.mark.parametrize("lost", [0.0, 2.5])
def test_errors_of_what_has_no_energy_are_no_multiples_of_it(lost):
    energy, errors = torch.tensor([[4.0, 0.0], [1.0, lost]]).double()
    report = MergeReport(
        ("a", "b"),
        {"w": energy},
        {"w": errors},
        {"w": "int8"},
        {"w": "experts"},
        {},
        {},
    )
    assert report.energy_kept == {"w": [0.75, 0.0 if lost else 1.0]}
    assert report.relative_errors == {"a": 0.25, **({} if lost else {"b": 0.0})}


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2), (4,)])
@pytest.mark.parametrize("budget", [0.1, 0.2])
def test_of_precisions_that_take_the_same_bits_the_finest_is_stored(shape, budget):
    """So few numbers take no more bytes of four bits than of three."""
    sizes = {"few": shape, "many": (40, 30)}
    parts = {name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    vectors = task_vectors(family(nn.ParameterDict(parts)))
    result = merge(vectors, merge_settings(budget, factor_dtype="auto"))
    assert result.report.precision["few"] == "int4"
