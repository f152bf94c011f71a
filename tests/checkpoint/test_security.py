"""What is read from a model directory is data: no code of it runs, nothing outside of it is read, nothing waits for ever."""

import copy
import json
import multiprocessing
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from exact_models import bert
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool
from fusion_bench.modelpool.causal_lm import CausalLMPool
from helpers import BASE, TRANSFORMERS, didi, family, fine_tuned
from hostile_directories import (
    MARK,
    Bomb,
    merged_language_model,
    rewrite,
    with_backbone,
    write_language_model,
)
from torch import nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from fusion_bench_didi.artifacts import load_artifact, save_artifact
from fusion_bench_didi.checkpoint import loaders
from fusion_bench_didi.checkpoint.fields import CHECKSUM, inside, sealed
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.method.merge import MERGE
from fusion_bench_didi.models.dynamic import DiDiModel


@pytest.fixture(scope="module")
def merged_once(tiny_clip_dir: Path, tmp_path_factory) -> Path:
    names = [p.name for p in tiny_clip_dir.iterdir()]
    pool = CLIPVisionModelPool({name: str(tiny_clip_dir / name) for name in names})
    place = tmp_path_factory.mktemp("once") / "merged"
    didi(pool, budget=0.9).save_pretrained(place)
    return place


@pytest.fixture
def saved(merged_once: Path, tmp_path: Path) -> Path:
    """A merge that refers to a base model on disk."""
    return shutil.copytree(merged_once, tmp_path / "merged")


@pytest.fixture
def static(tiny_clip, tiny_clip_dir: Path, tmp_path: Path) -> Path:
    base = tiny_clip.base
    known = {"source": str(tiny_clip_dir / BASE)}
    types = {name: torch.float32 for name, _ in base.named_parameters()}
    save_artifact(
        fine_tuned(base, 1), tmp_path / "static", base=base, types=types, known=known
    )
    return tmp_path / "static"


# --- nothing runs -------------------------------------------------------------

TARGETS = {
    "os.system": {"_target_": "os.system", "command": "touch {mark}"},
    "subprocess": {"_target_": "subprocess.check_output", "args": ["touch", "{mark}"]},
    "nested": {
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": {
            "_target_": "os.system",
            "command": "touch {mark}",
        },
    },
    "partial": {
        "_target_": "functools.partial",
        "_args_": [{"_target_": "pathlib.Path.touch", "_args_": ["{mark}"]}],
    },
    "eval": {"_target_": "builtins.eval", "_args_": ["open('{mark}', 'w')"]},
    "pickle": {"_target_": "torch.load", "f": "{mark}.pt", "weights_only": False},
    "ends as it should": {
        "_target_": "subprocess.Popen.from_pretrained",
        "args": ["touch", "{mark}"],
    },
    "interpolation": {
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": "${oc.env:HOME}",
    },
    "remote code": {
        "_target_": "transformers.AutoModel.from_pretrained",
        "pretrained_model_name_or_path": "x/y",
        "trust_remote_code": True,
    },
    "kernel of the hub": {
        "_target_": "transformers.CLIPVisionModel.from_pretrained",
        "pretrained_model_name_or_path": "x/y",
        "attn_implementation": "evil/kernel",
    },
    "more classes than there is room for": {
        "_target_": "transformers.ViTForImageClassification.from_pretrained",
        "pretrained_model_name_or_path": "x/y",
        "num_labels": 10**9,
    },
    "no model": {
        "_target_": "transformers.AutoTokenizer.from_pretrained",
        "pretrained_model_name_or_path": "x/y",
    },
    "pickle of the host": {"model_name": "ViT-B-32", "pickle_path": "{mark}.pt"},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("load", [DiDiModel.from_pretrained, load_artifact])
