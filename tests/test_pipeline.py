"""The whole merge on live models and on files: laws 1, 3 and 10, every kind of tensor, every policy."""

import copy
import json

import pytest
import torch
from helpers import (
    BASE,
    PLAIN,
    Oddities,
    OpenClipLike,
    combinations,
    didi,
    family,
    fine_tuned,
    floats,
    merge_settings,
    same_bits,
    task_vectors,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2Model

from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta
from fusion_bench_didi.lowrank.coupling import Coupling
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.settings import Budget
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.task_vectors.sources import SafetensorsSource


def gpt2() -> GPT2Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2Model(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
        )


def assert_task_weights(model, tuned: dict[str, nn.Module], atol: float) -> None:
    for task, expected in tuned.items():
        found = floats(model.materialize(task))
        for name, value in floats(expected).items():
            torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)


# --- law 1 --------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    combinations(
        allocation=["learned", "greedy", "uniform"],
        shared=["mean", "task_arithmetic", "ties", "none"],
        residual=["truncated", "full"],
    ),
)
def test_unlimited_budget_gives_every_task_back(tiny_clip, choice):
    model = didi(tiny_clip.pool_models(), budget=float("inf"), **choice)
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


@pytest.mark.parametrize("allocation", ["learned", "greedy", "uniform"])
def test_unlimited_budget_is_exact_where_precision_is_chosen(tiny_clip, allocation):
    choice = {"allocation": allocation, "factor_dtype": "auto"}
    model = didi(tiny_clip.pool_models(), budget=float("inf"), **choice)
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


@pytest.mark.parametrize("refinement", ["none", "adam", "alternating"])
@pytest.mark.parametrize("make", [OpenClipLike, gpt2, Oddities])
def test_unlimited_budget_is_exact_for_other_families(make, refinement):
    models = family(make())
    model = didi(models, budget=float("inf"), refinement=refinement)
    assert_task_weights(model, {t: m for t, m in models.items() if t != BASE}, 1e-6)


# --- law 3 --------------------------------------------------------------------


@pytest.mark.parametrize("include_backbone", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 1.4, 2.9])
@pytest.mark.parametrize(
    "choice",
    combinations(
        allocation=["learned", "greedy", "uniform"], residual=["truncated", "full"]
    ),
)
@pytest.mark.parametrize("make", [OpenClipLike, gpt2])
def test_budget_is_kept_and_used_up(make, choice, ratio, include_backbone):
    models = family(make(), ("mnist", "svhn", "eurosat"))
    budget = Budget(ratio + include_backbone, include_backbone)
    result = merge(task_vectors(models), merge_settings(budget, **choice))
    unit = sum(8 * p.numel() * p.element_size() for p in models[BASE].parameters())
    assert result.storage.unit_bits == unit
    rest = int(ratio * unit) - result.storage.excl_bits
    per_rank = [
        32 * (p.shape[0] + p[0].numel())
        for p in models[BASE].parameters()
        if p.ndim > 1
    ]
    assert 0 <= rest < max(per_rank)
    counted = result.storage.x_incl if include_backbone else result.storage.x_excl
    assert counted <= budget.ratio


def test_ranks_and_errors_are_those_of_what_is_stored(tiny_clip):
    models = tiny_clip.pool_models()
    result = merge(task_vectors(models), merge_settings(0.6))
    for task, deltas in result.experts.items():
        for name, rank in result.ranks.experts[task].items():
            delta = deltas.get(name)
            if isinstance(delta, LowRankDelta):
                assert delta.rank == rank
            else:
                assert rank == (0 if delta is None else min(delta.value[:, 0].shape))
    model = didi(models, budget=0.6)
    lost = total = 0.0
    base = floats(tiny_clip.base)
    for task, tuned in tiny_clip.tuned.items():
        found = floats(model.materialize(task))
        for name in result.report.errors:
            tau = floats(tuned)[name] - base[name]
            lost += float((floats(tuned)[name] - found[name]).square().sum())
            total += float(tau.square().sum())
    assert result.report.relative_error == pytest.approx(lost / total, rel=1e-3)
    assert model.info["relative_error"] == pytest.approx(lost / total, rel=1e-3)


