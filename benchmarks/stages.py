"""Rank stage and refinement beside their naive forms, on one matrix of eight tasks.

    python -m benchmarks.stages                # docs/stages.md and .json

Rank stage: one step (forward, backward) of Eq. 11 by the quadratic form, and by reconstructing every task vector.
Refinement: seconds until the loss of 300 steps of naive Adam is reached. Medians of ``--runs`` runs, taken in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoints import COMMON, _task_vector
from benchmarks.suites import in_words, machine, write_json
from fusion_bench_didi.allocation.learned import _Group, gate
from fusion_bench_didi.allocation.spectra import Rate, spectra_of
from fusion_bench_didi.lowrank.decomposition import decompose
from fusion_bench_didi.lowrank.refinement import FactorSet, RefinementSettings, refine
from fusion_bench_didi.lowrank.static_merge import shared_matrix

TASKS = 8
SHAPES = ((768, 768), (3072, 768))
BUDGET = 1.4
BETA = 1.0
#: Steps of the rank stage that follow one another, as they do in a merge.
STEPS = 10


def task_vectors(shape: tuple[int, int]) -> Tensor:
    """(T, m, n) of unit norm, as in ``benchmarks.checkpoints``."""
    common = _task_vector(0, 10**6, torch.Size(shape))
    rows = []
    for task in range(TASKS):
        own = _task_vector(0, task + 1, torch.Size(shape))
        tau = (1 - COMMON) ** 0.5 * own + COMMON**0.5 * common
        rows.append(tau / tau.norm())
    return torch.stack(rows)


def rank_steps(tau: Tensor) -> dict[str, Callable[[], float]]:
    """One gradient step of the rank stage in several forms; each returns its loss."""
    m, n = tau.shape[1:]
    even = BUDGET / TASKS * m * n / (m + n)
    rate = Rate(per_rank=32 * (m + n), dense=32 * m * n)
    shared = shared_matrix(tau)
    k = torch.full((1, TASKS + 1), even, requires_grad=True)

    def group(q: int, coupled: bool) -> _Group:
        parts = decompose(tau, shared, max_rank=q, coupled=coupled)
        row = spectra_of("w", parts, weights=torch.ones(TASKS), rate=rate, shape=(m, n))
        return _Group.of([row], coupled=coupled)

    def by_form(q: int, coupled: bool) -> Callable[[], float]:
        made = group(q, coupled)

        def step() -> float:
            loss = made.error(k, beta=BETA)
            torch.autograd.grad(loss, k)
            return float(loss.detach())

        return step

    spectra = decompose(tau, shared, coupled=False)
    parts = (spectra.shared, *spectra.experts)
    U, S, Vh = (torch.stack([getattr(p, x) for p in parts]) for x in ("U", "S", "Vh"))

    def dense() -> float:
        kept = gate(k[0], S.shape[1], beta=BETA) * S
        made = (U * kept[:, None]) @ Vh  # (T + 1, m, n)
        loss = (made[:1] + made[1:] - tau).square().sum()
        torch.autograd.grad(loss, k)
        return float(loss.detach())

    full = min(m, n)
    reach = int(2 * even) + 8
    return {
        "dense reconstruction": dense,
        f"quadratic form, all {full} directions": by_form(full, True),
        f"quadratic form, {reach} in reach": by_form(reach, True),
        f"without cross terms, {reach} in reach": by_form(reach, False),
    }


def refinements(tau: Tensor, steps: int) -> list[tuple[str, float, float]]:
    """Name, seconds and loss of every refinement from the same truncated decomposition."""
    m, n = tau.shape[1:]
    rank = int(BUDGET / (TASKS + 1) * m * n / (m + n))
    parts = decompose(tau, shared_matrix(tau), max_rank=rank, coupled=False)
    start = FactorSet(
        parts.shared.cut(rank), tuple(expert.cut(rank) for expert in parts.experts)
    )
    weights = torch.ones(TASKS)

    def loss(modules: FactorSet) -> float:
        return float(modules.errors(tau).sum())

    def timed(how: str, **settings) -> tuple[float, float]:
        begin = time.perf_counter()
        done = refine(
            start,
            tau,
            weights=weights,
            how=how,
            settings=RefinementSettings(**settings),
        )
        return time.perf_counter() - begin, loss(done)

    rows = [("start", 0.0, loss(start))]
    rows.append((f"Adam, dense, {steps} steps", *_naive_adam(start, tau, steps)))
    rows.append((f"Adam, factored, {steps} steps", *timed("adam", steps=steps)))
    for sweeps in (1, 2, 4, 8, 16):
        name = f"alternating, {sweeps} sweeps"
        rows.append((name, *timed("alternating", sweeps=sweeps, tolerance=0.0)))
    rows.append(("alternating, default", *timed("alternating")))
    return rows


def _naive_adam(start: FactorSet, tau: Tensor, steps: int) -> tuple[float, float]:
    """Eq. 16 as it is written: autograd through the reconstructed matrices."""
    size = tau.square().sum().div(len(tau)).sqrt()
    target, root = tau / size, size.sqrt()
    modules = (start.shared, *start.experts)
    parameters = [
        (p / root).clone().requires_grad_(True)
        for module in modules
        for p in (module.up, module.down)
    ]
    begin = time.perf_counter()
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        made = [up @ down for up, down in zip(parameters[::2], parameters[1::2])]
        loss = sum((made[0] + e - t).square().sum() for e, t in zip(made[1:], target))
        optimizer.zero_grad()
        (loss / len(tau)).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        made = [up @ down for up, down in zip(parameters[::2], parameters[1::2])]
        end = sum((made[0] + e - t).square().sum() for e, t in zip(made[1:], target))
    return seconds, float(end * size.square())


def _median_of_steps(steps: dict[str, Callable], runs: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):  # the first warms up
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[name] += [(time.perf_counter() - begin) / STEPS] if run else []
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    lines = [
        "# Rank stage and refinement against their naive forms",
        "",
        f"`python -m benchmarks.stages`, {TASKS} tasks, budget {BUDGET}, float32; {in_words(machine())}.",
        "",
        "## One step of the rank stage",
        "",
        "| shape | form | ms | speed-up |",
        "|---|---|--:|--:|",
    ]
    record: dict[str, list] = {"rank_stage": [], "refinement": []}
    for shape in SHAPES:
        found = _median_of_steps(rank_steps(task_vectors(shape)), arguments.runs)
        dense = found["dense reconstruction"]
        for name, seconds in found.items():
            size = f"{shape[0]} x {shape[1]}"
            lines.append(
                f"| {size} | {name} | {1e3 * seconds:.2f} | {dense / seconds:.0f} |"
            )
            print(lines[-1], flush=True)
            record["rank_stage"].append([size, name, seconds, dense / seconds])
    lines += [
        "",
        "## Refinement",
        "",
        "Loss: what of the task vectors' energy (8) is kept out; in parts of naive Adam's time.",
        "",
        "| shape | way | seconds | of naive Adam | loss |",
        "|---|---|--:|--:|--:|",
    ]
    for shape in SHAPES[:1]:
        runs = [refinements(task_vectors(shape), arguments.steps) for _ in range(3)]
        naive = statistics.median(run[1][1] for run in runs)
        for same in zip(*runs):
            name, seconds, loss = (
                same[0][0],
                statistics.median(s[1] for s in same),
                same[0][2],
            )
            lines.append(
                f"| {shape[0]} x {shape[1]} | {name} | {seconds:.3f} | {seconds / naive:.3f} | {loss:.4f} |"
            )
            print(lines[-1], flush=True)
            record["refinement"].append([name, seconds, seconds / naive, loss])
    write_json(arguments.out / "stages.json", {"machine": machine(), **record})
    (arguments.out / "stages.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
