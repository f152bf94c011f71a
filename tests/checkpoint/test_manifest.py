"""The manifest of a saved model: sealed, held against the files and the base model before anything is made room for; old ones
are read."""

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from fuzz import limits
from fuzz_cases import body, every_form
from fuzz_changes import reseal
from fuzz_inputs import FORMAT_1, old_body
from helpers import BASE, didi, family, fine_tuned, floats, same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion_bench_didi.artifacts import load_artifact, save_artifact
from fusion_bench_didi.checkpoint import parts
from fusion_bench_didi.checkpoint.deltas import entry_of, read_config, read_deltas
from fusion_bench_didi.checkpoint.fields import CHECKSUM, checksum
from fusion_bench_didi.checkpoint.stream import write_deltas
from fusion_bench_didi.deltas.kinds import KINDS
from fusion_bench_didi.deltas.masks import SparseDelta
from fusion_bench_didi.deltas.plain import DenseDelta
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.method.merge import MERGE
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.recombination.library import load_module
from fusion_bench_didi.task_vectors.digests import digests

# --- files of format 1 --------------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted(p.parent.name for p in FORMAT_1.glob("*/*.json"))
)
def test_files_of_format_1_give_what_they_gave(name):
    model = load_artifact(FORMAT_1 / name, old_body())
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(7))
    expected = {
        key.partition("/")[2]: value
        for key, value in load_file(FORMAT_1 / "expected.safetensors").items()
        if key.partition("/")[0] == name
    }
    assert expected
    for task, output in expected.items():
        one = model
        if isinstance(model, dict):
            one = model[task]
        elif task != "None":
            model.set_task(task)
        with torch.no_grad():
            torch.testing.assert_close(one(x), output, rtol=1e-5, atol=1e-6)


def test_files_of_format_1_become_files_of_format_2(tmp_path):
    model = load_artifact(FORMAT_1 / "didi_tucker", old_body())
    model.save_pretrained(tmp_path / "new")
    assert read_config(tmp_path / "new")["format"] == 2
    again = load_artifact(tmp_path / "new", old_body())
    for task in model.tasks:
        left, right = (floats(m.materialize(task)) for m in (model, again))
        assert same_bits(left, right)


def test_files_of_format_1_know_their_base_model():
    other = old_body()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(CheckpointMismatchError, match="not the one"):
        load_artifact(FORMAT_1 / "emr", other)


# --- sealed -------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model of all stored forms."""
    DiDiModel(body(), *every_form(), unit_bits=10000).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_no_flipped_bit_is_read_as_something_else(saved):
    """One moved a weight to another task, and loaded."""
    file = saved / "config.json"
    content, rng = file.read_bytes(), random.Random(0)
    read = read_config(saved)
    for _ in range(3000):
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            assert read_config(saved) == read
        except (DiDiError, FileNotFoundError):
            pass


@pytest.mark.parametrize("name", ["library", "module"])
def test_manifests_of_modules_are_sealed_too(tmp_path, name):
    models = family(body(), ("a", "b"))
    method = MERGE(objective="proxy", evaluations=4, population=4, trees=2)
    method.run(BaseModelPool(models)).save_pretrained(tmp_path / "m")
    file, *_ = sorted((tmp_path / "m" / "modules").glob("*/module.json"))
    load_module(file.parent)
    text = file.read_text()
    task = '"task": null' if name == "library" else '"operator": "'
    file.write_text(text.replace(task, task[:-1] + 'x"', 1))
    with pytest.raises(CheckpointMismatchError, match="module.json cannot be read"):
        load_module(file.parent)


