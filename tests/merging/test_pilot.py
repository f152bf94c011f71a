"""Where codes compete, one task vector's spectrum tells what is coded whole and how far the others are decomposed."""

import pytest
import torch
from helpers import without_codes
from steep_layers import TASKS, decaying, layers, low_rank, merged, steep, task_vectors
from torch import Tensor

from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.lowrank.svd import half_svd
from fusion_bench_didi.merging import pipeline, spectra
from fusion_bench_didi.merging.forms import early_decision
from fusion_bench_didi.task_vectors.reader import TaskVectors
from fusion_bench_didi.task_vectors.sources import ModuleSource


def noise(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reached(monkeypatch) -> dict[str, list[int]]:
    """Directions that decompositions of each matrix went to."""
    found: dict[str, list[int]] = {}
    decompose = spectra._decompose

    def noted(context, bounds, name, vectors, reach, shared_rank):
        found.setdefault(name, []).append(reach)
        return decompose(context, bounds, name, vectors, reach, shared_rank)

    monkeypatch.setattr(spectra, "_decompose", noted)
    return found


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.8])
def test_noise_is_coded_whole_and_not_decomposed(reached, bits):
    found = merged(task_vectors(noise, noise), bits)
    assert not reached
    assert set(found.report.forms.values()) == {"coded"}
    assert 0.97 * bits < found.storage.x_excl * 32 / len(TASKS) <= bits


@pytest.mark.parametrize("bits", [0.3, 0.7, 1.2, 1.8])
@pytest.mark.parametrize(
    "makers", [(steep, decaying), (noise, decaying), (decaying, low_rank)]
)
def test_it_costs_next_to_nothing(monkeypatch, reached, makers, bits):
    vectors = task_vectors(*makers)
    found = merged(vectors, bits, gain="none")
    if low_rank not in makers:  # which find directions of mere rounding worth a look
        assert all(len(times) == 1 for times in reached.values()), "long enough"
    monkeypatch.setattr(early_decision, "_codes_compete", lambda *_: False)
    expected = merged(vectors, bits, gain="none")
    lost, least = found.report.relative_error, expected.report.relative_error
    assert lost < (1 + early_decision.WORTH_DIRECTIONS) * least + 1e-4


def test_one_task_of_low_rank_among_others_is_found(reached):
    """Of the three tasks only the last is of low rank, and of the least energy."""

    def last_of_low_rank(m: int, n: int, seed: int) -> Tensor:
        return low_rank(m, n, seed) if seed % 10 == 2 else 3 * noise(m, n, seed)

    found = merged(task_vectors(last_of_low_rank), 1.0, gain="none")
    assert reached, "the pilot is of low rank, so that all are decomposed"
    last = found.report.tasks.index(TASKS[-1])
    left = found.report.errors["0.weight"] / found.report.energy["0.weight"]
    assert left[last] < 0.1 * left.max()


def test_decompositions_go_no_further_than_the_pilot_tells(monkeypatch, reached):
    vectors = task_vectors(steep, steep)
    found = merged(vectors, 0.5)
    ranks = max(max(k.values()) for k in found.ranks.experts.values())
    (longest,) = max(reached.values())
    assert ranks <= longest < 1.5 * ranks + 16
    without_codes(monkeypatch)
    reached.clear()
    merged(vectors, 0.5)
    assert max(max(reached.values())) > longest


@pytest.mark.parametrize("all_found_up_to", [0, 1024])
def test_a_matrix_that_holds_most_of_the_energy_is_not_dismissed(
    monkeypatch, all_found_up_to
):
    """Its rank lies beyond what the even share pays for; the small noise all around has no use for its share."""
    monkeypatch.setattr(early_decision, "SHORT_ENOUGH", all_found_up_to)

    def first(m: int, n: int, seed: int) -> Tensor:
        return low_rank(m, n, seed, rank=50)

    quiet = lambda m, n, seed: 1e-3 * noise(m, n, seed)  # noqa: E731
    vectors = task_vectors(first, *[quiet] * 19, side=256)
    found = merged(vectors, 0.1, gain="none")
    monkeypatch.setattr(early_decision, "_codes_compete", lambda *_: False)
    expected = merged(vectors, 0.1, gain="none")
    lost, least = found.report.relative_error, expected.report.relative_error
    assert lost < 1.03 * least


