"""Rows of the comparison that are called tuned have the scales that were best on validation."""

import json

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from benchmarks.tuned_scales import ENTRIES

FOUND = json.loads((REPOSITORY / "docs" / "tuned_scales.json").read_text())


@pytest.mark.parametrize("key, setting", ENTRIES.items())
def test_tuned_rows_are_of_the_best_scale(key, setting):
    entries = OmegaConf.load(REPOSITORY / "config" / "didi_compare.yaml").entries
    tuned, plain = entries[f"{key}_tuned"], entries[key]
    accuracy = FOUND["accuracy"][key]
    best = float(max(accuracy, key=accuracy.get))
    assert tuned.overrides[setting] == FOUND["best"][key] == best
    assert min(map(float, accuracy)) < best < max(map(float, accuracy))
    assert {**tuned.overrides, setting: 0} == {**plain.overrides, setting: 0}
    assert tuned.uses_data == "labels" and tuned.method == plain.method
