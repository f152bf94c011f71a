"""Saved models: equal bits and logits back (law 8), the account in bytes (law 5), whole or not at all."""

import json
import os
import shutil
import struct

import pytest
import torch
from helpers import BASE, OpenClipLike, didi, family, fine_tuned, floats, same_bits
from safetensors import safe_open
from torch import nn
from transformers import CLIPVisionModel

from fusion_bench_didi.checkpoint.fields import CHECKSUM, sealed
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.method import TSVCompression
from fusion_bench_didi.models.dynamic import DiDiModel

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CHOICES = [
    {},
    {"factor_dtype": "bfloat16", "residual": "full", "allocation": "learned"},
    {"factor_dtype": "int8"},
    {"factor_dtype": "auto", "budget": 0.3},
    {"vectors": "shared", "shared": "none"},
    {"vectors": "pretrained", "budget": 0.2},
    {"budget": float("inf")},
]


@pytest.fixture
def model(tiny_clip):
    return didi(tiny_clip.pool_models(), budget=0.9)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def stored_tensors(directory) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                assert name not in found
                found[name] = handle.get_tensor(name)
    return found


def assert_same_models(left: DiDiModel, right: DiDiModel) -> None:
    assert left.tasks == right.tasks
    for task in left.tasks:
        one, two = left.materialize(task), right.materialize(task)
        assert same_bits(floats(one), floats(two))
        for model in (left, right):
            model.set_task(task)
        outputs = [m(IMAGES) for m in (left, right)]
        assert outputs[0][0].equal(outputs[1][0])


# --- laws 5 and 8 -------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_saved_model_comes_back_and_its_size_is_the_account(
    choice, tiny_clip, tmp_path
):
    model = didi(tiny_clip.pool_models(), **{"budget": 0.9, **choice})
    model.set_task("svhn")  # what is on must not matter
    model.save_pretrained(tmp_path / "merged")
    tensors = stored_tensors(tmp_path / "merged")
    bytes_stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert 8 * bytes_stored == model.storage.excl_bits

    again = DiDiModel.from_pretrained(tmp_path / "merged", backbone=tiny_clip.base)
    assert again.storage == model.storage
    assert_same_models(model, again)


def test_nothing_else_than_the_account_is_in_the_file(model, saved):
    """Header aside, the file is as long as the account says."""
    file = saved / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert 8 * (file.stat().st_size - 8 - header) == model.storage.excl_bits


def test_other_families_come_back(tmp_path):
    models = family(OpenClipLike(), ("llama-3.1", "a/b"))
    model = didi(models, budget=0.9)
    model.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged", backbone=models[BASE])
    assert_same_models(model, again)


def test_backbone_is_found_again_where_the_merge_took_it(tiny_clip_dir, tmp_path):
    from fusion_bench.modelpool import CLIPVisionModelPool

    names = [p.name for p in tiny_clip_dir.iterdir()]
    pool = CLIPVisionModelPool({name: str(tiny_clip_dir / name) for name in names})
    model = didi(pool, budget=0.9)
    pool.save_model(model, str(tmp_path / "merged"))  # as the host's program does
    again = DiDiModel.from_pretrained(tmp_path / "merged")
    assert isinstance(again.backbone, CLIPVisionModel)
    assert_same_models(model.eval(), again.eval())
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "`svhn` in a local directory" in card and "budget 0.9" in card
    assert str(tiny_clip_dir) not in card


def test_a_saved_model_can_be_saved_again(saved, tiny_clip, tmp_path):
    again = DiDiModel.from_pretrained(saved, backbone=tiny_clip.base)
    again.save_pretrained(tmp_path / "twice")
    assert (saved / "config.json").read_text() == (
        tmp_path / "twice" / "config.json"
    ).read_text()
    first, second = stored_tensors(saved), stored_tensors(tmp_path / "twice")
    assert same_bits(first, second)


