"""Every model of the comparison as files: as large as its account says, and back with the same outputs."""

import copy
import json

import pytest
import torch
from fusion_bench.method import SimpleAverageAlgorithm, SmileUpscalingAlgorithm
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from helpers import (
    TOWER,
    Oddities,
    didi,
    family,
    floats,
    pool_facts,
    same_bits,
    tower_of,
)
from omegaconf import OmegaConf
from torch import nn

from fusion_bench_didi.artifacts import load_artifact, save_artifact
from fusion_bench_didi.artifacts.host_moe import host_storage
from fusion_bench_didi.artifacts.saving import written
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.method import EMRMerging, TwinMerging
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.programs import entry_run
from fusion_bench_didi.programs.compare import ComparisonProgram

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:CLIPDataset:DeprecationWarning"
)

FAST = {"refine_sweeps": 1}
PIXELS = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def of_every_kind(entries: dict[str, dict]) -> dict[str, dict]:
    """One of the entries that differ in values alone; of DiDi's budgets the least, a usual and the largest."""
    kinds: dict[str, str] = {}
    for key, entry in entries.items():
        parts = [entry["method"], entry.get("choose"), [*entry.get("overrides", {})]]
        kinds.setdefault(json.dumps(parts), key)
    some = {*kinds.values(), "didi_024", "didi_200"}
    some |= {key for key in entries if key.startswith("merge_")}
    return {key: entry for key, entry in entries.items() if key in some}


def fast(key: str, method: str, overrides: dict) -> dict:
    """What makes an entry of the shipped list quick, and no other model."""
    if method == "didi":
        return {**FAST, **overrides}
    if method == "didi/paper":
        return {"rank_steps": 5, "refine_steps": 2, **overrides}
    if method == "didi/wemoe":
        return {**overrides, "max_steps": 1, "batch_size": 2}
    if method == "wudi/wudi":
        return {**overrides, "iter_num": 2}
    search = {"population": 4, "evaluations": 8, "surrogate_generations": 1, "trees": 2}
    if method == "didi/merge":
        return {**overrides, **search}
    if key.startswith("merge"):
        base = {**overrides["base_method"], **search}
        return {**overrides, "images": 8, "base_method": base}
    if method == "didi/routed":
        options = {} if overrides["router"] != "projection" else {"directions": 4}
        few = {"images": 8} if "images" in overrides else {}
        return {**overrides, **few, "router_options": options, "base_method": FAST}
    if overrides.get("experts") == "didi":
        return {**overrides, "didi": {**overrides["didi"], **FAST}}
    return overrides


