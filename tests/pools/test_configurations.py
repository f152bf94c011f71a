"""A merge runs all tasks under the base model's configuration: fine-tuned models that compute something else are refused."""

import json
import logging

import pytest
import torch
from commands import run
from exact_models import bert, gpt2, llama, seeded, t5, tokens
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from helpers import BASE, TRANSFORMERS, didi, fine_tuned
from transformers import CLIPVisionModel, LlamaForCausalLM

from fusion_bench_didi.errors import CheckpointMismatchError, ModelPoolError
from fusion_bench_didi.pools.configurations import check_configurations, differing

#: What changes outputs of the same weights, by a model that has it.
OTHERS = [
    (llama, "rope_theta", 1e6),
    (llama, "rms_norm_eps", 1e-3),
    (llama, "hidden_act", "gelu"),
    (llama, "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    (llama, "num_attention_heads", 1),
    (gpt2, "activation_function", "relu"),
    (gpt2, "scale_attn_by_inverse_layer_idx", True),
    (gpt2, "layer_norm_epsilon", 1e-2),
    *([(bert, "position_embedding_type", "relative_key")] if TRANSFORMERS < 5 else []),
    (t5, "relative_attention_max_distance", 16),
]
#: What does not.
HARMLESS = {
    "id2label": {0: "yes", 1: "no", 2: "perhaps"},
    "problem_type": "single_label_classification",
    "transformers_version": "4.0.0",
    "dtype": "float16",
    "attention_dropout": 0.5,
    "hidden_dropout_prob": 0.5,
    "initializer_range": 1.0,
    "use_cache": False,
    "finetuning_task": "sst2",
    "max_position_embeddings": 4096,
    "architectures": ["Other"],
    "bos_token_id": 7,
}


def models_of(make):
    base = make()
    return {BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}


def change(model, key, value) -> None:
    config = model.config
    if TRANSFORMERS >= 5 and key.startswith("rope_"):
        value = value if key == "rope_scaling" else {key: value}
        key, value = "rope_parameters", {**config.rope_parameters, **value}
    setattr(config, key, value)


def written(models, place) -> dict:
    for name, model in models.items():
        model.save_pretrained(place / name)
    return {name: str(place / name) for name in models}


@pytest.mark.parametrize(("make", "key", "value"), OTHERS)
def test_another_computation_is_refused(make, key, value):
    models = models_of(make)
    change(models["b"], key, value)
    with pytest.raises(CheckpointMismatchError, match=rf"\n  b: {key}: .* != ") as e:
        didi(models)
    assert "config.json" in str(e.value) and "\n  a: " not in str(e.value)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("form", ["place", "mapping", "loaded"])
def test_in_files_too_and_before_weights_are_read(tmp_path, form, dry_run, monkeypatch):
    from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource

    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    models = models_of(llama)
    change(models["a"], "rope_theta", 5e5)
    change(models["b"], "rms_norm_eps", 1e-3)
    places = written(models, tmp_path)
    entries = {n: entry(place, form) for n, place in places.items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(CausalLMPool(entries, tokenizer=None), dry_run=dry_run)
    assert "a: rope_theta: " in str(caught.value)
    assert "b: rms_norm_eps: " in str(caught.value)


def entry(place, form):
    if form == "place":
        return place
    target = "transformers.LlamaForCausalLM.from_pretrained"
    other = {"revision": "main"} if form == "loaded" else {}
    return {"_target_": target, "pretrained_model_name_or_path": place, **other}


@pytest.mark.parametrize("key", HARMLESS)
def test_what_changes_no_outputs_is_silent(key):
    base, tuned = llama().config, llama().config
    setattr(tuned, key, HARMLESS[key])
    assert not differing(base, tuned)
    assert not differing(base, json.loads(tuned.to_json_string()))


def test_models_that_differ_in_such_alone_are_merged(caplog, tmp_path):
    models = models_of(llama)
    for key, value in HARMLESS.items():
        change(models["a"], key, value)
    with caplog.at_level(logging.WARNING):
        didi(CausalLMPool(written(models, tmp_path), tokenizer=None))
    assert not [r for r in caplog.records if r.name.startswith("fusion_bench_didi")]


def test_the_way_out_that_the_message_names_works(tmp_path):
    models = models_of(llama)
    change(models["b"], "rope_theta", 1e6)
    entries = written(models, tmp_path)
    key = "rope_theta" if TRANSFORMERS < 5 else "rope_parameters"
    given = {key: getattr(models[BASE].config, key)}
    entries["b"] = {
        "_target_": "transformers.LlamaForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": entries["b"],
        **given,
    }
    merged = didi(CausalLMPool(entries, tokenizer=None), budget=8.0)
    loaded = LlamaForCausalLM.from_pretrained(str(tmp_path / "b"), **given)
    x = tokens(2, 5)
    with torch.no_grad():
        found, right = (m(x).logits for m in (merged.materialize("b"), loaded))
    assert torch.allclose(found, right, atol=1e-4)


#: What changes outputs in architectures that few have, as files say it.
RARE = {
    "modernbert": {"classifier_pooling": ("cls", "mean"), "local_attention": (128, 4)},
    "modernbert-decoder": {"global_rope_theta": (1e5, 1e3)},
    "llava": {"vision_feature_layer": (-2, -1)},
    "longformer": {"attention_window": ([512, 512], [4, 4]), "sep_token_id": (2, 3)},
    "tapas": {"temperature": (1.0, 2.0)},
    "deepseek_v3": {"topk_group": (1, 4)},
    "gpt_neo": {"attention_layers": (["global", "local"], ["global", "global"])},
    "deberta-v2": {"pos_att_type": (["p2c"], ["c2p"]), "pooler_hidden_act": ("gelu", "relu")},  # fmt: skip
    "bloom": {"apply_residual_connection_post_layernorm": (False, True)},
    "falcon": {"activation": ("gelu", "relu")},
    "mamba2": {"time_step_limit": ([0.0, 1.0], [0.5, 0.6])},
    "wav2vec2": {"conv_stride": ([5, 2], [4, 2])},
    "segformer": {"strides": ([4, 2], [2, 2])},
    "albert": {"num_hidden_layers": (12, 2)},
    "glpn": {"max_depth": (10, 80), "head_in_index": (-1, -2)},
    "depth_anything": {"depth_estimation_type": ("relative", "metric")},
    "recurrent_gemma": {"attention_window_size": (2048, 4)},
    "vits": {"speaking_rate": (1.0, 2.0), "noise_scale": (0.6, 0.1)},
    "longt5": {"global_block_size": (16, 8), "encoder_attention_type": ("local", "transient-global")},  # fmt: skip
    "gemma3n_text": {"num_kv_shared_layers": (15, 3)},
}


@pytest.mark.parametrize("family", RARE)
def test_settings_that_few_architectures_have(family):
    for key, (one, other) in RARE[family].items():
        here, there = ({"model_type": family, key: value} for value in (one, other))
        assert differing(here, there) == [f"{key}: {one!r} != {other!r}"]
        assert not differing(here, {**here, key: tuple(one) if isinstance(one, list) else one})  # fmt: skip


@pytest.mark.parametrize("part", ["encoder", "decoder", "text_config", "generator"])
def test_parts_of_a_model_are_compared_whatever_they_are_called(part):
    here, there = (
        {"model_type": "whole", part: {"model_type": "bert", "num_attention_heads": n}}
        for n in (2, 4)
    )
    assert differing(here, there) == [f"{part}.num_attention_heads: 2 != 4"]


def test_what_may_matter_is_said_and_merged(caplog):
    models = models_of(llama)
    for name, model in models.items():
        model.config.depth_of_thought = 3 + (name == "b")
        model.config.my_dropout = 0.1 * (name == "b")
    with caplog.at_level(logging.WARNING):
        didi(models)
    (told,) = [r.getMessage() for r in caplog.records if "under the base" in r.message]
    assert told.startswith("b runs") and "depth_of_thought: 3 != 4. " in told
    assert "dropout" not in told


def test_the_end_of_a_text_matters_where_it_is_pooled_there():
    here, there = ({"model_type": "clip_text_model", "vocab_size": 62, "eos_token_id": n} for n in (61, 30))  # fmt: skip
    assert differing(here, there)
    assert not differing(here, {**there, "eos_token_id": 2}), "the largest, as long ago"
    assert differing({**here, "eos_token_id": 2}, there)
    for family in ("llama", "mllama_text_model", "siglip_text_model"):
        assert not differing(*({**c, "model_type": family} for c in (here, there)))


@pytest.mark.parametrize("ends", [None, [1, 2], 2, "x"])
def test_ends_of_texts_of_any_form_are_compared(ends):
    for family in ("clip_text_model", "mllama_text_model"):
        config = {"model_type": family, "eos_token_id": ends}
        assert not differing(config, dict(config))


def test_what_pads_matters_where_it_is_looked_for():
    """By heads that find the last token, and by positions; not where one model has no such token."""
    here, there = ({"model_type": "llama", "pad_token_id": n} for n in (0, 5))
    assert not differing(here, there)
    heads = {"architectures": ["LlamaForSequenceClassification"]}
    assert differing({**here, **heads}, {**there, **heads})
    assert not differing({**here, **heads}, {**there, **heads, "pad_token_id": None})
    assert differing(*({**c, "model_type": "roberta"} for c in (here, there)))


def test_positions_by_length_depend_on_the_length_of_pre_training():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    here, there = ({"rope_scaling": scaling, "max_position_embeddings": n} for n in (64, 128))  # fmt: skip
    assert differing(here, there) == ["max_position_embeddings: 64 != 128"]
    assert not differing({**here, "rope_scaling": None}, {**there, "rope_scaling": None})  # fmt: skip


def test_rotary_positions_as_either_generation_writes_them():
    """A base model in files of transformers 4, a fine-tuned one in files of 5."""
    plain = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    assert not differing(plain, {"model_type": "llama", "rope_parameters": rope})
    for name, other in {
        "rope_theta": {"rope_theta": 1e6},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }.items():
        told = differing(
            plain, {"model_type": "llama", "rope_parameters": {**rope, **other}}
        )
        assert [line.split(":")[0] for line in told] == [name]


@pytest.mark.parametrize("key, value", [("rope_scaling", "1e400"), ("model_type", [])])
def test_values_of_another_type_are_other_values(key, value):
    """Files may say anything: whoever makes a model of it says what is wrong."""
    file = {"model_type": "llama", "rope_scaling": None, "pad_token_id": 0}
    assert len(differing(file, {**file, key: value})) == (key == "rope_scaling")
    assert not differing({**file, key: value}, {**file, key: value})


def test_scaling_of_positions_under_its_older_name_and_none():
    old, new = ({key: "linear", "factor": 2.0} for key in ("type", "rope_type"))
    assert not differing({"rope_scaling": old}, {"rope_scaling": new})
    default = {"rope_type": "default"}
    assert not differing({"rope_scaling": default}, {"rope_scaling": None})
    assert differing({"rope_scaling": new}, {"rope_scaling": None})


def test_a_tied_head_scales_its_input_in_t5_alone():
    pair = [{"model_type": "t5", "tie_word_embeddings": tied} for tied in (True, False)]
    assert differing(*pair)
    assert not differing(*({**c, "model_type": "llama"} for c in pair))


def test_a_tower_in_the_files_of_its_whole_model(tiny_clip, tmp_path):
    """CLIP's files hold two configurations; the vision model reads its own."""
    models = tiny_clip.pool_models()
    for name in (BASE, *tiny_clip.tasks):
        models[name].save_pretrained(tmp_path / name)
    file = tmp_path / tiny_clip.tasks[0] / "config.json"
    vision = json.loads(file.read_text())
    whole = {
        "model_type": "clip",
        "hidden_act": "of the whole",
        "vision_config": vision,
    }
    file.write_text(json.dumps(whole))
    base = CLIPVisionModel.from_pretrained(tmp_path / BASE).config
    assert not differing(base, json.loads(file.read_text()))
    vision["hidden_act"] = "relu"
    assert differing(base, {**whole, "vision_config": vision})


def test_all_differences_of_all_tasks_come_in_one_error():
    models = models_of(llama)
    for name, theta in (("a", 1e5), ("b", 1e6)):
        change(models[name], "rope_theta", theta)
        models[name].config.hidden_act = "relu"
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(models)
    assert str(caught.value).count(" != ") == 4 + 1


def test_models_of_another_kind_are_told(caplog):
    models = models_of(llama)
    models["b"].config = bert().config
    models["b"].config.rope_theta = 1e4
    models["b"].config.hidden_act = models[BASE].config.hidden_act
    with caplog.at_level(logging.WARNING):
        check_configurations(models[BASE].config, {t: models[t].config for t in "ab"})
    (told,) = [r.getMessage() for r in caplog.records]
    assert told == "b is a bert, run as a llama as the base model is."


def test_models_without_a_configuration_are_merged():
    base = seeded(lambda: torch.nn.Linear(8, 8))
    pool = {BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}
    pool["a"].config = "text"
    assert didi(BaseModelPool(pool)).tasks == ["a", "b"]


def test_names_that_are_no_text():
    base = llama()
    with pytest.raises(ModelPoolError, match=r"Names of models are text.*\[1, 2\]"):
        didi({BASE: base, 1: fine_tuned(base, 1), 2: fine_tuned(base, 2)})


def test_models_without_a_name_are_refused():
    """Which ``=path`` on a command line gives, and an empty key in YAML."""
    base = llama()
    with pytest.raises(ModelPoolError, match="a model called ' '"):
        didi({BASE: base, " ": fine_tuned(base, 1), "b": fine_tuned(base, 2)})


def test_models_that_the_host_takes_for_special_are_named(caplog):
    base = llama()
    tuned = {name: fine_tuned(base, i) for i, name in enumerate(("a", "b", "_c_"))}
    with caplog.at_level(logging.WARNING):
        assert didi({BASE: base, **tuned}).tasks == ["a", "b"]
    assert any("_c_" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", [BASE, "a"])
@pytest.mark.parametrize("how", ["pool", "command"])
@pytest.mark.parametrize("setting", ["num_hidden_layers", "num_labels"])
def test_layers_that_no_weights_are_for_are_not_built(tmp_path, name, how, setting):
    """transformers would build them, list their types, or name them, one by one."""
    places = written(models_of(llama), tmp_path)
    file = tmp_path / name / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: 10**9}))
    with pytest.raises(CheckpointMismatchError, match=f"{file} says {setting}="):
        if how == "pool":
            didi(CausalLMPool(places, tokenizer=None), budget=0.5)
        else:
            run("merge", places[BASE], places["a"], places["b"], "-o", tmp_path / "m")


def test_many_layers_that_weights_are_for_are_built(tmp_path, monkeypatch):
    for most in ("_FEW", "_MANY_LABELS"):
        monkeypatch.setattr(f"fusion_bench_didi.pools.weight_files.{most}", 0)
    places = written(models_of(llama), tmp_path)
    assert didi(CausalLMPool(places, tokenizer=None), budget=0.5).tasks == ["a", "b"]
