"""The hub: what is uploaded is the merged model, what is loaded by name is it again; the client is a folder here."""

import copy
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from commands import run
from fusion_bench.modelpool import CLIPVisionModelPool
from helpers import didi, floats, same_bits
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open

import fusion_bench_didi
from fusion_bench_didi.editing import rescale
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.models import publishing
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.models.overview import is_repository
from fusion_bench_didi.models.publishing import portable

HUB_BASE = "someone/base-tower"


class Hub:
    """Repositories as folders; the calls of the hub's client that are used."""

    def __init__(self, place: Path):
        self.place, self.calls = place, []

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        (self.place / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.calls.append(("create", repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("branch", branch))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        shutil.copytree(folder_path, self.place / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id, *, revision, token, ignore_patterns):
        assert "*.py" in ignore_patterns and "*.bin" in ignore_patterns
        if not (self.place / repo_id).is_dir():
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404: no such repository", response=response)
        return str(self.place / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    stub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub.snapshot_download)
    return stub


@pytest.fixture
def merged(tiny_clip_dir) -> DiDiModel:
    """Of a pool of directories."""
    names = [p.name for p in tiny_clip_dir.iterdir()]
    return didi(
        CLIPVisionModelPool({n: str(tiny_clip_dir / n) for n in names}), budget=0.5
    )


def test_what_is_uploaded_is_the_merged_model(hub, merged, tiny_clip_dir):
    merged.set_task("svhn")  # what is on must not matter
    where = merged.push_to_hub(
        "me/merged",
        base_model=HUB_BASE,
        license="mit",
        datasets=["ylecun/mnist"],
        private=True,
    )
    assert where == "https://hub/me/merged/commit/1"
    assert hub.calls == [("create", "me/merged", True)]
    place = hub.place / "me" / "merged"
    assert {p.name for p in place.iterdir()} == (
        {"README.md", "config.json", "model.safetensors"}
    )
    for file in ("README.md", "config.json"):
        assert str(tiny_clip_dir) not in (place / file).read_text()
    card = (place / "README.md").read_text()
    for line in (f"base_model: {HUB_BASE}", "license: mit", "- ylecun/mnist"):
        assert line in card
    assert merged.info["backbone"]["source"] == str(tiny_clip_dir / "_pretrained_")

    again = fusion_bench_didi.load("me/merged", tiny_clip_dir / "_pretrained_")
    assert type(again) is DiDiModel and again.tasks == merged.tasks
    for task in merged.tasks:
        left, right = merged.materialize(task), again.materialize(task)
        assert same_bits(floats(left), floats(right))


def test_edits_do_not_tell_where_they_were_made(merged, tmp_path):
    merged.save_pretrained(tmp_path / "large")
    rescale(tmp_path / "large", budget=0.2, output_dir=tmp_path / "small")
    backbone = copy.deepcopy(merged.backbone)
    small = DiDiModel.from_pretrained(tmp_path / "small", backbone)
    assert str(tmp_path) in str(small.info["edits"])
    told = portable(small.info)["edits"]
    assert told[-1]["operation"] == "rescale" and str(tmp_path) not in str(told)


@pytest.mark.parametrize("place", ["./gone", "/data", "../x", "a/b/c", "", None])
def test_places_are_no_names_of_repositories(place):
    assert not is_repository(place)
    assert is_repository("gpt2") and is_repository("openai/clip-vit-base-patch32")


def test_a_base_model_that_no_reader_can_find_is_said(hub, merged, caplog):
    merged.push_to_hub("me/merged", revision="try")
    assert "pass the base model by hand" in caplog.text
    assert ("branch", "try") in hub.calls
    with pytest.raises(DiDiError, match="does not say where its backbone"):
        DiDiModel.from_pretrained("me/merged")


def refusal(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status} Client Error.\n\nMore of it.", response=response)


@pytest.mark.parametrize(
    "error, told",
    [
        (refusal(401), r"me/m cannot .*\(HfHubHTTPError: 401 .*hf auth login.$"),
        (refusal(403), r"hf auth login.$"),
        (refusal(500), r"\(HfHubHTTPError: 500 .*Mend the name or the connection"),
        (ConnectionError(), r"\(ConnectionError\). Mend the name or the connection"),
    ],
)
def test_a_repository_that_may_not_be_written_to_is_told_before_files_are_made(
    hub, merged, monkeypatch, error, told
):
    def create_repo(*_, **__):
        raise error

    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(publishing, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(DiDiError, match=told):
        merged.push_to_hub("me/m")


def test_an_upload_that_breaks_off_is_told_in_a_line(hub, merged, monkeypatch):
    def upload_folder(**_):
        raise refusal(403)

    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    with pytest.raises(DiDiError, match="me/m cannot be written to.*hf auth login"):
        merged.push_to_hub("me/m")


def test_what_cannot_be_uploaded_is_told_before_a_model_is_read(hub, monkeypatch):
    with pytest.raises(DiDiError, match="no name that a repository can have"):
        run("push", "nowhere", "me/a b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DiDiError, match="HF_HUB_OFFLINE is set. Unset it"):
        run("push", "nowhere", "me/m")
    assert not hub.calls


def test_a_repository_that_is_not_there_is_said(hub):
    with pytest.raises(DiDiError, match="neither a directory nor a repository"):
        DiDiModel.from_pretrained("me/nothing")
    with pytest.raises(FileNotFoundError):
        DiDiModel.from_pretrained("me/not/a/name")


def test_the_snippet_of_the_card_runs(merged, tmp_path, monkeypatch):
    merged.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(tmp_path / "m")
    names: dict = {}
    exec(code, names)
    assert names["model"].current_task == merged.tasks[0]


def test_the_header_says_who_wrote_it(merged, tmp_path):
    merged.save_pretrained(tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as opened:
        (told,) = opened.metadata().items()
    assert told == ("fusion-bench-didi", f"{version('fusion-bench-didi')}, format 2")


def test_routers_go_by_their_name(merged):
    merged.attach_router("subspace", directions=4)
    assert merged.router.kind == "projection" and merged.router.directions == 4
    images = torch.zeros(2, 3, 32, 32)
    assert merged(images).pooler_output.shape[0] == 2
    assert merged.attach_router(None).router is None
