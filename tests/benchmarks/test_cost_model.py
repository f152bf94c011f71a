"""The cost model: what is counted is what was done, and seconds follow from counts and rates alone."""

import json
from dataclasses import fields, replace

import pytest
import torch
from helpers import REPOSITORY

from benchmarks.cost_forecast import MODELS, counts_of
from benchmarks.cost_page import page
from benchmarks.cost_rates import KINDS, Rates, mean_of, seconds
from benchmarks.counting import counting, sized
from fusion_bench_didi.distributed.ownership import SOLO
from fusion_bench_didi.task_vectors.loop import spread

RATES = Rates(
    sized={f"{kind} 3": 2.0 for kind in KINDS},
    **{f.name: 2.0 for f in fields(Rates) if f.name != "sized"},
)


def test_counts_are_of_what_is_done():
    a, b, large = torch.ones(3, 4), torch.ones(4, 5), torch.ones(2**19)

    def work(_: str) -> None:
        a @ b
        torch.linalg.eigh(torch.eye(10))

    with counting() as found:
        list(spread(SOLO, "stage", work, ["x", "y"]))
        a + 1
        large.mul_(2)
        large.view(2, -1)  # costs nothing
    product = 2 * 3 * 4 * 5
    assert found["shared"][sized("product", product)] == 2 * product
    assert found["shared"][sized("eigh", 100)] == 2 * 10**3
    assert found["own"][sized("fresh", 12)] == 12
    assert found["own"][sized("pass", 2**19)] == 2**19  # in place
    assert found["own"]["calls"] == 2 and found["own"]["messages"] > 0
    assert not any(kind.startswith("product") for kind in found["own"])


def test_work_is_of_the_nearest_size_that_was_timed():
    rates = replace(RATES, sized={"product 6": 3.0, "product 9": 5.0, "eigh 9": 7.0})
    assert rates.of("product 2") == rates.of("product 7") == 3.0
    assert rates.of("product 8") == rates.of("product 14") == 5.0


def test_mean_rate_is_that_of_all_work_together():
    found = mean_of([replace(RATES, read=1.0), replace(RATES, read=3.0)])
    assert found.read == pytest.approx(2 / (1 / 1 + 1 / 3))
    assert found.sized == RATES.sized


def test_seconds_are_counts_over_rates():
    counts = {"shared": {"calls": 4, "product 3": 8}, "own": {"calls": 1, "read": 6}}
    one = seconds(counts, RATES)
    assert one["products"] == 4 and one["reading"] == 3
    assert one["calls"] == 10 and one["start"] == 2
    two = seconds(counts, RATES, 2)
    assert two["products"] == 2 and two["reading"] == 3 and two["calls"] == 6


def test_a_model_of_twice_the_tasks_is_twice_the_work():
    like = {"matrices": 2, "tasks": 4, "numbers": 100, "side": 10, "rank": None}
    like["counts"] = {"shared": {"calls": 3, "fresh 4": 5}, "own": {"calls": 1}}
    model = MODELS[0]
    counts = counts_of(model, like)
    pairs = model.matrices * model.tasks / 8
    assert counts["shared"]["calls"] == 3 * pairs and counts["own"]["calls"] == pairs
    numbers = model.numbers * model.tasks / 400
    assert counts["shared"]["fresh 4"] == pytest.approx(5 * numbers)


def test_page_shows_the_figures_beside_it():
    docs = REPOSITORY / "docs"
    found = json.loads((docs / "cost_model.json").read_text())
    assert (docs / "cost_model.md").read_text() == page(found, docs)
