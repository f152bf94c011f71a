"""MERGE: decisions stay decisions, what is counted is what is stored, and what is reported can be had again."""

import copy
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from helpers import BASE, REPOSITORY, pictures, task_vectors
from simulated_device import simulated

from benchmarks.merge_front import hypervolume, random_search
from fusion_bench_didi.deltas.plain import DenseDelta
from fusion_bench_didi.deltas.quantized import AffineDelta, shrunk_range
from fusion_bench_didi.errors import DiDiError, ModelPoolError, SettingsError
from fusion_bench_didi.method.merge import MERGE
from fusion_bench_didi.method.routed import fit_router_to
from fusion_bench_didi.pools.opening import load_backbone
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.recombination.components import (
    ComponentReader,
    component_of,
    components,
)
from fusion_bench_didi.recombination.evolution import SearchSettings
from fusion_bench_didi.recombination.front import named_picks, pareto_front
from fusion_bench_didi.recombination.genome import (
    canonical,
    crossover,
    groups,
    mutate,
    no_merging,
    one_group,
    random_genome,
)
from fusion_bench_didi.recombination.library import Library, load_modules
from fusion_bench_didi.recombination.model import RecombinedModel
from fusion_bench_didi.recombination.objectives import (
    Evaluation,
    Evaluator,
    ReconstructionScorer,
    Space,
)
from fusion_bench_didi.recombination.operators import OperatorSettings, rate_of
from fusion_bench_didi.recombination.search import nsga2
from fusion_bench_didi.recombination.surrogate import features
from fusion_bench_didi.recombination.validation import scorer_from_pools
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.task_vectors.scan import scan

OPERATORS = ("average", "task_arithmetic", "ties", "didi@0.1", "didi@0.3")
QUICK = {
    "population": 6,
    "evaluations": 18,
    "surrogate_generations": 2,
    "trees": 5,
    "operators": list(OPERATORS),
}


def make_space(models, operators=OPERATORS):
    vectors = task_vectors(models)
    vectors = vectors.ordered(sorted(vectors.tasks))
    parts = components(vectors, scan(vectors).changed)
    reader = ComponentReader(vectors)
    return Space.of(parts, reader, operators), reader


def make_evaluator(models, operators=OPERATORS):
    space, reader = make_space(models, operators)
    scorer = ReconstructionScorer(space.components, reader)
    return Evaluator(space, Library(reader), scorer)


def make_model(models, evaluate, genome):
    chains = evaluate.space.chains(genome, evaluate.library)
    return RecombinedModel(
        load_backbone(BaseModelPool(models)),
        {m.id: m for chain in chains.values() for m in chain},
        {task: [m.id for m in chain] for task, chain in chains.items()},
        unit_bits=evaluate.space.unit_bits,
    )


# --- 8-bit storage -----------------------------------------------------------


def test_affine_codes_are_off_by_half_a_step_and_cost_what_they_weigh():
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    delta = AffineDelta.of(value)
    step = (value.max() - value.min()) / 255
    assert (delta.change() - value).abs().max() <= step / 2 * 1.001
    assert delta.bits == 8 * sum(
        t.numel() * t.element_size() for t in delta.tensors().values()
    )
    assert delta.bits == 8 * 1200 + 64
    shared = DenseDelta((40, 30), value)
    assert torch.equal(delta.change(shared), value + delta.change())


def test_range_shrinking_gives_up_the_outliers_for_the_others():
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    value[3] = 1000.0
    lo, hi = shrunk_range(value, 1e-3)
    assert hi < 4 and lo > -4
    inside = value.clamp(lo, hi) == value
    delta = AffineDelta.of(value, clip=1e-3)
    error = (delta.change() - value).abs()
    assert error[inside].max() <= (hi - lo) / 255 / 2 * 1.001
    assert (
        error[inside].max()
        < (AffineDelta.of(value).change() - value)[inside].abs().max()
    )


@pytest.mark.parametrize("value", [torch.zeros(5), torch.full((3, 2), -0.25)])
def test_constant_tensors_are_exact(value):
    assert torch.equal(AffineDelta.of(value, clip=0.1).change(), value)


