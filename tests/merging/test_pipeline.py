"""The whole merge on live models: laws 1, 3 and 10 at every policy."""

import itertools

import pytest
import torch
from helpers import (
    BASE,
    Oddities,
    OpenClipLike,
    combinations,
    didi,
    family,
    fine_tuned,
    floats,
    merge_settings,
    pairwise,
    same_bits,
    task_vectors,
)
from merged_tasks import assert_task_weights, gpt2, pool
from safetensors.torch import load_file

from fusion_bench_didi.deltas.plain import LowRankDelta
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.lowrank.decomposition import Coupling
from fusion_bench_didi.merging.pipeline import merge, plan
from fusion_bench_didi.merging.settings import Budget


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


@pytest.mark.parametrize(
    "choice",
    combinations(
        allocation=["learned", "greedy", "uniform"], residual=["truncated", "full"]
    ),
)
@pytest.mark.parametrize(
    "make, ratio, include_backbone",
    pairwise(itertools.product([OpenClipLike, gpt2], [0.3, 1.4, 2.9], [False, True])),
)
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


@pytest.mark.parametrize("function", [merge, plan])
def test_models_are_not_task_vectors(function, tiny_clip):
    with pytest.raises(SettingsError, match="CLIPVisionModel is given. .*DiDiMerging"):
        function(tiny_clip.base, tiny_clip.tuned)
    with pytest.raises(SettingsError, match="dict is given. .*DiDiMerging"):
        function(task_vectors=tiny_clip.tuned, settings=merge_settings(0.6))


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


@pytest.mark.parametrize("dtype", ["auto", "int8", "checkpoint"])
@pytest.mark.parametrize("vectors", ["expert", "shared", "pretrained"])
def test_the_error_told_is_that_of_whole_models(tiny_clip, vectors, dtype):
    """Of vectors too, however they are stored, or not at all."""
    model = didi(
        tiny_clip.pool_models(),
        budget=1.4,
        vectors=vectors,
        factor_dtype=dtype,
        as_vectors=["*q_proj.weight"],
    )
    base, lost, whole = floats(tiny_clip.base), {}, {}
    for task, tuned in tiny_clip.tuned.items():
        found = floats(model.materialize(task))
        pairs = [(found[n] - v, v - base[n]) for n, v in floats(tuned).items()]
        lost[task], whole[task] = (
            sum(float(x.double().square().sum()) for x in rests)
            for rests in zip(*pairs)
        )
        told = model.info["relative_errors"][task]
        assert told == pytest.approx(lost[task] / whole[task], rel=0.01, abs=1e-7)
    assert model.info["energies"] == pytest.approx(whole)
    told = sum(lost.values()) / sum(whole.values())
    assert model.info["relative_error"] == pytest.approx(told, rel=0.01, abs=1e-7)


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


@pytest.mark.parametrize(
    "factor_dtype, ratio",
    [
        *(("auto", ratio) for ratio in (0.05, 0.3, 1.24, 2.5)),
        *zip(("int8", "int4", "int3", "int2"), (2.5, 0.3, 1.24, 0.05)),
    ],
)
def test_budget_is_never_exceeded_with_few_bits(tiny_clip, factor_dtype, ratio):
    choice = {"budget": ratio, "factor_dtype": factor_dtype, "vectors": "shared"}
    # learning takes longest and ends in the steps of the others
    ways = ("learned", "greedy", "uniform") if ratio == 0.3 else ("greedy", "uniform")
    for allocation in ways:
        some = {}
        if allocation == "uniform" and factor_dtype != "auto":
            some["residual"] = "full"
        model = didi(tiny_clip.pool_models(), allocation=allocation, **choice, **some)
        assert model.storage.x_excl <= ratio


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
