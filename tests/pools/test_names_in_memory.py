"""Checkpoints are read under the names that ``from_pretrained`` of their class gives their tensors; nothing is dropped silently."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from exact_models import seeded
from helpers import TOWER, TRANSFORMERS, didi
from peft import LoraConfig, PeftModel, get_peft_model
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
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HubertConfig,
    HubertModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.pools.names_in_memory import Names, apart
from fusion_bench_didi.pools.opening import load_backbone, open_pool
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource
from fusion_bench_didi.task_vectors.scan import scan
from fusion_bench_didi.task_vectors.ties import untie

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def change_config(directory: Path, **values) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def llava(tied: bool = False, whole: bool | None = None) -> nn.Module:
    """A model that ties its head by the configuration of its text, whatever its own says; with transformers 5, where one of them does.

    Args:
        whole: what its own configuration says; the other thing if None.
    """
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "clip_vision_model",
    }
    text = {**LLAMA, "model_type": "llama", "tie_word_embeddings": tied}
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        tie_word_embeddings=not tied if whole is None else whole,
    )
    return seeded(lambda: LlavaForConditionalGeneration(config))


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, vocab_size=30)
    return seeded(lambda: BertForSequenceClassification(config))


def hubert() -> HubertModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,)}
    config = HubertConfig(
        **sizes,
        **convolutions,
        intermediate_size=16,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return seeded(lambda: HubertModel(config))


# --- other names in files --------------------------------------------------------


def test_a_vision_language_model_whose_files_keep_an_older_layout(tmp_path):
    base = llava()
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    pool = pool_of(tmp_path, LlavaForConditionalGeneration)
    in_file = set(load_file(tmp_path / "a" / "model.safetensors"))
    assert not in_file <= set(base.state_dict()), "the layouts differ"
    assert_exact(pool)


def test_norms_of_old_files_are_called_gamma_and_beta(tmp_path):
    base = bert()
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    for name in ("base", "a", "b"):
        change_file(
            tmp_path / name,
            lambda t: {
                n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                    "LayerNorm.bias", "LayerNorm.beta"
                ): v
                for n, v in t.items()
            },
        )
    assert_exact(pool_of(tmp_path, BertForSequenceClassification))


def test_weight_norm_has_other_names_in_old_files(tmp_path):
    base = hubert()
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    change_file(
        tmp_path / "a",
        lambda t: {
            n.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): v
            for n, v in t.items()
        },
    )
    assert_exact(pool_of(tmp_path, HubertModel))


def before_rearranged(tensors: dict) -> dict:
    """An adapter of LLaVA as it was written before transformers 4.52."""
    found = {}
    for name, value in tensors.items():
        name = name.replace("model.model.language_model.", "model.language_model.model.")  # fmt: skip
        name = name.replace(f"model.model.vision_tower.{TOWER}", "model.vision_tower.vision_model.")  # fmt: skip
        name = name.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")  # fmt: skip
        found[name.replace("model.lm_head.", "model.language_model.lm_head.")] = value
    assert not found.keys() & tensors.keys()
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*vision_tower.*q_proj"},
        {"target_modules": ["lm_head", "up_proj"], "modules_to_save": ["linear_1"]},
        {"target_modules": ["k_proj"], "rank_pattern": {r"layers\.0\..*k_proj": 3}},
    ],
    ids=["all towers", "one tower", "head and whole ones", "patterns of ends"],
)
def test_adapters_from_before_a_class_was_rearranged(tmp_path, settings):
    """PEFT maps their names as transformers maps those of whole checkpoints; of modules that are saved whole, it does not with 5."""
    base = llava(whole=False)  # PEFT would add to the embedding what is the head's
    trained = write_adapters(tmp_path, base, settings, before_rearranged)
    merged = didi(pool_of(tmp_path, LlavaForConditionalGeneration), budget=1e9)
    for task, model in trained.items():
        if TRANSFORMERS < 5 or "modules_to_save" not in settings:
            model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / task)
        whole, found = model.merge_and_unload().state_dict(), merged.materialize(task)
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"language_model.model.layers.0.self_attn.q_proj": 3}},
        {"alpha_pattern": {"^model.language_model.layers.0.self_attn.q_proj": 3}},
        {"rank_pattern": {"language_model.model.layers.0.self_attn.q_proj": 3}},
    ],
    ids=["old scale", "new scale", "old rank"],
)
def test_patterns_that_mean_one_of_two_names_are_refused(tmp_path, settings):
    """PEFT would take the scale of other modules without a word, or fail."""
    targets = {"target_modules": r".*language_model.*q_proj"}
    write_adapters(tmp_path, llava(), targets, before_rearranged)
    change_config(tmp_path / "a", **settings)
    pool = pool_of(tmp_path, LlavaForConditionalGeneration)
    with pytest.raises(CheckpointMismatchError, match="a: .*rank and scale") as caught:
        didi(pool)
    assert "merge_and_unload" in str(caught.value)


def test_an_adapter_with_both_names_of_a_tensor_is_refused(tmp_path):
    def twice(tensors: dict) -> dict:
        copies = {name: value.clone() for name, value in tensors.items()}
        return {**before_rearranged(tensors), **copies}

    targets = {"target_modules": r".*language_model.*q_proj"}
    write_adapters(tmp_path, llava(), targets, twice)
    pool = pool_of(tmp_path, LlavaForConditionalGeneration)
    with pytest.raises(CheckpointMismatchError, match="a: .*base model does not have"):
        didi(pool)


def test_a_base_without_a_head_and_fine_tuned_models_with_one(tmp_path):
    whole = bert()
    whole.bert.save_pretrained(tmp_path / "base")
    saved(tmp_path, {"a": tuned(whole, 1), "b": tuned(whole, 2)})
    pool = pool_of(tmp_path, BertForSequenceClassification)
    vectors = open_pool(pool, load_backbone(pool))
    assert vectors.fresh == {"classifier.weight", "classifier.bias"}
    assert set(vectors.own_infos) == vectors.fresh
    assert_exact(pool)


@pytest.mark.parametrize("more", [{}, {"revision": "main"}], ids=["files", "host"])
def test_a_merge_on_a_base_with_a_random_tensor_comes_back(tmp_path, more):
    """It is another at every load; what is written of the base model is checked for the rest alone, where files tell which."""
    base = bert().bert
    base.save_pretrained(tmp_path / "base")
    change_file(
        tmp_path / "base", lambda t: {n: v for n, v in t.items() if "pooler" not in n}
    )
    for task in "ab":
        config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / task)
    pool = pool_of(tmp_path, BertModel)
    pool._models["_pretrained_"].update(more)
    merged = didi(pool, budget=8.0, output_dir=str(tmp_path / "out"))
    known = {} if more else {"fresh": ["pooler.dense.bias", "pooler.dense.weight"]}
    assert known.items() <= merged.info["backbone"].items()
    again = DiDiModel.from_pretrained(tmp_path / "out").materialize("a")
    for name, value in merged.materialize("a").state_dict().items():
        assert "pooler" in name or value.equal(again.get_parameter(name))


# --- every tensor is accounted for -------------------------------------------------


def test_a_tensor_that_no_fine_tuned_model_holds_is_missing_from_all(tmp_path):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    for name in "ab":
        change_file(
            tmp_path / name, lambda t: {n: v for n, v in t.items() if "q_proj" not in n}
        )
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(pool_of(tmp_path, LlamaForCausalLM))
    for task in "ab":
        assert (
            f"{task}: 1 tensors missing: model.layers.0.self_attn.q_proj.weight"
            in str(caught.value)
        )


def test_quantized_fine_tuned_models_are_refused(tmp_path):
    """As GPTQ writes them: integers under other names."""
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})

    def packed(tensors: dict) -> dict:
        out = {}
        for name, value in tensors.items():
            if "_proj.weight" in name:
                stem = name.removesuffix("weight")
                out[stem + "qweight"] = torch.ones(2, 16, dtype=torch.int32)
                out[stem + "scales"] = torch.ones(1, 16)
            else:
                out[name] = value
        return out

    for name in "ab":
        change_file(tmp_path / name, packed)
    with pytest.raises(
        CheckpointMismatchError, match="a: 7 tensors missing.*"
    ) as found:
        didi(pool_of(tmp_path, LlamaForCausalLM))
    assert "14 tensors that the base model does not have" in str(found.value)


def test_tensors_that_the_class_does_not_load_are_named(tmp_path):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_file(tmp_path / "a", lambda t: {**t, old: torch.ones(4)})
    pool = pool_of(tmp_path, LlamaForCausalLM)
    vectors = open_pool(pool, load_backbone(pool))
    assert vectors.unused("a") == {old: "not loaded by LlamaForCausalLM"}
    assert_exact(pool)


def test_buffers_that_models_compute_are_in_old_files_only(tmp_path):
    base = gpt2()
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    mask = "transformer.h.0.attn.bias"
    assert mask not in base.state_dict()
    change_file(tmp_path / "a", lambda t: {**t, mask: torch.ones(1, 1, 8, 8)})
    pool = pool_of(tmp_path, GPT2LMHeadModel)
    vectors = open_pool(pool, load_backbone(pool))
    assert vectors.unused("a") == {mask: "not loaded by GPT2LMHeadModel"}
    assert_exact(pool)


# --- tied tensors -----------------------------------------------------------------


def test_a_head_that_is_stored_though_it_is_tied_is_merged_once(tmp_path):
    base = llama(True)
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    saved(tmp_path, models)
    for name, model in models.items():
        as_pickle(tmp_path / name, model.state_dict())
    pool = pool_of(tmp_path, LlamaForCausalLM)
    assert_exact(pool)
    merged = didi(pool, budget=1e9)
    assert "lm_head.weight" not in merged.touched
    head = merged.materialize("a").lm_head.weight
    assert head is not None and merged.backbone.config.tie_word_embeddings


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_a_head_of_ones_own_takes_the_tied_base_apart(tmp_path, form):
    base = llama(True)
    models = {"base": base, "b": tuned(base, 2)}
    own = llama(False)
    own.load_state_dict(tuned(base, 1).state_dict())
    models["a"] = tuned(own, 3, "lm_head")
    saved(tmp_path, models)
    if form == "pickle":
        for name, model in models.items():
            as_pickle(tmp_path / name, model.state_dict())
    pool = pool_of(tmp_path, LlamaForCausalLM)
    merged, ids = didi(pool, budget=1e9), torch.arange(6)[None]
    for task in "ab":
        merged.set_task(task)
        with torch.no_grad():
            found, want = merged(ids).logits, models[task](ids).logits
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert not merged.materialize("a").config.tie_word_embeddings


@pytest.mark.skipif(TRANSFORMERS > 4, reason="the flag of the whole counts there")
def test_a_head_is_tied_by_the_part_of_the_configuration_that_ties(tmp_path):
    """Of a model with vision the text's, whatever the whole says."""
    base = llava()
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    for name in ("base", "a", "b"):
        file = tmp_path / name / "config.json"
        config = {**json.loads(file.read_text()), "tie_word_embeddings": True}
        config["text_config"].pop("tie_word_embeddings", None)  # its class has False
        file.write_text(json.dumps(config))
    pool = pool_of(tmp_path, LlavaForConditionalGeneration)
    assert_exact(pool)
    assert "lm_head.weight" in didi(pool, budget=1e9).touched


