"""What is offered to the host fits the host that is installed, and merges as the plugin does."""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

import fusion_bench
import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import REPOSITORY, OpenClipLike, family
from omegaconf import OmegaConf

from fusion_bench_didi.method.didi import DiDiMerging

UPSTREAM = REPOSITORY / "upstream"
HOST = Path(fusion_bench.__file__).resolve().parents[1]


@pytest.fixture
def contributed(monkeypatch):
    """The modules of the contributions, as if the host had them."""
    host = {
        "fusion_bench.models.modulator": "tsv_c",
        "fusion_bench.method": "didi_merging",
    }
    before = set(sys.modules)
    for package, contribution in host.items():
        files = UPSTREAM / contribution / "files" / package.replace(".", "/")
        place = importlib.import_module(package).__path__
        monkeypatch.setattr(sys.modules[package], "__path__", [*place, str(files)])
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith(("fusion_bench.method.didi", "fusion_bench.models.mod")):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.skipif(
    version("fusion_bench") != "0.2.33", reason="the edits are for release 0.2.33"
)
def test_every_edit_fits_the_installed_host(monkeypatch):
    monkeypatch.syspath_prepend(UPSTREAM)
    apply = importlib.import_module("apply")
    for contribution in apply.CONTRIBUTIONS:
        kinds = [change.kind for change in apply.changes(HOST, contribution)]
        assert "new" in kinds and "edited" in kinds


def test_an_edit_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(UPSTREAM)
    apply = importlib.import_module("apply")
    edit = apply.Edit.of({"file": "a.py", "find": "x = 1\n", "replace": "x = 2\n"})
    assert edit.applied("x = 1\ny = 3\n") == "x = 2\ny = 3\n"
    for text in ("", "x = 1\nx = 1\n"):
        with pytest.raises(apply.DoesNotFit, match="a.py: expected once"):
            edit.applied(text)


@pytest.mark.parametrize("budget", [0.5, 1.4])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compact_form_is_the_paper_preset(contributed, budget):
    compact = contributed("fusion_bench.method.didi_merging.didi_merging")
    few = {"budget": budget, "rank_steps": 40, "refine_steps": 40}
    models = family(OpenClipLike(), ("a", "b", "c"))
    preset = OmegaConf.load(REPOSITORY / "config/method/didi/paper.yaml")
    del preset["defaults"]
    theirs = compact.DiDiMerging(**few).run(BaseModelPool(models))
    ours = DiDiMerging(**{**preset, **few}).run(BaseModelPool(models))
    assert theirs.numel() * 32 == ours.storage.x_excl * ours.unit_bits
    for task in ours.tasks:
        theirs.set_task(task)
        ours.set_task(task)
        found, expected = theirs.backbone.state_dict(), ours.backbone.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
