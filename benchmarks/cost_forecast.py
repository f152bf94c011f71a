"""Merges that were not run: their counts by those of a counted merge, on machines that are described."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cost_rates import KINDS, Rates, seconds
from fusion_bench_didi.lowrank.svd import EIGEN_COST


@dataclass(frozen=True)
class Model:
    """A transformer of today's shapes.

    Args:
        numbers: of its matrices.
        side: their shorter one, mean by numbers.
        matrices: how many.
        largest: numbers of the largest, which one process works on.
        rank: of adapters on all linear layers; None for whole fine-tuned models.
    """

    name: str
    numbers: float
    side: int
    matrices: int
    largest: float
    tasks: int
    rank: int | None = None


MODELS = (
    Model("8B x 8", 8.03e9, 3600, 226, 128256 * 4096, 8),
    Model("70B x 8", 70.6e9, 7200, 562, 128256 * 8192, 8),
    Model("405B x 4", 405.9e9, 14500, 884, 128256 * 16384, 4),
    Model("1,000 LoRA of 8B, rank 16", 6.98e9, 3600, 224, 14336 * 4096, 1000, 16),
)
#: Of an H100 where docs/gpu.json says nothing: float32 products at three quarters of the vendor's 67 TFLOP/s; elementwise
#: operations at four fifths of its 3.35 TB/s, three numbers of float32 each.
ASSUMED = {"GFLOP/s": 50_000.0, "elementwise G/s": 220.0}
#: Bytes per second that one machine of eight accelerators, and one of processors, reads from and writes to its storage.
STORAGE = {"gpu": (6e9, 3e9), "cpu": (2e9, 1e9)}
#: Cores of a machine of processors, each as fast as the thread that was measured; bytes per second between machines.
CORES, NETWORK = 32, 1.25e9
GPUS, MACHINES = (1, 8, 64), (1, 4, 16)


def forecasts(
    cases: Sequence[Mapping[str, Any]], rates: Rates, docs: Path
) -> list[str]:
    """A section of the page."""
    file = docs / "gpu.json"
    told = json.loads(file.read_text()).get("rates", {}) if file.exists() else {}
    known = [key for key in ASSUMED if key in told]
    where = "`docs/gpu.json`" if len(known) == len(ASSUMED) else "assumed from the vendor's figures"  # fmt: skip
    gpu = {**ASSUMED, **told}
    lines = [
        "## Forecasts",
        "",
        "Minutes. Nothing of this section was run. Counts per number and task, and per matrix and task, are those of the counted merge",
        "that is nearest (named in the table), decompositions grow with the side of the matrices. Rates of a GPU",
        f"({gpu['GFLOP/s'] / 1e3:.0f} TFLOP/s in float32, {gpu['elementwise G/s']:.0f} G/s elementwise) are {where}; eigenproblems",
        f"cost {EIGEN_COST['cuda']:.0f} s^3 there. Assumed are machines of eight GPUs that read {STORAGE['gpu'][0] / 1e9:.0f} and write",
        f"{STORAGE['gpu'][1] / 1e9:.0f} GB/s, machines of {CORES} cores as fast as the thread measured here that read",
        f"{STORAGE['cpu'][0] / 1e9:.0f} and write {STORAGE['cpu'][1] / 1e9:.0f} GB/s, and {NETWORK / 1e9:.2f} GB/s between processes.",
        "",
        "| pool | counted as | largest matrix |"
        + "".join(f" {n} GPU{'s' * (n > 1)} |" for n in GPUS)
        + "".join(f" {n} CPU machine{'s' * (n > 1)} |" for n in MACHINES)
        + f" most of it on {GPUS[-1]} GPUs |",
        "|---|---|--:|" + "--:|" * (len(GPUS) + len(MACHINES)) + "---|",
    ]
    for model in MODELS:
        like = _nearest(cases, model)
        if like is None:
            continue
        counts = counts_of(model, like)
        gpus = [_minutes(model, counts, _gpu(rates, gpu), n, -(-n // 8)) for n in GPUS]
        cpus = [_minutes(model, counts, _cpu(rates), CORES * n, n) for n in MACHINES]
        cells = " | ".join(f"{sum(found.values()):.1f}" for found in (*gpus, *cpus))
        name = f"{like['shape']} x {like['tasks']} at {like['budget']}"
        share, last = model.largest / model.numbers, gpus[-1]
        most = max(last, key=last.get)
        part = 100 * last[most] / sum(last.values())
        lines.append(
            f"| {model.name} | {name} | {100 * share:.1f} % | {cells} | {most}, {part:.0f} % |"
        )
    return [
        *lines,
        "",
        "*Largest matrix*: its share of the numbers. A matrix is worked on by one process, so that no number of processes makes a",
        "merge faster than that part of it; an embedding of 128 k tokens is what holds up 8B on more than sixteen. *Writing* has the",
        "checksums in it: one process takes those of the whole base model, which tell this merge from another and stand in its manifest.",
    ]


def counts_of(model: Model, like: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Counts of a merge by those of a counted one."""
    pairs = model.matrices * model.tasks / (like["matrices"] * like["tasks"])
    numbers = model.numbers * model.tasks / (like["numbers"] * like["tasks"])
    side = model.side / like["side"]
    if (
        model.rank is not None
    ):  # factors, which grow with the sides and not with their product
        numbers = pairs * side * model.rank / RANK
        side = model.rank / RANK
    grows = {"calls": pairs, "messages": pairs}
    grows |= dict.fromkeys(CUBIC, numbers * side)
    return {
        part: {
            kind: n * grows.get(kind.partition(" ")[0], numbers)
            for kind, n in found.items()
        }
        for part, found in like["counts"].items()
    }


