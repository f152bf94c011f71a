"""Which weighting of the errors follows accuracy? Candidates side by side, on validation images.

    python -m benchmarks.objectives

First the options of the method, and others that were tried as options and are none: other weights of a matrix's error, and
errors that count by direction (``metric.py``); all else is at its default. Then candidates that were never options: experts only,
float32, truncated SVDs and water-filled ranks, so that nothing but the weighting differs. ``scalar`` weighs a matrix by the
mean squared gradient of the output (``probe.py``); ``kronecker`` decomposes L^(1/4) tau R^(1/4) with L = E[G G^T],
R = E[G^T G], which weighs every direction. Inputs are white or pink noise through the base or the fine-tuned models, or, as
the upper reference that uses data, training images.
"""

import argparse
import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import torch
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor

from benchmarks.metric import Metric, input_moments, unweighed, weighed
from benchmarks.probe import output_gradients, probe_inputs, sensitivity
from benchmarks.suites import Suite, machine, retention, write_json
from fusion_bench_didi.allocation.spectra import MatrixSpectra, Rate
from fusion_bench_didi.allocation.water_filling import greedy
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.pools.inputs import load_inputs
from fusion_bench_didi.pools.opening import open_pool
from fusion_bench_didi.task_vectors.reader import TaskVectors
from fusion_bench_didi.task_vectors.tensor import matrix_shape

BUDGETS = (0.24, 0.5, 1.24)
FEW_BITS = (0.12, 0.24)
POWERS = {"plain MSE": 0.0, "1 / norm (root)": 0.5, "1 / energy (relative)": 1.0}
OPTIONS: dict[str, dict] = {
    "root: 1 / norm of the task vector (default)": {},
    "none: plain MSE": {"normalization": "none"},
    "matrix: 1 / energy (relative)": {"normalization": "matrix"},
    "1 / energy of the task": {"weights": "task"},
    "1 / energy of the base's matrix": {"weights": "base"},
    "root / number of the block": {"weights": "depth"},
    "reaction to pink noise": {"weights": "sensitivity"},
    "root, directions by pink noise": {"directions": 0},
    "root, directions by 32 training images": {"directions": 32},
    "root, directions by 256 training images": {"directions": 256},
}


class Problem:
    """The task vectors of a suite as matrices, and how a choice of factors scores."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.base = suite.modelpool.load_pretrained_model().eval()
        self.tuned = {t: suite.modelpool.load_model(t).eval() for t in suite.tasks}
        vectors = open_pool(suite.modelpool, self.base)
        self.names = [n for n in vectors.infos if vectors.is_matrix(n)]
        self.tau = {n: _matrices(vectors, n) for n in self.names}
        values = sum(i.numel for i in vectors.infos.values())
        small = values - sum(self.tau[n][0].numel() for n in self.names)
        self.unit, self.vectors = values, small * len(suite.tasks)

    def score(self, weights, metrics, budget: float) -> dict[str, float]:
        """Accuracy with ``weights[name]`` (T,) and, per name and task, an optional pair of metric roots."""
        rows, factors = [], {}
        for name in self.names:
            parts = []
            for t, tau in enumerate(self.tau[name]):
                left, right = metrics(name, t) if metrics else (None, None)
                parts.append(_weighted_svd(tau, left, right))
            m, n = self.tau[name].shape[1:]
            sigma = torch.stack([p[1] for p in parts])
            sigma = torch.cat([torch.zeros_like(sigma[:1]), sigma])
            rate = Rate(per_rank=m + n, dense=m * n)
            tail = torch.zeros(len(sigma))
            rows.append(
                MatrixSpectra(
                    name, (m, n), sigma, tail, weights[name], rate, shared_rank=0
                )
            )
            factors[name] = parts
        ranks = greedy(rows, int(budget * self.unit) - self.vectors)
        scores = {}
        for t, task in enumerate(self.suite.tasks):
            model = copy.deepcopy(self.tuned[task])
            live, start = dict(model.named_parameters()), self.base.state_dict()
            for row, k in zip(rows, ranks):
                up, _, down = factors[row.name][t]
                r = int(k[t + 1])
                change = up[:, :r] @ down[:r]
                value = start[row.name] + change.view_as(start[row.name])
                live[row.name].data.copy_(value)
            scores |= self.suite.accuracy(model, [task])
        return scores


def _matrices(vectors: TaskVectors, name: str) -> Tensor:
    tau = vectors.read(name)
    return tau.view(len(tau), *matrix_shape(tau.shape[1:]))


def _weighted_svd(tau: Tensor, left, right) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of tau whose cuts are best under ``||left (tau - cut) right||``."""
    work = tau.double()
    if left is not None:
        work = left[0] @ work @ right[0]
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    up, down = u, s[:, None] * vh
    if left is not None:
        up, down = left[1] @ up, down @ right[1]
    return up.float(), s.float(), down.float()


