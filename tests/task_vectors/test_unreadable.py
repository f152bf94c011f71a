"""Tensors whose values cannot be read, kept or written are named in an error; what is no tensor of the model, in the account."""

import io
import math

import pytest
import torch
from exact_models import llama, seeded
from fusion_bench.modelpool import CausalLMPool
from helpers import BASE, didi, fine_tuned
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_bench_didi.errors import (
    CheckpointMismatchError,
    NonFiniteError,
    SettingsError,
)
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.task_vectors.file_sources import PickleSource


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.register_buffer("extra", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Stateful(Net):
    state: object = {"version": 1}

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def models(make=Net) -> dict[str, nn.Module]:
    base = seeded(make)
    return {BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}


def test_sparse_buffers():
    pool = models()
    pool["b"].extra = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointMismatchError, match="b: extra is of layout.*sparse"):
        didi(pool)
    assert didi(pool, exclude=["extra"]).tasks == ["a", "b"]


@pytest.mark.parametrize("whose", ["a", BASE])
def test_sparse_buffers_that_are_left_out_are_in_no_checksum(tmp_path, whose):
    pool = models()
    pool[whose].extra = torch.eye(3).to_sparse()
    didi(pool, exclude=["extra"], output_dir=str(tmp_path / "out"))
    assert DiDiModel.from_pretrained(tmp_path / "out", pool[BASE]).tasks == ["a", "b"]


@pytest.mark.parametrize(
    "state",
    [{"version": 2}, torch.ones(2), {"version": torch.ones(2)}, [{"version": 1}]],
    ids=["plain", "tensor", "within", "list"],
)
def test_state_that_is_no_tensor(state):
    pool = models(Stateful)
    assert didi(pool).tasks == ["a", "b"]
    with pytest.raises(SettingsError, match="own: no tensor matches '_extra_state'"):
        didi(pool, own=["_extra_state"])
    pool["a"].state = state
    with pytest.raises(CheckpointMismatchError, match="a: _extra_state is another"):
        didi(pool)
    merged = didi(pool, exclude=["_extra_state"])
    assert merged.materialize("a").get_extra_state() == {"version": 1}


@pytest.mark.parametrize(
    "state",
    [
        lambda: torch.arange(3),
        lambda: {"scale": torch.ones(2), "history": [torch.zeros(3), "amax"]},
        lambda: dict(sorted({"b": 1, "a": (2, None)}.items())),
        lambda: io.BytesIO(b"as of an engine"),
    ],
    ids=["tensor", "tensors within", "order", "bytes"],
)
def test_equal_states_are_equal_wherever_they_lie(state):
    pool = models(Stateful)
    kept = []  # so that none takes the place of another
    for model in pool.values():
        model.state = state()
        kept += [model.state, torch.ones(64)]
    assert didi(pool).tasks == ["a", "b"]


def test_types_that_files_do_not_hold():
    pool = models()
    for name, model in pool.items():
        model.extra = torch.full((3,), complex(len(name)), dtype=torch.complex128)
    with pytest.raises(CheckpointMismatchError, match="extra is of torch.complex128"):
        didi(pool)
    for model in pool.values():
        model.extra = torch.ones(3, dtype=torch.complex128)
    assert didi(pool).tasks == ["a", "b"]


@pytest.mark.parametrize("value", [1 + 2j, math.nan])
def test_complex_buffers_are_kept_or_not_finite(value, tmp_path):
    pool = models()
    for model in pool.values():
        model.extra = torch.zeros(3, dtype=torch.complex64)
    pool["a"].extra[1] = value
    if math.isnan(abs(value)):
        with pytest.raises(NonFiniteError, match=r"a: extra \(1 entries\)"):
            didi(pool)
    else:
        didi(pool).save_pretrained(tmp_path / "merged")
        assert didi(pool).materialize("a").extra.equal(pool["a"].extra)


@pytest.mark.parametrize("part", ["conjugate", "negative"])
@pytest.mark.parametrize("names", [(BASE, "a", "b"), (BASE,), ("a",)])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_views_as_conjugate_or_negative_are_their_values(part, names, kind, tmp_path):
    pool = models()
    for seed, (name, model) in enumerate(pool.items()):
        g = torch.Generator().manual_seed(seed)
        value = torch.randn(2, 3, 4, dtype=torch.complex64, generator=g).conj()
        value = value if part == "conjugate" else value.imag
        value = value if name in names else value.clone().resolve_conj().resolve_neg()
        assert (value.is_conj() or value.is_neg()) == (name in names)
        if kind == "buffer":
            model.extra = value
        else:
            model.more = nn.Parameter(value)
    want = pool["a"].state_dict()
    merged = didi(pool, budget=1e6)
    merged.save_pretrained(tmp_path / "merged")
    loaded = DiDiModel.from_pretrained(tmp_path / "merged", backbone=pool[BASE])
    for model in (merged, loaded):
        found = model.materialize("a").state_dict()
        for name, value in want.items():
            torch.testing.assert_close(found[name], value)


