"""Adapters are read as PEFT reads them, and their faults are named."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, OpenClipLike, Payload, didi
from lora_families import (
    ATTENTION,
    TASKS,
    assert_close,
    change_tensors,
    clip,
    family,
    llama,
    llamas,
    pool_of,
    write_adapter,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, SiglipConfig, SiglipModel

from fusion_bench_didi.errors import (
    CheckpointMismatchError,
    ModelPoolError,
    NonFiniteError,
)
from fusion_bench_didi.task_vectors import lora_adapter
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource
from fusion_bench_didi.task_vectors.lora_adapter import AdapterSource, read_config
from fusion_bench_didi.task_vectors.sources import TensorInfo

# PEFT on what it saves beside the adapter, and on layouts that it corrects itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


QUERY = "model.layers.1.self_attn.q_proj.weight"


def change_config(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_pickled_adapter_is_read_weights_only(llamas, capsys):
    directory, models, pool = llamas
    file = directory / "svhn" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert_close(didi(pool, budget=1.4), models)

    torch.save({"weight": Payload()}, file.with_suffix(".bin"))
    with pytest.raises(CheckpointMismatchError, match="weights-only checkpoint"):
        didi(pool)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "LOHA"}, "has peft_type='LOHA', expected 'LORA'"),
        ({"use_dora": True}, "has no lora_magnitude_vector beside it"),
        ({"use_dora": 1}, "has use_dora=1, expected true or false"),
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"target_parameters": ["experts.up"]}, r"target_parameters=\['experts.up'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": 4}, r"lora_A.weight is \(3, 32\) and .*\(32, 3\), expected rank 4 of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_other_kinds_of_adapters(llamas, config, message, dry_run, monkeypatch):
    directory, _, pool = llamas
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    change_config(directory / "svhn", **config)
    with pytest.raises(CheckpointMismatchError, match="svhn: .*" + message) as caught:
        didi(pool, dry_run=dry_run)
    assert "merge_and_unload" in str(caught.value)
    assert "mnist" not in str(caught.value)


def test_fused_attention_is_refused(tmp_path):
    models = family(tmp_path, OpenClipLike, target_modules=["attn"])
    message = "svhn: .*lora_A.weight belongs to an nn.MultiheadAttention"
    with pytest.raises(CheckpointMismatchError, match=message):
        didi(pool_of(tmp_path, models[BASE]))


def test_halves_of_two_kinds_of_pair_are_none(tmp_path):
    models = family(tmp_path, llama, target_modules=["embed_tokens", "q_proj"])
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"

    def renamed(tensors):
        other = embedding.removesuffix("embedding_") + "B.weight"
        tensors[other] = tensors.pop(f"{embedding}B")

    change_tensors(tmp_path / "mnist", renamed)
    change_tensors(tmp_path / "svhn", lambda t: t.pop(f"{embedding}A"))
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(pool_of(tmp_path, models[BASE]))
    message = str(caught.value)
    assert "embed_tokens.lora_B.weight, " in message and "stand alone" in message
    assert f"svhn: {embedding}B stands alone" in message


def test_all_faults_of_all_adapters_come_in_one_error(llamas, monkeypatch):
    directory, models, pool = llamas
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    first = "base_model.model.model.layers.0.self_attn."

    def narrow(tensors):
        tensors[f"{first}q_proj.lora_A.weight"] = torch.ones(3, 16)
        tensors["base_model.model.model.extra"] = torch.ones(3)

    change_tensors(directory / "mnist", lambda t: t.pop(f"{first}v_proj.lora_B.weight"))
    change_tensors(directory / "svhn", narrow)
    change_config(directory / "eurosat", lora_bias=True)
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(pool)
    message = str(caught.value)
    assert f"mnist: {first}v_proj.lora_A.weight stands alone" in message
    name = "model.layers.0.self_attn.q_proj.weight"
    assert f"svhn: {name} is (32, 16), the base model has (32, 32)" in message
    assert "svhn: 1 tensors that the base model does not have" in message
    assert "eurosat: adapter_config.json has lora_bias=True" in message


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.clear(), "it holds no tensors"),
        (lambda t: t.update(prompt_embeddings=torch.ones(2, 32)), "prompt_embeddings"),
        (lambda t: renamed(t, ".default.weight"), "is of neither LoRA nor DoRA"),
        (lambda t: t.update({PAIR + "lora_A.two.weight": torch.ones(3, 32)}), "A.two"),
        (lambda t: t.update({PAIR + "lora_magnitude_vector": torch.ones(32)}), "magn"),
        (lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()}), "torch.int8"),
        (lambda t: t.update({n: v[:0].clone() for n, v in t.items()}), "expected rank"),
    ],
    ids=["none", "prompt", "names", "another", "magnitude", "whole numbers", "rank 0"],
)  # fmt: skip
def test_tensors_that_are_none_of_an_adapter(llamas, change, message):
    directory, _, pool = llamas
    change_tensors(directory / "svhn", change)
    with pytest.raises(CheckpointMismatchError, match=f"svhn: .*{message}"):
        didi(pool)


PAIR = "base_model.model.model.layers.0.self_attn.q_proj."


def renamed(tensors: dict, ending: str) -> None:
    """As in memory, where adapters have names."""
    for name in list(tensors):
        tensors[name.removesuffix(".weight") + ending] = tensors.pop(name)


def test_faulty_tensors_may_be_left_out(llamas):
    directory, models, pool = llamas
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    change_tensors(directory / "mnist", lambda t: t.pop(key))
    model = didi(pool, budget=1.4, exclude=["*layers.0.self_attn.v_proj*"])
    assert "model.layers.0.self_attn.v_proj.weight" not in model.touched


def test_adapter_of_another_model(llamas):
    directory, _, pool = llamas
    other = family(directory / "other", clip, target_modules=ATTENTION)
    pool._models["svhn"] = str(directory / "other" / "svhn")
    with pytest.raises(CheckpointMismatchError, match="svhn: 4 tensors that the base"):
        didi(pool)
    del other


def test_adapters_that_are_all_of_another_model(llamas):
    directory, _, pool = llamas
    family(directory / "other", clip, target_modules=ATTENTION)
    pool._models.update({task: str(directory / "other" / task) for task in TASKS})
    with pytest.raises(CheckpointMismatchError, match="no tensor is one") as caught:
        didi(pool)
    assert "merge_and_unload" in str(caught.value)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_adapter_that_is_not_finite(llamas, name):
    directory, _, pool = llamas

    def damage(tensors):
        key = f"base_model.model.model.layers.1.self_attn.q_proj.{name}.weight"
        tensors[key][1, 2] = float("nan")

    change_tensors(directory / "svhn", damage)
    tensor = "model.layers.1.self_attn.q_proj.weight"
    expected = rf"svhn: {tensor} \(1 entries of lora_A and lora_B\)"
    with pytest.raises(NonFiniteError, match=expected):
        didi(pool)


@pytest.mark.parametrize(
    "sizes", [(1e17, 1.0), (1.0, 1e18), (1e19, 1e19), (1e25, 1e25)]
)
@pytest.mark.parametrize("settings", [{}, {"budget": 0.3}, {"factor_dtype": "float32"}])
def test_adapter_beyond_what_can_be_calculated_is_named(llamas, sizes, settings):
    directory, _, pool = llamas
    change_tensors(directory / "svhn", lambda tensors: scale_query(tensors, *sizes))
    with pytest.raises(
        NonFiniteError, match=rf"svhn: {QUERY} \(a change of norm \d+e\+"
    ):
        didi(pool, **settings)


@pytest.mark.parametrize("sizes", [(1e20, 1e-20), (1e-30, 1e28), (1e-12, 1e12)])
def test_adapter_of_uneven_factors_is_its_product(llamas, sizes):
    """However its norm is shared out between the factors: what PEFT applies is finite."""
    directory, models, pool = llamas
    change_tensors(directory / "svhn", lambda tensors: scale_query(tensors, *sizes))
    ratio = torch.tensor(sizes[0] * sizes[1])
    change = models["svhn"].get_parameter(QUERY) - models[BASE].get_parameter(QUERY)
    for settings in ({}, {"budget": 0.3}, {"factor_dtype": "float32"}):
        built = didi(pool, **settings).materialize("svhn").get_parameter(QUERY)
        found = (built - models[BASE].get_parameter(QUERY)).detach()
        if not settings:
            assert (found - change * ratio).norm() < 0.03 * found.norm()
        assert found.isfinite().all()


@pytest.mark.parametrize("sizes", [(1e-35, 1e-35), (1e-44, 1.0), (0.0, 1e30)])
def test_adapter_of_less_than_any_weight_notices_is_the_base_model(llamas, sizes):
    directory, models, pool = llamas
    change_tensors(directory / "svhn", lambda tensors: scale_query(tensors, *sizes))
    for settings in ({}, {"budget": 0.3}, {"factor_dtype": "float32"}):
        model = didi(pool, **settings)
        built = model.materialize("svhn").get_parameter(QUERY)
        assert torch.allclose(built, models[BASE].get_parameter(QUERY), atol=1e-20)
        told = model.info["tensors"]["svhn"]
        named = QUERY in told["left as in the base model"]
        assert named or told["equal to the base model"] >= 1


def scale_query(tensors, a: float, b: float) -> None:
    """Set the sizes of the two factors of one weight."""
    for name, size in (("lora_A", a), ("lora_B", b)):
        key = f"base_model.model.{QUERY}".replace("weight", f"{name}.weight")
        tensors[key] = tensors[key] * size


def test_base_model_under_adapters_that_is_not_finite(llamas):
    directory, models, _ = llamas
    tensor = "model.layers.1.self_attn.q_proj.weight"
    with torch.no_grad():
        models[BASE].get_parameter(tensor)[0, 0] = float("inf")
    entries = {BASE: models[BASE], **{t: str(directory / t) for t in TASKS}}
    with pytest.raises(NonFiniteError, match=f"the base model _pretrained_: {tensor}"):
        didi(entries)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "config"])
def test_incomplete_adapter(llamas, missing):
    directory, _, pool = llamas
    if missing == "config":
        (directory / "svhn" / "adapter_config.json").write_text("{")
        expected = "svhn: .*adapter_config.json is not the configuration of an adapter"
    else:
        (directory / "svhn" / missing).unlink()
        expected = "svhn: .* has adapter_config.json but neither adapter_model.safe"
    with pytest.raises(CheckpointMismatchError, match=expected):
        didi(pool)


def test_damaged_adapter(llamas):
    directory, _, pool = llamas
    file = directory / "svhn" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointMismatchError, match="not a whole safetensors file"):
        didi(pool)


@pytest.mark.parametrize("dry_run", [True, False])
def test_base_model_must_not_be_an_adapter(llamas, dry_run):
    directory, _, pool = llamas
    pool._models[BASE] = str(directory / "mnist")
    with pytest.raises(ModelPoolError, match="'_pretrained_' is an adapter: .*mnist"):
        didi(pool, dry_run=dry_run)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, None])
@pytest.mark.parametrize("shape", [(32, 32), (512, 1)], ids=["as it is", "packed"])
def test_a_base_model_of_whole_numbers_takes_no_change(llamas, dtype, shape):
    base = {QUERY: TensorInfo(shape, dtype)}
    source = AdapterSource.of_directory(llamas[0] / "svhn", "svhn", base)
    assert "expected floating point" in source.faults[QUERY]
    assert QUERY not in source.infos()


@pytest.mark.parametrize("kind", ["original_module", "base_layer", "base_layer in few bits"])  # fmt: skip
def test_values_of_the_base_model_in_an_adapter_are_told_of(llamas, kind):
    """PEFT runs nothing of the former; the latter is compared."""
    directory, models, pool = llamas
    key, value = "base_model.model.lm_head.original_module.weight", torch.ones(40, 32)
    if kind != "original_module":
        name = "model.layers.0.self_attn.q_proj.weight"
        key, value = f"{PAIR}base_layer.weight", models[BASE].get_parameter(name).data
        value = value.bfloat16() if "few" in kind else value
    change_tensors(directory / "svhn", lambda tensors: tensors.update({key: value}))
    model = didi(pool, budget=4.0)
    told = model.info["tensors"]["svhn"]["not taken from the checkpoint"]
    assert "base model's value beside" in told[key]
    assert_close(model, models)


def test_a_value_beside_a_pair_that_is_not_the_base_models_is_taken(tmp_path):
    """PEFT saves it with embeddings, and loads it again; it was left out, whatever it said."""
    models = family(tmp_path, llama, ("a",), target_modules=ATTENTION)
    other = copy.deepcopy(models[BASE])
    with torch.no_grad():  # rows in reserve, as of new special tokens
        other.get_input_embeddings().weight[36:] += 1.0
    targets = ["embed_tokens", "q_proj"]
    models["b"] = write_adapter(other, tmp_path / "b", 5, target_modules=targets)
    found = PeftModel.from_pretrained(copy.deepcopy(models[BASE]), tmp_path / "b")
    model = didi(pool_of(tmp_path, models[BASE], ("a", "b")), budget=50)
    assert_close(model, {**models, "b": found.merge_and_unload()})
    assert_close(model, models)


@pytest.mark.parametrize(
    "missing, told",
    [
        ("lm_head", "it holds no tensor of lm_head, expected it by modules_to_save"),
        ("lora_", "it holds no lora_A and lora_B, expected those of target_modules"),
    ],
)
def test_an_adapter_that_lacks_what_its_configuration_names_is_refused(
    tmp_path, missing, told
):
    """PEFT does not load it, or leaves the base model as it is."""
    config = {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "score"]}
    models = family(tmp_path, llama, **config)

    def forget(tensors: dict) -> None:
        for key in [key for key in tensors if missing in key]:
            del tensors[key]

    change_tensors(tmp_path / "svhn", forget)
    with pytest.raises(CheckpointMismatchError, match=f"svhn: {told}"):
        didi(pool_of(tmp_path, models[BASE]))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": r".*v_proj"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r"model\.layers\..*q_proj"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_pairs_that_the_configuration_leaves_out_are_refused(llamas, config):
    """So does PEFT leave them out."""
    directory, _, pool = llamas
    change_config(directory / "svhn", **config)
    with pytest.raises(CheckpointMismatchError, match="svhn: .*of a module that adapter_config.json leaves out") as caught:  # fmt: skip
        didi(pool)
    assert "mnist" not in str(caught.value)
    name = "*layers.1*" if "layers_to_transform" in config else "*q_proj*"
    assert didi(pool, exclude=[name]).tasks == list(TASKS)


def places() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, max_position_embeddings=16))  # fmt: skip


def test_factors_of_a_layer_that_peft_runs_otherwise_are_refused(tmp_path):
    """Positions of OPT are counted from 2, and those of PEFT's factors from 0."""
    models = family(tmp_path, places, target_modules=["embed_positions"])
    with pytest.raises(CheckpointMismatchError, match="a OPTLearnedPositionalEmbedding, which PEFT takes for a plain Emb"):  # fmt: skip
        didi(pool_of(tmp_path, models[BASE]))