def test_a_source_is_never_run(saved, static, tmp_path, target, load):
    mark = tmp_path / MARK
    torch.save(Bomb(mark), f"{mark}.pt")
    text = json.dumps(TARGETS[target]).replace("{mark}", str(mark))
    directory = saved if load == DiDiModel.from_pretrained else static
    with_backbone(directory, source=json.loads(text))
    with pytest.raises(DiDiError, match="backbone="):
        load(directory)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "evil.Model",
        "transformers.pipeline",
        "transformers.evil.CLIPVisionModel",
        "transformers.models.bert.modeling_bert.CLIPVisionModel",
        "transformers.dynamic_module_utils.CLIPVisionModel",
        "fusion_bench.evil.Model",
        "fusion_bench_didi.demo.__main__",
        "torch.nn.Linear",
        "transformers.__loader__",
        "",
    ],
)
def test_classes_are_of_a_closed_list(saved, tmp_path, monkeypatch, name):
    """Also those that lie beside the directory, where Python would find them."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with_backbone(saved, **{"class": name})
    with pytest.raises(DiDiError, match="backbone="):
        DiDiModel.from_pretrained(saved)
    assert not (tmp_path / MARK).exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        {"model_class": "evil.Model"},
        {"model_class": "__import__"},
        {"model_class": "saving"},
        {"kind": "eval", "model_class": None},
        {"kind": "__class__", "model_class": None},
        {"router": {"kind": "os.system", "options": {}}},
        {"router": {"kind": "mlp", "options": {"_target_": "os.system"}}},
    ],
    ids=str,
)
def test_classes_of_what_is_stored_are_of_a_closed_list(saved, tiny_clip, change):
    def apply(config: dict) -> None:
        config.update(change)
        if config["model_class"] is None:
            del config["model_class"]

    rewrite(saved, apply)
    with pytest.raises(
        CheckpointMismatchError, match="config.json: .* (expected|make)"
    ):
        load_artifact(saved, tiny_clip.base)


@pytest.mark.parametrize("left", [0, 1])
def test_tensors_that_a_manifest_does_not_name_are_none_of_it(static, tiny_clip, left):
    rewrite(static, lambda config: config.update(names=config["names"][:left]))
    with pytest.raises(CheckpointMismatchError):
        load_artifact(static, tiny_clip.base)


def test_a_base_model_is_found_beside_the_merge(tmp_path, monkeypatch):
    base = merged_language_model(tmp_path / "merged", "base")
    monkeypatch.chdir("/")
    again = DiDiModel.from_pretrained(tmp_path / "merged")
    again.set_task("mnist")
    assert type(again.backbone) is type(base)


@pytest.mark.parametrize(
    "written",
    [
        {"_attn_implementation_autoset": True},
        {"_attn_implementation_autoset": False, "attn_implementation": None},
        {"_attn_implementation": None, "_attn_implementation_autoset": None},
    ],
    ids=str,
)
def test_what_releases_wrote_of_attention_names_no_code(tmp_path, written):
    merged_language_model(tmp_path / "merged", "base")
    file = tmp_path / "merged" / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **written}))
    assert DiDiModel.from_pretrained(tmp_path / "merged").tasks


@pytest.mark.parametrize("how", ["auto_map", "generate", "adapter", "kernel"])
def test_code_beside_a_base_model_does_not_run(tmp_path, how):
    """A directory with weights of a base model may hold what transformers would run, also with trust_remote_code=False."""
    merged_language_model(
        tmp_path / "merged",
        "base",
        **{"class": "transformers.models.auto.modeling_auto.AutoModelForCausalLM"},
    )
    base, mark = tmp_path / "merged" / "base", tmp_path / MARK
    code = f"open({str(mark)!r}, 'w')\n"
    config = json.loads((base / "config.json").read_text())
    if how == "auto_map":
        (base / "modeling_evil.py").write_text(
            code
            + "from transformers import BertForSequenceClassification, GPT2LMHeadModel as Evil\n"
        )
        config["auto_map"] = {
            "AutoConfig": "modeling_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        }
        config["model_type"] = "evil"
    elif how == "generate":
        (base / "custom_generate").mkdir()
        generate = code + "def generate(model, **_): ...\n"
        (base / "custom_generate" / "generate.py").write_text(generate)
    elif how == "adapter":
        adapter = {"peft_type": "LORA", "megatron_core": "evil", "megatron_config": {}}
        adapter["base_model_name_or_path"] = str(base)
        (base / "adapter_config.json").write_text(json.dumps(adapter))
    else:
        config["_attn_implementation"] = "evil/kernel"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(DiDiError, match="backbone="):
        DiDiModel.from_pretrained(tmp_path / "merged")
    assert not mark.exists()


@pytest.mark.skipif(TRANSFORMERS >= 5, reason="transformers 5 does not")
def test_transformers_would_run_code_of_a_local_directory(tmp_path):
    """Why directories are looked at before they are given to transformers; once this fails, the look may go."""
    write_language_model(tmp_path / "base")
    place, mark = tmp_path / "base" / "custom_generate", tmp_path / MARK
    place.mkdir()
    code = f"open({str(mark)!r}, 'w')\ndef generate(model, **_): ...\n"
    (place / "generate.py").write_text(code)
    load = partial(GPT2LMHeadModel.from_pretrained, trust_remote_code=False)
    child = multiprocessing.get_context("fork").Process(
        target=load, args=(str(tmp_path / "base"),)
    )
    child.start()
    child.join()
    assert child.exitcode == 0 and mark.exists()


def test_entries_that_pools_have_are_loaded_again(tiny_clip_dir, tmp_path):
    """The forms in which the host's pools name a base model, with what only concerns the machine that merged."""
    place = str(tiny_clip_dir / BASE)
    target = "transformers.CLIPVisionModel.from_pretrained"
    entries = [
        place,
        {"_target_": target, "pretrained_model_name_or_path": place},
        {
            "_target_": target,
            "pretrained_model_name_or_path": place,
            "low_cpu_mem_usage": True,
            "token": "hf_secret",
            "attn_implementation": "eager",
            "trust_remote_code": False,
        },
    ]
    for i, entry in enumerate(entries):
        models = {name: str(tiny_clip_dir / name) for name in ("mnist", "svhn")}
        pool = CLIPVisionModelPool({BASE: entry, **models})
        merged = tmp_path / str(i)
        didi(pool, budget=0.9).save_pretrained(merged)
        assert type(DiDiModel.from_pretrained(merged).backbone).__name__ == (
            "CLIPVisionModel"
        )
        assert "hf_secret" not in (merged / "config.json").read_text()
        assert "hf_secret" not in (merged / "README.md").read_text()