def _root(moment: Tensor, *, power: float = 0.25, damping: float = 0.1):
    """``(C + damping)^power`` and its inverse, for the second moment of normalized size."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    values = values / values.mean() + damping
    return tuple((vectors * values**p) @ vectors.mT for p in (power, -power))


def probes(problem: Problem, kind: str) -> dict[str, list]:
    """Inputs per source name: white and pink noise, training images."""
    pink = probe_inputs(problem.base, 32)
    if kind == "pink":
        return {"inputs": pink}
    if kind == "white":
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(torch.cat(pink).shape, generator=generator)
        return {"inputs": list(noise.split(1))}
    processor = problem.suite.modelpool.load_processor()
    images = []
    for task in problem.suite.tasks:
        data = problem.suite.modelpool.load_train_dataset(task).select(range(4))
        rgb = [image.convert("RGB") for image in data["image"]]
        pixels = processor(images=rgb, return_tensors="pt")["pixel_values"]
        images += list(pixels.split(1))
    return {"inputs": images}


def moments(problem: Problem, model, inputs: list) -> dict[str, tuple[Tensor, Tensor]]:
    """Per matrix, E[G G^T] and E[G^T G]."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for gradients in output_gradients(model, problem.names, inputs):
        for name, g in gradients.items():
            g = g.flatten(1).double()
            l, r = g @ g.mT / len(inputs), g.mT @ g / len(inputs)
            old = found.get(name)
            found[name] = (l, r) if old is None else (old[0] + l, old[1] + r)
    return found