@pytest.mark.parametrize("bits", [0.6, 1.3, 5.0])
def test_what_few_directions_hold_exactly_is_found_at_every_budget(bits):
    """A few rows of an embedding, also where bits are so many that all entries lose as little."""

    def few_rows(m: int, n: int, seed: int) -> Tensor:
        changed = torch.zeros(m, n)
        changed[:3] = noise(3, n, 7) + 0.01 * noise(3, n, seed)
        return changed

    vectors = task_vectors(few_rows, side=256)
    assert merged(vectors, bits).report.relative_error < 1e-5


@pytest.mark.parametrize("quiet", [0, 1])
def test_a_task_of_which_the_sample_sees_nothing_is_no_pilot(monkeypatch, quiet):
    """Sparse changes, as of a few rows of an embedding."""

    def sparse_or_noise(m: int, n: int, seed: int) -> Tensor:
        if seed % 10 != quiet:
            return noise(m, n, seed)
        changed = torch.zeros(m, n)
        changed[0, 0] = 1e-3
        return changed

    monkeypatch.setattr(early_decision, "sampled", lambda side, k: torch.arange(1, k))
    seen, pilot = [], early_decision._pilot
    monkeypatch.setattr(
        early_decision, "_pilot", lambda *args: seen.append(pilot(*args)) or seen[-1]
    )
    merged(task_vectors(sparse_or_noise), 1.0, gain="none")
    (sample,) = seen
    assert (sample.sigma[:, 50] > 0.1 * sample.sigma[:, 0]).all(), "of noise"


def test_the_pilot_is_scaled_to_the_others(monkeypatch):
    seen = []
    pilot = early_decision._pilot
    monkeypatch.setattr(
        early_decision, "_pilot", lambda *args: seen.append(pilot(*args)) or seen[-1]
    )
    vectors = task_vectors(steep)
    merged(vectors, 0.5)
    energy = torch.stack([t.double().square().sum() for t in vectors.read("0.weight")])
    (sample,) = seen
    assert sample.piloted
    whole = sample.sigma.double().square().sum(1) + sample.tail
    torch.testing.assert_close(whole, energy, rtol=1e-5, atol=0)
    own = torch.stack([half_svd(t, max_rank=4).S for t in vectors.read("0.weight")])
    torch.testing.assert_close(sample.sigma[:, :4], own, rtol=0.3, atol=0)


class _Adapter(ModuleSource):
    """The base model and a change of a few directions, as an adapter has it."""

    def rank(self, name):
        return 6

    def factors(self, name):
        m, n = self._tensors[name].shape
        return LowRankFactors(noise(m, 6, 1), 0.05 * noise(6, n, 2))

    def applied(self, name, base):
        return base + self.factors(name).dense()


@pytest.mark.parametrize("bits", [1.0, 3.0])
def test_beside_adapters_noise_is_not_decomposed_either(monkeypatch, reached, bits):
    """Which keep directions of their own, and are what they are when all is decomposed."""
    plain = task_vectors(noise, noise)
    base = layers([plain.tensor(name).base() for name in plain.infos])
    source = {task: plain.tensor("0.weight")._tuned[t] for t, task in enumerate(TASKS)}
    source[TASKS[-1]] = _Adapter(base, TASKS[-1])
    vectors = TaskVectors(ModuleSource(base, "base"), source)
    found = merged(vectors, bits, gain="none")
    assert not reached
    assert set(found.report.forms.values()) == {"coded"}
    assert set(found.ranks.experts[TASKS[-1]].values()) == {6}
    monkeypatch.setattr(pipeline, "sample_of", lambda *_: None)
    expected = merged(vectors, bits, gain="none")
    assert reached
    lost, least = found.report.relative_error, expected.report.relative_error
    assert lost < (1 + early_decision.WORTH_DIRECTIONS) * least + 1e-4
