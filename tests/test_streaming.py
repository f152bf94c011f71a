"""What bounds time and memory: the range finder, growing spectra, workers, scratch files, and writing while merging."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import didi, floats, merge_settings, same_bits, task_vectors
from safetensors.torch import save_file

from fusion_bench_didi.lowrank import svd
from fusion_bench_didi.lowrank.decomposition import decompose, half_of
from fusion_bench_didi.lowrank.overlap import mean_overlap
from fusion_bench_didi.lowrank.svd import half_svd, singular_values, sketched, spectrum
from fusion_bench_didi.merging.basis_store import BasisStore
from fusion_bench_didi.merging.pipeline import merge, plan
from fusion_bench_didi.merging.rank_bounds import RankBounds
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.parallel import GROWTH, HeapTrimmer, ordered_map
from fusion_bench_didi.task_vectors import sources
from fusion_bench_didi.task_vectors.sources import SafetensorsSource


def decaying(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Singular values falling like i^(-1/2): hard for a range finder."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, n, generator=g)
        * torch.arange(1, m + 1).rsqrt()[torch.randperm(m, generator=g), None]
    )


# --- the range finder ---------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 300), (700, 260), (260, 700)])
def test_range_finder_is_within_two_percent_of_the_least_error(shape):
    matrix = decaying(*shape)
    rank = 24
    assert sketched(shape, rank)
    values = torch.linalg.svdvals(matrix)
    found = half_svd(matrix, max_rank=rank)
    for k in (6, 12, 24):
        least = float(values[k:].square().sum())
        error = float((matrix - found.factors(matrix, k).dense()).square().sum())
        assert least * (1 - 1e-4) <= error <= 1.02 * least
    rest = float((matrix - found.factors(matrix, rank).dense()).square().sum())
    assert found.tail_energy == pytest.approx(rest, rel=1e-3)
    torch.testing.assert_close(
        singular_values(matrix, max_rank=rank), found.S, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("way", [svd._direct, svd._within_gram])
@pytest.mark.parametrize("shape", [(300, 300), (900, 260), (260, 900)])
def test_every_way_to_search_finds_the_same_directions(shape, way, monkeypatch):
    matrix, rank = decaying(*shape), 40
    monkeypatch.setattr(svd, "_cheapest", lambda *_: way)
    values = torch.linalg.svdvals(matrix)
    found = half_svd(matrix, max_rank=rank)
    torch.testing.assert_close(
        found.vectors.mT @ found.vectors, torch.eye(rank), atol=1e-4, rtol=0
    )
    for k in (10, 20, 40):
        least = float(values[k:].square().sum())
        error = float((matrix - found.factors(matrix, k).dense()).square().sum())
        assert least * (1 - 1e-4) <= error <= 1.02 * least


def test_long_matrices_are_searched_within_their_gram_matrix():
    assert svd._cheapest((1024, 1024), 20, "cpu") is svd._direct
    assert svd._cheapest((1024, 4096), 250, "cpu") is svd._within_gram
    assert svd._cheapest((1024, 4096), 900, "cpu") is svd._gram


def test_gram_matrix_in_strips_is_the_whole_product():
    for shape in ((50, 7), (20, 300), (9, 1)):
        a = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(svd._gram_matrix(a), a.mT.double() @ a.double())


def test_exact_means_exact_whatever_the_size():
    matrix = decaying(300, 280)
    values = torch.linalg.svdvals(matrix)[:8]
    found = spectrum(matrix, max_rank=8, exact=True)
    torch.testing.assert_close(found.S, values, rtol=1e-5, atol=0)


def test_range_finder_is_for_few_directions_of_large_matrices():
    assert not sketched((64, 64), 2)
    assert not sketched((768, 768), 700)
    assert sketched((768, 768), 60)


def test_half_a_decomposition_is_enough_to_cut(monkeypatch):
    for shape in ((20, 12), (12, 20)):
        matrix = decaying(*shape)
        half, whole = half_svd(matrix), spectrum(matrix)
        for k in (0, 3, 12):
            torch.testing.assert_close(
                half.factors(matrix, k).dense(),
                whole.cut(k).dense(),
                atol=1e-5,
                rtol=1e-4,
            )


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
def test_half_of_a_coupled_decomposition_cuts_like_the_whole(shape):
    vectors = [decaying(*shape, seed) for seed in range(3)]
    whole = decompose(vectors, sum(vectors) / 3, max_rank=5)
    half = half_of(whole)
    parts = zip((half.shared, *half.experts), (whole.shared, *whole.experts))
    residuals = [sum(vectors) / 3, *(v - sum(vectors) / 3 for v in vectors)]
    for (basis, spectrum), matrix in zip(parts, residuals):
        torch.testing.assert_close(
            basis.factors(matrix, 5).dense(),
            spectrum.cut(5).dense(),
            atol=1e-5,
            rtol=1e-4,
        )


def test_eigensolver_that_fails_in_float32_is_tried_in_float64(monkeypatch, caplog):
    real = torch.linalg.eigh

    def failing(gram):
        if gram.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(gram)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(svd, "DOUBLE_SIDE", 0)
    matrix = decaying(9, 7)
    torch.testing.assert_close(
        spectrum(matrix, name="layer.weight").head(), matrix, atol=1e-4, rtol=1e-4
    )
    assert "layer.weight" in caplog.text


# --- spectra grow to where the budget reaches -----------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32", "int4"])
@pytest.mark.parametrize("budget", [0.3, 0.9, 1.6])
def test_a_small_first_guess_changes_no_rank(tiny_clip, monkeypatch, dtype, budget):
    models = tiny_clip.pool_models()
    settings = merge_settings(budget, factor_dtype=dtype)
    whole = plan(task_vectors(models), settings)
    monkeypatch.setattr(RankBounds, "initial_rank", lambda self, name: 1)
    monkeypatch.setattr(RankBounds, "even_share_pays_dense", lambda self, name: False)
    grown = plan(task_vectors(models), settings)
    assert grown.ranks == whole.ranks


def test_sharing_is_one_for_unrelated_tasks_and_t_for_equal_ones():
    g = torch.Generator().manual_seed(0)
    own = torch.randn(6, 200, 150, generator=g)
    weights = torch.ones(6)

    def found(tau):
        sigma = torch.stack([torch.linalg.svdvals(t) for t in tau])
        return mean_overlap(torch.linalg.svdvals(tau.mean(0)), sigma, weights, 150)

    assert found(own) == pytest.approx(1.0, abs=0.1)
    assert found(own[:1].expand(6, -1, -1)) == pytest.approx(6.0, rel=1e-4)


# --- workers ------------------------------------------------------------------


def test_ordered_map_keeps_order_and_never_runs_far_ahead():
    begun, lock = [], threading.Lock()

    def work(i: int) -> int:
        with lock:
            begun.append(i)
        return i * i

    results = ordered_map(work, range(20), workers=3)
    assert next(results) == 0
    assert max(begun) <= 3
    assert list(results) == [i * i for i in range(1, 20)]


def test_ordered_map_hands_on_the_first_error_and_restores_threads():
    threads = torch.get_num_threads()

    def work(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    results = ordered_map(work, range(10), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        list(results)
    assert torch.get_num_threads() == threads


def test_memory_is_given_back_when_the_process_has_grown(monkeypatch):
    resident, given = [0], []

    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=resident[0])

    monkeypatch.setattr("fusion_bench_didi.parallel.psutil.Process", Process)
    release = HeapTrimmer()
    release._trim = lambda _: given.append(resident[0])
    for resident[0] in (GROWTH // 2, 2 * GROWTH, 3 * GROWTH, 3 * GROWTH + 1):
        release()
    assert given == [2 * GROWTH, 3 * GROWTH + 1]


@pytest.mark.parametrize("numel, most", [(4, 16), (2**21, 5)])
def test_small_tensors_are_let_go_like_large_ones(tmp_path, monkeypatch, numel, most):
    """A few bytes of a file map a whole page of the system's cache, of up to 2 MB."""
    names = [f"w{i:02d}" for i in range(32)]
    save_file({name: torch.ones(numel) for name in names}, tmp_path / "a.safetensors")
    source = SafetensorsSource([tmp_path / "a.safetensors"], "a")
    opened = []
    real = sources.safe_open
    monkeypatch.setattr(
        sources, "safe_open", lambda *a, **k: opened.append(a) or real(*a, **k)
    )
    for name in names:
        assert bool((source.read(name) == 1).all())
    assert len(opened) >= len(names) // most


