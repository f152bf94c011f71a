"""Files that name or hold tensors otherwise than their models do: read as ``from_pretrained`` reads them, or named in an error."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
import transformers
from exact_models import seeded
from fusion_bench.modelpool import BaseModelPool
from helpers import TRANSFORMERS, didi
from safetensors.torch import load_file, save_file
from saved_checkpoints import (
    LLAMA,
    as_pickle,
    assert_exact,
    change_file,
    gpt2,
    llama,
    pool_of,
    saved,
    tuned,
)
from torch import nn

from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.pools.opening import load_backbone, open_pool
from fusion_bench_didi.task_vectors.file_sources import E8M0

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TEXT = {**LLAMA, "head_dim": 8}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
#: Multimodal models by what their configurations want.
MULTIMODAL: dict[str, dict] = {
    "Gemma3": {"mm_tokens_per_image": 4, "image_token_index": 63},
    "PaliGemma": {"projection_dim": 16, "image_token_index": 63},
    "LlavaNext": {"vision_feature_layer": -1},
}
PARTS = {
    "Gemma3": ("siglip_vision_model", "gemma3_text"),
    "PaliGemma": ("siglip_vision_model", "gemma"),
    "LlavaNext": ("clip_vision_model", "llama"),
}


def multimodal(name: str) -> nn.Module:
    images, text = PARTS[name]
    parts = {
        "vision_config": {**IMAGES, "model_type": images},
        "text_config": {**TEXT, "model_type": text},
    }
    config = getattr(transformers, f"{name}Config")(**parts, **MULTIMODAL[name])
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    return seeded(lambda: kind(config))


def family(place, base: nn.Module) -> dict[str, nn.Module]:
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    saved(place, models)
    return models


# --- names --------------------------------------------------------------------


@pytest.mark.parametrize("name", MULTIMODAL)
def test_language_towers_of_multimodal_models_are_merged(tmp_path, name):
    base = multimodal(name)
    family(tmp_path, base)
    in_file = set(load_file(tmp_path / "a" / "model.safetensors"))
    assert TRANSFORMERS >= 5 or not in_file <= set(base.state_dict())
    kind = type(base)
    if name == "Gemma3":
        kind = transformers.AutoModelForImageTextToText
    assert_exact(pool_of(tmp_path, kind))


def bare(tensors: dict) -> dict:
    """As the first GPT-2 was published."""
    mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    return {n.removeprefix("transformer."): v for n, v in tensors.items()} | mask


def by_other_names(tensors: dict) -> dict:
    """One matrix under each of its names but the first."""
    rest = dict(tensors)
    rows = rest.pop("shared.weight")
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return {**rest, **{name: rows.clone() for name in (*names, "lm_head.weight")}}


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    config = transformers.T5Config(**sizes, vocab_size=30)
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def masked() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16, vocab_size=30)
    return seeded(lambda: transformers.BertForMaskedLM(config))


def whole_decoder(tensors: dict) -> dict:
    """A head in full, though it is tied."""
    rows, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    head = {"weight": tensors[rows].clone(), "bias": tensors[bias].clone()}
    named = {f"cls.predictions.decoder.{n}": v for n, v in head.items()}
    return {**tensors, **named}


@pytest.mark.parametrize(
    ("make", "change"),
    [(gpt2, bare), (t5, by_other_names), (masked, whole_decoder)],
    ids=["no prefix", "other names of one", "tied head in full"],
)
@pytest.mark.parametrize("where", ["a", "base"])
def test_names_that_other_versions_wrote(tmp_path, make, change, where):
    base = make()
    family(tmp_path, base)
    change_file(tmp_path / where, change)
    assert_exact(pool_of(tmp_path, type(base)))


# --- numbers ------------------------------------------------------------------


def quantized(**forms: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Weights of layers in forms by what follows the layer's name."""

    def change(tensors: dict) -> dict:
        out = {}
        for name, value in tensors.items():
            if not name.endswith("_proj.weight"):
                out[name] = value
                continue
            stem = name.removesuffix("weight")
            out.update({stem + end: form(value) for end, form in forms.items()})
        return out

    return change