def test_large_models_are_written_in_shards(model, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_bench_didi.checkpoint.stream.MAX_SHARD", 50_000)
    model.save_pretrained(tmp_path / "merged")
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    tensors = stored_tensors(tmp_path / "merged").values()
    assert 8 * sum(t.nbytes for t in tensors) == model.storage.excl_bits
    again = DiDiModel.from_pretrained(tmp_path / "merged", backbone=tiny_clip.base)
    assert_same_models(model, again)


def test_configuration_tells_what_was_done(model, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == 2 and config["tasks"] == model.tasks
    assert config["storage"]["x_excl"] == model.storage.x_excl
    assert config["info"]["ranks"] == model.info["ranks"]
    assert config["info"]["settings"]["allocation"] == "greedy"
    assert config["backbone"]["class"].endswith("CLIPVisionModel")
    assert set(config["versions"]) >= {"torch", "fusion-bench", "fusion-bench-didi"}


def test_names_that_run_together_do_not_collide(tmp_path):
    """Task ``t`` with tensor ``a.b`` and task ``t.a`` with tensor ``b``."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Module()
            self.a.b = nn.Parameter(torch.zeros(3, 4))
            self.b = nn.Parameter(torch.zeros(3, 4))

    models = family(Nested(), ("t", "t.a"))
    model = didi(models, budget=float("inf"))
    model.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged", backbone=models[BASE])
    for task in model.tasks:
        one, two = model.materialize(task), again.materialize(task)
        assert same_bits(floats(one), floats(two))


def test_a_model_that_stores_nothing_can_be_saved(tiny_clip, tmp_path):
    vectors = [n for n, p in tiny_clip.base.named_parameters() if p.ndim < 2]
    method = TSVCompression(rank_fraction=1e-3, conv="matrix", exclude=vectors)
    model = method.run(tiny_clip.pool_models())  # of rank zero everywhere
    assert model.storage.excl_bits == 0
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged", backbone=tiny_clip.base)
    assert same_bits(floats(again.materialize("mnist")), floats(tiny_clip.base))


# --- whole or not at all ------------------------------------------------------


def listing(directory) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_existing_directory_is_refused_and_can_be_overwritten(
    model, tiny_clip, saved, tmp_path
):
    (saved / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"merged exists.*overwrite=True"):
        model.save_pretrained(saved)
    assert (saved / "mine.txt").read_text() == "keep"
    less = didi(tiny_clip.pool_models(), budget=0.5)
    less.save_pretrained(saved, overwrite=True)
    again = DiDiModel.from_pretrained(saved, backbone=tiny_clip.base)
    assert again.storage == less.storage
    assert listing(tmp_path) == ["merged"]
    assert (saved / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("links", [True, False])
def test_what_someone_put_beside_a_model_stays_when_it_is_replaced(
    model, saved, monkeypatch, links
):
    """And nothing of the old model does, nor what the hub's client left."""
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    kept = {"results.json", ".gitattributes", "experts/notes.md"}
    for name in kept:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text(name)
    (saved / ".gitattributes").chmod(0o600)
    (saved / "latest").symlink_to("nowhere")
    ours = ("model.safetensors.index.json", "README.md", ".cache/hub/x.json")
    for name in ours:
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_text("old")
    model.save_pretrained(saved, overwrite=True)
    assert all((saved / name).read_text() == name for name in kept)
    assert (saved / ".gitattributes").stat().st_mode & 0o777 == 0o600
    assert os.readlink(saved / "latest") == "nowhere"
    assert (saved / "README.md").read_text() != "old"
    assert not (saved / ours[0]).exists() and not (saved / ".cache").exists()
    model.save_pretrained(saved, overwrite=True)  # as often as one likes
    assert all((saved / name).read_text() == name for name in kept)


def refuse(*_, **__):
    raise OSError("no links here")


class Interrupted(BaseException):
    """Like KeyboardInterrupt: nobody catches it."""


@pytest.mark.parametrize(
    "step",
    [
        "checkpoint.stream.save_file",
        "models.saving.model_card",
        "checkpoint.stream.file_digest",
    ],
)
def test_interrupted_write_leaves_nothing(model, tmp_path, monkeypatch, step):
    def interrupt(*_, **__):
        lock, part = sorted(tmp_path.iterdir(), key=lambda path: path.suffix)
        assert part.name.startswith(".merged.") and part.name.endswith(".tmp")
        assert lock.name == ".merged.lock"
        raise Interrupted

    monkeypatch.setattr(f"fusion_bench_didi.{step}", interrupt)
    with pytest.raises(Interrupted):
        model.save_pretrained(tmp_path / "merged")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("step", ["write", "exchange", "first", "second"])
def test_interrupted_overwrite_leaves_the_old_model(
    model, saved, tiny_clip, tmp_path, monkeypatch, step
):
    """``first`` and ``second`` are the renames of systems that cannot exchange two names."""
    rename, done = os.rename, []

    def interrupt(*arguments, **_):
        done.append(arguments)
        if step == "second" and len(done) == 1 or len(done) > 2:
            return rename(*arguments)
        raise Interrupted

    checkpoint = "fusion_bench_didi.checkpoint."
    if step in ("first", "second"):
        monkeypatch.setattr(f"{checkpoint}exchange._renamed", lambda *_: False)
    target = {"write": "stream.save_file", "exchange": "directory.exchange"}
    target = target.get(step, "exchange.os.rename")
    monkeypatch.setattr(f"{checkpoint}{target}", interrupt)
    with pytest.raises(Interrupted):
        model.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert done
    again = DiDiModel.from_pretrained(saved, backbone=tiny_clip.base)
    assert again.storage == model.storage
    assert listing(tmp_path) == ["merged"]


# --- damaged or wrong files ---------------------------------------------------


def rewrite_config(saved, change) -> None:
    """As someone would who knows how it is sealed."""
    path = saved / "config.json"
    config = json.loads(path.read_text())
    del config[CHECKSUM]
    change(config)
    path.write_text(json.dumps(sealed(config)))


def expect_refused(saved, backbone, message, error=CheckpointMismatchError):
    with pytest.raises(error, match=message):
        DiDiModel.from_pretrained(saved, backbone=backbone)


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "damaged, message",
    [
        (lambda content: content[:-100], "is not a whole safetensors file"),
        (lambda content: struct.pack("<Q", 2**40) + content[8:], "is not a whole safe"),
        (
            lambda content: flipped(content, -1),
            "was altered after it was written.*SHA-256",
        ),
        (
            lambda content: flipped(content, -4000),
            "was altered after it was written.*SHA-256",
        ),
        (lambda content: None, "is missing; config.json lists it"),
    ],
)
def test_damaged_file_is_refused(saved, tiny_clip, damaged, message):
    file = saved / "model.safetensors"
    content = damaged(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    expect_refused(saved, tiny_clip.base, f"model.safetensors.*{message}")


def test_tensor_that_is_in_no_file_is_named(saved, tiny_clip):
    rewrite_config(
        saved, lambda config: config["deltas"][0].update(key="shared/unheard_of")
    )
    expect_refused(saved, tiny_clip.base, r"tensor shared/unheard_of\.\w+ is listed")


def test_what_is_no_merged_model_is_refused(tmp_path, saved, tiny_clip):
    expect_refused(
        tmp_path, None, "is not a merged model saved by fusion", FileNotFoundError
    )
    rewrite_config(saved, lambda config: config.update(format=99))
    expected = "format 99, this version reads 1 to 3"
    expect_refused(saved, tiny_clip.base, expected, DiDiError)


def test_wrong_backbone_is_refused(saved, tiny_clip, make_tiny_clip):
    wrong = "backbone given is not the one .* its weights differ"
    expect_refused(saved, tiny_clip.tuned["mnist"], wrong)
    expect_refused(saved, make_tiny_clip(seed=1).base, wrong)
    close = fine_tuned(tiny_clip.base, 1, scale=1e-4)
    expect_refused(saved, close, wrong)
    expect_refused(
        saved, OpenClipLike(), r"\(OpenClipLike\) has no tensor '(vision_|encoder)"
    )


def test_backbone_that_was_only_in_memory_must_be_given(saved):
    expect_refused(
        saved, None, "merged from modules in memory. Pass backbone", DiDiError
    )


def test_moved_directory_still_loads(saved, model, tiny_clip, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    again = DiDiModel.from_pretrained(tmp_path / "elsewhere", backbone=tiny_clip.base)
    assert_same_models(model, again)