def test_more_budget_and_refinement_lower_the_error(tiny_clip):
    vectors = task_vectors(tiny_clip.pool_models())

    def error(ratio: float, **choice) -> float:
        if choice.get("refinement") == "adam":
            choice["refine_steps"] = 50
        settings = merge_settings(ratio, **choice)
        return merge(vectors, settings).report.relative_error

    errors = [error(ratio) for ratio in (0.3, 0.6, 1.2, 2.4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]
    plain = error(0.6, refinement="none")
    assert error(0.6, refinement="adam") <= plain
    assert error(0.6, refinement="alternating") <= plain
    # experts cut against the whole shared matrix do not fit the part of it that is stored
    plain = error(0.6, refinement="none", residual="full")
    assert error(0.6, refinement="alternating", residual="full") < plain


def test_normalization_decides_which_task_is_served():
    """One task changed ten times as much as the other."""
    base = OpenClipLike()
    models = {
        BASE: base,
        "loud": fine_tuned(base, 1, scale=0.5),
        "quiet": fine_tuned(base, 2, scale=0.05),
    }

    def ranks_of_quiet(normalization: str) -> int:
        # experts alone: those of a shared mean of two tasks are equal up to their sign
        settings = merge_settings(1.0, shared="none", normalization=normalization)
        result = merge(task_vectors(models), settings)
        return sum(result.ranks.experts["quiet"].values())

    rank = {how: ranks_of_quiet(how) for how in ("none", "root", "matrix")}
    assert rank["none"] <= rank["root"] < rank["matrix"]


def test_factors_that_do_not_fit_the_memory_are_computed_again(tiny_clip):
    models = tiny_clip.pool_models()
    kept = didi(models, budget=0.6)
    again = didi(models, budget=0.6, factor_memory_gb=0.0)
    assert kept.info["ranks"] == again.info["ranks"]
    for task in kept.tasks:
        left, right = floats(kept.materialize(task)), floats(again.materialize(task))
        assert same_bits(left, right)


# --- law 10 -------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    combinations(allocation=["learned", "greedy"], residual=["truncated", "full"]),
)
def test_order_of_tasks_changes_nothing(make_tiny_clip, choice):
    """Sums over five tasks round differently in another order."""
    models = make_tiny_clip(("e", "b", "d", "a", "c")).pool_models()
    turned = dict(reversed(models.items()))
    choice = {"budget": 0.7, **choice}
    one, two = didi(models, **choice), didi(turned, **choice)
    assert one.tasks == list(reversed(two.tasks)) == ["e", "b", "d", "a", "c"]
    assert one.storage.as_dict() == two.storage.as_dict()
    if choice["residual"] == "full":
        assert one.storage.shared_bits > 0
    for task in one.tasks:
        left, right = one.materialize(task), two.materialize(task)
        assert same_bits(floats(left), floats(right))


def test_order_of_tensors_in_a_file_changes_nothing(tiny_clip_dir, tmp_path):
    from fusion_bench.modelpool import CLIPVisionModelPool

    names = [p.name for p in sorted(tiny_clip_dir.iterdir())]
    turned = tmp_path / "turned"
    for name in names:
        (turned / name).mkdir(parents=True)
        tensors = load_file(tiny_clip_dir / name / "model.safetensors")
        state = dict(reversed(tensors.items()))
        config = (tiny_clip_dir / name / "config.json").read_text()
        (turned / name / "config.json").write_text(config)
        torch.save(state, turned / name / "pytorch_model.bin")

    def merged(directory, order):
        pool = CLIPVisionModelPool({name: str(directory / name) for name in order})
        return didi(pool, budget=0.7)

    one, two = merged(tiny_clip_dir, names), merged(turned, names[::-1])
    for task in one.tasks:
        left, right = one.materialize(task), two.materialize(task)
        assert same_bits(floats(left), floats(right))


def test_same_input_gives_same_bits(tiny_clip):
    one, two = (
        didi(tiny_clip.pool_models(), refinement="adam", budget=0.7) for _ in range(2)
    )
    for task in one.tasks:
        left, right = one.materialize(task), two.materialize(task)
        assert same_bits(floats(left), floats(right))


# --- kinds of tensors ---------------------------------------------------------


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
    name = "vision_model.embeddings.patch_embedding.weight"
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
    name = "vision_model.post_layernorm.weight"
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
    name = "vision_model.embeddings.position_embedding.weight"
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