def test_a_seal_is_of_the_content_and_not_of_its_form(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    turned = dict(reversed(list(config.items())))
    file.write_text(json.dumps(turned, separators=(",", ":")))
    load_artifact(saved, body())
    assert checksum(turned) == config[CHECKSUM]


@pytest.mark.parametrize("key", [CHECKSUM, "format"])
def test_a_manifest_without_its_seal_or_format_is_refused(saved, key):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    del config[key]
    file.write_text(json.dumps(config))
    with pytest.raises(DiDiError, match="checksum|altered|format None"):
        load_artifact(saved, body())


def test_infinity_and_nan_are_written_as_words(tmp_path):
    info = {"budget": math.inf, "seconds": {"merge": math.nan}, "list": [-math.inf]}
    model = DiDiModel(body(), *every_form(), unit_bits=1, info=info)
    model.save_pretrained(tmp_path / "m")
    again = load_artifact(tmp_path / "m", body())
    assert again.info["budget"] == "inf" and float(again.info["budget"]) == math.inf
    assert again.info["seconds"] == {"merge": "nan"} and again.info["list"] == ["-inf"]
    text = (tmp_path / "m" / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


ODD = {
    "empty": b"",
    "cut short": b'{"format": 2, "tasks": ["a"',
    "no object": b"[1, 2]",
    "null": b"null",
    "twice": b'{"format": 2, "tasks": ["a"], "tasks": ["b"]}',
    "twice inside": b'{"format": 2, "a": [{"b": 1, "b": 2}]}',
    "not a number": b'{"format": 2, "unit_bits": NaN, "checksum": ""}',
    "deep": b'{"format":' + b"[" * 100000,
    "huge": b'{"format": ' + b"9" * 5000 + b"}",
    "latin-1": '{"format": 2, "tasks": ["\xe4"]}'.encode("latin-1"),
    "byte order mark": b'\xef\xbb\xbf{"format": 2}',
    "UTF-16": '{"format": 2}'.encode("utf-16"),
    "zeros": b"\0" * 1000,
    "safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("file", ["config.json", "module.json"])
def test_what_is_no_manifest_is_named(tmp_path, what, file):
    (tmp_path / file).write_bytes(ODD[what])
    with pytest.raises(CheckpointMismatchError, match=f"{file} cannot be read"):
        load_module(tmp_path) if file == "module.json" else load_artifact(tmp_path)


# --- held against what it may be ----------------------------------------------


def rewrite(directory: Path, change: Callable[[dict], object]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    reseal(directory)


def delta(config: dict, kind: str) -> dict:
    return next(d for d in config["deltas"] if d["kind"] == kind)


#: field that the message names -> what is done to the manifest
FAULTS: dict[str, list[Callable[[dict], object]]] = {
    "unit_bits": [
        lambda c: c.update(unit_bits=0),
        lambda c: c.update(unit_bits=-8),
        lambda c: c.update(unit_bits=True),
        lambda c: c.update(unit_bits="8"),
        lambda c: c.update(unit_bits=8.0),
        lambda c: c.update(unit_bits=2**70),
        lambda c: c.pop("unit_bits"),
    ],
    "backbone_bits": [lambda c: c.update(backbone_bits=None)],
    "info": [lambda c: c.update(info=[]), lambda c: c.pop("info")],
    "storage": [lambda c: c.update(storage=5)],
    "storage.unit_bits": [lambda c: c["storage"].update(unit_bits=0)],
    "storage.shared_bits": [lambda c: c["storage"].pop("shared_bits")],
    "storage.routing_bits": [lambda c: c["storage"].update(routing_bits="0")],
    "storage.expert_bits": [lambda c: c["storage"].update(expert_bits=[8])],
    "storage.expert_bits.a": [lambda c: c["storage"].update(expert_bits={"a": {}})],
    "storage.x_excl": [lambda c: c["storage"].update(x_excl="much")],
    "storage.x_incl": [lambda c: c["storage"].update(x_incl=None)],
    **{
        f"info.{field}": [lambda c, told=told: c["info"].update(told)]
        for field, told in {
            "method": {"method": ["DiDi"]},
            "settings": {"settings": 5},
            "budget": {"budget": "much"},
            "parents": {"parents": 5},
            "parents.a": {"parents": {"a": 5}},
            "tensors": {"tensors": 5},
            "tensors.a": {"tensors": {"a": 5}},
            "relative_error": {"relative_error": []},
            "relative_errors.a": {"relative_errors": {"a": -1.0}},
            "energies": {"energies": ["a"]},
            "ranks.shared": {"ranks": {"experts": {}}},
            "ranks.experts.a.x": {
                "ranks": {"shared": {}, "experts": {"a": {"x": "y"}}}
            },
            "precision.x": {"precision": {"x": ["int4"]}},
            "forms": {"forms": ["experts"]},
            "energy_tasks": {"energy_kept": {}},
            "energy_kept.x": {"energy_tasks": ["a"], "energy_kept": {"x": []}},
            "labels.a": {"labels": {"a": {"1": "x"}}},
            "generation.a": {"generation": {"a": 5}},
            r"edits\[0\].operation": {"edits": [{"task": "a"}]},
        }.items()
    },
    "router.kind": [lambda c: c.update(router={"kind": 5})],
    "versions": [lambda c: c.update(versions="0.1")],
    "tasks": [
        lambda c: c.update(tasks="ae"),
        lambda c: c.update(tasks=["a", "a", "b/c.d", "e"]),
        lambda c: c.update(tasks=["a", 3]),
        lambda c: c.update(tasks=["\ud800"]),
        lambda c: c.update(tasks={"a": 1}),
    ],
    "deltas": [
        lambda c: c.update(deltas={}),
        lambda c: c.update(deltas=[3]),
        lambda c: c["deltas"].append(copy.deepcopy(c["deltas"][0])),
        lambda c: c["deltas"][1].update(key=c["deltas"][0]["key"]),
        lambda c: c["deltas"][-1].update(tensor=c["deltas"][-2]["tensor"]),
    ],
    r"deltas\[\d+\].task": [
        lambda c: c["deltas"][-1].update(task="nobody"),
        lambda c: c["deltas"][-1].update(task=0),
        lambda c: c["deltas"][-1].pop("task"),
    ],
    r"deltas\[\d+\].kind": [
        lambda c: c["deltas"][0].update(kind="unheard_of"),
        lambda c: c["deltas"][0].update(kind="layered"),
        lambda c: c["deltas"][0].update(kind=["dense"]),
        lambda c: delta(c, "masked").update(task=None, tensor="new"),
        lambda c: delta(c, "core").update(task=None, tensor="new"),
        lambda c: delta(c, "own").update(task=None, tensor="new"),
        lambda c: delta(c, "bases").update(task="a", tensor="new"),
    ],
    r"deltas\[\d+\].shape": [
        lambda c: c["deltas"][0].update(shape="12"),
        lambda c: c["deltas"][0].update(shape=[12, 2**70]),
        lambda c: c["deltas"][0].update(shape=[2**40, 2**40]),
        lambda c: c["deltas"][0].update(shape=[1] * 40),
        lambda c: delta(c, "rounded_low_rank").update(shape=[]),
        lambda c: c["deltas"][0].pop("shape"),
    ],
    r"deltas\[\d+\].options": [
        lambda c: delta(c, "rounded_dense").update(options={}),
        lambda c: delta(c, "rounded_dense")["options"].update(bits=5),
        lambda c: delta(c, "rounded_dense")["options"].update(bits=2.0),
        lambda c: delta(c, "rounded_dense")["options"].update(other=1),
        lambda c: delta(c, "rounded_core")["options"].update(columns=0),
        lambda c: delta(c, "dense").update(options={"bits": 8}),
        lambda c: delta(c, "dense").update(options=None),
    ],
    r"deltas\[\d+\].without": [
        lambda c: delta(c, "dense").update(without=["value"]),
        lambda c: delta(c, "bases").update(without=["nothing"]),
        lambda c: delta(c, "bases").update(without="up"),
    ],
    "files": [
        lambda c: c.update(files=[]),
        lambda c: c.update(files={"nowhere.safetensors": "0"}),
        lambda c: c.update(files={"nowhere.safetensors": None}),
        lambda c: c.update(files={"a/b": "0" * 64}),
        lambda c: c.update(files={"": "0" * 64}),
    ],
    "backbone": [
        lambda c: c.update(backbone="x"),
        lambda c: c["backbone"].update(tensors=[]),
        lambda c: c["backbone"].update(tensors={"first.weight": "0"}),
        lambda c: c["backbone"].update({"class": 3}),
        lambda c: c["backbone"].update(source=["x"]),
        lambda c: c["backbone"].update(dtype=3),
        lambda c: c["backbone"].update(untied="first.weight"),
        lambda c: c["backbone"].update(fresh=[1]),
    ],
}


@pytest.mark.parametrize(
    ("field", "change"),
    [(field, change) for field, found in FAULTS.items() for change in found],
)
def test_a_field_that_is_not_as_written_is_named(saved, field, change):
    rewrite(saved, change)
    with pytest.raises(CheckpointMismatchError, match=rf"config.json: {field}.*"):
        load_artifact(saved, body())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        (field, change)
        for field, found in FAULTS.items()
        for change in found
        if field.startswith(("storage", "info.", "router", "versions", "tasks"))
    ],
)
def test_a_page_of_a_manifest_is_made_of_what_it_may_be(saved, field, change):
    """The page reads no more than the manifest, which was checked for models that are loaded alone."""
    rewrite(saved, change)
    with pytest.raises(CheckpointMismatchError, match=rf"config.json: {field}.*"):
        read_config(saved)


#: what is done to the manifest -> what the message says
MISFITS: dict[str, tuple[Callable[[dict], object], str]] = {
    "another shape": (
        lambda c: delta(c, "dense").update(shape=[12, 2, 2, 3]),
        "expected .* for a change of shape",
    ),
    "sides turned": (
        lambda c: delta(c, "rounded_bases").update(shape=[10, 12]),
        "expected .* for a change of shape",
    ),
    "another form": (
        lambda c: delta(c, "affine8").update(kind="rounded_dense", options={"bits": 8}),
        "sides at least|in no file",
    ),
    "other bits": (
        lambda c: delta(c, "rounded_dense")["options"].update(bits=4),
        "expected U8",
    ),
    "other columns": (
        lambda c: delta(c, "rounded_core")["options"].update(columns=1),
        "expected U8",
    ),
    "half of a pair": (
        lambda c: delta(c, "rounded_bases").update(without=["up"]),
        "together or neither",
    ),
    "a side less": (
        lambda c: delta(c, "rounded_bases").update(without=["up", "up_scale"]),
        "does not go with the shared part",
    ),
    "a mask of nothing": (
        lambda c: delta(c, "masked").update(tensor="new"),
        "does not go with the shared part .*nothing",
    ),
    "a core of nothing": (
        lambda c: delta(c, "core").update(tensor="new"),
        "does not go with the shared part",
    ),
    "a tensor of nobody": (
        lambda c: delta(c, "spectral").update(tensor="nowhere"),
        "has no tensor 'nowhere'",
    ),
    "a module for a tensor": (
        lambda c: delta(c, "spectral").update(tensor="first"),
        "has no tensor 'first'",
    ),
    "another tensor": (
        lambda c: delta(c, "spectral").update(tensor="conv.bias"),
        "changes conv.bias of shape .* the backbone .* has it as",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_refused_before_it_is_worked_out(saved, what):
    change, message = MISFITS[what]
    rewrite(saved, change)
    with pytest.raises(CheckpointMismatchError, match=message):
        load_artifact(saved, body())


@pytest.mark.parametrize(
    "where",
    [
        torch.tensor([3, 1], dtype=torch.int32),
        torch.tensor([1, 1], dtype=torch.int32),
        torch.tensor([-1, 1], dtype=torch.int32),
        torch.tensor([1, 12], dtype=torch.int32),
        torch.tensor([0b111, 0], dtype=torch.uint8),
        torch.tensor([0, 0b11110001], dtype=torch.uint8),  # beyond the last entry
    ],
    ids=str,
)
def test_positions_are_those_of_entries(tmp_path, where):
    found = SparseDelta((3, 4), where, torch.ones(2))
    manifest = write_deltas(tmp_path, {"x": found}, {"a": {}})
    with pytest.raises(CheckpointMismatchError, match="ascending positions"):
        read_deltas(tmp_path, manifest)


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "masked", "core", "own"])
def test_no_room_is_made_for_what_the_files_do_not_hold(tmp_path, kind):
    """One stored value for a matrix of 40000 x 40000 took 6 GB."""
    shape, m = (40000, 40000), 40000
    one = torch.ones(1)
    made = {
        "sparse": SparseDelta(shape, torch.zeros(1, dtype=torch.int32), one),
        "low_rank": KINDS["low_rank"](shape, torch.ones(m, 1), torch.ones(1, m)),
        "masked": KINDS["masked"](shape, torch.zeros(8, dtype=torch.uint8), one[0]),
        "core": KINDS["core"](shape, torch.ones(1, 1)),
        "own": KINDS["own"]((1,), one),
    }[kind]
    made.shape = shape
    shared = {"first.weight": DenseDelta((1, 1), torch.ones(1, 1))}
    if kind == "core":
        up, down = torch.ones(m, 1), torch.ones(1, m)
        shared = {"first.weight": KINDS["bases"](shape, up, down)}
    model = DynamicModel(body(), shared, {"a": {"first.weight": made}}, unit_bits=1)
    model.save_pretrained(tmp_path / "m")
    with limits(), pytest.raises(CheckpointMismatchError):
        load_artifact(tmp_path / "m", body())


def test_every_stored_form_has_its_parts():
    stored = {
        kind
        for kind, cls in KINDS.items()
        if cls.parts and cls.__module__.startswith("fusion_bench_didi.deltas.")
    }
    assert set(parts.FORMS) == stored
    shared, experts = every_form()
    made = {d.kind for deltas in (shared, *experts.values()) for d in deltas.values()}
    assert made == stored


@pytest.mark.parametrize(
    "tasks", [("a", "a/b"), ("a", "a.b"), ("~", "~0"), ("a/", "a~1"), ("", "shared")]
)
def test_keys_of_odd_names_do_not_collide(tmp_path, tasks):
    """Task ``a`` with tensor ``b/x`` and task ``a/b`` with tensor ``x`` had the same key."""
    tensors = ("x", "b/x", "b.x", "/x", "~1x", "1x", "a", "b", "")
    experts = {
        task: {
            name: DenseDelta((1,), torch.tensor([10.0 * i + j]))
            for j, name in enumerate(tensors)
        }
        for i, task in enumerate(tasks)
    }
    manifest = write_deltas(tmp_path, experts[tasks[0]], experts)
    keys = [d["key"] for d in manifest["deltas"]]
    assert len(set(keys)) == len(keys)
    shared, again = read_deltas(tmp_path, json.loads(json.dumps(manifest)))
    for task in tasks:
        for name in tensors:
            assert again[task][name].value.equal(experts[task][name].value)
            assert shared[name].value.equal(experts[tasks[0]][name].value)


def test_keys_of_common_names_are_as_they_were():
    """So that readers of other programs find what they found."""
    one = DenseDelta((1,), torch.ones(1))
    assert entry_of("mnist", "a.0.weight", one)["key"] == "experts/mnist/a.0.weight"
    assert entry_of(None, "a.0.weight", one)["key"] == "shared/a.0.weight"


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8),
        *(torch.bool, torch.complex64, torch.uint16),
    ],
    ids=str,
)
def test_tensors_of_a_tasks_own_are_of_any_type(tmp_path, dtype):
    value = torch.arange(6).view(2, 3).to(dtype)
    own = KINDS["own"]((2, 3), value)
    manifest = write_deltas(tmp_path, {}, {"a": {"x": own}, "b": {"x": own}})
    _, experts = read_deltas(tmp_path, manifest)
    for task in "ab":
        found = experts[task]["x"].value
        assert found.dtype == dtype and found.view(torch.uint8).equal(
            value.view(torch.uint8)
        )