def other_weights(
    problem: Problem, how: str, energies: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """(T,) weight of each task's squared error per tensor, of weightings that are no options.

    Args:
        energies: (T,) squared norms of the task vectors, of matrices and of vectors that compete with them for bits.
    """
    start = dict(problem.base.named_parameters())
    if how == "task":
        total = torch.stack(list(energies.values())).sum(0)
        return {n: total.reciprocal() for n in energies}
    if how == "base":
        size = {n: start[n].detach().square().sum() for n in energies}
        return {n: (0 * e + size[n]).reciprocal() for n, e in energies.items()}
    if how == "depth":
        return {n: e.rsqrt() / block_of(n) for n, e in energies.items()}
    found = sensitivity(problem.base, problem.names, samples=32)
    average = sum(found.values()) / len(found)  # vectors were not probed
    return {
        n: torch.full_like(e, found.get(n, average) / average)
        for n, e in energies.items()
    }


def block_of(name: str) -> int:
    """1 for the first block and for what stands outside the blocks, 2 for the second, and so on."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return 1 if found is None else int(found[1]) + 1


def directions(problem: Problem, images: int) -> dict[str, Metric]:
    """What every matrix is multiplied with, on training images or, for none, on pink noise."""
    pool, tasks = problem.suite.modelpool, problem.suite.tasks
    if images:
        count = max(images // len(tasks), 1)
        inputs = [load_inputs(pool, task, count, seed=0) for task in tasks]
    else:
        inputs = probe_inputs(problem.base, 32)
    moments = input_moments(problem.base, problem.names, inputs)
    return {name: Metric.of(moment) for name, moment in moments.items()}


def scores_of(problem: Problem, budget: float, dtype: str, choice: Mapping) -> dict:
    """Accuracy by task under one option."""
    suite, settings = problem.suite, {"budget": budget, "factor_dtype": dtype}
    if "directions" in choice:
        metrics = directions(problem, choice["directions"])
        tuned = {t: weighed(problem.base, m, metrics) for t, m in problem.tuned.items()}
        pool = BaseModelPool({"_pretrained_": problem.base, **tuned})
        model, scores = DiDiMerging(**settings).run(pool), {}
        for task in suite.tasks:
            one = unweighed(problem.base, model.materialize(task), metrics)
            scores |= suite.accuracy(one, [task])
        return scores
    if "weights" not in choice:
        method = DiDiMerging(**settings, **choice)
        return suite.accuracy(method.run(suite.modelpool))
    place = "fusion_bench_didi.merging.pipeline.loss_weights"

    def weighed_so(energies: Mapping[str, Tensor], _: str) -> dict[str, Tensor]:
        found = other_weights(problem, choice["weights"], energies)
        return {name: weights.float() for name, weights in found.items()}

    with mock.patch(place, weighed_so):
        return suite.accuracy(DiDiMerging(**settings).run(suite.modelpool))


def options(
    problem: Problem, reference: dict[str, float]
) -> tuple[list[str], list[list]]:
    """Lines and rows of the first table."""
    at = [(b, "float32") for b in BUDGETS] + [(b, "auto") for b in FEW_BITS]
    head = [f"{b}, {'float32' if d == 'float32' else 'few bits'}" for b, d in at]
    lines = [
        "| option | data | " + " | ".join(head) + " |",
        "|---|---|" + "---|" * len(at),
    ]
    print("\n".join(lines))
    rows = []
    for label, choice in OPTIONS.items():
        kept = [
            retention(scores_of(problem, budget, dtype, choice), reference)
            for budget, dtype in at
        ]
        data = "training images" if choice.get("directions") else "none"
        rows.append([label, data, *kept])
        cells = " | ".join(f"{100 * k:.1f}" for k in kept)
        lines.append(f"| {label} | {data} | {cells} |")
        print(lines[-1], flush=True)
    return lines, rows


def candidates(problem: Problem) -> Iterator[tuple]:
    """Label, data and weights per tensor of every weighting that never was an option; then metrics, if it has some."""
    energy = {n: tau.flatten(1).square().sum(1) for n, tau in problem.tau.items()}
    for label, power in POWERS.items():
        yield label, "none", {n: e.pow(-power) for n, e in energy.items()}
    for kind in ("white", "pink", "images"):
        inputs = probes(problem, kind)["inputs"]
        data = "none" if kind != "images" else "32 training images"
        for who in ("base", "fine-tuned"):
            models = problem.tuned.values() if who == "fine-tuned" else [problem.base]
            found = [moments(problem, model, inputs) for model in models]
            found = found if len(found) > 1 else found * len(problem.tuned)
            weights = {
                n: torch.stack(
                    [f[n][0].trace() / problem.tau[n][0].numel() for f in found]
                )
                for n in problem.names
            }
            scale = sum(w.mean() for w in weights.values()) / len(weights)
            weights = {n: (w / scale).float() for n, w in weights.items()}
            yield f"scalar, {kind}, {who}", data, weights
            roots = {
                (n, t): tuple(map(_root, f[n]))
                for n in problem.names
                for t, f in enumerate(found)
            }
            yield f"kronecker, {kind}, {who}", data, weights, lambda n, t: roots[n, t]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    suite = Suite(arguments.suite, split="validation")
    problem, reference = Problem(suite), suite.individuals()
    first, chosen = options(problem, reference)
    rows = []

    def row(label: str, data: str, weights, metrics=None) -> None:
        kept = [
            retention(problem.score(weights, metrics, b), reference) for b in BUDGETS
        ]
        rows.append([label, data, *kept])
        cells = " | ".join(f"{100 * k:.1f}" for k in kept)
        lines.append(f"| {label} | {data} | {cells} |")
        print(lines[-1], flush=True)

    lines = [
        f"# Which weighting follows accuracy: {suite.label}, validation images",
        "",
        "`python -m benchmarks.objectives`: retention in per cent. Options of the method, and what was tried as one; all else at its default:",
        "",
        *first,
        "",
        "Candidates that never were options; experts only, float32, water-filled ranks:",
        "",
        "| weighting | data | " + " | ".join(f"budget {b}" for b in BUDGETS) + " |",
        "|---|---|" + "---|" * len(BUDGETS),
    ]
    print("\n".join(lines[-2:]))
    for candidate in candidates(problem):
        row(*candidate)
    (arguments.out / "objectives.md").write_text("\n".join(lines) + "\n")
    write_json(
        arguments.out / "objectives.json",
        {"machine": machine(), "options": chosen, "rows": rows},
    )


if __name__ == "__main__":
    main()