def outputs(model: nn.Module | dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Pooled states under every task that a model can be given; under the one name ``""`` where it finds them."""
    if isinstance(model, dict):
        return {task: outputs(plain)[""] for task, plain in model.items()}
    model.eval()
    found = {}
    with torch.no_grad():
        if not isinstance(model, DynamicModel) or model.router is not None:
            return {"": model(PIXELS)[1]}
        for task in model.tasks:
            model.set_task(task)
            found[task] = model(PIXELS)[1]
        model.unset_task()
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory, demo_suite):
    """Shipped entries of every kind on the tiny suite, saved; and what each model gave before it was saved."""
    directory = tmp_path_factory.mktemp("run")
    pools = [
        f"{pool}.{key}={value}"
        for pool in ("modelpool", "taskpool")
        for key, value in demo_suite.items()
    ]
    options = [f"path.log_dir={directory}", "save_artifacts=true", "report=false"]
    config = initialize_hydra_config("didi_compare", [*pools, *options])
    entries = of_every_kind(OmegaConf.to_container(config.entries, resolve=True))
    for key, entry in entries.items():
        entry["overrides"] = fast(key, entry["method"], entry.get("overrides", {}))
    given = {k: config[k] for k in ARGUMENTS}
    before: dict[str, dict[str, torch.Tensor]] = {}

    def save(model, place, **options):
        if not isinstance(model, nn.Module):
            model = list(model)
        plain = dict(model) if isinstance(model, list) else model
        before[place.name] = outputs(plain)
        return save_artifact(model, place, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry_run, "save_artifact", save)
        program = ComparisonProgram(**{**given, "entries": OmegaConf.create(entries)})
        comparison = program.run()
    return directory, comparison, before


ARGUMENTS = (
    "modelpool",
    "taskpool",
    "save_artifacts",
    "report",
    "path",
    "seed",
)


@pytest.mark.slow
def test_every_row_is_there(compared):
    _, comparison, before = compared
    failed = {r["key"]: r["error"] for r in comparison["rows"] if r["error"]}
    assert not failed
    groups = {row["group"] for row in comparison["rows"]}
    assert groups == {"reference", "static", "dynamic", "routed"}
    assert set(before) == {row["key"] for row in comparison["rows"]}


@pytest.mark.slow
def test_files_are_as_large_as_the_account(compared):
    directory, comparison, _ = compared
    for row in comparison["rows"]:
        place = directory / "artifacts" / row["key"]
        files = [f for f in place.rglob("*.safetensors") if f.parent.name != "backbone"]
        headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)
        size = sum(f.stat().st_size for f in files)
        assert size - headers == row["bytes_excl"], row["key"]
        assert size == row["bytes_written"], row["key"]
        own = list(place.glob("backbone/*.safetensors"))
        assert bool(own) == (row["key"] == "wemoe")
        if own:
            backbone = row["bytes_incl"] - row["bytes_excl"]
            assert written(place).backbone == backbone == comparison["unit_bytes"]


@pytest.mark.slow
def test_every_model_comes_back(compared):
    directory, comparison, before = compared
    for row in comparison["rows"]:
        again = load_artifact(directory / "artifacts" / row["key"])
        found, expected = outputs(again), before[row["key"]]
        assert found.keys() == expected.keys()
        for task in found:
            torch.testing.assert_close(
                found[task], expected[task], atol=1e-6, rtol=1e-6, msg=row["key"]
            )


@pytest.mark.slow
def test_rows_of_merge_share_one_search(compared):
    directory, comparison, _ = compared
    assert [p.name for p in (directory / "searches").iterdir()] == ["merge"]
    report = json.loads((directory / "searches" / "merge" / "front.json").read_text())
    rows = {row["key"]: row for row in comparison["rows"]}
    router = rows["merge_balanced"]["x_excl"] - rows["merge_oracle"]["x_excl"]
    assert router > 0
    for pick, i in report["picks"].items():
        stored = report["front"][i]["storage"]
        assert rows[f"merge_{pick}"]["x_excl"] == pytest.approx(stored + router)


# --- the forms one by one -----------------------------------------------------


def types_of(models: dict[str, nn.Module]) -> dict[str, torch.dtype]:
    return dict(pool_facts(BaseModelPool(models), models["_pretrained_"]).types)


def merged(models: dict[str, nn.Module]) -> nn.Module:
    return SimpleAverageAlgorithm().run(BaseModelPool(copy.deepcopy(models)))


def test_a_static_merge_is_the_changed_tensors_once(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    model, types = merged(models), types_of(models)
    found = save_artifact(model, tmp_path / "a", base=tiny_clip.base, types=types)
    assert found.beyond == sum(p.numel() * 4 for p in tiny_clip.base.parameters())
    assert found.backbone == 0 and found == written(tmp_path / "a")
    assert found.replaced == found.beyond
    again = load_artifact(tmp_path / "a", copy.deepcopy(tiny_clip.base))
    assert same_bits(floats(again), floats(model))
    wrapped, base = torch.compile(model), torch.compile(tiny_clip.base)
    save_artifact(wrapped, tmp_path / "b", base=base, types=types)
    again = load_artifact(tmp_path / "b", torch.compile(copy.deepcopy(tiny_clip.base)))
    assert same_bits(floats(again), floats(model))


def test_tied_weights_buffers_and_untouched_tensors(tmp_path):
    """A tensor that no task changed is not written; one that goes by two names is written once."""
    models = family(Oddities())
    base = models["_pretrained_"]
    types = types_of(models)
    names = {n for n, _ in base.named_parameters()}
    assert names <= set(types)
    model = merged(models)
    found = save_artifact(model, tmp_path / "a", base=base, types=types)
    assert found.beyond == sum(4 * base.state_dict()[name].numel() for name in types)
    again = load_artifact(tmp_path / "a", copy.deepcopy(base))
    assert same_bits(floats(again), floats(model))


def test_tensors_that_tasks_keep_count_in_the_unit():
    """Running statistics: of one fine-tuned model, as the methods count them, and of what static merges write."""
    models = family(Oddities())
    for task in ("mnist", "svhn"):
        models[task].norm.running_mean += 1
    facts = pool_facts(BaseModelPool(models), models["_pretrained_"])
    assert facts.types["norm.running_mean"] == torch.float32
    assert facts.unit_bits == EMRMerging().run(models).unit_bits
    assert facts.unit_bits == 32 * sum(
        models["_pretrained_"].state_dict()[name].numel() for name in facts.types
    )


def test_what_files_replace(tiny_clip, tmp_path):
    """The base model's values that a directory makes do without: all, or none."""
    models, base = tiny_clip.pool_models(), tiny_clip.base
    options = {"base": base, "types": types_of(models)}
    whole = sum(4 * p.numel() for p in base.parameters())
    static = save_artifact(merged(models), tmp_path / "static", **options)
    own = iter(tiny_clip.tuned.items())
    individuals = save_artifact(own, tmp_path / "individuals", **options)
    dynamic = save_artifact(TwinMerging().run(models), tmp_path / "twin", **options)
    assert [f.replaced for f in (static, individuals, dynamic)] == [whole, whole, 0]
    assert individuals.beyond == len(tiny_clip.tasks) * whole


@pytest.mark.parametrize("rank", [4, -1])
def test_smile_comes_back(tiny_clip, tmp_path, rank):
    models = tiny_clip.pool_models()
    types = types_of(models)
    model = SmileUpscalingAlgorithm(device="cpu", gate_k=2, k=rank, top_k=2).run(
        BaseModelPool(copy.deepcopy(models))
    )
    expected = outputs(model)[""]
    unit = 32 * sum(p.numel() for p in tiny_clip.base.parameters())
    found = save_artifact(model, tmp_path / "a", base=tiny_clip.base, types=types)
    report = host_storage(model, tiny_clip.tasks, unit_bits=unit)
    assert 8 * found.beyond == report.excl_bits and found.backbone == 0
    again = load_artifact(tmp_path / "a", copy.deepcopy(tiny_clip.base))
    assert same_bits(again.state_dict(), model.state_dict())
    # The host keeps views of whole decompositions; a product's last bit depends on how its operands lie in memory.
    torch.testing.assert_close(outputs(again)[""], expected, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in again.parameters())


def test_wemoe_writes_the_backbone_that_it_changed(tiny_clip, tmp_path):
    models = copy.deepcopy(tiny_clip.pool_models())
    base, tuned = models.pop("_pretrained_"), list(models.values())
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value += 0.3 * sum(m.get_parameter(name) - value for m in tuned)
    for i, layer in enumerate(tower_of(model).encoder.layers):
        mlps = [tower_of(m).encoder.layers[i].mlp for m in (base, *tuned)]
        layer.mlp = WeightEnsemblingMoE(
            32, mlps[0], mlps[1:], batch_first=True, router_hidden_layers=1
        )
    types = types_of(tiny_clip.pool_models())
    found = save_artifact(model, tmp_path / "a", base=tiny_clip.base, types=types)
    unit = sum(4 * p.numel() for p in tiny_clip.base.parameters())
    report = host_storage(model, tiny_clip.tasks, unit_bits=8 * unit)
    assert 8 * found.beyond == report.excl_bits
    assert 8 * found.backbone == report.backbone_bits == 8 * unit
    again = load_artifact(tmp_path / "a", copy.deepcopy(tiny_clip.base))
    assert torch.equal(outputs(again)[""], outputs(model)[""])


def test_what_cannot_come_back_is_refused(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    types, base = types_of(models), tiny_clip.base
    options = {"base": base, "types": types}
    assert host_storage(base, tiny_clip.tasks, unit_bits=1) is None
    with pytest.raises(TypeError, match="Linear cannot be saved as an artifact"):
        save_artifact(nn.Linear(2, 2), tmp_path / "a", **options)
    model = merged(models)
    name = f"{TOWER}embeddings.class_embedding"
    del types[name]
    with pytest.raises(CheckpointMismatchError, match=f"{name}, which no task changed"):
        save_artifact(model, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_backbones_and_damaged_files_are_refused(
    tiny_clip, make_tiny_clip, tmp_path
):
    models = tiny_clip.pool_models()
    options = {"base": tiny_clip.base, "types": types_of(models)}
    save_artifact(merged(models), tmp_path / "a", **options)
    with pytest.raises(CheckpointMismatchError, match="not the one"):
        load_artifact(tmp_path / "a", make_tiny_clip(seed=1).base)
    with pytest.raises(CheckpointMismatchError, match="has no tensor"):
        load_artifact(tmp_path / "a", nn.Linear(2, 2))
    with (tmp_path / "a" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(CheckpointMismatchError, match="altered"):
        load_artifact(tmp_path / "a", copy.deepcopy(tiny_clip.base))


def test_dynamic_models_are_found_by_their_class(tiny_clip, tmp_path):
    model = didi(tiny_clip.pool_models(), budget=0.9)
    found = save_artifact(model, tmp_path / "a", base=tiny_clip.base, types={})
    assert 8 * found.beyond == model.storage.excl_bits
    assert type(load_artifact(tmp_path / "a", tiny_clip.base)) is type(model)
