"""What bounds a merge's time and memory: growing spectra, workers, scratch files, and writing while merging."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import didi, floats, merge_settings, same_bits, task_vectors, without_codes
from steep_layers import decaying

from fusion_bench_didi.lowrank.svd import half_svd
from fusion_bench_didi.merging.basis_store import BasisStore
from fusion_bench_didi.merging.pipeline import merge, plan
from fusion_bench_didi.merging.rank_bounds import RankBounds
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel


@pytest.mark.parametrize("dtype", ["auto", "float32", "int4"])
@pytest.mark.parametrize("budget", [0.3, 0.9, 1.6])
def test_a_small_first_guess_changes_no_rank(tiny_clip, monkeypatch, dtype, budget):
    without_codes(monkeypatch)  # they take what directions are known
    models = tiny_clip.pool_models()
    settings = merge_settings(budget, factor_dtype=dtype)
    whole = plan(task_vectors(models), settings)
    monkeypatch.setattr(RankBounds, "initial_rank", lambda self, name: 1)
    monkeypatch.setattr(RankBounds, "even_share_pays_dense", lambda self, name: False)
    grown = plan(task_vectors(models), settings)
    assert grown.ranks == whole.ranks


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


def test_a_merge_that_fails_leaves_what_is_finished(tiny_clip, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("on the way")

    monkeypatch.setattr("fusion_bench_didi.merging.forms.experts.encode", fail)
    with pytest.raises(RuntimeError, match="on the way"):
        didi(tiny_clip.pool_models(), budget=0.6, output_dir=str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == [".out.journal"]


def test_existing_output_is_refused_before_any_work(tiny_clip, tmp_path):
    (tmp_path / "out").mkdir()
    method = DiDiMerging(output_dir=str(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="exists"):
        method.run(tiny_clip.pool_models())
