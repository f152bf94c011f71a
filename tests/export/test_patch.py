"""Patches: thirty lines that know nothing of this package apply them."""

import json

import pytest
import torch
from exact_models import gpt2, llama, qwen, t5
from helpers import didi, family
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusion_bench_didi.deltas.plain import DenseDelta, OwnDelta
from fusion_bench_didi.errors import CheckpointMismatchError
from fusion_bench_didi.export import patch, patched, to_patch
from fusion_bench_didi.models.dynamic import DiDiModel


def apply(file, state):
    """As any reader would."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
        assert header["sparse"] == "True"
        names, keys = json.loads(header["changed_params"]), set(opened.keys())
        for name in names:
            if name in keys:
                state[name] = opened.get_tensor(name)
                continue
            index = opened.get_tensor(f"{name}.indices")
            values = opened.get_tensor(f"{name}.values")
            assert index.dtype == torch.int32 and bool((index.diff() > 0).all())
            flat = state[name].clone().flatten()
            flat[index.long()] = values
            state[name] = flat.view(state[name].shape)
        for name, others in json.loads(header["tied"]).items():
            state |= dict.fromkeys(others, state[name])
        assert len(keys) == sum(1 if name in keys else 2 for name in names)
    return state


@pytest.mark.parametrize(
    "make, dtype",
    [
        (llama, torch.float32),
        (qwen, torch.bfloat16),
        (t5, torch.float32),
        (gpt2, torch.float32),
    ],
)
def test_a_patch_makes_the_base_model_the_task(make, dtype, tmp_path):
    base = make().to(dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = didi(family(base), budget=0.5, factor_dtype="auto")
    to_patch(model, tmp_path / "out")
    wanted = model.materialize("svhn")
    found, file = make().to(dtype), tmp_path / "out/svhn.safetensors"
    for state in (patched(file, before), apply(file, before)):
        found.load_state_dict(state)
        for name, value in wanted.state_dict().items():
            assert torch.equal(state[name], value), name
            assert torch.equal(found.state_dict()[name], value), name


def sparse_model(part: float) -> DiDiModel:
    """One tensor changed at a part of its entries."""
    base, name = llama().bfloat16(), "model.layers.0.mlp.up_proj.weight"
    draw = torch.Generator().manual_seed(0)
    shape = base.get_parameter(name).shape
    change = (torch.rand(shape, generator=draw) < part) * torch.ones(shape)
    return DiDiModel(base, {}, {"a": {name: DenseDelta(shape, change)}}, unit_bits=1)


@pytest.mark.parametrize("part, how", [(0.1, "sparse"), (0.6, "whole"), (0.0, "base")])
def test_tensors_are_stored_in_the_smaller_way(part, how, tmp_path):
    model = sparse_model(part)
    report = to_patch(model, tmp_path / "out")
    assert {one.how for one in report.tensors["a"].values()} == {how}
    values = model.base_tensor(model.touched[0]).numel()
    expected = min(6 * part, 2) * values
    assert report.bytes["a"] == pytest.approx(expected + 500, abs=0.1 * expected + 500)


def test_a_patch_of_another_base_model_is_refused(tmp_path):
    model = sparse_model(0.1)
    to_patch(model, tmp_path / "out")
    file, state = tmp_path / "out/a.safetensors", dict(llama().bfloat16().state_dict())
    name = model.touched[0]
    after = patched(file, state)
    assert torch.equal(after[name], model.materialize("a").get_parameter(name))
    with pytest.raises(CheckpointMismatchError, match="their values differ"):
        patched(file, {**state, name: state[name] + 1})
    with pytest.raises(CheckpointMismatchError, match=f"they lack {name}"):
        patched(file, {})
    file.write_bytes(b"no file")
    with pytest.raises(CheckpointMismatchError, match="is no patch"):
        patched(file, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_base_models_in_another_type_are_told(dtype, tmp_path):
    """Their values may be the same, which are all that the digest is of."""
    model = sparse_model(0.1)
    to_patch(model, tmp_path / "out")
    state = {n: v.to(dtype) for n, v in model.backbone.state_dict().items()}
    said = f"in torch.bfloat16, and the tensor given is in {dtype}. Give"
    with pytest.raises(CheckpointMismatchError, match=said):
        patched(tmp_path / "out/a.safetensors", state)


def test_the_base_model_is_looked_at_once_for_all_tasks(tmp_path, monkeypatch):
    looked, digests = [], patch.digests

    def look(tensors):
        looked.extend(name for name in tensors if name == model.touched[0])
        return digests(tensors)

    monkeypatch.setattr(patch, "digests", look)
    model = sparse_model(0.1)
    (deltas,) = (dict(e.deltas.items()) for e in model.modulators.values())
    model.hold({}, {task: deltas for task in "abc"})
    to_patch(model, tmp_path / "out")
    assert len(looked) == 1
    patched(tmp_path / "out/b.safetensors", dict(llama().bfloat16().state_dict()))
    assert len(looked) == 2, "a patch alone is held against what it is given"


def test_heads_of_another_shape_are_whole(tmp_path):
    base = llama()
    own = OwnDelta((50, 32), torch.ones(50, 32))
    model = DiDiModel(base, {}, {"a": {"lm_head.weight": own}}, unit_bits=1)
    report = to_patch(model, tmp_path / "out")
    assert report.tensors["a"]["lm_head.weight"].how == "whole"
    found = apply(tmp_path / "out/a.safetensors", dict(llama().state_dict()))
    assert found["lm_head.weight"].shape == (50, 32)
    name, state = "lm_head.weight", dict(llama().state_dict())
    assert patched(tmp_path / "out/a.safetensors", state)[name].shape == (50, 32)
    with pytest.raises(CheckpointMismatchError, match=rf"{name} has the shape \(50"):
        patched(written(tmp_path, {}, {"own": "[]"}), state)


def written(place, parts, header):
    """The patch ``place/out/a.safetensors`` with other parts and another header; what is None is left out."""
    file = place / "out/a.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = {**opened.metadata(), **header}
    kept = {k: v for k, v in {**load_file(file), **parts}.items() if v is not None}
    told = {key: value for key, value in header.items() if value is not None}
    save_file(kept, place / "other.safetensors", metadata=told)
    return place / "other.safetensors"


NAME = "model.layers.0.mlp.up_proj.weight"
INDICES, VALUES = f"{NAME}.indices", f"{NAME}.values"
#: Parts in place of three indices and values, of which None is left out, and what is said.
DAMAGES = {
    "shape": ({NAME: torch.ones(5, 32).bfloat16()}, r"has the shape \(5, 32\)"),
    "type": ({NAME: torch.ones(48, 32).half()}, "in torch.float16, and the tensor"),
    "gone": ({}, r"holds \[\], expected"),
    "no indices": ({VALUES: torch.ones(3)}, r"holds \['.*values'\], expected"),
    "no values": ({INDICES: torch.arange(3)}, r"holds \['.*indices'\], expected"),
    "both forms": (
        {NAME: torch.ones(48, 32), INDICES: torch.arange(3), VALUES: torch.ones(3)},
        "expected",
    ),
    "more": (
        {NAME: torch.ones(48, 32).bfloat16(), "zz": torch.ones(1)},
        "zz is of none of changed_params",
    ),
    "one value": (
        {INDICES: torch.arange(3), VALUES: torch.ones(1).bfloat16()},
        r"values has the shape \(1,\), its indices \(3,\)",
    ),
    "fewer values": (
        {INDICES: torch.arange(3), VALUES: torch.ones(2).bfloat16()},
        r"values has the shape \(2,\), its indices \(3,\)",
    ),
}
#: Indices, and what is said.
POSITIONS = {
    "negative": (torch.tensor([-5, 1, 2]), "from -5 to 2"),
    "beyond": (torch.tensor([0, 1, 1536]), "from 0 to 1536, .* has 1536 entries"),
    "repeated": (torch.tensor([1, 1, 2]), "do not ascend"),
    "unordered": (torch.tensor([2, 1, 3]), "do not ascend"),
    "floats": (torch.tensor([0.0, 1.0, 2.0]), "is torch.float32 with 1"),
    "bools": (torch.tensor([True, False, True]), "is torch.bool with 1"),
    "a matrix": (torch.tensor([[0, 1, 2]]), "is torch.int64 with 2"),
}


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("how", [*DAMAGES, *POSITIONS])
def test_parts_that_are_not_as_they_were_written_are_told(how, digest, tmp_path):
    """With the digest of other parts or none, the tensor is named."""
    model = sparse_model(0.1)
    to_patch(model, tmp_path / "out")
    if how in DAMAGES:
        parts, said = DAMAGES[how]
    else:
        index, said = POSITIONS[how]
        parts = {INDICES: index, VALUES: torch.ones(index.shape).bfloat16()}
    header = {} if digest else {"digest": None}
    file = written(tmp_path, {INDICES: None, VALUES: None, **parts}, header)
    with pytest.raises(CheckpointMismatchError, match=said) as caught:
        patched(file, dict(llama().bfloat16().state_dict()))
    assert str(file) in str(caught.value) and "xport it again" in str(caught.value)
    assert how == "more" or NAME in str(caught.value)


def test_values_that_flipped_are_told_by_the_digest(tmp_path):
    model = sparse_model(0.1)
    to_patch(model, tmp_path / "out")
    state = dict(llama().bfloat16().state_dict())
    values = load_file(tmp_path / "out/a.safetensors")[VALUES]
    values[3] += 1
    file = written(tmp_path, {VALUES: values}, {})
    with pytest.raises(CheckpointMismatchError, match="not those of the digest"):
        patched(file, state)
    file = written(tmp_path, {}, {"digest": None, "own": None})
    found = patched(file, state)[NAME]
    assert torch.equal(found, model.materialize("a").get_parameter(NAME))


@pytest.mark.parametrize("value", ["5", "[[1]]", "[1]", '{"a": 1}', "null", "[" * 10**5])  # fmt: skip
@pytest.mark.parametrize("key", ["changed_params", "own", "tied"])
def test_headers_that_are_no_lists_of_texts_are_told(key, value, tmp_path):
    to_patch(sparse_model(0.1), tmp_path / "out")
    file = written(tmp_path, {}, {key: value})
    with pytest.raises(CheckpointMismatchError, match="is no patch .*xport it again"):
        patched(file, dict(llama().bfloat16().state_dict()))