def test_such_views_in_pickles_are_their_values(tmp_path):
    one, other = (torch.randn(3, dtype=torch.complex64).conj() for _ in range(2))
    torch.save({"one": one, "other": other.imag}, tmp_path / "c.bin")
    source = PickleSource([tmp_path / "c.bin"], "a")
    found = source.read("one"), source.read("other")
    assert found[0].equal(one) and found[1].equal(other.imag)
    assert not (found[0].is_conj() or found[1].is_neg())


def test_a_base_model_in_float8_cannot_hold_merged_values():
    pool = models()
    weight = pool[BASE].body.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointMismatchError, match="body.weight in torch.float8"):
        didi(pool)


def test_live_fine_tuned_models_in_float8():
    pool = models()
    value = pool["a"].body.weight.detach().to(torch.float8_e5m2)
    pool["a"].body.weight = nn.Parameter(value, requires_grad=False)
    found = didi(pool, budget=1e9).materialize("a").body.weight
    torch.testing.assert_close(found, value.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("rows", [3, 2**21, 10**12])
def test_a_pickle_whose_values_stand_for_many_entries(tmp_path, rows):
    """A kilobyte, which took gigabytes where it was merged."""
    file, wide = tmp_path / "model.bin", torch.ones(2, 1)[:1].expand(rows, 4)
    torch.save({"weight": torch.zeros(2, 3)[:1].T, "head.weight": wide}, file)
    if rows == 3:
        assert PickleSource([file], "svhn").read("head.weight").equal(torch.ones(3, 4))
        return
    with pytest.raises(CheckpointMismatchError, match="holds fewer values of .'head.weight'. than"):  # fmt: skip
        PickleSource([file], "svhn")


def test_tensors_within_other_values_of_a_pickle(tmp_path):
    base = llama()
    entries = {}
    for name, model in {BASE: base, "a": fine_tuned(base, 1), "b": base}.items():
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        state = {**model.state_dict(), "optimizer": {"m": [torch.ones(2)]}, "step": 3}
        torch.save(state, tmp_path / name / "pytorch_model.bin")
        entries[name] = str(tmp_path / name)
    merged = didi(CausalLMPool(entries, tokenizer=None))
    unused = merged.info["tensors"]["a"]["not taken from the checkpoint"]
    assert unused == {"optimizer": "beside the state dict's tensors"}


@pytest.fixture
def saved(tmp_path):
    """A pool of directories whose base model is written anew under other names."""
    base = llama()
    for name, model in {BASE: base, "a": fine_tuned(base, 1), "b": base}.items():
        model.save_pretrained(tmp_path / name)

    file = tmp_path / BASE / "model.safetensors"
    state = load_file(file)

    def pool(change):
        save_file(change(state), file, {"format": "pt"})
        places = {name: str(tmp_path / name) for name in (BASE, "a", "b")}
        return CausalLMPool(places, tokenizer=None)

    return pool


def test_what_the_base_models_class_does_not_load_is_in_the_account(saved, tmp_path):
    merged = didi(saved(lambda state: {**state, "foo.weight": torch.ones(3)}))
    told = {"foo.weight": "not loaded by the base model"}
    assert merged.info["unused_of_base"] == told
    merged.save_pretrained(tmp_path / "m")
    loaded = DiDiModel.from_pretrained(tmp_path / "m", backbone=None)
    assert loaded.info["unused_of_base"] == told
    assert "unused_of_base" not in didi(saved(lambda state: state)).info


NORM = "model.norm.weight"


@pytest.mark.parametrize("other", ["model\u2024norm.weight", "model.norm.weigth", "Model.norm.weight"])  # fmt: skip
def test_a_name_nearly_as_meant_in_the_base_model_is_told(saved, other, caplog):
    def renamed(state):
        return {other if name == NORM else name: v for name, v in state.items()}

    merged = didi(saved(renamed))
    assert NORM in merged.info["tensors"]["a"]["kept as the task has them"]
    (line,) = [m for m in caplog.messages if NORM in m and repr(other) in m]
    assert "no LlamaForCausalLM loads" in line


def test_a_head_that_the_base_model_lacks_is_nothing_to_tell_of(saved, caplog):
    didi(saved(lambda state: {k: v for k, v in state.items() if k != NORM}))
    didi(saved(lambda state: {**state, "cls.predictions.bias": torch.ones(3)}))
    assert not [m for m in caplog.messages if "loads" in m]
