"""Merges that are cut off for real: processes killed at random moments, hanging ones, a full disk, an input that vanishes.

    python -m benchmarks.reliability              # docs/reliability.md and .json; minutes
    python -m benchmarks.reliability --kills 10

Every merge is of four fine-tuned CLIP towers of width 64 on two processes. A kill comes at a moment drawn evenly over the time of
an unbroken merge, to one process or to both; then the same command runs again, on one process or on two, until it ends.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import CLIPVisionModelPool
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.processes import Job, silence
from benchmarks.suites import in_words, machine, write_json
from fusion_bench_didi.distributed import ranks
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.merging.forms import EXPERTS
from fusion_bench_didi.method.didi import DiDiMerging

TASKS = ("a", "b", "c", "d")
#: Seconds after which a rank that says nothing counts as ended, and one that does not get on as hanging.
SILENCE, PATIENCE = 5.0, 6.0
#: What is allowed by default.
USUAL = ranks.SILENCE


def make_inputs(home: Path) -> None:
    """Directories of small fine-tuned towers."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(home / "base")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for task in TASKS:
        for name, value in model.named_parameters():
            change = torch.randn(value.shape)
            if value.ndim == 2:
                change = torch.randn(len(value), 4) @ torch.randn(4, value.shape[1])
            value.data = base[name] + 0.01 * change
        model.save_pretrained(home / task)


def merge(home: Path, target: Path, **settings: Any) -> None:
    entries = {task: str(home / task) for task in TASKS}
    pool = CLIPVisionModelPool({"_pretrained_": str(home / "base"), **entries})
    DiDiMerging(budget=0.5, refine_sweeps=4, output_dir=str(target), **settings).run(
        pool
    )


def quietly(function: Callable[[], Any]) -> Callable[[int], Any]:
    """The function on a process that prints nothing."""

    def run(_: int) -> Any:
        silence()
        return function()

    return run