def towers(width: int) -> nn.Module:
    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "vocab_size": 40, "max_position_embeddings": 8}
    image = {"hidden_size": width, "image_size": 8, "patch_size": 4}
    return SiglipModel(SiglipConfig(text_config={**sizes, **text, "projection_size": width}, vision_config={**sizes, **image}))  # fmt: skip


@pytest.mark.parametrize("width", [16, 24])
def test_an_adapter_of_one_of_two_towers_goes_where_it_fits_or_is_refused(tmp_path, width):  # fmt: skip
    """It went into the first of two that are alike, which was another than it was trained on."""
    models = {BASE: towers(width).eval()}
    for seed, task in enumerate(TASKS):
        models[task] = copy.deepcopy(models[BASE])
        place, tower = tmp_path / task, models[BASE].vision_model
        models[task].vision_model = write_adapter(tower, place, seed, target_modules=ATTENTION)  # fmt: skip
    models[BASE].save_pretrained(tmp_path / BASE)
    kind = {"_target_": "transformers.SiglipModel.from_pretrained"}
    pool = BaseModelPool({name: {**kind, "pretrained_model_name_or_path": str(tmp_path / name)} for name in models})  # fmt: skip
    if width == 16:
        with pytest.raises(CheckpointMismatchError, match=r"mnist: its tensors fit text_model\..* and vision_model\..* alike"):  # fmt: skip
            didi(pool)
    else:
        assert_close(didi(pool, budget=50), models)


