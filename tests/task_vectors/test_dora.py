"""Adapters with DoRA are what PEFT makes of them, read by value, and their faults are named."""

import copy
from pathlib import Path

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from helpers import BASE, didi
from lora_families import (
    ATTENTION,
    TASKS,
    assert_close,
    change_tensors,
    family,
    llama,
    pool_of,
    write_adapter,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusion_bench_didi.errors import CheckpointMismatchError, NonFiniteError
from fusion_bench_didi.pools.merged_adapters import adapted
from fusion_bench_didi.pools.opening import open_pool
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource
from fusion_bench_didi.task_vectors.layers import fan_in_first
from fusion_bench_didi.task_vectors.lora_adapter import AdapterSource
from fusion_bench_didi.task_vectors.sources import ModuleSource

# PEFT on what it saves beside the adapter, and on layouts that it corrects itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

DORA = {"target_modules": ATTENTION, "use_dora": True}
QUERY = "model.layers.0.self_attn.q_proj."
MAGNITUDE = f"base_model.model.{QUERY}lora_magnitude_vector"


class Layers(nn.Module):
    """One module of every kind that PEFT has DoRA for."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.turned, self.square = Conv1D(7, 5), Conv1D(6, 6)
        self.rows = nn.Embedding(11, 6)
        self.line = nn.Conv1d(4, 6, 3)
        self.plane, self.point = nn.Conv2d(4, 6, (3, 2)), nn.Conv2d(4, 6, 1)
        self.space = nn.Conv3d(4, 6, (1, 2, 2))


#: Where PEFT has settings by module, of a DoRA adapter of all of them.
SETTINGS = {
    "plain": {},
    "patterns and root": {
        "use_rslora": True,
        "rank_pattern": {"linear": 2, "plane|rows": 4},
        "alpha_pattern": {"turned": 9, "space": 5},
    },
}


@pytest.fixture
def doras(tmp_path):
    """Adapters with DoRA that a test may damage."""
    models = family(tmp_path, llama, **DORA)
    return tmp_path, models, pool_of(tmp_path, models[BASE])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_kind_of_module_gets_the_norms_that_peft_gives_it(
    tmp_path, settings, dtype
):
    base = Layers().to(dtype)
    targets = [name for name, _ in base.named_children()]
    config = {"target_modules": targets, "use_dora": True, **settings}
    merged = write_adapter(base, tmp_path, 1, **config)
    source = opened(tmp_path, base)
    assert not source.faults
    assert {*source.infos()} == {f"{name}.weight" for name in targets}
    for name, info in source.infos().items():
        value, expected = base.get_parameter(name).detach(), merged.get_parameter(name)
        assert source.rank(name) is None
        assert info.shape == expected.shape and info.dtype == dtype
        for found in (source.read(name), source.applied(name, value)):
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, msg=name)
        other = source.applied(name, -value)
        assert not torch.allclose(other, expected), "of the base model that is given"


def opened(directory: Path, base: nn.Module) -> AdapterSource:
    source = ModuleSource(base, BASE)
    turned = fan_in_first(base)
    return AdapterSource.of_directory(directory, "task", source.infos(), fan_in_first=turned, values=source.read)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_of_these_adapters_are_those_of_peft(tmp_path, dtype):
    models = family(tmp_path, lambda: llama().to(dtype), **DORA)
    entries = {BASE: models[BASE], **{t: str(tmp_path / t) for t in TASKS}}
    pool = adapted(BaseModelPool(entries))
    for task in TASKS:
        found = pool.load_model(task).state_dict()
        for name, value in models[task].state_dict().items():
            torch.testing.assert_close(found[name], value)


def test_adapters_of_both_kinds_and_checkpoints_in_one_pool(tmp_path):
    models = family(tmp_path, llama, **DORA)
    plain = {"target_modules": ATTENTION}
    models["svhn"] = write_adapter(models[BASE], tmp_path / "svhn", 7, **plain)
    models["eurosat"].save_pretrained(tmp_path / "whole")
    entries = {name: str(tmp_path / name) for name in (BASE, *TASKS)}
    entries["eurosat"] = str(tmp_path / "whole")
    pool = CausalLMPool(entries, tokenizer=None)
    vectors = open_pool(pool, pool.load_pretrained_model())
    assert vectors.ranks(f"{QUERY}weight") == [None, 3, None]
    for choice in ({}, {"residual": "full"}, {"refinement": "adam"}):
        assert_close(didi(pool, budget=float("inf"), **choice), models)
    choice = {"budget": 0.1, "refinement": "none"}
    one, two = didi(pool, **choice), didi(models, **choice)
    assert one.storage.as_dict() == two.storage.as_dict()
    assert one.info["relative_error"] == pytest.approx(two.info["relative_error"], rel=1e-4)  # fmt: skip


def test_a_matrix_can_be_kept_as_each_task_has_it(doras):
    _, wholes, pool = doras
    model = didi(pool, own=["*q_proj*"], budget=4.0)
    assert_close(model, wholes, names=[f"{QUERY}weight"])


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("ties", [True, False])
def test_tied_tensors_get_norms_of_their_own_at_either_end(tmp_path, targets, ties):
    """Merging, PEFT puts both into one tensor; what it runs is two."""
    config = llama().config
    config.tie_word_embeddings = True
    base = type(llama())(config).eval()
    base.save_pretrained(tmp_path / BASE)
    adapter = LoraConfig(
        r=2,
        target_modules=targets,
        use_dora=True,
        ensure_weight_tying=ties,
        init_lora_weights=False,
    )
    model = get_peft_model(copy.deepcopy(base), adapter).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value *= 1 + torch.rand_like(value)
        model.save_pretrained(tmp_path / "mnist")
        tokens = torch.arange(10)[None]
        found = adapted(pool_of(tmp_path, base, ("mnist",))).load_model("mnist")
        right = model(tokens).logits
        assert (found(tokens).logits - right).norm() < 1e-5 * right.norm()


def test_both_spellings_of_the_magnitude_are_read_as_peft_reads_them(doras):
    directory, models, pool = doras
    for task in TASKS:
        change_tensors(directory / task, spelled_out)
    assert all(
        not key.endswith("vector")
        for key in load_file(directory / "svhn" / "adapter_model.safetensors")
    )
    assert_close(didi(pool, budget=float("inf")), models)


def spelled_out(tensors: dict) -> None:
    for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
        tensors[f"{key}.weight"] = tensors.pop(key)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(MAGNITUDE), f"{QUERY}lora_B.weight has no lora_magnitude_vec"),
        (
            lambda t: t.update({MAGNITUDE: torch.ones(31)}),
            r"magnitude_vector is \(31,\) in torch.float32, expected \(32,\) in floating",
        ),
        (
            lambda t: t.update({MAGNITUDE: t[MAGNITUDE][None].clone()}),
            r"magnitude_vector is \(1, 32\) in",
        ),
        (
            lambda t: t.update({MAGNITUDE: torch.ones(32, dtype=torch.int8)}),
            "magnitude_vector is .* in torch.int8",
        ),
        (
            lambda t: t.update({f"{MAGNITUDE}.weight": t[MAGNITUDE].clone()}),
            "magnitude_vector and .*.weight are both lora_magnitude_vector, expected one",
        ),
        (
            lambda t: t.update({f"{MAGNITUDE}.default": t.pop(MAGNITUDE)}),
            "magnitude_vector.default is of neither LoRA nor DoRA",
        ),
        (
            lambda t: [t.pop(k) for k in [*t] if QUERY in k and "magnitude" not in k],
            "magnitude_vector stands alone",
        ),
    ],
    ids=["none", "size", "shape", "whole numbers", "two", "name", "no pair"],
)
def test_faults_of_magnitudes_are_named_before_anything_is_read(
    doras, change, message, monkeypatch
):
    directory, _, pool = doras
    change_tensors(directory / "svhn", change)
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    with pytest.raises(CheckpointMismatchError, match=f"svhn: .*{message}") as caught:
        didi(pool, dry_run=True)
    assert "mnist" not in str(caught.value)


def test_magnitudes_without_the_setting_are_a_fault(tmp_path):
    models = family(tmp_path, llama, target_modules=ATTENTION)
    change_tensors(tmp_path / "svhn", lambda t: t.update({MAGNITUDE: torch.ones(32)}))
    with pytest.raises(CheckpointMismatchError, match=f"svhn: {MAGNITUDE} .* use_dora"):
        didi(pool_of(tmp_path, models[BASE]))


def test_without_values_of_the_base_model_it_is_a_fault(doras):
    base = ModuleSource(doras[1][BASE], BASE)
    source = AdapterSource.of_directory(doras[0] / "svhn", "svhn", base.infos())
    assert "expected a base model whose values are read" in source.faults[f"{QUERY}weight"]  # fmt: skip
    assert not source.infos()


def test_headers_are_enough_for_a_plan(doras, monkeypatch, capsys):
    _, _, pool = doras
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    assert didi(pool, budget=1.4, dry_run=True) is None
    plan = capsys.readouterr().out
    assert "layers.*.self_attn.q_proj" in plan and "mlp" not in plan


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_magnitudes_that_are_not_finite_are_named(doras, value):
    directory, _, pool = doras
    change_tensors(directory / "svhn", lambda t: t[MAGNITUDE][:1].fill_(value))
    with pytest.raises(NonFiniteError, match=f"svhn: {QUERY}weight"):
        didi(pool)


def test_rows_of_nothing_have_no_direction(doras):
    """PEFT divides by zero there, too."""
    directory, models, _ = doras
    with torch.no_grad():
        models[BASE].get_parameter(f"{QUERY}weight")[0] = 0
    change_tensors(
        directory / "svhn",
        lambda t: t[MAGNITUDE.replace("magnitude_vector", "B.weight")][0].zero_(),
    )
    entries = {BASE: models[BASE], **{t: str(directory / t) for t in TASKS}}
    with pytest.raises(NonFiniteError, match=f"svhn: {QUERY}weight"):
        didi(entries)


def test_a_merge_that_goes_on_is_of_the_same_base_model_and_adapter(doras):
    """What these tensors are follows from the base model's values."""
    directory, models, pool = doras
    identity = open_pool(pool, copy.deepcopy(models[BASE])).identity
    assert open_pool(pool, copy.deepcopy(models[BASE])).identity == identity
    other = copy.deepcopy(models[BASE])
    with torch.no_grad():
        other.get_parameter(f"{QUERY}weight")[0, 0] += 1
    assert open_pool(pool, other).identity != identity
    before = opened(directory / "svhn", models[BASE]).identity
    change_tensors(directory / "svhn", spelled_out)
    assert opened(directory / "svhn", models[BASE]).identity != before
