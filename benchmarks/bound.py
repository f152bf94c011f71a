"""How far entropy-coded experts are from the rate-distortion bound of Gaussian rows, at the spectra of the suites.

    python -m benchmarks.bound            # real8, and text where its models are; minutes
    python -m benchmarks.bound --pages    # the page from stored figures

The curves that the allocation works with (``allocation/coded_curve.py``, within a few per cent of what merges measure) are
evaluated twice: with the rate and the distortion of the dead-zone codes, and with those of the best code that there can be
for Gaussian rows of any length, without side information. Writes docs/bound.json and docs/bound.md.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.frontier import FILE as FRONTIER
from benchmarks.frontier import TITLES, curve, pools, retention_at
from benchmarks.suites import NOTES, machine, write_json
from fusion_bench_didi.allocation import coded_curve
from fusion_bench_didi.allocation.coded_curve import CodedCurve
from fusion_bench_didi.lowrank.svd import singular_values
from fusion_bench_didi.pools.opening import open_pool
from fusion_bench_didi.task_vectors.tensor import matrix_shape

FILE, PAGE = Path("docs") / "bound.json", Path("docs") / "bound.md"
#: Storage that matrices alone take, in units of one fine-tuned model.
STORAGES = (0.03, 0.06, 0.1, 0.12, 0.17, 0.24, 0.36)
#: The multiplier is halved into this part of an octave.
HALVINGS = 30


def gaussian_bound(spread: Tensor, quantizer: str = "scalar") -> tuple[Tensor, Tensor]:
    """Bits and squared error per value of Gaussian rows at the bound, as :func:`rate_distortion` of codes at the same slope.

    ``D = 1 / 12`` of a squared step, the error of fine uniform cells, or the row's energy where that is less;
    ``R = log2(spread^2 / D) / 2``.

    Args:
        spread: standard deviations in steps, of any shape.
    """
    energy = spread.double().square()
    error = energy.clamp(max=1 / 12)
    return (energy / error.clamp(min=1e-300)).clamp(min=1.0).log2() / 2, error


@contextmanager
def at_the_bound() -> Iterator[None]:
    """While the block runs, curves are those of the bound, without side information."""
    with (
        patch.object(coded_curve, "rate_distortion", gaussian_bound),
        patch.object(coded_curve, "CLASS_BITS", 0),
        patch.object(coded_curve, "OVERHEAD", 0),
    ):
        yield


def error_at(curves: Sequence[CodedCurve], bits: float) -> float:
    """The least squared error of all curves together within so many bits, convex hull."""
    low, high = -80.0, 40.0  # logarithm of the multiplier: too many bits, few enough
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        spent = sum(c.at(2.0**middle)[1] for c in curves)
        low, high = (middle, high) if spent > bits else (low, middle)
    return sum(c.at(2.0**high)[0] for c in curves)


def bits_for(curves: Sequence[CodedCurve], error: float) -> float:
    """The bits that all curves together need for so much squared error."""
    low, high = -80.0, 40.0  # too little error, too much
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        lost = sum(c.at(2.0**middle)[0] for c in curves)
        low, high = (low, middle) if lost > error else (middle, high)
    return sum(c.at(2.0**low)[1] for c in curves)


def curves_of(modelpool: Any) -> tuple[list[CodedCurve], float]:
    """Curves of all changed matrices, plain squared error, and the bits of one fine-tuned model."""
    vectors, made = open_pool(modelpool), []
    for name, info in vectors.infos.items():
        if len(info.shape) > 1:
            found = [singular_values(x) for x in vectors.tensor(name).matrices()]
            sigma = torch.stack(found)
            energy = sigma.double().square().sum(1)
            if bool((energy > 0).any()):
                shape, weights = matrix_shape(info.shape), torch.ones_like(energy)
                made.append(CodedCurve(shape, sigma, energy, weights))
    unit = sum(i.numel * i.dtype.itemsize * 8 for i in vectors.base.infos().values())
    return made, float(unit)


def measure(name: str) -> list[dict[str, float]]:
    modelpool, _ = pools(name, "validation")  # images and texts are not looked at
    curves, unit = curves_of(modelpool)
    numel = sum(math.prod(c.shape) * len(c.energy) for c in curves)
    energy = sum(float(c.energy.sum()) for c in curves)
    rows = []
    for storage in STORAGES:
        bits = storage * unit
        error = error_at(curves, bits)
        with at_the_bound():
            least, needed = error_at(curves, bits), bits_for(curves, error)
        rows.append(
            {
                "storage": storage,
                "bits_per_entry": bits / numel,
                "error": error / energy,
                "error_at_bound": least / energy,
                "storage_at_bound": needed / unit,
                "storage_for_bound": bits_for(curves, least) / unit,
            }
        )
        print(name, rows[-1], flush=True)
    return rows


def table(name: str, rows: Sequence[Mapping[str, float]]) -> str:
    kept = json.loads(FRONTIER.read_text())["suites"].get(name)
    points = curve(kept) if kept else []
    lines = [
        f"## {TITLES[name]}",
        "",
        "| stored | bits per entry | energy lost | at the bound | bound loses as little in | keeps | kept with what the bound loses |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        now, then = (
            retention_at(points, row[key]) for key in ("storage", "storage_for_bound")
        )
        cells = [
            f"{row['storage']:g}",
            f"{row['bits_per_entry']:.2f}",
            f"{row['error']:.3f}",
            f"{row['error_at_bound']:.3f}",
            f"{row['storage_at_bound']:.3f} ({row['storage_at_bound'] / row['storage']:.2f})",
            *("–" if x is None else f"{x:.1f}" for x in (now, then)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(record: Mapping[str, Any]) -> None:
    tables = "\n\n".join(table(name, rows) for name, rows in record["suites"].items())
    text = (NOTES / "bound.md").read_text()
    told = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    PAGE.write_text(text.format(tables=tables, machine=told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", default=["real8", "text"])
    parser.add_argument("--pages", action="store_true")
    arguments = parser.parse_args()
    if not arguments.pages:
        found = {name: measure(name) for name in arguments.suites}
        write_json(FILE, {"machine": machine(), "suites": found})
    write_page(json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