@pytest.mark.parametrize("more, dtype", [(1, torch.float32), (0, torch.float16)])
def test_two_values_of_one_tensor_in_an_adapter_are_refused(llamas, more, dtype):
    directory, _, pool = llamas
    head, value = "base_model.model.lm_head.", torch.ones(40, 32)
    both = {"weight": value, "modules_to_save.weight": (value + more).to(dtype)}
    both = {f"{head}{name}": value for name, value in both.items()}
    change_tensors(directory / "svhn", lambda tensors: tensors.update(both))
    with pytest.raises(CheckpointMismatchError, match="svhn: .*are both lm_head.weig"):
        didi(pool)


@pytest.mark.parametrize("name", ["org/other", "elsewhere/other/", "/x/other", "", BASE, f"org/{BASE}", None, 3])  # fmt: skip
def test_adapters_that_name_another_base_model_are_told_of(llamas, name, caplog):
    directory, _, pool = llamas
    change_config(directory / "svhn", base_model_name_or_path=name)
    didi(pool, budget=1.4)
    told = [r for r in caplog.messages if "trained on another" in r]
    assert len(told) == ("other" in str(name))
    assert all(f"added to {directory / BASE}" in r for r in told)
    assert all(f"svhn on {name}" in r and str(directory / BASE) in r for r in told)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_prompts_are_no_changes_of_weights(llamas, kind):
    """There is nothing to put into the base model."""
    directory, _, pool = llamas
    change_config(directory / "svhn", peft_type=kind)
    message = (
        f"svhn: .*'{kind}', which learns inputs and changes no weight.*leave it out"
    )
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        didi(pool)
    assert "An adapter that changes weights" in str(caught.value)


def test_a_configuration_that_changes_as_it_is_read_is_refused(llamas, monkeypatch):
    directory, _, _ = llamas
    file = directory / "svhn" / "adapter_config.json"

    def read_and_change(*place):
        found = read_config(*place)
        os.utime(file, ns=(1, 1))
        return found

    monkeypatch.setattr(lora_adapter, "read_config", read_and_change)
    source = AdapterSource.of_directory(directory / "svhn", "svhn", {})
    with pytest.raises(CheckpointMismatchError, match="adapter_config.*changed while"):
        source.check()