QUANTIZED = {
    "8 bits, scale per row": quantized(
        weight=lambda v: (100 * v).to(torch.int8), SCB=lambda v: torch.ones(len(v))
    ),
    "4 bits, packed": quantized(
        weight=lambda v: torch.zeros(v.numel() // 2, 1, dtype=torch.uint8),
        **{"weight.absmax": lambda v: torch.ones(4)},
    ),
    "compressed": quantized(
        weight_packed=lambda v: torch.ones(2, 2, dtype=torch.int32),
        weight_scale=lambda v: torch.ones(len(v), 1),
    ),
    "float8, scale of an unknown name": quantized(
        weight=lambda v: v.to(torch.float8_e4m3fn),
        scale_weight=lambda v: torch.ones(()),
    ),
    "float8, exponents as whole numbers": quantized(
        weight=lambda v: v.to(torch.float8_e4m3fn),
        weight_scale=lambda v: torch.full((len(v), 1), 127, dtype=torch.uint8),
    ),
    "whole numbers": quantized(weight=lambda v: (10 * v).to(torch.int8)),
}


@pytest.mark.parametrize("form", QUANTIZED)
def test_numbers_that_stand_for_others_are_refused(tmp_path, form):
    family(tmp_path, llama(False))
    change_file(tmp_path / "a", QUANTIZED[form])
    with pytest.raises(CheckpointMismatchError, match="a: .*_proj"):
        didi(pool_of(tmp_path, transformers.LlamaForCausalLM))


def told(place, **config) -> None:
    """Write into a model's configuration how it is quantized."""
    file = place / "config.json"
    content = json.loads(file.read_text()) | {"quantization_config": config}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "config, method",
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_base_model_that_is_quantized_is_refused_before_it_is_loaded(
    tmp_path, config, method, dry_run
):
    family(tmp_path, llama(False))
    told(tmp_path / "base", **config)
    with pytest.raises(CheckpointMismatchError, match=f"config.json says .*quantized by {method}, .*Give "):  # fmt: skip
        didi(pool_of(tmp_path, transformers.LlamaForCausalLM), dry_run=dry_run)


@pytest.mark.parametrize("config", [{}, {"load_in_8bit": False, "load_in_4bit": False}])
def test_a_base_model_of_whose_numbers_bitsandbytes_quantizes_none_is_merged(
    tmp_path, config
):
    family(tmp_path, llama(False))
    told(tmp_path / "base", quant_method="bitsandbytes", **config)
    assert_exact(pool_of(tmp_path, transformers.LlamaForCausalLM))


PACKED = {
    "GPTQ": quantized(
        qweight=lambda v: torch.ones(2, 16, dtype=torch.int32),
        scales=lambda v: torch.ones(1, 16),
    ),
    "compressed": QUANTIZED["compressed"],
    "quanto": quantized(
        **{
            "weight._data": lambda v: v.to(torch.int8),
            "weight._scale": lambda v: torch.ones(len(v), 1),
        }
    ),
    "quanto, float8": quantized(
        **{
            "weight._data": lambda v: v.to(torch.float8_e4m3fn),
            "weight._scale": lambda v: torch.ones(len(v), 1),
        }
    ),
    "hqq": quantized(
        W_q=lambda v: torch.ones(8, 16, dtype=torch.uint8),
        scale=lambda v: torch.ones(8, 1),
    ),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("form", PACKED)
def test_weights_that_no_checkpoint_holds_but_packed_are_refused(
    tmp_path, form, dry_run
):
    """No configuration says so."""
    family(tmp_path, llama(False))
    for name in ("base", "a", "b"):
        change_file(tmp_path / name, PACKED[form])
    with pytest.raises(CheckpointMismatchError, match=r"_pretrained_: .*_proj.weight.*and \d+ more are in no checkpoint, .*holds .*_proj"):  # fmt: skip
        didi(pool_of(tmp_path, transformers.LlamaForCausalLM), dry_run=dry_run)


def test_packed_weights_of_the_base_model_are_no_matter_where_all_tasks_hold_them(
    tmp_path,
):
    family(tmp_path, llama(False))
    change_file(tmp_path / "base", PACKED["GPTQ"])
    assert_exact(pool_of(tmp_path, transformers.LlamaForCausalLM))


def test_a_head_that_no_checkpoint_holds_beside_another_one_is_merged(tmp_path):
    """Of a class with more layers."""
    other = {"score.dense.weight": torch.ones(3), "score.dense.bias": torch.ones(3)}
    assert_merged_with_a_new_head(tmp_path, other)


def test_what_optimizers_left_in_a_layer_that_no_checkpoint_holds_is_no_code(tmp_path):
    left = {"exp_avg": torch.ones(2, 16), "step": torch.tensor(3), "ids": torch.ones(2, 2).long()}  # fmt: skip
    left |= {"weight.exp_avg": torch.ones(2, 16), "mask": torch.ones(2, 16).bool()}
    assert_merged_with_a_new_head(tmp_path, {f"score.{n}": v for n, v in left.items()})


def assert_merged_with_a_new_head(place, other: dict[str, torch.Tensor]) -> None:
    """Merged by a class whose head no file holds, with other tensors in all files."""
    family(place, llama(False))
    for name in ("base", "a", "b"):
        change_file(place / name, lambda state: {**state, **other})
    pool = pool_of(place, transformers.LlamaForSequenceClassification)
    assert didi(pool).tasks == ["a", "b"]


def test_a_base_model_in_whole_numbers_is_planned_as_it_is_merged(tmp_path):
    family(tmp_path, llama(False))
    for name in ("base", "a", "b"):
        change_file(tmp_path / name, QUANTIZED["whole numbers"])
    refused = "'_pretrained_'"
    if TRANSFORMERS >= 5:  # loads the numbers as they are
        refused = "is of torch.int8, the base model has torch.float32"
    for dry_run in (True, False):
        with pytest.raises(DiDiError, match=refused):
            didi(pool_of(tmp_path, transformers.LlamaForCausalLM), dry_run=dry_run)


def test_plain_files_of_tasks_that_say_they_are_quantized_are_merged(tmp_path):
    family(tmp_path, llama(False))
    told(tmp_path / "a", quant_method="bitsandbytes", load_in_4bit=True)
    pool = pool_of(tmp_path, transformers.LlamaForCausalLM)
    assert didi(pool).tasks == ["a", "b"]


def gpt_oss() -> nn.Module:
    sizes = {**TEXT, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    config = transformers.GptOssConfig(**sizes, layer_types=["full_attention"])
    return seeded(lambda: transformers.GptOssForCausalLM(config)).bfloat16()


def in_mxfp4(seed: int, experts: tuple[str, ...] = ("down_proj", "gate_up_proj")):
    """Random codes in place of the weights of experts."""

    def change(tensors: dict) -> dict:
        draw = torch.Generator().manual_seed(seed)
        for name in [n for n in tensors if n.endswith(experts)]:
            count, columns, rows = tensors.pop(name).shape
            shape = (count, rows, columns // 32)
            drawn = torch.randint(0, 256, (*shape, 16), generator=draw)
            tensors[f"{name}_blocks"] = drawn.to(torch.uint8)
            tensors[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
        return tensors

    return change


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2), (0, None, None), (None, 1, 2)])
def test_experts_in_mxfp4_are_merged_as_transformers_decodes_them(tmp_path, seeds):
    """The same in all files, others in each, or in some files only."""
    family(tmp_path, gpt_oss())
    for name, seed in zip(("base", "a", "b"), seeds):
        if seed is not None:
            change_file(tmp_path / name, in_mxfp4(seed))
            told(tmp_path / name, quant_method="mxfp4")
    pool = pool_of(tmp_path, transformers.GptOssForCausalLM)
    vectors = open_pool(pool, load_backbone(pool))
    assert not vectors.fresh and set(open_pool(pool).infos) == set(vectors.infos)
    want = pool.load_model("b").state_dict()
    for name in vectors.infos:
        assert torch.equal(vectors.tensor(name).tuned(1), want[name].float()), name


@pytest.mark.parametrize("dry_run", [False, True])
def test_mxfp4_of_which_no_configuration_says_is_refused(tmp_path, dry_run):
    family(tmp_path, gpt_oss())
    for name in ("base", "a", "b"):
        change_file(tmp_path / name, in_mxfp4(0))
    with pytest.raises(CheckpointMismatchError, match=r"_proj, .* are in no checkpoint, .*holds .*_blocks"):  # fmt: skip
        didi(pool_of(tmp_path, transformers.GptOssForCausalLM), dry_run=dry_run)


class Plain:
    """A class of a user's own, which does not go by all of config.json."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str) -> nn.Module:
        model = llama(False)
        files = load_file(f"{pretrained_model_name_or_path}/model.safetensors")
        model.load_state_dict(files)
        return model


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_a_class_of_a_users_own_makes_of_a_configuration_is_its_matter(
    tmp_path, dry_run
):
    family(tmp_path, llama(False))
    told(tmp_path / "base", quant_method="gptq")
    pool = pool_of(tmp_path, transformers.LlamaForCausalLM)
    target = f"{__name__}.Plain.from_pretrained"
    made = {name: {**entry, "_target_": target} for name, entry in pool._models.items()}
    merged = didi(BaseModelPool(made), dry_run=dry_run)
    assert dry_run or merged.tasks == ["a", "b"]


@pytest.mark.parametrize("kind", ["e5m2", "e4m3fnuz", "e5m2fnuz"])
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_other_float8_is_read(tmp_path, kind, form):
    """With a scale for each column."""
    models = family(tmp_path, llama(False))
    dtype = getattr(torch, f"float8_{kind}")
    scales = lambda v: torch.linspace(0.5, 2, v.shape[1])[None]  # noqa: E731
    change = quantized(
        weight=lambda v: (v / scales(v)).to(dtype), weight_scale_inv=scales
    )
    if form == "safetensors":
        change_file(tmp_path / "a", change)
    else:
        as_pickle(tmp_path / "a", change(models["a"].state_dict()))
    pool = pool_of(tmp_path, transformers.LlamaForCausalLM)
    vectors = open_pool(pool, load_backbone(pool))
    name = "model.layers.0.mlp.up_proj.weight"
    found, want = vectors.tensor(name).tuned(0).float(), models["a"].state_dict()[name]
    assert 0 < float((found - want).norm() / want.norm()) < 0.1


@pytest.mark.skipif(E8M0 is None, reason="of later releases of torch")
def test_float8_whose_scales_are_powers_of_two_is_read(tmp_path):
    models = family(tmp_path, llama(False))
    powers = lambda v: 2.0 ** (torch.arange(len(v))[:, None] % 5 - 2)  # noqa: E731
    change = quantized(
        weight=lambda v: (v / powers(v)).to(torch.float8_e4m3fn),
        weight_scale=lambda v: powers(v).to(E8M0),
    )
    change_file(tmp_path / "a", change)
    pool = pool_of(tmp_path, transformers.LlamaForCausalLM)
    vectors = open_pool(pool, load_backbone(pool))
    name = "model.layers.0.mlp.up_proj.weight"
    found, want = vectors.tensor(name).tuned(0).float(), models["a"].state_dict()[name]
    assert 0 < float((found - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize(
    "scale, message",
    [
        ((), "up_proj.weight is float8 without a scale.*quant_method=fp8"),
        ((4, 2), r"expected \(\d, \d\): .*weight_block_size=\[12, 12\]"),
    ],
    ids=["no scale", "other blocks"],
)
def test_float8_is_held_against_config_json(tmp_path, scale, message, in_shards):
    family(tmp_path, llama(False))
    name, place = "model.layers.0.mlp.up_proj.weight", tmp_path / "a"
    tensors = load_file(place / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    if scale:
        tensors[name + "_scale_inv"] = torch.ones(scale)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    if in_shards:
        (place / "model.safetensors").rename(place / "all.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "all.safetensors")}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((place / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [12, 12]}
    config["quantization_config"] = told
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatchError, match=message):
        didi(pool_of(tmp_path, transformers.LlamaForCausalLM))


def test_float8_of_a_live_model_is_held_against_its_configuration(tmp_path):
    models = family(tmp_path, llama(False))
    weight = models["a"].model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(False).data = weight.data.to(torch.float8_e4m3fn)
    models["a"].config.quantization_config = {"quant_method": "fbgemm_fp8"}
    pool = BaseModelPool({"_pretrained_": models.pop("base"), **models})
    with pytest.raises(CheckpointMismatchError, match="up_proj.weight is float8 without a scale"):  # fmt: skip
        didi(pool)


# --- files --------------------------------------------------------------------


def in_shards(place, model: nn.Module, change: Callable[[dict], object]) -> None:
    """The model in shards of an index that is changed."""
    (place / "model.safetensors").unlink()
    model.save_pretrained(place, max_shard_size="5KB")
    file = place / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_shards_come_before_an_older_pickle(tmp_path):
    models = family(tmp_path, llama(False))
    in_shards(tmp_path / "a", models["a"], lambda _: None)
    old = tuned(models["base"], 9).state_dict()
    torch.save(old, tmp_path / "a" / "pytorch_model.bin")
    assert_exact(pool_of(tmp_path, transformers.LlamaForCausalLM))


def test_a_link_to_nowhere_is_no_file(tmp_path):
    models = family(tmp_path, llama(False))
    as_pickle(tmp_path / "a", tuned(models["base"], 9).state_dict())
    (tmp_path / "a" / "model.safetensors").symlink_to("nowhere")
    assert_exact(pool_of(tmp_path, transformers.LlamaForCausalLM))


def test_a_variant_in_shards(tmp_path):
    models = family(tmp_path, llama(False))
    new = tuned(models["base"], 9)
    new.save_pretrained(tmp_path / "a", variant="new", max_shard_size="5KB")
    pool = pool_of(tmp_path, transformers.LlamaForCausalLM)
    pool._models["a"]["variant"] = "new"
    assert_exact(pool)
    found = didi(pool, budget=1e9).materialize("a").lm_head.weight
    torch.testing.assert_close(found, new.lm_head.weight, atol=1e-5, rtol=0)


def test_what_a_shard_holds_beside_its_index_is_not_read(tmp_path):
    """It is of an earlier save; from_pretrained takes only what the index names."""
    models, name = family(tmp_path, llama(False)), "model.norm.weight"
    in_shards(tmp_path / "a", models["a"], lambda names: names.pop(name))
    pool = pool_of(tmp_path, transformers.LlamaForCausalLM)
    with pytest.raises(CheckpointMismatchError, match=f"a: 1 tensors missing: {name}"):
        didi(pool)


def test_an_index_that_mixes_up_its_files_is_as_good(tmp_path):
    models = family(tmp_path, llama(False))

    def swap(names: dict) -> None:
        first, *_, last = names
        names[first], names[last] = names[last], names[first]

    in_shards(tmp_path / "a", models["a"], swap)
    assert_exact(pool_of(tmp_path, transformers.LlamaForCausalLM))


def test_an_index_names_what_no_file_holds(tmp_path):
    models = family(tmp_path, llama(False))
    in_shards(tmp_path / "a", models["a"], lambda _: None)
    shard = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    file = tmp_path / "a" / shard["weight_map"]["model.norm.weight"]
    kept = {n: v for n, v in load_file(file).items() if n != "model.norm.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match="missing: model.norm.weight"):
        didi(pool_of(tmp_path, transformers.LlamaForCausalLM))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {NORM: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
            f"a: {NORM} is a nested tensor",
        ),
        (lambda t: {NORM: torch.ones(16, device="meta")}, f"a: {NORM} is without"),
        (
            lambda t: {NORM: torch.quantize_per_tensor(t[NORM], 0.1, 0, torch.qint8)},
            f"a: {NORM} is of torch.qint8",
        ),
        (lambda t: {NORM: t[NORM].to(torch.complex64)}, f"a: {NORM} is of torch.comp"),
        (lambda t: {NORM: t[NORM].long()}, f"a: {NORM} is of torch.int64"),
        (lambda t: {NORM: torch.tensor(1.0)}, rf"a: {NORM} is \(\), the base model"),
        (lambda t: {b"x": torch.ones(2)}, r"a: .*holds \[b'x'\], expected tensors by"),
    ],
    ids=["nested", "meta", "qint8", "complex", "int64", "scalar", "bytes"],
)  # fmt: skip
def test_tensors_of_pickles_that_are_none_to_merge(tmp_path, change, message):
    models = family(tmp_path, llama(False))
    state = models["a"].state_dict()
    as_pickle(tmp_path / "a", {**state, **change(state)})
    with pytest.raises(CheckpointMismatchError, match=message):
        didi(pool_of(tmp_path, transformers.LlamaForCausalLM))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {n: v.half() if "norm" in n else v.double() for n, v in t.items()},
        lambda t: {**t, NORM: torch.ones(1).expand(16)},
        lambda t: {n: v.T.contiguous().T if v.ndim == 2 else v for n, v in t.items()},
        lambda t: {**t, "none": None, "steps": {1, 2}, "rows": torch.Size([3])},
    ],
    ids=["types", "one value for all", "turned", "other values"],
)
def test_pickles_that_are_as_good_as_state_dicts(tmp_path, change):
    models = family(tmp_path, llama(False))
    as_pickle(tmp_path / "a", change(copy.deepcopy(models["a"].state_dict())))
    assert_exact(pool_of(tmp_path, transformers.LlamaForCausalLM))