def test_smaller_factors_buy_more_rank(tiny_clip):
    models = tiny_clip.pool_models()
    whole = didi(models, budget=0.6, allocation="greedy")
    half = didi(models, budget=0.6, allocation="greedy", factor_dtype="bfloat16")
    assert half.storage.unit_bits == whole.storage.unit_bits
    assert half.storage.x_excl <= 0.6
    ranks = [m.info["ranks"]["experts"] for m in (whole, half)]
    total = [sum(sum(one.values()) for one in r.values()) for r in ranks]
    assert total[1] > total[0]
    assert half.info["relative_error"] < whole.info["relative_error"]


@pytest.mark.parametrize(
    "factor_dtype", ["float16", "int8", "int4", "int3", "int2", "auto"]
)
def test_budget_counts_the_bits_that_are_stored(tiny_clip, factor_dtype):
    model = didi(tiny_clip.pool_models(), budget=0.2, factor_dtype=factor_dtype)
    assert model.storage.unit_bits == 32 * sum(
        p.numel() for p in tiny_clip.base.parameters()
    )
    stored = sum(
        8 * p.nbytes for m in (model.shared, model.modulators) for p in m.parameters()
    )
    assert stored == model.storage.excl_bits
    assert 0.19 < model.storage.x_excl <= 0.2
    whole = didi(tiny_clip.pool_models(), budget=0.2, factor_dtype="checkpoint")
    assert model.info["relative_error"] < 0.8 * whole.info["relative_error"]


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.24, 2.5])
@pytest.mark.parametrize("factor_dtype", ["int8", "int4", "int3", "int2", "auto"])
def test_budget_is_never_exceeded_with_few_bits(tiny_clip, factor_dtype, ratio):
    choice = {"budget": ratio, "factor_dtype": factor_dtype, "vectors": "shared"}
    for allocation in ("learned", "greedy", "uniform"):
        some = {}
        if allocation == "uniform" and factor_dtype != "auto":
            some["residual"] = "full"
        model = didi(tiny_clip.pool_models(), allocation=allocation, **choice, **some)
        assert model.storage.x_excl <= ratio


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


# --- files --------------------------------------------------------------------


@pytest.fixture
def pool(tiny_clip_dir):
    return clip_pool(tiny_clip_dir)


def clip_pool(directory):
    from fusion_bench.modelpool import CLIPVisionModelPool

    tasks = sorted(p.name for p in directory.iterdir() if p.name != BASE)
    return CLIPVisionModelPool({n: str(directory / n) for n in (BASE, *tasks)})