def _bert_pool(place: Path, **arguments: object) -> BaseModelPool:
    """Two tasks of a base model on disk that is loaded with more arguments."""
    base = bert(2)
    for name, model in family(base, ("a", "b")).items():
        model.save_pretrained(place / name)
    target = "transformers.BertForSequenceClassification.from_pretrained"

    def entry(name: str) -> dict:
        return {"_target_": target, "pretrained_model_name_or_path": str(place / name)}

    entries = {name: entry(name) for name in ("a", "b")}
    return BaseModelPool({BASE: {**entry(BASE), **arguments}, **entries})


PLAIN = {
    "files": {
        **{"use_safetensors": True, "revision": "main", "subfolder": ""},
        **{"variant": None, "local_files_only": True, "force_download": False},
        **{"weights_only": True, "from_tf": False, "trust_remote_code": False},
    },
    "machine": {
        **{"low_cpu_mem_usage": True, "device_map": "cpu", "cache_dir": "cache"},
        **{"offload_state_dict": False, "max_memory": {"cpu": "9GB"}},
        **{"offload_folder": "offloaded", "offload_buffers": False},
    },
    "secrets": {"token": "hf_secret", "proxies": {"https": "http://hf_secret@proxy"}},
    "types": {"torch_dtype": "float32", "attn_implementation": "eager"},
    "the other name of types": {"dtype": "auto"},
    "heads": {
        **{"ignore_mismatched_sizes": True, "num_labels": 2},
        **{"problem_type": "single_label_classification"},
    },
    "outputs": {
        **{"output_hidden_states": True, "output_attentions": False},
        **{"return_dict": True, "use_cache": False, "pad_token_id": 0},
    },
    "computed": {"layer_norm_eps": 1e-6, "hidden_act": "relu"},
}


