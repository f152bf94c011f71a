"""Saved files that were damaged, or made to do harm: ``python -m tests.fuzz --inputs 100000``.

An input is a small saved model of some kind with a few changes: bits and bytes, fields of its JSON files, headers of its
tensors, files replaced by links, pipes and directories. Most of the changed are sealed again, as by someone who knows
how, so that they get past the checksums. Whatever is read must load, or be refused by this package's own error; it may not hang,
run code, or take much more memory than the files are large.

Input i of a case is the same every time, so that ``--only CASE --first i --inputs 1`` shows it again.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parent))  # as pytest has it

from fuzz_cases import CASES, Case
from fuzz_changes import mutate

from fusion_bench_didi.errors import DiDiError

SECONDS = 20  # a second and more may be spent on a pattern alone
MEMORY = 2**27
ROUND = 1000  # inputs per process: memory does not add up, and a crash costs little


class Hangs(BaseException):
    pass


class RunsCode(BaseException):
    pass


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
_watching = _hooked = False


def _watch(event: str, arguments: tuple) -> None:
    if _watching and event in FORBIDDEN:
        raise RunsCode(f"{event}{arguments}")


def _alarm(*_: Any) -> None:
    raise Hangs


def in_memory() -> Path | None:
    """A directory that no disk is waited for, where there is one."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


@contextmanager
def limits() -> Iterator[None]:
    """Time and memory of what is read in the block."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = pages * resource.getpagesize() + MEMORY
    old = signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (now, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def run_input(case: Case, seed_files: Path, place: Path, number: int, name: str) -> str:
    """What became of one input: ``read``, ``refused``, or the fault."""
    global _watching
    rng = random.Random(f"{name} {number}")
    shutil.copytree(seed_files, place)
    mutate(place, rng)
    _watching = True
    try:
        with limits():
            case.read(place)
        return "read"
    except (DiDiError, FileNotFoundError):
        return "refused"
    except (Exception, Hangs, RunsCode) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if "didi" in f.filename
        ]
        where = ours[-1] if ours else last
        text = str(error).splitlines()[0][:90] if str(error) else ""
        return f"{type(error).__name__}: {text} at {Path(where.filename).name}:{where.lineno}"
    finally:
        _watching = False
        shutil.rmtree(place)


def run(names: list[str], inputs: int, first: int = 0) -> dict[str, list[str]]:
    """Outcomes by input, each round in a process of its own.

    Returns:
        faults -> the inputs that show them; and how many were ``read`` and ``refused``.
    """
    global _hooked
    if not _hooked:  # there is no way to take it off again
        sys.addaudithook(_watch)
        _hooked = True
    outcomes: dict[str, list[str]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(dir=in_memory()) as directory:
        home = Path(directory)
        (home / "outside").write_text("{}")
        for name in names:
            CASES[name].write(home / name)
            CASES[name].read(home / name)  # what is unchanged is read
        numbers = list(range(first, first + inputs))
        jobs = [(names[i % len(names)], i) for i in numbers]
        for start in range(0, len(jobs), ROUND):
            for job, outcome in _round(home, jobs[start : start + ROUND]):
                outcomes[outcome].append(" ".join(map(str, job)))
    return outcomes


def _round(home: Path, jobs: list) -> Iterator[tuple[tuple, str]]:
    """Run inputs in a child process; the one that ends it is a fault, and the rest goes on in another."""
    while jobs:
        results = home / "results"
        results.write_text("")
        child = os.fork()
        if child == 0:
            with results.open("a") as file:
                for name, number in jobs:
                    outcome = run_input(
                        CASES[name], home / name, home / "input", number, name
                    )
                    file.write(json.dumps(outcome) + "\n")
                    file.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = [json.loads(line) for line in results.read_text().splitlines()]
        yield from zip(jobs, found)
        jobs = jobs[len(found) :]
        if status and jobs:
            shutil.rmtree(home / "input", ignore_errors=True)
            yield jobs[0], f"the process ended with status {status}"
            jobs = jobs[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    outcomes = run(arguments.only, arguments.inputs, arguments.first)
    for outcome, inputs in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"{len(inputs):8d}  {outcome}  ({', '.join(inputs[:3])})")
    return int(bool(outcomes.keys() - {"read", "refused"}))


if __name__ == "__main__":
    sys.exit(main())