def test_fine_tuned_models_that_tie_what_the_base_does_not(tmp_path):
    base = llama(False)
    tied = llama(True)
    saved(tmp_path, {"base": base, "a": tuned(tied, 1), "b": tuned(tied, 2)})
    pool, ids = pool_of(tmp_path, LlamaForCausalLM), torch.arange(6)[None]
    merged = didi(pool, budget=1e9)
    for task in "ab":
        merged.set_task(task)
        with torch.no_grad():
            found, want = merged(ids).logits, pool.load_model(task)(ids).logits
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make, settings",
    [
        (gpt2, {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
        (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        (
            lambda: llama(True),
            {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
        (
            lambda: llama(True),
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ),
        (
            lambda: llama(True),
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
        ),
    ],
    ids=[
        "pair on the head",
        "pair on the embedding",
        "pair on both",
        "whole embedding",
        "whole head",
        "both, kept tied",
    ],
)
def test_adapters_that_change_one_name_of_a_tied_tensor(tmp_path, make, settings):
    """PEFT runs the embedding and the head apart from then on, unless it is told to tie them; so does the merged model."""
    base = make()
    want = write_adapters(tmp_path, base, settings)
    assert_same_text(tmp_path, base, want)


#: Models by what they call the embedding; PEFT knows other names than these.
EMBEDDINGS: dict[str, tuple] = {
    "wte": (lambda: gpt2(), "c_attn"),
    "word_embeddings": (lambda: bloom(), "query_key_value"),
    "embed_in": (lambda: neox(), "query_key_value"),
    "embeddings": (lambda: mamba(), "in_proj"),
    "shared": (lambda: bart(), "q_proj"),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pair"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_that_peft_does_not_tie_though_it_was_told_to(tmp_path, name, whole):
    """It looks for ``embed_tokens`` and ``lm_head``; of other names its file holds the embedding alone."""
    make, layer = EMBEDDINGS[name]
    base, targets = make(), {"target_modules": [layer, *([] if whole else [name])]}
    settings = targets | ({"modules_to_save": [name]} if whole else {})
    settings["ensure_weight_tying"] = True
    want = write_adapters(tmp_path, base, settings)
    assert_same_text(tmp_path, base, want)


@pytest.mark.parametrize(
    "make, settings",
    [
        (gpt2, {"target_modules": ["c_attn", "wte", "lm_head"]}),
        (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
        (lambda: bart(), {"target_modules": ["q_proj", "lm_head"]}),
        (lambda: llama(True), {"target_modules": ["q_proj", "lm_head"]}),
        (lambda: llama(True), {"target_modules": r".*(q_proj|embed_tokens)"}),
        (lambda: llama(True), {"target_modules": r"model\.embed_tokens|.*q_proj"}),
        (lambda: llava(True), {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=[
        "both",
        "head",
        "whole head",
        "four names",
        "llama",
        "pattern",
        "anchored",
        "text alone",
    ],
)
def test_embeddings_that_peft_ties_or_not(tmp_path, make, settings):
    """By what its file holds then, whatever the embedding is called."""
    base = make()
    settings = {**settings, "ensure_weight_tying": True}
    want = write_adapters(tmp_path, base, settings)
    assert_same_text(tmp_path, base, want)


@pytest.mark.parametrize("targets", [["embed_tokens"], ".*embed_tokens"], ids=str)
def test_an_embedding_that_peft_ties_as_it_loads_it(tmp_path, targets):
    """Its file need not hold the head, and older ones do not."""
    base = llama(True)

    def without_head(tensors: dict) -> dict:
        return {name: v for name, v in tensors.items() if "lm_head" not in name}

    settings = {"target_modules": targets, "ensure_weight_tying": True}
    write_adapters(tmp_path, base, settings, without_head)
    want = {
        task: PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / task)
        for task in "ab"
    }
    assert_same_text(tmp_path, base, want)


def write_adapters(place, base, settings: dict, change=None) -> dict[str, nn.Module]:
    """The base model and two adapters, and the models with them as they were trained.

    Args:
        change: what becomes of an adapter's tensors in its file.
    """
    base.save_pretrained(place / "base")
    trained = {}
    for seed, task in enumerate("ab", 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=2, init_lora_weights=False, **settings)
            model = get_peft_model(copy.deepcopy(base), config)
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if "modules_to_save" in name:
                        value += 0.1 * torch.randn(value.shape)
        model.save_pretrained(place / task)
        trained[task] = model.eval()
        if change is not None:
            file = place / task / "adapter_model.safetensors"
            save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return trained


def assert_same_text(place, base: nn.Module, want: dict[str, nn.Module]) -> None:
    """The merged model computes what the models do."""
    merged, x = didi(pool_of(place, type(base)), budget=1e9), torch.arange(6)[None]
    inputs = {"input_ids": x}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = x
    for task, model in want.items():
        merged.set_task(task)
        with torch.no_grad():
            found, expected = (m(**inputs).logits for m in (merged, model))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def bloom() -> nn.Module:
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=30)
    return seeded(lambda: BloomForCausalLM(config))


def neox() -> nn.Module:
    config = GPTNeoXConfig(**SIZES, intermediate_size=16, tie_word_embeddings=True)
    return seeded(lambda: GPTNeoXForCausalLM(config))


def mamba() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return seeded(lambda: MambaForCausalLM(MambaConfig(**sizes, vocab_size=30)))


def bart() -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = BartConfig(**layers, **heads, **widths, vocab_size=30)
    return seeded(lambda: BartForConditionalGeneration(config))


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
}


def test_copies_of_a_tied_tensor_that_differ_are_refused(tmp_path):
    """An adapter that says it keeps them tied, and does not."""
    base = llama(True)
    base.save_pretrained(tmp_path / "base")
    for task in "ab":
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["embed_tokens"], ensure_weight_tying=True)  # fmt: skip
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / task)
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if "lm_head" in name)
    save_file({**tensors, head: tensors[head] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match="a: .*lm_head.weight"):
        didi(pool_of(tmp_path, LlamaForCausalLM), budget=1e9)


class Tied(nn.Module):
    """Three names of one tensor, as T5's embeddings have."""

    def __init__(self):
        super().__init__()
        self.shared, self.one, self.two = (nn.Embedding(4, 2) for _ in range(3))
        self.one.weight = self.two.weight = self.shared.weight


ROWS = torch.arange(8.0).view(4, 2)


@pytest.mark.parametrize(
    "stored, expected",
    [
        ({"one": ROWS, "two": ROWS}, set()),
        ({"one": ROWS, "two": ROWS + 1}, {"two.weight"}),
        ({"two": ROWS}, set()),
        ({"shared": ROWS, "two": ROWS + 1}, {"two.weight"}),
        ({"shared": ROWS, "one": ROWS + 1, "two": ROWS + 1}, {"one.weight", "two.weight"}),
        ({"shared": ROWS, "one": ROWS.bfloat16(), "two": ROWS.double()}, set()),
        ({"shared": ROWS.bfloat16(), "one": ROWS / 3}, {"one.weight"}),
    ],
    ids=["two of three", "of which differ", "one", "one differs", "both", "types", "a finer one"],
)  # fmt: skip
def test_all_names_of_a_tied_tensor_are_compared(tmp_path, stored, expected):
    """Whichever of them a file holds: the others were taken for equal, and one that was not was lost."""
    file = tmp_path / "m.safetensors"
    save_file({f"{name}.weight": value.clone() for name, value in stored.items()}, file)
    found = apart(SafetensorsSource([file], "a"), Names.of(Tied()))
    assert found == expected


@pytest.mark.parametrize("equal", [True, False])
def test_a_tensor_under_its_old_and_its_new_name_is_one(tmp_path, equal):
    base, name = bert(), "bert.embeddings.LayerNorm."
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})

    def doubled(tensors: dict) -> dict:
        twin = tensors[f"{name}weight"] + (0 if equal else 1)
        return {**tensors, f"{name}gamma": twin}

    change_file(tmp_path / "a", doubled)
    pool = pool_of(tmp_path, BertForSequenceClassification)
    if equal:
        assert_exact(pool)
        return
    message = f"a: {name}weight is held as {name}.* and as {name}.*, which differ"
    with pytest.raises(CheckpointMismatchError, match=message):
        didi(pool)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"llama"', "{"])
@pytest.mark.parametrize("whose", ["base", "a"])
def test_configurations_of_models_that_are_none(tmp_path, text, whose):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    (tmp_path / whose / "config.json").write_text(text)
    with pytest.raises(DiDiError, match="config.json|cannot load"):
        didi(pool_of(tmp_path, LlamaForCausalLM))


def test_a_configuration_that_its_class_cannot_read(tmp_path, monkeypatch):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    pool = pool_of(tmp_path, LlamaForCausalLM)
    backbone = load_backbone(pool)
    monkeypatch.setattr(type(base.config), "from_dict", lambda _: {}["x"])
    with pytest.raises(CheckpointMismatchError, match="config.json.*LlamaForCausalLM"):
        open_pool(pool, backbone)


def test_a_class_without_source_is_asked_what_it_was_compiled_to():
    """Of an interactive session, say."""
    for body in ("self.config.tie_word_embeddings", "x"):
        scope: dict = {"Tied": Tied}
        exec(f"class Net(Tied):\n def forward(self, x):\n  return {body}", scope)
        net = scope["Net"]()
        if body == "x":
            untie(net, ["two.weight"])
            assert net.two.weight is not net.one.weight
            continue
        with pytest.raises(CheckpointMismatchError, match="two.weight apart"):
            untie(net, ["two.weight"])


def test_a_model_that_computes_something_else_when_untied_is_refused(tmp_path):
    """T5 scales what goes into a tied head."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    base = seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes, vocab_size=30)))
    base.save_pretrained(tmp_path / "base")
    for task in "ab":
        config = LoraConfig(r=2, target_modules=["q", "lm_head"], init_lora_weights=False)  # fmt: skip
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / task)
    pool = pool_of(tmp_path, T5ForConditionalGeneration)
    if TRANSFORMERS < 5:
        with pytest.raises(
            CheckpointMismatchError, match="lm_head.weight apart.*forward"
        ):
            didi(pool)
        return
    merged = didi(pool, budget=8.0)  # the scale is a setting of its own there
    whole = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    x = dict.fromkeys(("input_ids", "decoder_input_ids"), torch.arange(5)[None])
    with torch.no_grad():
        found, right = (m.eval()(**x).logits for m in (merged.materialize("a"), whole))
    assert torch.allclose(found, right, atol=1e-4)


@pytest.mark.parametrize("whole", [["lm_head", "shared"], ["shared"]], ids=str)
def test_a_forward_that_asks_for_ties_which_there_are_none_of(tmp_path, whole):
    """T5 1.1 says that its head is not tied, and has one embedding in three places all the same; PEFT changes that of one place."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    config = T5Config(**sizes, vocab_size=30, tie_word_embeddings=False)
    base = seeded(lambda: T5ForConditionalGeneration(config))
    settings = {"target_modules": ["q"], "modules_to_save": whole}
    want = write_adapters(tmp_path, base, settings)
    assert_same_text(tmp_path, base, want)


class OneInTwoPlaces(nn.Module):
    """Modules that are one, with two tensors, within others that are one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2))
        self.second = self.first
        self.third = nn.Sequential(self.first[0])


@pytest.mark.parametrize("name", ["second.0.weight", "third.0.weight"])
def test_a_tensor_of_modules_that_are_one_is_taken_apart(name):
    net = OneInTwoPlaces()
    names = {n for n in net.state_dict() if n.endswith("weight")} - {name}
    untie(net, [name])
    with torch.no_grad():
        net.get_parameter(name).add_(1)
    assert len({net.get_parameter(other) for other in names}) == 1
    other, *_ = names
    assert not net.get_parameter(name).equal(net.get_parameter(other))
    assert net.second[0].bias is net.third[0].bias is net.first[0].bias


# --- the files that the host would read ---------------------------------------------


def test_pickles_in_shards_are_read(tmp_path):
    base = llama(False)
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    saved(tmp_path, models)
    names = sorted(models["a"].state_dict())
    parts = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    as_pickle(tmp_path / "a", {})
    (tmp_path / "a" / "pytorch_model.bin").unlink()
    for file, some in parts.items():
        state = {n: models["a"].state_dict()[n] for n in some}
        torch.save(state, tmp_path / "a" / file)
    index = {
        "metadata": {},
        "weight_map": {n: f for f, some in parts.items() for n in some},
    }
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_exact(pool_of(tmp_path, LlamaForCausalLM))


def test_a_subfolder_and_an_unknown_argument_give_what_the_host_gives(tmp_path):
    base = llama(False)
    saved(tmp_path, {"base": base, "a/inner": tuned(base, 1), "b": tuned(base, 2)})
    pool = pool_of(tmp_path, LlamaForCausalLM)
    pool._models["a"]["subfolder"] = "inner"
    pool._models["b"]["revision"] = "main"
    assert_exact(pool)


@pytest.mark.parametrize(
    "shard", ["../base/model.safetensors", "/etc/hostname", "", "x/../y"]
)
def test_an_index_that_leads_out_of_its_directory_is_refused(tmp_path, shard):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    (tmp_path / "a" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointMismatchError, match="a: .*expected files beside it"):
        didi(pool_of(tmp_path, LlamaForCausalLM))


@pytest.mark.parametrize("text", ["[1, 2]", '{"weight_map": []}', "[" * 10**5])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointMismatchError, match="a: .*an index of shards"):
        didi(pool_of(tmp_path, LlamaForCausalLM))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    (tmp_path / "a" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointMismatchError, match="a: .*is no file"):
        didi(pool_of(tmp_path, LlamaForCausalLM))


# --- inputs that change -----------------------------------------------------------


CHANGES = ("rewritten", "dated back", "replaced", "link moved", "cut short", "removed")


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
@pytest.mark.parametrize("whose", ["a", "base"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, how, form, whose):
    """Also the base model's, into which what transformers has loaded is still mapped."""
    base = llama(False)
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    saved(tmp_path, models)
    if form == "pickle":
        as_pickle(tmp_path / whose, models[whose].state_dict())
    pool = pool_of(tmp_path, LlamaForCausalLM)
    vectors = open_pool(pool, load_backbone(pool))
    name = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}[form]
    file = tmp_path / whose / name
    content, dates = file.read_bytes(), os.stat(file)
    other = file.with_suffix(".new")
    other.write_bytes(content)
    if how == "rewritten":
        os.utime(file, ns=(0, 0))
    elif how == "dated back":
        file.write_bytes(bytes(len(content)))
        os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    elif how == "replaced":
        os.replace(other, file)
    elif how == "link moved":
        file.unlink()
        file.symlink_to(other)
    elif how == "cut short":
        os.truncate(file, len(content) // 2)
    else:
        file.unlink()
    label = {"a": "a", "base": "_pretrained_"}[whose]
    with pytest.raises(
        CheckpointMismatchError, match=f"{label}: .*(changed|cannot be read)"
    ):
        scan(vectors)


# --- pickles ----------------------------------------------------------------------


def test_parameters_and_plain_values_in_a_state_dict_do_no_harm(tmp_path):
    base = llama(False)
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    saved(tmp_path, models)
    state = {n: nn.Parameter(v.clone()) for n, v in models["a"].state_dict().items()}
    as_pickle(tmp_path / "a", {**state, "step": 7, "classes": ["x", "y"]})
    vectors = open_pool(pool_of(tmp_path, LlamaForCausalLM), base)
    assert set(vectors.infos) == set(base.state_dict())


@pytest.mark.parametrize(
    "state, message",
    [
        ([1, 2], "holds a list, expected a state dict"),
        ({"model": {"x": torch.ones(2)}}, r"holds dictionaries \['model'\]"),
        (
            {"x": torch.ones(2, 2).to_sparse()},
            "x is of layout torch.sparse_coo, expected",
        ),
        ({3: torch.ones(2)}, r"holds \[3\], expected tensors by name"),
    ],
    ids=["a list", "nested", "sparse", "numbers for names"],
)
def test_pickles_that_are_no_state_dict_are_refused(tmp_path, state, message):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    as_pickle(tmp_path / "a", state)
    with pytest.raises(CheckpointMismatchError, match="a: .*" + message):
        didi(pool_of(tmp_path, LlamaForCausalLM))


# --- float8 -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["none", "one", "per row", "per block"])
def test_float8_is_read_as_what_it_stands_for(tmp_path, scale):
    base = llama(False)
    models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    saved(tmp_path, models)

    def squeezed(tensors: dict) -> dict:
        out = {}
        for name, value in tensors.items():
            if "_proj" not in name:
                out[name] = value
                continue
            shape = {"one": (1,), "per row": (len(value), 1)}.get(scale)
            if scale == "per block":
                shape = (value.shape[0] // 8, value.shape[1] // 8)
            by = torch.ones(()) if shape is None else torch.rand(shape) + 0.5
            whole = by
            if scale == "per block":
                whole = by.repeat_interleave(8, 0).repeat_interleave(8, 1)
            out[name] = (value / whole).to(torch.float8_e4m3fn)
            if shape is not None:
                key = "_scale" if scale == "per row" else "_scale_inv"
                out[name + key] = by
        return out

    change_file(tmp_path / "a", squeezed)
    pool = pool_of(tmp_path, LlamaForCausalLM)
    vectors = open_pool(pool, load_backbone(pool))
    name = "model.layers.0.mlp.up_proj.weight"
    found = vectors.tensor(name).tuned(0).float()
    want = models["a"].state_dict()[name]
    assert float((found - want).norm() / want.norm()) < 0.05
    assert didi(pool, budget=1.4).tasks == ["a", "b"]


def test_float8_with_scales_that_do_not_fit_is_refused(tmp_path):
    base = llama(False)
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    name = "model.layers.0.mlp.up_proj.weight"
    change_file(
        tmp_path / "a",
        lambda t: {
            **t,
            name: t[name].to(torch.float8_e5m2),
            name + "_scale_inv": torch.ones(7, 3),
        },
    )
    with pytest.raises(CheckpointMismatchError, match=r"a: .*_scale_inv is \(7, 3\)"):
        didi(pool_of(tmp_path, LlamaForCausalLM))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_base_model_whose_file_is_not_read_is_refused(tmp_path, prefix):
    """Values of its own would stand there: the merge would be of them, and could never be loaded again."""
    base = bert()
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)})
    change_file(
        tmp_path / "base", lambda held: {prefix + n: t for n, t in held.items()}
    )
    pool = pool_of(tmp_path, BertForSequenceClassification)
    message = f"holds .* as {prefix}.* Write the file again without what is in front"
    with pytest.raises(CheckpointMismatchError, match=message):
        didi(pool)
