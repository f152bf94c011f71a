"""Matrices that are known to be stored whole without being decomposed: nothing else is stored for it."""

import pytest
import torch
from helpers import same_bits, without_codes
from steep_layers import TASKS, decaying, low_rank, merged, steep, task_vectors
from torch import Tensor

from fusion_bench_didi.merging import pipeline, spectra
from fusion_bench_didi.merging.forms.early_decision import WORTH
from fusion_bench_didi.merging.results import MergeResult


def stored(result: MergeResult) -> dict[str, Tensor]:
    return {
        f"{task}/{name}/{part}": value
        for task, deltas in result.experts.items()
        for name, delta in deltas.items()
        for part, value in delta.tensors().items()
    }


@pytest.fixture(autouse=True)
def fixed_widths(monkeypatch) -> None:
    without_codes(monkeypatch)


@pytest.fixture
def decomposed(monkeypatch) -> list[str]:
    """Names of the matrices that are decomposed for all tasks."""
    names, decompose = [], spectra._decompose

    def noted(context, bounds, name, *args):
        names.append(name)
        return decompose(context, bounds, name, *args)

    monkeypatch.setattr(spectra, "_decompose", noted)
    return names


@pytest.mark.parametrize("bits", [4.5, 6.0, 9.0, 40.0])
def test_what_is_stored_is_what_decompositions_would_have_chosen(
    monkeypatch, decomposed, bits
):
    vectors = task_vectors(decaying, decaying, still=True)
    found = merged(vectors, bits)
    assert not decomposed
    monkeypatch.setattr(pipeline, "sample_of", lambda *_: None)
    expected = merged(vectors, bits)
    assert decomposed
    assert found.ranks == expected.ranks
    assert found.report.precision == expected.report.precision
    assert same_bits(stored(found), stored(expected))
    for name, error in found.report.errors.items():
        torch.testing.assert_close(error, expected.report.errors[name])
    assert "0.weight" not in found.experts[TASKS[-1]]


def test_task_vectors_of_low_rank_are_still_found(monkeypatch):
    vectors = task_vectors(low_rank, decaying)
    found = merged(vectors, 6.0)
    assert all(found.ranks.experts[task]["1.weight"] == 280 for task in TASKS)
    assert found.report.errors["0.weight"].max() < 1e-6
    monkeypatch.setattr(pipeline, "sample_of", lambda *_: None)
    expected = merged(vectors, 6.0)
    assert found.report.precision == expected.report.precision
    for task in TASKS:
        # beyond the sixth direction there is nothing but rounding
        assert 6 <= found.ranks.experts[task]["0.weight"] < 280
        assert expected.ranks.experts[task]["1.weight"] == 280


def test_what_tasks_have_in_common_is_still_shared():
    """At a budget that pays for whole matrices, one whole shared one and small experts are better."""
    alike = lambda m, n, seed: decaying(m, n, 0) + 0.2 * decaying(
        m, n, seed
    )  # noqa: E731
    both = merged(task_vectors(alike), 4.5, shared="auto")
    alone = merged(task_vectors(alike), 4.5, shared="none")
    assert both.storage.shared_bits > 0
    assert both.report.relative_error < 0.5 * alone.report.relative_error


@pytest.mark.parametrize("bits", [3.2, 4.5])
def test_sharing_beside_whole_experts_needs_no_decomposition_of_them(
    monkeypatch, decomposed, bits
):
    """A few directions are common to all tasks; experts are whole with and without them."""

    def somewhat_alike(m: int, n: int, seed: int) -> Tensor:
        return decaying(m, n, seed) + 0.1 * low_rank(m, n, 0, rank=3)

    vectors = task_vectors(somewhat_alike, somewhat_alike)
    found = merged(vectors, bits)
    assert not decomposed
    assert found.storage.shared_bits > 0
    monkeypatch.setattr(pipeline, "sample_of", lambda *_: None)
    expected = merged(vectors, bits)
    assert found.report.relative_error < 1.001 * expected.report.relative_error


def test_a_budget_for_less_than_whole_matrices_decomposes_them(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fusion_bench_didi.merging.forms.early_decision.optimistic_spectrum",
        lambda *_, **__: asked.append(0),
    )
    merged(task_vectors(decaying, decaying), 2.0)
    assert not asked


@pytest.mark.parametrize("bits", [2.6, 3.2, 4.5])
def test_only_what_one_task_finds_of_low_rank_is_decomposed(
    monkeypatch, decomposed, bits
):
    vectors = task_vectors(steep, decaying, decaying, steep)
    found = merged(vectors, bits)
    assert set(decomposed) == {"0.weight", "3.weight"}
    monkeypatch.setattr(pipeline, "sample_of", lambda *_: None)
    expected = merged(vectors, bits)
    assert found.report.relative_error < 1.02 * expected.report.relative_error


@pytest.mark.parametrize("bits", [2.2, 2.6, 3.0, 3.4, 5.0, 7.0])
def test_what_is_not_looked_into_costs_no_more_than_is_said(monkeypatch, bits):
    vectors = task_vectors(decaying, decaying, decaying, decaying)
    found = merged(vectors, bits)
    monkeypatch.setattr(pipeline, "sample_of", lambda *_: None)
    expected = merged(vectors, bits)
    most = 1 / (1 - WORTH) + 0.02
    assert found.report.relative_error < most * expected.report.relative_error


@pytest.mark.parametrize("few", [True, False])
def test_errors_beside_a_shared_part_are_those_of_what_is_stored(few):
    """Rounded straight from the checkpoints, experts take what the stored shared part leaves."""

    def alike(m: int, n: int, seed: int) -> Tensor:
        common = 0.1 * low_rank(m, n, 0, rank=3) if few else decaying(m, n, 0)
        return decaying(m, n, seed) + common

    vectors = task_vectors(alike, alike)
    found = merged(vectors, 4.5)
    shared = found.ranks.shared.values()
    assert any(0 < k < 280 for k in shared) if few else 280 in shared
    assert all(k == 280 for e in found.ranks.experts.values() for k in e.values())
    for name, errors in found.report.errors.items():
        rest = [
            tau - found.experts[task][name].change(found.shared.get(name))
            for task, tau in zip(TASKS, vectors.read(name))
        ]
        expected = torch.stack([x.double().square().sum() for x in rest])
        torch.testing.assert_close(errors, expected, rtol=1e-4, atol=0)