def test_files_that_hold_a_tensor_twice_are_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file(dict([next(iter(tensors.items()))]), saved / "more.safetensors")
    rewrite(saved, lambda c: c["files"].update({"more.safetensors": ""}))
    with pytest.raises(CheckpointMismatchError, match="and so does another file"):
        load_artifact(saved, body())


def test_a_model_is_loaded_by_its_own_kind_of_class(saved, tmp_path):
    from fusion_bench_didi.recombination.model import RecombinedModel

    assert type(DynamicModel.from_pretrained(saved, body())) is DiDiModel
    with pytest.raises(CheckpointMismatchError, match="holds a DynamicModel"):
        DiDiModel.from_pretrained(FORMAT_1 / "emr", old_body())
    with pytest.raises(CheckpointMismatchError, match="Load it by DiDiModel"):
        RecombinedModel.from_pretrained(saved, body())
    with pytest.raises(CheckpointMismatchError, match="model_class is missing"):
        DiDiModel.from_pretrained(FORMAT_1 / "static", old_body())


# --- the base model -----------------------------------------------------------


class Wide(nn.Module):
    """Large tensors, one that no task changes, a buffer, and two that are tied."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(3000, 6)
            self.frozen = nn.Linear(6, 2000)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3000, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.words(tokens) - self.mean)))


def wide_models() -> dict[str, nn.Module]:
    models = family(Wide(), ("a", "b"))
    for task in ("a", "b"):
        models[task].frozen.load_state_dict(models[BASE].frozen.state_dict())
    return models


@torch.no_grad()
def disturbed(how: str) -> Wide:
    model = Wide()
    if how == "a value":
        model.words.weight[1234, 5] += 1e-6
    elif how == "rows":
        weight = model.words.weight
        weight[[7, 8]] = weight[[8, 7]].clone()
    elif how == "untouched":
        model.frozen.weight[1999, 5] += 1e-6
    elif how == "buffer":
        model.mean[3] = 1e-6
    elif how == "sign of zero":
        model.mean[3] = -0.0
    else:
        model.frozen.bias += 1.0
    return model


DISTURBED = ("a value", "rows", "untouched", "buffer", "sign of zero", "untouched bias")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of each form."""
    home, models = tmp_path_factory.mktemp("wide"), wide_models()
    base = models[BASE]
    didi(models, budget=0.9).save_pretrained(home / "didi")
    method = MERGE(objective="proxy", evaluations=4, population=4, trees=2)
    method.run(BaseModelPool(wide_models())).save_pretrained(home / "merge")
    changed = [n for n, _ in base.named_parameters() if not n.startswith("frozen")]
    types = dict.fromkeys(changed, torch.float32)
    options = {"base": base, "types": types}
    save_artifact(models["a"], home / "static", **options)
    pairs = [(task, models[task]) for task in ("a", "b")]
    save_artifact(pairs, home / "individuals", **options)
    save_artifact(Wide(), home / "base", base=base, types={})
    return home


