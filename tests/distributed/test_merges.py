"""Several processes write the bytes that one process writes, and each ends with the whole model."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, floats, same_bits
from test_golden import adapters, clip, convolution, decaying, layers
from torch import nn

from benchmarks.processes import on_ranks
from fusion_bench_didi.checkpoint import stream
from fusion_bench_didi.distributed import ranks
from fusion_bench_didi.errors import NonFiniteError, RankError, SettingsError
from fusion_bench_didi.method import DiDiMerging, FreeMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.task_vectors import digests

#: Merges to a directory, by what is special about them.
CASES = {
    "default": lambda _, **to: didi(clip(), budget=0.6, factor_dtype="auto", **to),
    "sampled": lambda _, **to: didi(
        layers(decaying), budget=0.12, factor_dtype="auto", **to
    ),
    "own tensors": lambda _, **to: didi(convolution(), own=["proj"], **to),
    "adapters": lambda inputs, **to: didi(
        adapters(inputs), budget=0.05, factor_dtype="auto", **to
    ),
    "baseline": lambda _, **to: FreeMerging(filter="code", **to).run(
        BaseModelPool(convolution())
    ),
}
#: Ranks, and what is merged on so many.
SIZES = {1: CASES, 2: CASES, 3: ("default",), 4: ("default", "adapters")}


def contents(directory: Path) -> dict[str, bytes | dict]:
    """Files by name; of the manifest what does not tell the time or the place."""
    found = {p.name: p.read_bytes() for p in sorted(directory.iterdir())}
    del found["README.md"]
    config = json.loads(found.pop("config.json"))
    del config["checksum"]
    for key in ("seconds", "parents", "settings"):
        config["info"].pop(key, None)
    config["backbone"].pop("source")
    return {**found, "config.json": config}


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[int, Path]:
    """The merges of so many ranks each."""
    inputs = tmp_path_factory.mktemp("inputs")
    adapters(inputs)  # of several processes transformers 5 saves on the first alone
    homes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SHARD_BYTES", 8_000)  # several files
        for size in SIZES:
            home = homes[size] = tmp_path_factory.mktemp(f"of {size}")

            def merges(rank: int) -> None:
                for case in SIZES[size]:
                    CASES[case](inputs, output_dir=str(home / case))

            if size == 1:
                merges(0)
            else:
                assert on_ranks(size, merges) == [None] * size
    return homes


@pytest.mark.parametrize(
    ("size", "case"),
    [(size, case) for size, cases in SIZES.items() for case in cases if size > 1],
)
def test_files_are_those_of_one_process(homes, case, size):
    one, several = contents(homes[1] / case), contents(homes[size] / case)
    assert one.keys() == several.keys()
    assert [name for name in one if one[name] != several[name]] == []
    assert len(one) > 3 or case in ("adapters", "baseline")


def test_checksums_of_live_models_are_shared_out(tmp_path):
    pool = clip()
    sizes = {m: sum(p.nbytes for p in pool[m].parameters()) for m in pool}

    def digested(_: int) -> int:
        taken, digest = [], digests._digest
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                digests, "_digest", lambda t: taken.append(t.nbytes) or digest(t)
            )
            didi(pool, budget=0.6, output_dir=str(tmp_path / "out"))
        return sum(taken)

    found = on_ranks(2, digested)
    assert max(found) < 0.6 * sum(sizes.values()) < sum(found)


def test_every_rank_holds_the_whole_model_in_memory():
    def change(_: int):
        model = didi(clip(), budget=0.6)
        return {task: floats(model.materialize(task)) for task in model.tasks}

    one = change(0)
    for found in on_ranks(2, change):
        for task in one:
            assert same_bits(one[task], found[task])


def test_the_host_saves_once(tmp_path):
    def save(_: int) -> None:
        pool = BaseModelPool(clip())
        model = didi(pool, budget=0.6)
        pool.save_model(model, str(tmp_path / "saved"))
        assert DiDiModel.from_pretrained(tmp_path / "saved", clip()[BASE])

    assert on_ranks(2, save) == [None, None]
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_failed_merge_is_no_end_of_the_job(tmp_path):
    """Whether all ranks find the fault or one alone: what comes next has its own signs, and those of before are no more heard."""
    (tmp_path / "taken").mkdir()

    def change(_: int):
        for _ in range(2):
            broken = clip()
            next(broken["svhn"].parameters()).data.view(-1)[0] = torch.nan
            with pytest.raises(NonFiniteError):
                didi(broken)
            pool = BaseModelPool(clip())
            model = didi(pool, budget=0.6)
            with pytest.raises((RankError, FileExistsError)):
                pool.save_model(model, str(tmp_path / "taken"))
        model = didi(clip(), budget=0.6)
        return {task: floats(model.materialize(task)) for task in model.tasks}

    one, other = on_ranks(2, change)
    assert all(same_bits(one[task], other[task]) for task in one)


@pytest.mark.parametrize("given", ["30m", "", "-1", "0", "nan"])
def test_patience_is_a_number_of_seconds(monkeypatch, given):
    monkeypatch.setenv("FUSION_BENCH_DIDI_RANK_TIMEOUT", given)
    with pytest.raises(SettingsError, match=f"RANK_TIMEOUT={given} is no number"):
        ranks.patience()
    monkeypatch.setenv("FUSION_BENCH_DIDI_RANK_TIMEOUT", "7.5")
    assert ranks.patience() == 7.5
    monkeypatch.delenv("FUSION_BENCH_DIDI_RANK_TIMEOUT")
    assert ranks.patience() == ranks.PATIENCE


@pytest.mark.parametrize("here, more", [(2, " [+]{2}fabric.num_nodes=2"), (4, "")])
def test_processes_of_torchrun_know_of_one_another_or_end(monkeypatch, here, more):
    """Each would merge everything, and write it where the others do."""
    started = {"RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": str(here)}
    for key, value in started.items():
        name = f"TORCHELASTIC_{key}" if key == "RUN_ID" else key
        monkeypatch.setenv(name, value)
    method = DiDiMerging(budget=1.0)
    method._program = SimpleNamespace(taskpool=None)
    asked = f"torchrun started 4 processes.* fabric.devices={here}{more}[.]$"
    with pytest.raises(RankError, match=asked):
        method.run(layers(decaying))
    didi(layers(decaying), budget=1.0)  # in a script of one's own
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.check_started(ranks.ALONE)


_ENDS = """
import atexit, os, pathlib
import torch.distributed as dist
from fusion_bench_didi.distributed.ranks import ranks_here

