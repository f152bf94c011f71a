"""DiDi-Merging, on models made on the spot. Runs offline."""

import unittest
from copy import deepcopy

import torch
from fusion_bench.method import DiDiMerging
from fusion_bench.method.didi_merging.decomposition import decompose, spectrum
from fusion_bench.method.didi_merging.rank_allocation import (
    Modules,
    allocate,
    total_cost,
)
from fusion_bench.method.didi_merging.refinement import refine
from torch import nn

FEW = {"rank_steps": 30, "refine_steps": 30}


def models(tasks=("a", "b", "c")):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 24))
    pool = {"_pretrained_": base}
    for task in tasks:
        pool[task] = deepcopy(base)
        with torch.no_grad():
            for value in pool[task].parameters():
                value += 0.1 * torch.randn_like(value)
    return pool


def task_vectors(tasks=3, m=12, n=9):
    torch.manual_seed(1)
    common = torch.randn(m, n)
    return torch.stack([common + torch.randn(m, n) for _ in range(tasks)])


def set_weights(model, task):
    model.set_task(task)
    return model.backbone.state_dict()


class TestDecomposition(unittest.TestCase):
    def test_spectrum_is_the_svd(self):
        for matrix in (torch.randn(12, 9), torch.randn(9, 12)):
            found = spectrum(matrix, 4)
            sigma = torch.linalg.svdvals(matrix)
            torch.testing.assert_close(found.sigma, sigma[:4])
            tail = float(sigma[4:].square().sum())
            self.assertAlmostEqual(found.tail_energy, tail, places=3)
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            best = (U[:, :3] * S[:3]) @ Vh[:3]
            product = found.cut(matrix, 3).dense()
            torch.testing.assert_close(product, best, atol=1e-4, rtol=0)


class TestAllocation(unittest.TestCase):
    def test_quadratic_form_is_the_error_of_truncation(self):
        vectors = task_vectors()
        for size in (5, 9):
            parts = decompose(vectors, size)
            table = Modules.of(parts, (12, 9), 32)
            k0, k = 3, 2
            mean = vectors.mean(0)
            shared = parts.shared.cut(mean, k0).dense()
            error = sum(
                float((tau - shared - e.cut(tau - mean, k).dense()).square().sum())
                for tau, e in zip(vectors, parts.experts)
            )
            ranks = torch.tensor([k0, k, k, k]) + 0.5
            self.assertAlmostEqual(float(table.loss(ranks, 1e4)), error, delta=1e-3)

    def test_the_budget_is_spent_and_never_exceeded(self):
        table = [
            Modules.of(decompose(task_vectors(m=m, n=n), min(m, n)), (m, n), 32)
            for m, n in ((12, 9), (30, 20))
        ]
        unit = sum(x.dense for x in table)
        for ratio in (0.3, 1.0, 2.5):
            budget = int(ratio * unit)
            ranks = allocate(table, budget, unit=unit, steps=20)
            left = budget - total_cost(table, ranks)
            self.assertGreaterEqual(left, 0)
            self.assertLess(left, max(x.per_rank for x in table))


class TestRefinement(unittest.TestCase):
    def test_never_worse_than_its_start(self):
        vectors = task_vectors()
        parts, mean = decompose(vectors, 9), vectors.mean(0)
        shared = parts.shared.cut(mean, 2)
        experts = [e.cut(tau - mean, 2) for tau, e in zip(vectors, parts.experts)]

        def loss(first, others):
            return sum(
                float((tau - first.dense() - e.dense()).square().sum())
                for tau, e in zip(vectors, others)
            )

        before = loss(shared, experts)
        self.assertLess(loss(*refine(shared, experts, vectors, steps=100)), before)
        far = refine(shared, experts, vectors, steps=3, lr=100.0)
        self.assertEqual(loss(*far), before)

    def test_shapes_of_modules_of_different_ranks(self):
        vectors = task_vectors()
        parts, mean = decompose(vectors, 9), vectors.mean(0)
        experts = [parts.experts[0].cut(vectors[0] - mean, 4), None]
        experts.append(parts.experts[2].cut(vectors[2] - mean, 0))
        shared, fitted = refine(parts.shared.cut(mean, 1), experts, vectors, steps=5)
        self.assertEqual(shared.rank, 1)
        self.assertEqual([e and e.rank for e in fitted], [4, None, 0])


class TestDiDiMerging(unittest.TestCase):
    def test_a_generous_budget_gives_every_model_back(self):
        pool = models()
        model = DiDiMerging(budget=4.0, **FEW).run(pool)
        for task in ("a", "b", "c"):
            for name, value in set_weights(model, task).items():
                expected = pool[task].state_dict()[name]
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)

    def test_storage_and_error_fall_with_the_budget(self):
        pool, errors = models(), []
        size = sum(p.numel() for p in pool["a"].parameters())
        for budget in (0.6, 1.2, 2.4):
            model = DiDiMerging(budget=budget, **FEW).run(pool)
            self.assertLessEqual(model.numel(), budget * size)
            error = 0.0
            for task in ("a", "b", "c"):
                for name, value in set_weights(model, task).items():
                    target = pool[task].state_dict()[name]
                    error += float((value - target).square().sum())
            errors.append(error)
        self.assertEqual(errors, sorted(errors, reverse=True))

    def test_order_of_the_pool_does_not_matter(self):
        pool = models()
        turned = {name: pool[name] for name in ("_pretrained_", "c", "a", "b")}
        first, second = (DiDiMerging(budget=0.8, **FEW).run(p) for p in (pool, turned))
        for task in ("a", "b", "c"):
            one, other = (set_weights(model, task) for model in (first, second))
            self.assertTrue(all(torch.equal(one[name], other[name]) for name in one))

    def test_too_small_a_budget_is_refused(self):
        with self.assertRaisesRegex(ValueError, "vectors alone take 0.08"):
            DiDiMerging(budget=0.01).run(models())


if __name__ == "__main__":
    unittest.main()