def test_number_of_workers_changes_no_bit(tiny_clip, monkeypatch):
    models = tiny_clip.pool_models()
    one = didi(models, budget=0.7)
    for module in ("loop", "scan"):
        monkeypatch.setattr(
            f"fusion_bench_didi.task_vectors.{module}.workers_for", lambda _: 3
        )
    three = didi(models, budget=0.7)
    for task in one.tasks:
        assert same_bits(floats(one.materialize(task)), floats(three.materialize(task)))


def test_matrices_too_large_to_stack_are_read_one_by_one(tiny_clip, monkeypatch):
    models = tiny_clip.pool_models()
    settings = merge_settings(0.8, factor_dtype="float32", residual="full")
    stacked = merge(task_vectors(models), settings)
    monkeypatch.setattr("fusion_bench_didi.task_vectors.tensor.STACK_BYTES", 0)
    single = merge(task_vectors(models), settings)
    assert single.ranks == stacked.ranks
    for name, error in stacked.report.errors.items():
        torch.testing.assert_close(single.report.errors[name], error)


# --- scratch files ------------------------------------------------------------


def test_factors_beyond_the_limit_come_back_from_files_unchanged():
    bases = tuple(half_svd(decaying(12, 9, seed), max_rank=4) for seed in range(3))
    store = BasisStore(memory_gb=0)
    kept, other = store.keep(bases), store.keep(bases[:1])
    place = store._scratch.path
    for found, given in zip(kept.load(), bases):
        assert found.vectors.equal(given.vectors) and found.S.equal(given.S)
        assert found.tail_energy == given.tail_energy
    assert len(list(place.iterdir())) == 2
    assert len(kept.take()) == 3
    assert len(list(place.iterdir())) == 1
    del other  # what nobody holds is let go of
    assert not list(place.iterdir())


