"""Patches: thirty lines that know nothing of this package apply them."""

import json

import pytest
import torch
from exact_models import gpt2, llama, qwen, t5
from helpers import didi, family
from safetensors import safe_open

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
    monkeypatch.setattr(patch, "digests", lambda t: looked.append(t) or digests(t))
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