@pytest.mark.parametrize("form", ["didi", "merge", "static", "individuals", "base"])
def test_another_base_model_of_equal_shapes_is_refused(wide, form):
    load_artifact(wide / form, Wide())
    for how in DISTURBED:
        name = "mean|words|frozen"
        with pytest.raises(
            CheckpointMismatchError, match=rf"weights differ \(({name})"
        ):
            load_artifact(wide / form, disturbed(how))


def test_a_merge_of_nothing_knows_its_base_model(tmp_path):
    """It touches no tensor, and every base model was taken for its own."""
    model = DiDiModel(body(), {}, {"a": {}, "b": {}}, unit_bits=10000)
    assert not model.touched
    model.save_pretrained(tmp_path / "m")
    load_artifact(tmp_path / "m", body())
    with pytest.raises(CheckpointMismatchError, match="not the one"):
        load_artifact(tmp_path / "m", fine_tuned(body(), 9))


def test_what_every_task_has_as_its_own_may_differ(tmp_path):
    """Such as a head that is drawn anew whenever the base model is loaded."""
    shared, experts = every_form()
    own = {"second.bias": KINDS["own"]((10,), torch.ones(10))}
    experts = {task: {**deltas, **own} for task, deltas in experts.items()}
    model = DiDiModel(body(), shared, experts, unit_bits=10000)
    model.save_pretrained(tmp_path / "m")
    other = body()
    with torch.no_grad():
        other.second.bias += 1
    again = load_artifact(tmp_path / "m", other)
    again.set_task("a")
    assert again.backbone.second.bias.eq(1).all()