@pytest.mark.parametrize("kind", PLAIN)
def test_arguments_that_run_no_code_are_given_again(tmp_path, caplog, kind):
    """And secrets are written nowhere."""
    pool = _bert_pool(tmp_path, **PLAIN[kind])
    if kind == "computed":  # of tasks too
        for task in "ab":
            pool._models[task].update(PLAIN[kind])
    merged = didi(pool, budget=2.0, output_dir=str(tmp_path / "merged"))
    assert "by itself" not in caplog.text
    merged.save_pretrained(tmp_path / "saved")
    again, before = DiDiModel.from_pretrained(tmp_path / "saved").config, merged.config
    for same in PLAIN[kind].keys() - loaders.IGNORED:
        assert getattr(again, same, None) == getattr(before, same, None)
    files = [*(tmp_path / "merged").rglob("*"), *(tmp_path / "saved").rglob("*")]
    for file in filter(Path.is_file, files):
        assert b"hf_secret" not in file.read_bytes()


def test_heads_that_did_not_fit_are_others_every_time(tmp_path):
    pool = _bert_pool(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    didi(pool, budget=20.0, own=["classifier*"]).save_pretrained(tmp_path / "saved")
    again = DiDiModel.from_pretrained(tmp_path / "saved")
    assert again.backbone.classifier.out_features == 5
    assert again.materialize("a").classifier.out_features == 2


@pytest.mark.parametrize(
    "more",
    [
        {"key_mapping": {"a": "b"}},
        {"attn_implementation": {"": "evil/kernel"}},
        {"layer_norm_eps": {"_target_": "os.getcwd"}},
        {"_target_": "load_bert"},
    ],
    ids=str,
)
def test_what_will_not_be_loaded_again_is_told_of(more):
    target = "transformers.BertForSequenceClassification.from_pretrained"
    entry = {"_target_": target, "pretrained_model_name_or_path": "x/y"}
    assert loaders.obstacle("", entry) is None
    assert "backbone=" in str(loaders.obstacle("", {**entry, **more}))


def test_what_will_not_be_loaded_again_is_said_before_the_merge(tmp_path, caplog):
    pool = _bert_pool(tmp_path)
    pool._models[BASE]["_target_"] = f"{__name__}.load_bert"
    merged = didi(pool, budget=2.0)
    assert "by itself" in caplog.text and "load_bert" in caplog.text
    merged.save_pretrained(tmp_path / "saved")
    with pytest.raises(DiDiError, match="load_bert"):
        DiDiModel.from_pretrained(tmp_path / "saved")


def load_bert(pretrained_model_name_or_path: str) -> nn.Module:
    """A loader of somebody's own."""
    return BertForSequenceClassification.from_pretrained(pretrained_model_name_or_path)


def test_a_secret_within_an_argument_is_not_written():
    source = {"pretrained_model_name_or_path": "x/y", "config": {"token": "hf_secret"}}
    assert "hf_secret" not in str(loaders.described(source))


def test_a_relative_place_is_kept_as_the_place_it_was(
    tiny_clip_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_clip_dir)
    pool = CLIPVisionModelPool({name: name for name in (BASE, "mnist", "svhn")})
    model = didi(pool, budget=0.9)
    model.save_pretrained(tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    DiDiModel.from_pretrained("merged")


def test_a_place_that_is_gone_is_named(saved):
    with_backbone(saved, source="/nowhere/base")
    with pytest.raises(DiDiError, match="'/nowhere/base', where no directory"):
        DiDiModel.from_pretrained(saved)


def test_encoders_of_open_clip_come_from_state_dicts(monkeypatch, tmp_path):
    """As the host's pool loads ``{model_name, state_dict_path}``, but never by a pickle."""
    from fusion_bench.models import open_clip

    class Encoder(nn.Linear):
        def __init__(self, name: str):
            assert name == "ViT-B-32"
            super().__init__(2, 2)

    monkeypatch.setattr(open_clip, "ImageEncoder", Encoder)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "base.pt")
    source = {"model_name": "ViT-B-32", "state_dict_path": str(tmp_path / "base.pt")}
    name = loaders.OPEN_CLIP
    found, fresh = loaders.load(name, source, directory=tmp_path)
    assert isinstance(found, Encoder) and not fresh
    torch.save(Bomb(tmp_path / MARK), tmp_path / "base.pt")
    with pytest.raises(DiDiError, match="cannot be loaded"):
        loaders.load(name, source, directory=tmp_path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_type_that_is_none_is_named(tmp_path, key):
    source = {"pretrained_model_name_or_path": str(tmp_path), key: "int8"}
    with pytest.raises(DiDiError, match="given by the type 'int8', expected one of"):
        loaders.load("transformers.LlamaModel", source, directory=tmp_path)


# --- the base model as it was -------------------------------------------------


@pytest.mark.parametrize("how", ["pool", "entry"])
def test_the_type_of_the_base_model_comes_back(tmp_path, how):
    """A pool of bfloat16 models gave a merge that came back in float32."""
    base = write_language_model(tmp_path / BASE, "llama")
    for task, seed in (("mnist", 1), ("svhn", 2)):
        fine_tuned(base, seed).save_pretrained(tmp_path / task)
    names = (BASE, "mnist", "svhn")
    if how == "pool":
        pool = CausalLMPool(
            {name: str(tmp_path / name) for name in names},
            tokenizer=None,
            model_kwargs={"torch_dtype": "bfloat16"},
        )
    else:
        target = "transformers.LlamaForCausalLM.from_pretrained"
        pool = BaseModelPool(
            {
                name: {
                    "_target_": target,
                    "pretrained_model_name_or_path": str(tmp_path / name),
                    "torch_dtype": "bfloat16",
                }
                for name in names
            }
        )
    model = didi(pool, budget=0.9)
    model.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged")
    assert next(again.backbone.parameters()).dtype == torch.bfloat16
    tokens = torch.arange(8)[None]
    for one in (model, again):
        one.set_task("svhn")
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_the_same_values_in_a_larger_type_are_the_same_base_model(tmp_path):
    base = write_language_model(tmp_path / "base").bfloat16()
    models = {t: m.bfloat16() for t, m in family(base).items()}
    didi(models, budget=0.9).save_pretrained(tmp_path / "merged")
    DiDiModel.from_pretrained(tmp_path / "merged", copy.deepcopy(base).float())


@pytest.mark.parametrize("given", [True, False])
def test_tensors_that_were_taken_apart_are_apart_again(tmp_path, given):
    """Fine-tuned models whose head is no longer the embedding of the tied base model."""
    base = write_language_model(tmp_path / BASE)
    for task, seed in (("mnist", 1), ("svhn", 2)):
        tuned = fine_tuned(base, seed)
        weight = tuned.lm_head.weight.detach()
        tuned.lm_head.weight = nn.Parameter(weight + 0.1 * torch.randn(weight.shape))
        tuned.config.tie_word_embeddings = False
        tuned.save_pretrained(tmp_path / task)
    target = "transformers.GPT2LMHeadModel.from_pretrained"
    pool = BaseModelPool(
        {
            name: {
                "_target_": target,
                "pretrained_model_name_or_path": str(tmp_path / name),
            }
            for name in (BASE, "mnist", "svhn")
        }
    )
    model = didi(pool, budget=float("inf"))
    model.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["backbone"]["untied"] == ["lm_head.weight"]
    own = GPT2LMHeadModel.from_pretrained(tmp_path / BASE) if given else None
    again = DiDiModel.from_pretrained(tmp_path / "merged", own)
    tokens = torch.arange(8)[None]
    for task in model.tasks:
        for one in (model, again):
            one.set_task(task)
            one.eval()
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    with_backbone(tmp_path / "merged", untied=["nowhere.weight"])
    with pytest.raises(CheckpointMismatchError, match="no parameter 'nowhere.weight'"):
        DiDiModel.from_pretrained(tmp_path / "merged", base)


# --- nothing outside, and nothing for ever ------------------------------------


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (form, kind)
        for form in ("model", "static", "individuals", "modules")
        for kind in ("up", "absolute", "link", "link on the way")
        # the directory itself may be a link
        if kind != "link on the way" or form in ("individuals", "modules")
    ],
)
def test_files_outside_of_the_directory_are_refused(
    saved, static, tiny_clip, tmp_path, kind, form
):
    """The same bytes, with the right SHA-256, elsewhere."""
    base = tiny_clip.base
    if form == "model":
        directory, inner = saved, Path()
    elif form == "static":
        directory, inner = static, Path()
    elif form == "individuals":
        directory, inner = tmp_path / form, Path("experts/1")
        types = {name: torch.float32 for name, _ in base.named_parameters()}
        save_artifact(tiny_clip.tuned.items(), directory, base=base, types=types)
    else:
        directory = tmp_path / form
        method = MERGE(objective="proxy", evaluations=4, population=4, trees=2)
        method.run(BaseModelPool(tiny_clip.pool_models())).save_pretrained(directory)
        first, *_ = sorted((directory / "modules").iterdir())
        inner = Path("modules", first.name)
    place, outside = directory / inner, tmp_path / "outside"
    outside.mkdir()
    if kind == "link on the way":
        os.rename(place, outside / place.name)
        os.symlink(outside / place.name, place)
    else:
        os.rename(place / "model.safetensors", outside / "model.safetensors")
        if kind == "link":
            os.symlink(outside / "model.safetensors", place / "model.safetensors")
    names = {
        "up": "../" * len(inner.parts) + "../outside/model.safetensors",
        "absolute": str(outside / "model.safetensors"),
    }

    def point(value: object) -> None:
        """Change the names of the file wherever they stand."""
        if isinstance(value, dict):
            if "files" in value and kind in names:
                digest, *_ = value["files"].values()
                value["files"] = {names[kind]: digest}
            for one in value.values():
                point(one)
        elif isinstance(value, list):
            for one in value:
                point(one)

    for file in directory.rglob("*.json"):
        content = json.loads(file.read_text())
        content.pop(CHECKSUM)
        point(content)
        file.write_text(json.dumps(sealed(content)))
    with pytest.raises(CheckpointMismatchError, match="leads out|expected a file of"):
        load_artifact(directory, base)