# --- decisions ---------------------------------------------------------------


def test_strings_stay_restricted_growth_strings():
    rng = np.random.default_rng(0)
    alone = np.array([0, 0, 0, 3, 4])
    parent = canonical(random_genome(rng, 5, 7, 5), alone)
    for _ in range(300):
        other = canonical(random_genome(rng, 5, 7, 5), alone)
        for child in crossover(parent, other, rng):
            child = canonical(mutate(child, rng, operators=5, rate=0.5), alone)
            assert np.array_equal(canonical(child, alone), child)
            for row in child:
                labels, chosen = row
                assert labels[0] == 0 and (labels >= 0).all()
                assert (labels[1:] <= np.maximum.accumulate(labels)[:-1] + 1).all()
                assert ((chosen >= 0) & (chosen < 5)).all()
                assert not chosen[labels.max() + 1 :].any()
                members = [t for _, tasks in groups(row) for t in tasks]
                assert sorted(members) == list(range(7))
        parent = child


def test_canonical_form_forgets_group_numbers_and_operators_that_mean_the_same():
    alone = np.array([0, 0])
    for same in ([[2, 2, 0], [1, 0, 1]], [[1, 1, 2], [0, 1, 0]]):
        found = canonical(np.array([same]), alone)
        assert found.tolist() == [[[0, 0, 1], [1, 0, 0]]]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vision_model.encoder.layers.3.self_attn.q_proj.weight", "attention"),
        ("vision_model.encoder.layers.3.layer_norm1.bias", "attention"),
        ("vision_model.encoder.layers.3.mlp.fc1.weight", "mlp"),
        ("vision_model.encoder.layers.3.layer_norm2.bias", "mlp"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("model.visual.transformer.resblocks.5.attn.in_proj_weight", "attention"),
        ("model.visual.transformer.resblocks.5.ln_2.weight", "mlp"),
        ("model.layers.7.post_attention_layernorm.weight", "mlp"),
        ("model.layers.7.self_attn.o_proj.weight", "attention"),
        ("roberta.encoder.layer.2.attention.output.dense.weight", "attention"),
        ("roberta.encoder.layer.2.intermediate.dense.weight", "mlp"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "attention"),
        ("encoder.block.1.layer.1.DenseReluDense.wi.weight", "mlp"),
        ("vision_model.embeddings.patch_embedding.weight", "rest"),
    ],
)
def test_components_by_name(name, expected):
    assert component_of(name).rpartition(".")[2] == expected


def test_unknown_operators_are_refused():
    with pytest.raises(ValueError, match="didi@"):
        rate_of("fisher")
    with pytest.raises(ValueError, match="objective"):
        MERGE(objective="accuracy")


# --- what is stored ----------------------------------------------------------


def test_one_group_costs_a_quarter_and_no_merging_a_quarter_per_task(tiny_clip):
    evaluate = make_evaluator(tiny_clip.pool_models())
    C, T, _ = evaluate.space.shape
    tensors = sum(len(c.tensors) for c in evaluate.space.components)
    ends = 64 * tensors / evaluate.space.unit_bits
    together = evaluate(one_group(C, T, 0))
    apart = evaluate(no_merging(C, T, 0))
    assert together.storage == pytest.approx(0.25 + ends)
    assert apart.storage == pytest.approx(T * (0.25 + ends))
    assert apart.performance > 0.999


@pytest.mark.parametrize("rate", [3, 4])
def test_low_rank_modules_keep_to_their_budget(tiny_clip, rate):
    evaluate = make_evaluator(tiny_clip.pool_models())
    C, T, _ = evaluate.space.shape
    budget = T * rate_of(OPERATORS[rate])
    for genome in (one_group(C, T, rate), no_merging(C, T, rate)):
        assert 0.5 * budget < evaluate(genome).storage <= budget
        assert evaluate.space.nominal_storage(genome) == pytest.approx(budget)