#: Of the adapters that are counted.
RANK = 8
#: Kinds that grow with the numbers of a matrix times its side.
CUBIC = tuple(k for k, group in KINDS.items() if group in ("products", "decompositions"))  # fmt: skip


def _nearest(
    cases: Sequence[Mapping[str, Any]], model: Model
) -> Mapping[str, Any] | None:
    """The largest of the same kind, with as many tasks if there is one."""
    if model.rank is not None:
        fit = [c for c in cases if c["shape"] == "adapters"]
        return max(fit, key=lambda c: c["tasks"], default=None)
    fit = [c for c in cases if c["budget"] == 1.4 and c["shape"] not in ("small", "adapters")]  # fmt: skip
    same = [c for c in fit if c["tasks"] == model.tasks] or fit
    return max(same, key=lambda c: c["numbers"], default=None)


def _minutes(
    model: Model,
    counts: Mapping[str, Mapping[str, float]],
    rates: Rates,
    size: int,
    machines: int,
) -> dict[str, float]:
    """Of the slowest process by kind of work, storage being shared by those of one machine."""
    largest = model.largest / model.numbers
    share, stored = max(1 / size, largest), max(1 / machines, largest)
    alone = {
        kind: n * size * (stored if kind in ("read", "written") else share)
        for kind, n in counts["shared"].items()
    }
    found = seconds({**counts, "shared": alone}, rates, size)
    return {kind: value / 60 for kind, value in found.items()}


def _gpu(rates: Rates, told: Mapping[str, float]) -> Rates:
    products, passes = 1e9 * told["GFLOP/s"], 1e9 * told["elementwise G/s"]
    # all decompositions as eigenproblems, which are what is slow there
    by_group = {"products": products, "decompositions": products / EIGEN_COST["cuda"]}
    return replace(
        rates,
        sized={f"{kind} 0": by_group.get(group, passes) for kind, group in KINDS.items()},  # fmt: skip
        read=min(STORAGE["gpu"][0], 1e9 * told.get("to it GB/s", 50.0)),
        write=STORAGE["gpu"][1],
        sent=NETWORK,
    )


def _cpu(rates: Rates) -> Rates:
    read, write = STORAGE["cpu"]
    return replace(rates, read=read, write=write, sent=NETWORK)
