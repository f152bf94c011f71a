"""The cost model: what is counted is what was done, and seconds follow from counts and rates alone."""

import json
from dataclasses import fields

import pytest
import torch
from helpers import REPOSITORY

from benchmarks.cost_forecast import MODELS, counts_of
from benchmarks.cost_page import page
from benchmarks.cost_rates import Rates, seconds
from benchmarks.counting import LARGE, counting
from fusion_bench_didi.distributed.ownership import SOLO
from fusion_bench_didi.task_vectors.loop import spread

RATES = Rates(**{f.name: 2.0 for f in fields(Rates)})


def test_counts_are_of_what_is_done():
    a, b, large = torch.ones(3, 4), torch.ones(4, 5), torch.ones(LARGE)

    def work(_: str) -> None:
        a @ b
        torch.linalg.eigh(torch.eye(10))

    with counting() as found:
        list(spread(SOLO, "stage", work, ["x", "y"]))
        a + 1
        large.mul_(2)
        large.view(2, -1)  # costs nothing
    assert found["shared"]["operations"] == 2 * 2 * 3 * 4 * 5
    assert found["shared"]["eigen"] == 2 * 9 * 10**3
    assert found["own"]["in cache"] == 12 and found["own"]["from memory"] == LARGE
    assert found["own"]["calls"] == 2 and found["own"]["messages"] > 0
    assert "operations" not in found["own"]


def test_seconds_are_counts_over_rates():
    counts = {"shared": {"calls": 4, "operations": 8}, "own": {"calls": 1, "read": 6}}
    one = seconds(counts, RATES)
    assert one["products"] == 4 and one["reading"] == 3
    assert one["calls"] == 10 and one["start"] == 2
    two = seconds(counts, RATES, 2)
    assert two["products"] == 2 and two["reading"] == 3 and two["calls"] == 6


def test_a_model_of_twice_the_tasks_is_twice_the_work():
    like = {"matrices": 2, "tasks": 4, "numbers": 100, "side": 10, "rank": None}
    like["counts"] = {"shared": {"calls": 3, "in cache": 5}, "own": {"calls": 1}}
    model = MODELS[0]
    counts = counts_of(model, like)
    pairs = model.matrices * model.tasks / 8
    assert counts["shared"]["calls"] == 3 * pairs and counts["own"]["calls"] == pairs
    numbers = model.numbers * model.tasks / 400
    assert counts["shared"]["in cache"] == pytest.approx(5 * numbers)


def test_page_shows_the_figures_beside_it():
    docs = REPOSITORY / "docs"
    found = json.loads((docs / "cost_model.json").read_text())
    assert (docs / "cost_model.md").read_text() == page(found, docs)