place = pathlib.Path(__file__).with_name(os.environ["RANK"])
atexit.register(
    lambda: place.write_text("alive" if ranks._heart.is_alive() else "ended")
)
dist.init_process_group("gloo")
ranks = ranks_here()
ranks.gather(None)
"""


def test_no_thread_is_within_torch_when_a_process_ends(tmp_path):
    """The interpreter would end it there, and the process with it: SIGABRT after all is done."""
    script = tmp_path / "script.py"
    script.write_text(_ENDS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--standalone", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["ended", "ended"]


def _stale(inputs: Path) -> None:
    """Pools of two processes, of which the second finds another checkpoint under a task's name."""
    pools = [adapters(inputs / f"of {rank}") for rank in range(2)]
    one, other, *_ = pools[1].model_names
    file = "adapter_model.safetensors"
    content = (inputs / "of 1" / other / file).read_bytes()
    (inputs / "of 1" / one / file).write_bytes(content)


def _other_values(rank: int) -> dict[str, nn.Module]:
    models = layers(decaying)
    with torch.no_grad():
        next(models[sorted(models)[-1]].parameters()).view(-1)[0] += rank
    return models


@pytest.mark.parametrize(
    "given, told",
    [
        (
            lambda _, rank: (clip(), {"budget": 0.5 + 0.1 * rank}),
            "budget is 0.6 and 0.5",
        ),
        (lambda _, rank: (clip(), {"exclude": ["*bias"] * rank}), "exclude is "),
        (lambda _, rank: (_other_values(rank), {}), "the content of .* is another"),
        (
            lambda inputs, rank: (adapters(inputs / f"of {rank}"), {}),
            "the content of .* is another",
        ),
    ],
    ids=["budget", "patterns", "values", "files"],
)
@pytest.mark.parametrize("where", ["written", "in memory"])
def test_processes_that_were_given_different_things_are_refused(tmp_path, given, told, where):  # fmt: skip
    """They were merged into a model that nobody asked for, some of its matrices of either."""
    _stale(tmp_path)

    def merges(rank: int) -> str:
        pool, settings = given(tmp_path, rank)
        to = {"output_dir": str(tmp_path / "out")} if where == "written" else {}
        try:
            didi(pool, **{"budget": 0.5, **settings}, **to)
        except SettingsError as error:
            return str(error)
        return ""

    for found in on_ranks(2, merges):
        assert re.search(f"Rank 1 was given something else .*{told}", found)
    assert not (tmp_path / "out").exists()


def test_an_output_that_another_process_names_is_not_written_and_said_to_be(tmp_path):
    """Names with the time in them differ."""

    def merges(rank: int) -> list[str]:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("fusion_bench_didi").addHandler(handler)
        didi(clip(), budget=0.5, output_dir=str(tmp_path / f"out {rank}"))
        return [text for text in said if "the output of rank 0" in text]

    for said in on_ranks(2, merges):
        assert len(said) == 1 and "out 0, the" in said[0] and "out 1" in said[0]
    assert (tmp_path / "out 0").exists() and not (tmp_path / "out 1").exists()