def test_model_counts_a_shared_module_once_and_survives_saving(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    evaluate = make_evaluator(models)
    C, T, O = evaluate.space.shape
    rng = np.random.default_rng(3)
    for i in range(3):
        genome = canonical(random_genome(rng, C, T, O), evaluate.space.alone)
        model = make_model(models, evaluate, genome)
        found = evaluate(genome)
        assert model.storage.x_excl == pytest.approx(found.storage, abs=1e-12)
        assert sum(model.storage.layer_bits.values()) == model.storage.excl_bits
        model.save_pretrained(tmp_path / str(i))
        again = RecombinedModel.from_pretrained(tmp_path / str(i), models[BASE])
        assert again.storage == model.storage
        for task in model.tasks:
            one, other = model.materialize(task), again.materialize(task)
            for a, b in zip(one.parameters(), other.parameters()):
                assert torch.equal(a, b)


@pytest.mark.parametrize("operator", [0, 4])
def test_a_task_that_is_removed_is_gone_from_shared_modules(
    tiny_clip, tmp_path, operator
):
    models = tiny_clip.pool_models()
    evaluate = make_evaluator(models)
    C, T, _ = evaluate.space.shape
    model = make_model(models, evaluate, one_group(C, T, operator))
    gone, *left = model.tasks
    before = {task: model.materialize(task).state_dict() for task in left}
    model.remove_modulator(gone)
    assert not any(gone in (*m.tasks, *m.experts) for m in model.library.values())
    assert sum(model.storage.layer_bits.values()) == model.storage.excl_bits
    model.save_pretrained(tmp_path / "model")
    again = RecombinedModel.from_pretrained(tmp_path / "model", models[BASE])
    assert again.tasks == left and again.storage == model.storage
    for task in left:
        for name, value in again.materialize(task).state_dict().items():
            assert value.equal(before[task][name])


def test_saved_bytes_are_the_account(tiny_clip, tmp_path):
    from safetensors.torch import load_file

    models = tiny_clip.pool_models()
    evaluate = make_evaluator(models)
    C, T, _ = evaluate.space.shape
    for name, genome in {"a": one_group(C, T, 2), "b": one_group(C, T, 4)}.items():
        model = make_model(models, evaluate, genome)
        model.save_pretrained(tmp_path / name)
        files = (tmp_path / name).glob("modules/*/*.safetensors")
        stored = [t for f in files for t in load_file(f).values()]
        assert 8 * sum(t.nbytes for t in stored) == model.storage.excl_bits


def test_a_router_is_counted_and_comes_back(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    evaluate = make_evaluator(models)
    C, T, _ = evaluate.space.shape
    model = make_model(models, evaluate, one_group(C, T, 4)).eval()
    alone = model.storage.excl_bits
    model.attach_router(make_router("mlp", model.tasks))
    pixels = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fit_router_to(model, pixels.split(3))
    assert model.storage.excl_bits == alone + model.router.bits > alone
    model.save_pretrained(tmp_path / "model")
    again = RecombinedModel.from_pretrained(tmp_path / "model", models[BASE])
    assert again.storage == model.storage
    found, expected = again.eval()(pixels)[1], model(pixels)[1]
    torch.testing.assert_close(found, expected)


def test_tasks_of_the_same_groups_are_one_model(tiny_clip):
    models = tiny_clip.pool_models()
    evaluate = make_evaluator(models)
    C, T, _ = evaluate.space.shape
    first, second, third = evaluate.space.tasks
    genome = one_group(C, T, 0)
    genome[0, 0] = [0, 0, 1]
    model = make_model(models, evaluate, genome)
    assert model.chains[first] == model.chains[second] != model.chains[third]
    a, b = model.materialize(first), model.materialize(second)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


# --- the search --------------------------------------------------------------


def test_resumed_search_equals_an_unbroken_one(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    settings = SearchSettings(6, 24, 1, surrogate_generations=2, trees=5)
    whole = nsga2(make_evaluator(models).space, make_evaluator(models), settings)

    class Killed(Exception):
        pass

    evaluate = make_evaluator(models)
    calls = 0

    def fragile(genome):
        nonlocal calls
        calls += 1
        if calls == 15:
            raise Killed
        return evaluate(genome)

    state = tmp_path / "search.json"
    with pytest.raises(Killed):
        nsga2(evaluate.space, fragile, settings, state=state)
    assert len(json.loads(state.read_text())["evaluations"]) == 12
    fresh = make_evaluator(models)
    assert nsga2(fresh.space, fresh, settings, state=state) == whole
    other = SearchSettings(6, 24, 2, surrogate_generations=2, trees=5)
    with pytest.raises(DiDiError, match="seed"):
        nsga2(fresh.space, fresh, other, state=state)


def test_search_beats_random_on_reconstruction(tiny_clip):
    evaluate = make_evaluator(tiny_clip.pool_models())
    settings = SearchSettings(10, 60, 0, surrogate_generations=5, trees=20)
    found = nsga2(evaluate.space, evaluate, settings)
    drawn = random_search(evaluate.space, evaluate, settings, lambda *_: None)
    assert len(found) == len(drawn) == 60
    assert len({json.dumps(e.genome) for e in found}) == 60
    assert found[:10] == drawn[:10]
    assert hypervolume(found, storage=0.75) > hypervolume(drawn, storage=0.75)


@pytest.mark.parametrize("patterns, count", [({}, 1), ({"block": ".*"}, 3), (None, 5)])
def test_components_are_those_that_are_asked_for(make_tiny_clip, patterns, count):
    """Of no pattern the rest is one component, of all tensors."""
    asked = {**QUICK, "operators": ["average"], "evaluations": 6}
    method = MERGE(objective="proxy", components=patterns, **asked)
    pool = BaseModelPool(make_tiny_clip(tasks=("mnist", "svhn")).pool_models())
    assert len(method.run(pool).info["components"]) == count


@pytest.mark.parametrize("part", ["a/b", "../up", "", "a b"])
def test_components_are_names_of_files(make_tiny_clip, part):
    method = MERGE(objective="proxy", components={part: ".*"}, **QUICK)
    with pytest.raises(SettingsError, match="components names"):
        method.run(BaseModelPool(make_tiny_clip(tasks=("mnist", "svhn")).pool_models()))


def test_a_task_that_equals_the_base_model_is_searched_with_the_others(make_tiny_clip):
    models = make_tiny_clip(tasks=("mnist", "svhn")).pool_models()
    models["same"] = copy.deepcopy(models[BASE])
    asked = {**QUICK, "operators": ["average"], "evaluations": 6}
    model = MERGE(objective="proxy", **asked).run(BaseModelPool(models))
    assert set(model.tasks) == {"mnist", "svhn", "same"}


def test_a_small_space_is_exhausted(make_tiny_clip):
    evaluate = make_evaluator(
        make_tiny_clip(tasks=("mnist", "svhn")).pool_models(), ("average",)
    )
    settings = SearchSettings(8, 500, 0, surrogate_generations=1, trees=2)
    found = nsga2(evaluate.space, evaluate, settings)
    assert len(found) == 2 ** evaluate.space.shape[0]


def test_front_and_picks():
    points = [(0.9, 2.0), (0.5, 0.3), (0.85, 0.6), (0.4, 0.5), (0.9, 2.5)]
    found = [Evaluation([], p, s, {}) for p, s in points]
    assert pareto_front(found) == [1, 2, 0]
    front = [found[i] for i in pareto_front(found)]
    assert named_picks(front) == {"performance": 2, "balanced": 1, "storage": 0}
    assert hypervolume(found[:1], storage=4.0) == pytest.approx(0.9 * 0.5)


# --- the method --------------------------------------------------------------


class LabelledPool(BaseModelPool):
    """Hands out lists as they are; the host would make configurations of their pictures."""

    def load_val_dataset(self, dataset_name, *args, **kwargs):
        return pictures(list(self._val_datasets).index(dataset_name))


def pools(tiny, clip_dir, *, validation=True):
    """A model pool with labelled noise, and the task pool that lends its heads."""
    data = {task: pictures(i) for i, task in enumerate(tiny.tasks)}
    return (
        LabelledPool(
            tiny.pool_models(), val_datasets=dict.fromkeys(data) if validation else None
        ),
        CLIPVisionModelTaskPool(
            test_datasets=data,
            processor=str(clip_dir),
            clip_model=str(clip_dir),
            dataloader_kwargs={"batch_size": 6},
        ),
    )


def run(modelpool, taskpool, **settings):
    method = MERGE(**{**QUICK, **settings})
    if taskpool is not None:
        method._program = SimpleNamespace(taskpool=taskpool)
    return method.run(modelpool)


def test_reported_objectives_come_back_from_the_library(
    make_tiny_clip, clip_dir, tmp_path
):
    tiny = make_tiny_clip(scale=0.2)
    modelpool, taskpool = pools(tiny, clip_dir)
    settings = {"directory": str(tmp_path), "validation_samples": None}
    model = run(modelpool, taskpool, pick="balanced", **settings)
    assert (tmp_path / "front.png").is_file() and (tmp_path / "front.svg").is_file()
    report = json.loads((tmp_path / "front.json").read_text())
    score = Scorer(taskpool).score
    alone = {t: score(tiny.tuned[t], t) for t in tiny.tasks}
    for i, point in enumerate(report["front"]):
        ids = [key for chain in point["chains"].values() for key in chain]
        again = RecombinedModel(
            load_backbone(modelpool),
            load_modules(tmp_path / "library", ids),
            point["chains"],
            unit_bits=report["unit_bits"],
        )
        assert again.storage.x_excl == point["storage"]
        # by the host's own evaluation of a plain model
        scores = [
            score(again.materialize(t), t) / max(alone[t], 1 / 12)
            for t in sorted(tiny.tasks)
        ]
        assert np.mean(scores) == pytest.approx(point["performance"], rel=1e-5)
        if i == report["picks"]["balanced"]:
            assert again.storage == model.storage
    library = sorted(p.name for p in (tmp_path / "library").iterdir())
    used = {k for p in report["front"] for c in p["chains"].values() for k in c}
    assert library == sorted(used)
    # a search that ended is not run again
    before = (tmp_path / "search.json").read_text()
    run(modelpool, taskpool, pick="storage", **settings)
    assert (tmp_path / "search.json").read_text() == before


@pytest.fixture
def unplotted(monkeypatch):
    monkeypatch.setattr("fusion_bench_didi.method.merge.plot_front", lambda *_: [])


SMALL = {
    "objective": "proxy",
    "population": 4,
    "evaluations": 4,
    "trees": 2,
    "operators": ["average"],
}


@pytest.mark.parametrize(
    "changed, differ",
    [
        ({"scale": 0.2}, "checkpoints"),
        ({"exclude": "*mlp.fc1.bias"}, "components"),
        ({"components": {"attention": "attn", "mlp": "mlp"}}, "components"),
    ],
)
def test_a_search_goes_on_with_what_it_began_with_only(
    make_tiny_clip, unplotted, tmp_path, changed, differ
):
    """Other checkpoints of the same tasks, or other tensors in components of the same names, are another search."""
    before = {**SMALL, "directory": str(tmp_path)}
    run(BaseModelPool(make_tiny_clip().pool_models()), None, **before)
    scale = {key: changed[key] for key in ("scale",) if key in changed}
    now = {**before, **{k: v for k, v in changed.items() if k not in scale}}
    pool = BaseModelPool(make_tiny_clip(**scale).pool_models())
    with pytest.raises(DiDiError, match=f"another search .*{differ}.* differ"):
        run(pool, None, **now)


def test_modules_of_other_checkpoints_are_none_of_this_library(
    make_tiny_clip, unplotted, tmp_path
):
    """Who removes the state and not the library begins anew; the front names modules of its own models."""
    settings = {**SMALL, "directory": str(tmp_path)}
    for scale in (0.05, 0.2):
        models = make_tiny_clip(scale=scale).pool_models()
        model = run(BaseModelPool(models), None, **settings)
        found = load_modules(tmp_path / "library", model.library)
        for key, module in model.library.items():
            for name, change in module.change(module.tasks[0]).items():
                assert change.equal(found[key].change(module.tasks[0])[name])
        for name in ("search.json", "front.json"):
            (tmp_path / name).unlink()


def test_a_directory_at_home(tiny_clip, unplotted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = {**SMALL, "directory": "~/search"}
    run(BaseModelPool(tiny_clip.pool_models()), None, **settings)
    assert (tmp_path / "search" / "front.json").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("scaling", [0.3, 0.5])
def test_the_surrogate_knows_the_scale_of_task_arithmetic(
    tiny_clip, monkeypatch, scaling
):
    """What it is told of one group is what the group loses, but for the rounding to 8 bits."""

    class Caught(Exception):
        pass

    def catch(space, evaluate, *_, **__):
        raise Caught(evaluate)

    monkeypatch.setattr("fusion_bench_didi.method.merge.nsga2", catch)
    pool = BaseModelPool(tiny_clip.pool_models())
    with pytest.raises(Caught) as caught:
        run(pool, None, objective="proxy", scaling=scaling)
    evaluate = caught.value.args[0]
    space = evaluate.space
    C, T, O = space.shape
    genome = one_group(C, T, OPERATORS.index("task_arithmetic"))
    table = features(space, genome[None])[0, : C * T * (O + 2)].reshape(C, T, O + 2)
    own = np.einsum("ctt->ct", space.grams)
    told = 1 - (table[..., -1] * own).sum(0) / own.sum(0)
    scores = evaluate(genome).scores
    np.testing.assert_allclose(told, [scores[t] for t in space.tasks], atol=1e-3)


def test_models_are_scored_on_the_device_of_the_heads(make_tiny_clip, clip_dir):
    """The host puts its CLIP model there; base model, candidates and images follow, and the pool's model stays where it was."""
    tiny = make_tiny_clip(scale=0.2)
    modelpool, taskpool = pools(tiny, clip_dir)
    vectors = task_vectors(tiny.pool_models())
    here = scorer_from_pools(modelpool, taskpool, tiny.base, vectors, samples=None)
    with simulated() as device:
        taskpool.clip_model.to(device)
        there = scorer_from_pools(modelpool, taskpool, tiny.base, vectors, samples=None)
        assert there.individual == here.individual
    assert {p.device.type for p in tiny.base.parameters()} == {"cpu"}


def test_without_validation_data_the_error_says_so(tiny_clip, clip_dir):
    modelpool, taskpool = pools(tiny_clip, clip_dir, validation=False)
    with pytest.raises(ModelPoolError, match='val_datasets.*objective="proxy"'):
        run(modelpool, taskpool)
    with pytest.raises(DiDiError, match='CLIP task pool.*objective="proxy"'):
        run(pools(tiny_clip, clip_dir)[0], None)


def test_proxy_needs_neither_data_nor_a_task_pool(tiny_clip):
    models = tiny_clip.pool_models()
    picked = {
        pick: run(BaseModelPool(models), None, objective="proxy", pick=pick)
        for pick in ("storage", "performance", 1)
    }
    sizes = {pick: model.storage.x_excl for pick, model in picked.items()}
    assert sizes["storage"] < sizes[1] <= sizes["performance"]
    assert picked["storage"].tasks == list(tiny_clip.tasks)


def test_yaml_is_the_constructor():
    import inspect

    from omegaconf import OmegaConf

    file = REPOSITORY / "config/method/didi/merge.yaml"
    config = OmegaConf.to_container(OmegaConf.load(file))
    assert config.pop("_target_") == "fusion_bench_didi.method.merge.MERGE"
    named = {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in inspect.signature(MERGE.__init__).parameters.values()
        if p.default is not inspect.Parameter.empty
    }
    assert list(config) == list(named) and config == named
    assert asdict(OperatorSettings()) == {
        "scaling": config["scaling"],
        "ties_keep": config["ties_keep"],
        "clip": config["clip"],
        "bits": config["low_rank_bits"],
    }
