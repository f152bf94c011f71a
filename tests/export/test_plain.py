"""Plain checkpoints: bit for bit ``materialize``, with all that belongs to a model."""

import json
import shutil

import pytest
import torch
from exact_models import llama, qwen, seeded
from helpers import BASE, OpenClipLike, didi, family, same_bits
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
)

from fusion_bench_didi import load
from fusion_bench_didi.deltas.plain import DenseDelta
from fusion_bench_didi.errors import DiDiError, SettingsError
from fusion_bench_didi.export import export, to_patch, to_peft, to_plain
from fusion_bench_didi.models.dynamic import DiDiModel


@pytest.mark.parametrize(
    "make, dtype", [(llama, torch.float32), (qwen, torch.bfloat16)]
)
def test_a_checkpoint_is_materialize_bit_for_bit(make, dtype, tmp_path):
    model = didi(family(make().to(dtype)), budget=0.5, factor_dtype="auto")
    report = to_plain(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out/svhn").glob("*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out/svhn", dtype="auto")
    wanted = model.materialize("svhn").state_dict()
    assert found.dtype == dtype
    for name, value in found.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert set(report.bytes) == {"mnist", "svhn"}


def test_a_model_is_no_directory_of_one(tmp_path):
    model = didi(family(llama()), budget=0.5)
    with pytest.raises(SettingsError, match="DiDiModel is given. .*to_plain"):
        export(model, tmp_path / "out", form="plain")
    with pytest.raises(DiDiError, match="directory .* expected, and DiDiModel is"):
        load(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [to_plain, to_patch, to_peft])
@pytest.mark.parametrize("none", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_no_task_is_not_all_of_them(form, none, tmp_path):
    model = DiDiModel(llama(), {}, {"a": {}}, unit_bits=1)
    with pytest.raises(DiDiError, match="No task is asked for. Name one or more."):
        form(model, tmp_path / "out", tasks=none)
    empty = DiDiModel(llama(), {}, {}, unit_bits=1)
    with pytest.raises(DiDiError, match="holds no task, so there is nothing to export"):
        form(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_and_generation_config_come_along(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    (base / "modeling.py").write_text("raise SystemExit")
    model = didi(family(llama()), budget=0.5)
    report = to_plain(model, tmp_path / "out", tasks="mnist", base=base)
    files = {file.name for file in (tmp_path / "out/mnist").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= files
    assert "modeling.py" not in files and not report.notes
    assert not (tmp_path / "out/svhn").exists()


def test_a_model_in_memory_has_no_tokenizer_which_is_said(tmp_path):
    report = to_plain(didi(family(llama()), budget=0.5), tmp_path / "out")
    assert "no tokenizer" in report.notes[0] and "no tokenizer" in str(report)
    written = json.loads((tmp_path / "out/export.json").read_text())
    assert written["form"] == "plain" and written["bytes"] == dict(report.bytes)


def test_models_that_are_not_transformers(tmp_path):
    model = didi(family(OpenClipLike()), budget=0.5)
    to_plain(model, tmp_path / "out")
    found = load_file(tmp_path / "out/mnist/model.safetensors")
    wanted = model.materialize("mnist").state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_names_of_any_length_are_names_of_files(tmp_path):
    long = ["ü" * 200 + end for end in "ab"]
    model = didi(family(OpenClipLike(), long), budget=0.5)
    to_patch(model, tmp_path / "patches")
    assert len(list((tmp_path / "patches").glob("*.safetensors"))) == 2


def test_only_an_export_is_overwritten(tmp_path):
    model = didi(family(OpenClipLike()), budget=0.5)
    to_plain(model, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        to_plain(model, tmp_path / "out")
    to_plain(model, tmp_path / "out", tasks="svhn", overwrite=True)
    assert not (tmp_path / "out/mnist").exists()
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(FileExistsError, match="export.json does not say so"):
        to_plain(model, tmp_path / "merged", overwrite=True)


FORMS = {"peft": to_peft, "plain": to_plain, "patch": to_patch}
OTHERS = {
    "mine/model.safetensors": "mine",
    "mine.bin": "mine.bin",
    "svhn/run/model.safetensors": "svhn/run",
    "svhn/heads.safetensors": "svhn/heads.safetensors",
}


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_within_an_export_is_not_lost(tmp_path, form, monkeypatch):
    """Nor is a merged model read before that is said."""
    model, out = didi(family(llama()), budget=0.5), tmp_path / "out"
    FORMS[form](model, out)
    FORMS[form](model, out, overwrite=True)  # all of its own parts are replaced
    monkeypatch.setattr("fusion_bench_didi.export.saved.load", never)
    for name, strange in OTHERS.items():
        file = out / name
        made = [p for p in (file, *file.parents) if not p.exists()][-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        strange = strange.split("/")[0] if form == "patch" else strange
        with pytest.raises(FileExistsError, match=f"also holds {strange}, which"):
            export(tmp_path / "merged", out, form=form, overwrite=True)
        with pytest.raises(FileExistsError, match="also holds"):
            FORMS[form](model, out, overwrite=True)
        assert file.read_text() == "mine"
        shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.mark.parametrize("form", FORMS)
def test_tasks_may_be_called_as_the_files_beside_them(tmp_path, form):
    names = ("Export.json", "export.json.tmp", ".cache", "config.json")
    model, out = didi(family(llama(), names), budget=0.5), tmp_path / "out"
    FORMS[form](model, out)
    report = FORMS[form](model, out, overwrite=True)  # all parts are known as its own
    assert json.loads((out / "export.json").read_text())["bytes"] == report.bytes
    parts = [path.name.lower() for path in out.iterdir()]
    assert len(set(parts)) == 1 + len(names)


@pytest.mark.parametrize("form", FORMS)
def test_notes_beside_an_export_stay(tmp_path, form):
    """Of the old export nothing does: no tokenizer of a base model that has none any more."""
    model, out = didi(family(llama()), budget=0.5), tmp_path / "out"
    FORMS[form](model, out)
    notes = ["notes.md", "scores.csv"] + ["svhn/eval.json"] * (form != "patch")
    for name in notes:
        (out / name).write_text(name)
    (out / "tokenizer.json").write_text("old")
    FORMS[form](model, out, overwrite=True)
    assert all((out / name).read_text() == name for name in notes)
    assert not (out / "tokenizer.json").exists()


def never(*_, **__):
    raise AssertionError("the merged model was read")


def test_classes_that_compute_what_they_do_not_save(tmp_path):
    """Such as tables of positions, which are in no checkpoint."""
    sides = {
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 16,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
    config = MarianConfig(**sides, **layers, **heads, **tokens)
    models = family(seeded(lambda: MarianMTModel(config)))
    tables = ("model.encoder.embed_positions", "model.decoder.embed_positions")
    for model in models.values():
        for name in tables:
            model.get_submodule(name).load_state_dict(models[BASE].get_submodule(name).state_dict())  # fmt: skip
    merged = didi(models, budget=0.5)
    to_plain(merged, tmp_path / "out")
    found = MarianMTModel.from_pretrained(tmp_path / "out/svhn").state_dict()
    assert not any(f"{n}.weight" in load_file(tmp_path / "out/svhn/model.safetensors") for n in tables)  # fmt: skip
    assert same_bits(found, merged.materialize("svhn").state_dict())


def test_classes_that_name_tensors_otherwise_in_checkpoints(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {**sizes, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**heads, image_size=16, patch_size=8)
    text = LlamaConfig(**heads, vocab_size=32)
    base = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=30)
    ).eval()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    change = DenseDelta((16, 16), torch.ones(16, 16))
    model = DiDiModel(base, {}, {"a": {name: change}}, unit_bits=1)
    to_plain(model, tmp_path / "out")
    found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out/a")
    wanted = model.materialize("a").state_dict()
    assert all(torch.equal(v, wanted[n]) for n, v in found.state_dict().items())
    if name not in load_file(tmp_path / "out/a/model.safetensors"):
        assert "under others" in to_patch(model, tmp_path / "patch").notes[0]
