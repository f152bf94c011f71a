"""Architectures that nobody here made, of the sweep over all: those that once were merged, switched or written wrongly."""

import pytest

from benchmarks.architectures import BUILT, NOT_TRIED, page, row

TELLING = {
    "GotOcr2ForConditionalGeneration": "ties its head by a part of its configuration",
    "MarianMTModel": "does not save its tables of positions",
    "MusicgenForCausalLM": "has several heads",
}


@pytest.mark.parametrize("name", TELLING)
def test_what_can_be_tried_passes(name):
    found = dict(row(name, "images and text", without=("small budget", "planned")))
    assert found[BUILT] == "yes" and list(found.values()).count("yes") > 5
    assert not {c: s for c, s in found.items() if s != "yes" and not s.startswith(NOT_TRIED)}  # fmt: skip


def test_the_page_counts_what_passed_and_lists_the_rest():
    yes = {"kind": "language", BUILT: "yes"}
    rows = {
        "A": {**yes, "tensors": "yes", "generate": f"{NOT_TRIED}it does not"},
        "B": {**yes, "tensors": "AssertionError: 1 tensor is wrong", "generate": "yes"},
        "C": {**yes, "tensors": "AssertionError: 7 tensor is wrong", "generate": "yes"},
        "D": {"kind": "language", BUILT: "ImportError: no such thing"},
    }
    text = page({"versions": "transformers 0", "rows": rows})
    assert "| language | 4 | 3 | 1/3 | 2 |" in text
    assert "- **tensors**, `B`, `C`: AssertionError: 1 tensor is wrong" in text
    assert "- **generate**, `A`: it does not" in text
    assert "- `D`: ImportError: no such thing" in text