@pytest.mark.parametrize(
    "directory", ["../outside", "/tmp", "experts/../../x", "experts", ".", ""]
)
def test_directories_of_individuals_lie_inside(tiny_clip, tmp_path, directory):
    base = tiny_clip.base
    types = {name: torch.float32 for name, _ in base.named_parameters()}
    save_artifact(tiny_clip.tuned.items(), tmp_path / "a", base=base, types=types)
    rewrite(tmp_path / "a", lambda c: c["experts"][0].update(directory=directory))
    with pytest.raises(CheckpointMismatchError, match="directory|leads out"):
        load_artifact(tmp_path / "a", base)


@pytest.mark.parametrize("id", ["..", "../modules", "/", "a/b", ""])
def test_ids_of_modules_are_names(tiny_clip, tmp_path, id):
    method = MERGE(objective="proxy", evaluations=4, population=4, trees=2)
    model = method.run(BaseModelPool(tiny_clip.pool_models()))
    model.save_pretrained(tmp_path / "a")
    rewrite(tmp_path / "a", lambda c: c["chains"].update(mnist=[id]))
    with pytest.raises(CheckpointMismatchError, match="leads out"):
        load_artifact(tmp_path / "a", tiny_clip.base)


def test_links_within_a_directory_and_of_the_hubs_cache_are_followed(
    saved, tiny_clip, tmp_path
):
    """``snapshots/<revision>/<file>`` links to ``blobs``."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(saved.iterdir())):
        os.rename(file, repository / "blobs" / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / file.name)
    DiDiModel.from_pretrained(snapshot, tiny_clip.base)
    os.symlink(snapshot, tmp_path / "latest")
    DiDiModel.from_pretrained(tmp_path / "latest", copy.deepcopy(tiny_clip.base))
    (saved / "real").touch()
    os.symlink("real", saved / "link")
    assert inside(saved, "link") == saved / "link"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "device", "socket"]
)
def test_what_is_no_file_does_not_hang(saved, tiny_clip, name):
    import socket

    file = saved / ("config.json" if name == "config.json" else "model.safetensors")
    file.unlink()
    if name == "device":
        os.symlink("/dev/zero", file)
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(file))
    else:
        os.mkfifo(file)
    with pytest.raises((CheckpointMismatchError, FileNotFoundError), match=file.name):
        DiDiModel.from_pretrained(saved, tiny_clip.base)