def test_files_are_read_without_instantiating_fine_tuned_models(
    pool, tiny_clip, monkeypatch
):
    stock = pool.load_model

    def load(name, *args, **kwargs):
        assert name == BASE, f"{name} was instantiated"
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(pool, "load_model", load)
    model = didi(pool, budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


def test_files_and_live_models_give_equal_bits(pool, tiny_clip):
    one = didi(pool, budget=0.7)
    two = didi(tiny_clip.pool_models(), budget=0.7)
    for task in one.tasks:
        left, right = one.materialize(task), two.materialize(task)
        assert same_bits(floats(left), floats(right))


def rewrite(source, target, change):
    """Copy a directory of models with each file's tensors changed."""
    for model in source.iterdir():
        (target / model.name).mkdir(parents=True)
        config = (model / "config.json").read_text()
        (target / model.name / "config.json").write_text(config)
        tensors = change(model.name, load_file(model / "model.safetensors"))
        file = target / model.name / "model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_prefix_dropped_in_fine_tuned_files(tiny_clip_dir, tiny_clip, tmp_path):
    def change(name, tensors):
        if name == BASE:
            return tensors
        return {k.removeprefix("vision_model."): v for k, v in tensors.items()}

    directory = rewrite(tiny_clip_dir, tmp_path / "models", change)
    model = didi(clip_pool(directory), budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


@pytest.mark.parametrize("dry_run", [True, False])
def test_base_checkpoint_may_be_a_whole_clip_model(
    dry_run, tiny_clip_dir, tiny_clip, tmp_path, capsys
):
    """The base model of the published pools holds the text tower too, one of ours does as well."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = json.loads((tiny_clip_dir / BASE / "config.json").read_text())
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    others = {
        name: value.contiguous()
        for name, value in whole.state_dict().items()
        if not name.startswith("vision_model.")
    }

    wholes = (BASE,) if dry_run else (BASE, "svhn")

    def change(name, tensors):
        return {**tensors, **others} if name in wholes else tensors

    directory = rewrite(tiny_clip_dir, tmp_path / "models", change)
    whole.config.save_pretrained(directory / BASE)
    model = didi(clip_pool(directory), budget=1e9, dry_run=dry_run)
    if dry_run:
        plan = capsys.readouterr().out
        assert "vision_model.encoder" in plan
        assert "text_model" not in plan and "visual_projection" not in plan
    else:
        assert_task_weights(model, tiny_clip.tuned, atol=1e-6)
        assert not [name for name in model.touched if "text_model" in name]


def test_pickles_are_read_weights_only(tiny_clip_dir, tiny_clip, tmp_path, monkeypatch):
    for model in tiny_clip_dir.iterdir():
        (tmp_path / model.name).mkdir()
        config = (model / "config.json").read_text()
        (tmp_path / model.name / "config.json").write_text(config)
        file = tmp_path / model.name / "pytorch_model.bin"
        torch.save(load_file(model / "model.safetensors"), file)
    pool = clip_pool(tmp_path)
    monkeypatch.setattr(pool, "load_pretrained_model", lambda: tiny_clip.base)
    monkeypatch.setattr(pool, "load_model", None)
    model = didi(pool, budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


def test_sharded_files_are_read(tiny_clip_dir, tiny_clip, tmp_path, monkeypatch):
    from transformers import CLIPVisionModel

    for source in tiny_clip_dir.iterdir():
        model = CLIPVisionModel.from_pretrained(source)
        model.save_pretrained(tmp_path / source.name, max_shard_size="40KB")
        assert (tmp_path / source.name / "model.safetensors.index.json").is_file()
    pool = clip_pool(tmp_path)
    base = pool.load_pretrained_model()
    monkeypatch.setattr(pool, "load_pretrained_model", lambda: base)
    monkeypatch.setattr(pool, "load_model", None)
    model = didi(pool, budget=float("inf"))
    assert_task_weights(model, tiny_clip.tuned, atol=1e-6)


# --- dry run ------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_reads_no_weights(pool, monkeypatch, capsys):
    def no_reading(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(SafetensorsSource, "read", no_reading)
    monkeypatch.setattr(pool, "load_model", no_reading)
    with pytest.raises(AssertionError, match="weights were read"):
        didi(pool, budget=1.4)
    assert DiDiMerging(budget=1.4, dry_run=True, **PLAIN).run(pool) is None
    plan = capsys.readouterr().out
    assert "3 tasks: eurosat, mnist, svhn" in plan
    line = next(line for line in plan.splitlines() if "layers.1.mlp.fc1.weight" in line)
    assert line.split()[1:5] == ["64", "x", "32", str(4 * (64 + 32))]
    assert "to read:" in plan and "predicted peak memory" in plan


def test_dry_run_finds_the_faults_that_headers_show(pool, monkeypatch):
    from fusion_bench_didi.errors import BudgetError

    with pytest.raises(BudgetError, match="too small"):
        didi(pool, budget=0.001, dry_run=True)


def test_dry_run_works_on_live_models(tiny_clip, capsys):
    models = copy.deepcopy(tiny_clip.pool_models())
    assert didi(models, budget=1.4, dry_run=True) is None
    assert "layers.0.self_attn.q_proj.weight" in capsys.readouterr().out


def test_large_couplings_are_kept_in_half_the_memory(tiny_clip, monkeypatch):
    choice = {"budget": 0.4, "residual": "full", "shared": "mean"}
    choice["allocation"], halved = "learned", []
    plain = didi(tiny_clip.pool_models(), **choice)
    monkeypatch.setattr("fusion_bench_didi.merging.spectra.COUPLING_BYTES", 0)
    reduce = Coupling.reduced
    monkeypatch.setattr(
        Coupling, "reduced", lambda self: halved.append(reduce(self)) or halved[-1]
    )
    reduced = didi(tiny_clip.pool_models(), **choice)
    assert {c.head.dtype for c in halved} == {torch.bfloat16}
    assert reduced.storage.x_excl <= 0.4
    error = plain.info["relative_error"]
    assert reduced.info["relative_error"] == pytest.approx(error, rel=0.02)