def test_digests_are_of_values_and_shapes():
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    kept = digests({"x": x})["x"]
    assert digests({"y": x.clone().T.contiguous().T})["y"] == kept
    assert digests({"x": x.T})["x"] != kept
    assert digests({"x": x.flatten()})["x"] != kept
    assert digests({"x": x.double()})["x"] != kept
    half = x.bfloat16()
    assert digests({"x": half})["x"] == digests({"x": half.float()})["x"]
    for other in (torch.ones(()), torch.zeros(0, 3), torch.ones(3).bool()):
        assert len(digests({"x": other})["x"]) == 64


# --- the model card -----------------------------------------------------------


def test_names_do_not_change_the_page(tmp_path):
    shared, experts = every_form()
    odd = {'a"\n# b | `c`': experts["a"], "e": experts["e"]}
    info = {"parents": {"e": "x|y\n| z |"}}
    model = DiDiModel(body(), shared, odd, unit_bits=10000, info=info)
    model.save_pretrained(tmp_path / "m")
    lines = (tmp_path / "m" / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("# ")] == [
        "# DiDiModel: 2 tasks on one backbone"
    ]
    (call,) = [line for line in lines if line.startswith("model.set_task")]
    found: list[str] = []
    exec(call, {"model": type("Model", (), {"set_task": found.append})})
    assert found == list(odd)[:1]
    rows = [line for line in lines if line.startswith("| ")]
    assert all(len(row.replace("\\|", "").split("|")) in (4, 5) for row in rows)
