"""Where the shared part starts to pay: constructed task vectors with a known common part.

    python -m benchmarks.overlap

*Direction*: each task vector is ``sqrt(f) C + sqrt(1 - f) U_t`` with independent C and U_t of equal, decaying spectra, so that
a fraction f of the energy is common. *Spaces*: nothing is common but the row and column spaces: a fraction f of a task
vector's energy is ``L R_t Q`` with common L (m, 16) and Q (16, n) and independent R_t, the rest as before. Storage needed
for a given error, experts only against shared + experts.
"""

import argparse
import itertools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.suites import machine, write_json
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.merging.results import MergeResult
from fusion_bench_didi.merging.settings import Budget, MergeSettings
from fusion_bench_didi.task_vectors.reader import TaskVectors
from fusion_bench_didi.task_vectors.sources import ModuleSource

OVERLAPS = (0.0, 0.25, 0.5, 0.9, 1.0)
ERRORS = (0.2, 0.1, 0.05)
#: Size of the common row and column spaces.
SPACE = 16


def decaying(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A random (m, n) matrix of unit energy with singular values 1 / (i + 4)."""
    u = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    k = min(m, n)
    sigma = 1 / torch.arange(4, 4 + k, dtype=torch.float32)
    return (u[:, :k] * (sigma / sigma.norm())) @ v[:, :k].mT


def constructed(
    overlap: float,
    *,
    what: Literal["direction", "spaces"] = "direction",
    tasks: int = 8,
    side: int = 96,
    matrices: int = 3,
    seed: int = 0,
) -> TaskVectors:
    """Task vectors of which a fraction ``overlap`` of the energy is, or lies in what is, common to all tasks."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.ModuleList([nn.Linear(side, side, bias=False) for _ in range(matrices)])
    common = [decaying(side, side, generator) for _ in base]
    sources = {}
    for t in range(tasks):
        tuned = nn.ModuleList([nn.Linear(side, side, bias=False) for _ in base])
        for layer, start, c in zip(tuned, base, common):
            if what == "spaces":
                u, _, vh = torch.linalg.svd(c)
                inner = torch.randn(SPACE, SPACE, generator=generator)
                c = u[:, :SPACE] @ (inner / inner.norm()) @ vh[:SPACE]
            own = decaying(side, side, generator)
            layer.weight.data = (
                start.weight.data + overlap**0.5 * c + (1 - overlap) ** 0.5 * own
            )
        sources[f"task{t}"] = ModuleSource(tuned, f"task{t}")
    return TaskVectors(ModuleSource(base, "base"), sources)


def merged(vectors: TaskVectors, budget: float, shared: str) -> MergeResult:
    settings = MergeSettings(
        Budget(budget), shared=shared, allocation="greedy", factor_dtype="float32"
    )
    return merge(vectors, settings)


def storage_for(vectors: TaskVectors, error: float, shared: str) -> MergeResult:
    """The merge of least budget (to 2 %) whose relative error is at most ``error``."""
    low, high = 0.0, float(len(vectors.tasks))
    best = merged(vectors, high, shared)
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        result = merged(vectors, middle, shared)
        if result.report.relative_error <= error:
            high, best = middle, result
        else:
            low = middle
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    lines = [
        "# Where the shared part starts to pay",
        "",
        "`python -m benchmarks.overlap`: eight tasks, three 96 x 96 matrices, float32 factors; a fraction of every task",
        "vector's energy is common to all (*direction*), or lies in 16 rows and columns that are common to all, in unrelated",
        "combinations (*spaces*). Storage in fine-tuned models for the error given; matrices in common subspaces of three.",
        "",
        "| common | of the energy | error | experts only | shared + experts | ratio | of it shared | in subspaces |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    rows = []
    for what, overlap in itertools.product(("direction", "spaces"), OVERLAPS):
        vectors = constructed(overlap, what=what)
        for error in ERRORS:
            alone = storage_for(vectors, error, "none").storage.x_excl
            result = storage_for(vectors, error, "auto")
            both, common = result.storage, len(result.report.subspaces)
            part, ratio = both.shared_bits / both.excl_bits, both.x_excl / alone
            rows.append([what, overlap, error, alone, both.x_excl, ratio, part, common])
            lines.append(
                f"| {what} | {overlap:.0%} | {error} | {alone:.2f} | {both.x_excl:.2f} | {ratio:.2f} | {part:.0%} | {common} |"
            )
            print(lines[-1], flush=True)
    write_json(arguments.out / "overlap.json", {"machine": machine(), "rows": rows})
    (arguments.out / "overlap.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
