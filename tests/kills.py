"""Kills saves before each of their file events: ``python kills.py DIRECTORY SCENARIO ...`` prints what was there afterwards.

Python says before it opens, renames, makes or removes a file (audit events); those count that are in the directory. The
process is forked for every one of them, so that what takes long, to import torch, is done once.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fusion_bench.modelpool import BaseModelPool
from fuzz import body
from helpers import family

from fusion_bench_didi.artifacts import load_artifact
from fusion_bench_didi.checkpoint import exchange, stream
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.method.didi import DiDiMerging

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


def kills(directory: Path, scenario: str) -> list[dict]:
    """What is left of a scenario that is killed before its first event, its second one, and so on.

    Args:
        scenario: ``save`` or ``merge``, then perhaps ``overwrite``, and ``renames`` where names cannot be exchanged.
    """
    directory.mkdir()
    what, *how = scenario.split()
    overwrite, renamed = "overwrite" in how, exchange._renamed

    def write(budget: float, target: Path, overwrite: bool, what: str = what) -> None:
        if what == "save":
            MADE[budget].save_pretrained(target, overwrite=overwrite)
        else:
            merge(budget, output_dir=str(target), overwrite=overwrite)

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
            write(0.9, target, False, "save")
        ended = forked(lambda: write(0.5, target, overwrite), n)
        first = found_at(target)
        left = sorted(p.name for p in home.iterdir() if p.name != "m")
        write(0.5, target, True, "save")
        again = [found_at(target), *sorted(p.name for p in home.iterdir())]
        outcomes.append({"found": first, "left": left, "again": again})
    exchange._renamed = renamed
    return outcomes


if __name__ == "__main__":
    stream.SHARD_BYTES = stream.MAX_SHARD = 1000  # several files
    MADE = {budget: merge(budget) for budget in (0.9, 0.5)}
    sys.addaudithook(_watch)
    home, *scenarios = sys.argv[1:]
    print(json.dumps({s: kills(Path(home, s), s) for s in scenarios}))