def test_memory_of_bases_is_free_again_with_whoever_held_them():
    bases = tuple(half_svd(decaying(12, 9, seed), max_rank=4) for seed in range(3))
    size = sum(b.vectors.nbytes + b.S.nbytes for b in bases)
    store = BasisStore(memory_gb=size / 2**30)
    kept = store.keep(bases)
    assert store.keep(bases)._file is not None
    kept.take()
    again = store.keep(bases)
    assert again._file is None
    del again
    assert store.keep(bases)._file is None


def test_many_threads_that_spill_first_at_once_lose_nothing():
    """Each saw no directory, made one, and the last one made took the files of the others away."""
    bases = (half_svd(decaying(12, 9, 0), max_rank=4),)
    for _ in range(50):
        store, start = BasisStore(memory_gb=0), threading.Barrier(8)

        def spill(_: int):
            start.wait()
            return store.keep(bases)

        with ThreadPoolExecutor(8) as pool:
            kept = list(pool.map(spill, range(8)))
        assert all(len(k.load()) == 1 for k in kept)


# --- straight to disk -----------------------------------------------------------


def test_merge_written_while_it_runs_equals_the_one_in_memory(tiny_clip, tmp_path):
    models = tiny_clip.pool_models()
    held = didi(models, budget=0.6)
    written = didi(models, budget=0.6, output_dir=str(tmp_path / "out"))
    loaded = DiDiModel.from_pretrained(
        tmp_path / "out", tiny_clip.pool_models()["_pretrained_"]
    )
    assert written.storage == held.storage == loaded.storage
    for model in (written, loaded):
        for task in held.tasks:
            left, right = held.materialize(task), model.materialize(task)
            assert same_bits(floats(left), floats(right))


def test_shards_are_written_as_they_fill(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_bench_didi.checkpoint.stream.SHARD_BYTES", 2**12)
    didi(tiny_clip.pool_models(), budget=0.6, output_dir=str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_a_merge_that_fails_leaves_no_directory(tiny_clip, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("on the way")

    monkeypatch.setattr("fusion_bench_didi.merging.forms.experts.encode", fail)
    with pytest.raises(RuntimeError, match="on the way"):
        didi(tiny_clip.pool_models(), budget=0.6, output_dir=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_existing_output_is_refused_before_any_work(tiny_clip, tmp_path):
    (tmp_path / "out").mkdir()
    method = DiDiMerging(output_dir=str(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="exists"):
        method.run(tiny_clip.pool_models())
