"""Kills saves before each of their file events: ``python kills.py DIRECTORY SCENARIO ...`` prints what was there afterwards.

Python says before it opens, renames, makes or removes a file (audit events); those count that are in the directory. The
process is forked for every one of them, so that what takes long, to import torch, is done once.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fusion_bench.modelpool import BaseModelPool
from fuzz_cases import M, _modules, body
from helpers import family

from fusion_bench_didi.artifacts import load_artifact
from fusion_bench_didi.checkpoint import exchange, stream
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.programs.entries import Entry
from fusion_bench_didi.programs.results import blank_row
from fusion_bench_didi.programs.rows import RowStore
from fusion_bench_didi.recombination.library import load_modules, save_modules
from fusion_bench_didi.routers import make_router

torch.set_num_threads(1)
EVENTS = frozenset(
    "open os.rename os.remove os.rmdir os.mkdir os.chmod os.link os.symlink os.truncate".split()
)
_left: list[int] = []  # events until the kill
_home = os.fsencode(sys.argv[1]) + b"/"


def _watch(event: str, arguments: tuple) -> None:
    if not _left or event not in EVENTS or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.fsencode(arguments[0])
    # trees are removed by names within them
    if path.startswith(_home) or (event != "open" and not os.path.isabs(path)):
        _left[0] -= 1
        if _left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(run, kill_at: int) -> bool:
    """Whether the run ended by itself."""
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        _left.append(kill_at)
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and status:
        raise RuntimeError(f"the run failed with status {status}")
    return not os.WIFSIGNALED(status)


def merge(budget: float, **options):
    # new models every time: what a merge leaves in memory must not matter
    pool = BaseModelPool(family(body(), ("a", "b")))
    return DiDiMerging(budget=budget, vectors="pretrained", **options).run(pool)


def found_at(target: Path) -> str:
    """``absent``, or the budget of the model that lies there, all of which was read."""
    if not os.path.lexists(target):
        return "absent"
    try:
        return str(load_artifact(target, body()).info["budget"])
    except (DiDiError, FileNotFoundError) as error:
        return f"broken: {error}"


def save(budget: float, target: Path, overwrite: bool) -> None:
    MADE[budget].save_pretrained(target, overwrite=overwrite)


def save_routed(budget: float, target: Path, overwrite: bool) -> None:
    """A model with a router, which has a file of its own."""
    model = MADE[budget]
    router = make_router("mlp", model.tasks, layers=["first"], pooling="mean")
    labels = torch.arange(2).repeat(9)
    router.fit(torch.linspace(-1, 1, 18 * M).view(18, M), labels, epochs=1, width=4)
    model.attach_router(router).save_pretrained(target, overwrite=overwrite)


def merge_to(budget: float, target: Path, overwrite: bool) -> None:
    merge(budget, output_dir=str(target), overwrite=overwrite)


def save_library(budget: float, target: Path, overwrite: bool) -> None:
    save_modules(target, _modules().values())


def library_at(target: Path) -> str:
    """``absent``, ``some`` or 0.5 for all modules; those that lie there are whole."""
    there = [p.name for p in target.glob("*") if not p.name.startswith(".")]
    try:
        found = load_modules(target, there)
    except CheckpointMismatchError as error:
        return f"broken: {error}"
    return "absent" if not found else "0.5" if len(found) == len(_modules()) else "some"


def save_row(budget: float, target: Path, overwrite: bool) -> None:
    entry = {"method": "emr"}
    row = blank_row(Entry("a", "A", "emr", "dynamic"), entry)
    RowStore(target, {"seed": 0}).save("a", {**row, "budget": budget})


def row_at(target: Path) -> str:
    if not (target / "rows" / "a.json").exists():
        return "absent"
    try:
        return str(RowStore(target, {"seed": 0}).load("a")["budget"])
    except DiDiError as error:
        return f"broken: {error}"


#: what writes, and what tells what is there
KINDS = {
    "save": (save, found_at),
    "router": (save_routed, found_at),
    "merge": (merge_to, found_at),
    "library": (save_library, library_at),
    "row": (save_row, row_at),
}


def remains(home: Path) -> list[str]:
    """What is there beside results."""
    hidden = (p for p in home.rglob("*") if p.name[0] == "." or p.suffix == ".tmp")
    return sorted(p.name for p in hidden)


def kills(directory: Path, scenario: str) -> list[dict]:
    """What is left of a scenario that is killed before its first event, its second one, and so on.

    Args:
        scenario: one of :data:`KINDS`, then perhaps ``overwrite``, and ``renames`` where names cannot be exchanged.
    """
    directory.mkdir()
    what, *how = scenario.split()
    overwrite, renamed = "overwrite" in how, exchange._renamed
    (write, found), before = KINDS[what], KINDS["save" if what == "merge" else what][0]
    if "renames" in how:
        exchange._renamed = lambda *_: False
    write(0.9, directory / "warm", False)  # whatever is imported late
    outcomes, ended, n = [], False, 0
    while not ended:
        n += 1
        home = directory / str(n)
        target = home / "m"
        home.mkdir()
        if overwrite:
            before(0.9, target, False)
        ended = forked(lambda: write(0.5, target, overwrite), n)
        first, left = found(target), remains(home)
        before(0.5, target, True)
        again = [found(target), *remains(home), *sorted(p.name for p in home.iterdir())]
        outcomes.append({"found": first, "left": left, "again": again})
    exchange._renamed = renamed
    return outcomes


if __name__ == "__main__":
    stream.SHARD_BYTES = stream.MAX_SHARD = 300  # several files
    MADE = {budget: merge(budget) for budget in (0.9, 0.5)}
    MADE[0.5].save_pretrained(Path(sys.argv[1], "shown"))
    assert len([*Path(sys.argv[1], "shown").glob("model-*.safetensors")]) > 1
    gc.freeze()  # what no process looks through is not copied into each
    sys.addaudithook(_watch)
    home, *scenarios = sys.argv[1:]
    print(json.dumps({s: kills(Path(home, s), s) for s in scenarios}))
