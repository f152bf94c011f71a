"""Entropy-coded experts: they win at small budgets, keep to their bits, and hold more of the signal than least error would."""

import copy

import pytest
import torch
from helpers import merge_settings, task_vectors, without_codes
from test_golden import decaying, layers
from torch import Tensor, nn

from fusion_bench_didi.allocation.coded_curve import CodedCurve
from fusion_bench_didi.deltas.coded import CodedDelta, CodedLowRankDelta
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.results import MergeResult
from fusion_bench_didi.task_vectors.reader import TaskVectors


def merged(budget: float, **settings) -> tuple[MergeResult, TaskVectors]:
    vectors = task_vectors(layers(decaying))
    settings = {"factor_dtype": "auto", **settings}
    return merge(vectors, merge_settings(budget, **settings)), vectors


def held(found: MergeResult, vectors: TaskVectors, task: str) -> float:
    """Part of the coded task vectors that is in what is stored of them."""
    along = whole = 0.0
    for name, form in found.report.forms.items():
        if form == "coded" and name in found.experts[task]:
            tau = vectors.tensor(name, "cpu").stacked()[vectors.tasks.index(task)]
            along += float((found.experts[task][name].own() * tau).sum())
            whole += float(tau.square().sum())
    return along / whole


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_they_lose_less_than_fixed_widths_in_the_same_bits(budget, monkeypatch):
    found, _ = merged(budget, gain="none")
    assert "coded" in found.report.forms.values()
    assert 0.97 * budget < found.storage.x_excl <= budget
    without_codes(monkeypatch)
    fixed, _ = merged(budget, gain="none")
    assert found.report.relative_error < 0.95 * fixed.report.relative_error


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.15])
def test_they_hold_more_of_the_signal_in_the_same_bytes(budget, quantizer):
    """And more noise, which has no direction."""
    short, vectors = merged(budget, gain="none", quantizer=quantizer)
    found, _ = merged(budget, quantizer=quantizer)
    assert found.storage.x_excl == short.storage.x_excl
    for task in vectors.tasks:
        before, after = (held(one, vectors, task) for one in (short, found))
        assert before * 1.02 < after < 1.0
    assert found.report.relative_error > short.report.relative_error


def test_errors_are_those_of_what_is_stored():
    found, vectors = merged(0.2)
    for name, errors in found.report.errors.items():
        stacked = vectors.tensor(name, "cpu").stacked()
        for t, task in enumerate(found.report.tasks):
            delta = found.experts[task].get(name)
            left = stacked[t] if delta is None else stacked[t] - delta.own()
            assert float(errors[t]) == pytest.approx(
                float(left.square().sum()), rel=1e-3
            )


def test_gain_is_of_codes():
    with pytest.raises(SettingsError, match="gain is of factor_dtype=auto"):
        merge_settings(0.2, factor_dtype="int4", gain="none")


def test_generous_budgets_need_no_codes():
    found, _ = merged(4.0)
    assert "coded" not in found.report.forms.values()


def curve(whole: bool = True) -> CodedCurve:
    sigma = torch.logspace(0, -2, 20).expand(3, 20) * torch.tensor([[1.0], [2.0], [0]])
    energy = sigma.double().square().sum(1)
    return CodedCurve((30, 50), sigma, energy, torch.tensor([1.0, 0.5, 1.0]), whole)


@pytest.mark.parametrize("whole", [True, False])
def test_the_curve_falls_and_keeps_its_word(whole):
    one = curve(whole)
    multipliers = torch.logspace(-1, -9, 60).tolist()
    points = [one.at(m) for m in multipliers]
    errors, bits = zip(*points)
    assert list(bits) == sorted(bits) and bits[-1] > 0
    assert all(b <= a * 1.001 for a, b in zip(errors, errors[1:]))
    assert one.at(one.zero_rate_multiplier)[1] == 0
    for multiplier in multipliers:
        point = one.point(multiplier)
        assert one.rate(point) == pytest.approx(one.at(multiplier)[1], abs=3)
        assert point.bits[2] == point.ranks[2] == 0, "nothing to store"
    assert max(one.point(1e-9).ranks) == 20


def test_steps_up_the_curve_fit_what_is_left():
    one = curve()
    point = one.point(1e-4)
    gain, finer = one.step(point, 400)
    assert gain > 0 and 0 < one.rate(finer) - one.rate(point) <= 400
    assert one.step(point, 0) is None


@pytest.mark.parametrize("shape", [(768, 2), (2, 768), (300, 8), (1536, 4)])
@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0])
def test_thin_matrices_are_coded_as_was_expected_of_them(shape, bits):
    """All of their directions may be worth it where a class for each row is not."""
    draw = torch.Generator().manual_seed(0)
    shapes = (shape, (300, 300))
    base = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    tuned = {}
    for task in "ab":
        tuned[task] = copy.deepcopy(base)
        for weight in tuned[task].parameters():
            weight.data += torch.randn(weight.shape, generator=draw)
    vectors = task_vectors({"_pretrained_": base, **tuned})
    settings = merge_settings(2 * bits / 32, factor_dtype="auto", gain="none")
    found = merge(vectors, settings)
    assert found.storage.x_excl <= 2 * bits / 32
    left = found.report.errors["0.weight"] / found.report.energy["0.weight"]
    assert left.max() < 1.5 * 2.0 ** (-2 * bits) + 0.1


class Bodies(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


@pytest.mark.parametrize("shape", [(300, 280), (40, 8, 3, 3)])
def test_matrices_of_much_energy_everywhere_are_coded_whole(shape):
    """White noise has no directions that stand out."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=draw)
    names = ("a", "b")
    tuned = {n: Bodies(base + torch.randn(shape, generator=draw)) for n in names}
    vectors = task_vectors({"_pretrained_": Bodies(base), **tuned})
    settings = merge_settings(0.15, factor_dtype="auto", shared="none")
    found = merge(vectors, settings)
    delta = found.experts["a"]["weight"]
    assert isinstance(delta, CodedDelta | CodedLowRankDelta)
    assert delta.own().shape == shape
    assert isinstance(delta, CodedDelta)