def weights(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


def journal(target: Path) -> tuple[dict[str, Counter], str]:
    """Tensors that are begun and not done, by file of a process; and the stage of the last line."""
    lost, last = {}, "before the first tensor"
    place = target.with_name(f".{target.name}.journal")
    for file in sorted(place.glob("*.jsonl"), key=lambda f: f.stat().st_mtime_ns):
        begun: Counter = Counter()
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "begin" in line:
                begun[tuple(line["begin"])] += 1
            else:
                begun.pop(tuple(line["done"]), None)
            last = (line.get("begin") or line["done"])[0].split()[0]
        lost[file.name] = begun
    return lost, last


class Trial:
    """One place to merge into, and what an unbroken merge leaves in so many seconds."""

    def __init__(self, home: Path, goal: dict[str, bytes], seconds: float):
        self.home, self.goal, self.seconds = home, goal, seconds
        self.target = Path(tempfile.mkdtemp(dir=home)) / "merged"

    def job(self, size: int, **settings: Any) -> Job:
        return Job(size, quietly(lambda: merge(self.home, self.target, **settings)))

    def held(self, size: int) -> tuple[Job, Path]:
        """A merge whose encoding waits for a file that lets it go on."""
        go = self.target.parent.with_suffix(".go")

        def run() -> None:
            encode = type(EXPERTS).encode

            def waiting(self, context, decision):
                while not go.exists():
                    time.sleep(0.01)
                return encode(self, context, decision)

            type(EXPERTS).encode = waiting
            merge(self.home, self.target)

        job = Job(size, quietly(run))
        self.until("encode")
        return job, go

    def until(self, stage: str, *, seconds: float = 60) -> None:
        """Wait until the journal is at a stage."""
        limit = time.monotonic() + seconds
        while journal(self.target)[1] != stage and time.monotonic() < limit:
            time.sleep(0.01)

    def again(self, size: int) -> list[str]:
        """The same command, until it ends: what was said when it did not."""
        said: list[str] = []
        while True:
            found = self.job(size).results()
            errors = [f"{type(r).__name__}: {r}" for r in found if r is not None]
            if not errors or len(said) > 5:
                return said
            said += errors

    @property
    def ended_well(self) -> bool:
        """Whether there are the weights of an unbroken merge to the byte, and no files beside them."""
        alone = [p.name for p in self.target.parent.iterdir()] == ["merged"]
        return alone and weights(self.target) == self.goal


def killed(trial: Trial, draw: random.Random) -> dict[str, Any]:
    """One kill, and the run after it."""
    job, whom = trial.job(2), draw.choice([[0], [1], [0, 1]])
    moment = draw.uniform(0, trial.seconds)
    time.sleep(moment)
    job.kill(whom)
    begun = time.monotonic()
    others = [r for i, r in enumerate(job.results(seconds=30)) if i not in whom]
    waited = time.monotonic() - begun
    lost, stage = journal(trial.target)
    whole, size = trial.target.exists(), draw.choice([1, 2])
    said = [] if whole else trial.again(size)
    return {
        "killed": "both" if len(whom) == 2 else f"rank {whom[0]}",
        "after": moment,
        "at": "the end" if whole else stage,
        "begun and not done, most of a process": max(
            (sum(c.values()) for c in lost.values()), default=0
        ),
        "the other": [
            "ended well" if r is None else f"{type(r).__name__}: {r}" for r in others
        ],
        "told after": waited if others else None,
        "again on": size,
        "said again": said,
        "same bytes": trial.ended_well,
    }


def hanging(trial: Trial) -> str:
    """Rank 1 stops at one matrix for good."""

    def run() -> None:
        encode = type(EXPERTS).encode

        def stuck(self, context, decision):
            if context.crew.ranks.rank == 1:
                threading.Event().wait()
            return encode(self, context, decision)

        type(EXPERTS).encode = stuck
        merge(trial.home, trial.target)

    job = Job(2, quietly(run))
    return str(job.results(seconds=PATIENCE + 20)[0])


def stopped(trial: Trial) -> str:
    """Rank 1 is stopped by the system, as on a machine that swaps or has gone."""
    job, go = trial.held(2)
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    go.touch()
    return str(job.results(seconds=SILENCE + 20)[0])


def at_once(trial: Trial) -> str:
    """Two merges into one directory."""
    first, go = trial.held(1)
    (told,) = trial.job(1).results()
    go.touch()
    ended = first.results() == [None] and trial.ended_well
    return f"{told} The first ended {'well' if ended else 'badly'}."


def full(trial: Trial) -> str:
    """Files may not grow beyond a size, as on a full disk."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, resource.RLIM_INFINITY))
        merge(trial.home, trial.target)

    return "; ".join(str(r) for r in Job(2, quietly(run)).results())


def vanishing(trial: Trial) -> str:
    """The directory of one task is away while the merge runs, as that of a mount; it is put back afterwards."""
    (job, go), place = trial.held(2), trial.home / "b"
    os.rename(place, place.with_suffix(".away"))
    go.touch()
    found = job.results()
    os.rename(place.with_suffix(".away"), place)
    return "; ".join(str(r) for r in found)


FAULTS: dict[str, Callable[[Trial], str]] = {
    "a rank hangs within a matrix": hanging,
    "a rank is stopped": stopped,
    "two merges into one directory": at_once,
    "no room on the disk": full,
    "an input vanishes": vanishing,
}


def page(found: dict[str, Any]) -> list[str]:
    kills = found["kills"]
    stuck = [k for k in kills if any("TimeoutError" in said for said in k["the other"])]
    waits = [
        k["told after"] for k in kills if k["told after"] is not None and k not in stuck
    ]
    lines = [
        "# Merges that are cut off",
        "",
        f"`python -m benchmarks.reliability --kills {len(kills)} --seed {found['seed']}`; {in_words(found['machine'])}. Four towers of width 64 on two "
        f"processes; an unbroken merge takes {found['seconds']:.1f} s.",
        "",
        "## Kills at random moments",
        "",
        "SIGKILL to one process or to both, then the same command again on one process or on two. *Done twice*: tensors that a "
        "process had",
        "begun and not finished, as the journal says. *Bytes* are those of the weights' files; `config.json` says how long a merge took,",
        "and so has other seconds in it, and another checksum of itself.",
        "",
        "| killed | kills | the rerun ends in the bytes of an unbroken merge | done twice, at most per process |",
        "|---|--:|--:|--:|",
    ]
    key = "begun and not done, most of a process"
    for whom in ("rank 0", "rank 1", "both"):
        rows = [k for k in kills if k["killed"] == whom]
        if rows:
            same = sum(k["same bytes"] for k in rows)
            lines.append(
                f"| {whom} | {len(rows)} | {same} | {max(k[key] for k in rows)} |"
            )
    where = Counter(k["at"] for k in kills)
    lines += [
        "",
        "Where they came: "
        + ", ".join(f"{stage} {count}" for stage, count in where.most_common())
        + ".",
    ]
    if late := where["the end"]:
        lines.append(
            f"{late} of them came when the merge had ended: there was nothing left to do."
        )
    if waits:
        lines.append(
            f"The process that was left told so after {statistics.median(waits):.1f} s (median; at most {max(waits):.1f} s, with "
            f"{SILENCE:g} s of silence allowed here and {USUAL:g} s by default)."
        )
    if stuck:
        lines.append(
            f"{len(stuck)} kills came before the processes had met: those that are left wait as long as torch's own rendezvous does, "
            "unless what started them ends them."
        )
    if false := [k for k in kills if k["said again"]]:
        lines.append(
            f"In {len(false)} cases the rerun itself ended with an error ({false[0]['said again'][0]}), and was run once more."
        )
    lines += [
        "",
        "## Other faults",
        "",
        "| fault | what is said | the rerun ends in the same bytes |",
        "|---|---|---|",
    ]
    for fault, row in found["faults"].items():
        said = " ".join(row["said"].replace("|", "/").split())
        lines.append(f"| {fault} | {said} | {'yes' if row['same bytes'] else 'no'} |")
    return lines


def write_page(place: Path, found: dict[str, Any]) -> None:
    (place / "reliability.md").write_text("\n".join(page(found)) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--page", action="store_true", help="of the .json there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out / "reliability.json"
    if arguments.page:
        write_page(arguments.out, json.loads(file.read_text()))
        return 0
    ranks.SILENCE, ranks.PATIENCE = SILENCE, PATIENCE
    draw, kills, faults = random.Random(arguments.seed), [], {}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        make_inputs(home)
        times = []
        for i in range(3):
            begun, target = time.monotonic(), home / f"whole{i}"
            if Job(2, quietly(lambda: merge(home, target))).results() != [None, None]:
                raise DiDiError("the unbroken merge failed")
            times.append(time.monotonic() - begun)
        goal, seconds = weights(home / "whole0"), min(times)
        for i in range(arguments.kills):
            kills.append(killed(Trial(home, goal, seconds), draw))
            print(i, kills[-1], flush=True)
        for fault, make in FAULTS.items():
            trial = Trial(home, goal, seconds)
            said = (
                make(trial).replace(str(trial.target.parent), "DIR").replace(place, "")
            )
            if not trial.target.exists():
                trial.again(2)
            faults[fault] = {"said": said, "same bytes": trial.ended_well}
            print(fault, faults[fault], flush=True)
    for row in kills:
        row["the other"] = [said.replace(place, "") for said in row["the other"]]
    found = {
        "machine": machine(),
        "seed": arguments.seed,
        "seconds": seconds,
        "kills": kills,
        "faults": faults,
    }
    write_json(file, found)
    write_page(arguments.out, found)
    bad = [k for k in (*kills, *faults.values()) if not k["same bytes"]]
    return len(bad)


if __name__ == "__main__":
    raise SystemExit(main())
