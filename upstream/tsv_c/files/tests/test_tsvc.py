"""Task Singular Vector Compression, on models made on the spot. Runs offline."""

import unittest
from copy import deepcopy

import torch
from fusion_bench.method import TaskSingularVectorCompression
from torch import nn


def models(tasks=("a", "b"), rank=None):
    """A base model and fine-tuned ones, their matrices changed by a given rank or fully."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 12))
    pool = {"_pretrained_": base}
    for task in tasks:
        pool[task] = deepcopy(base)
        with torch.no_grad():
            for value in pool[task].parameters():
                if rank is not None and value.ndim == 2:
                    m, n = value.shape
                    value += 0.1 * torch.randn(m, rank) @ torch.randn(rank, n)
                else:
                    value += 0.1 * torch.randn_like(value)
    return pool


class TestTSVC(unittest.TestCase):
    def weights(self, model, task):
        model.set_task(task)
        return {k: v.clone() for k, v in model.backbone.state_dict().items()}

    def test_low_rank_task_vectors_come_back(self):
        pool = models(rank=3)  # of 12 / 2 directions kept
        model = TaskSingularVectorCompression().run(pool)
        for task in ("a", "b"):
            for name, value in self.weights(model, task).items():
                expected = pool[task].state_dict()[name]
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)

    def test_error_is_that_of_the_best_approximation(self):
        pool = models()
        model = TaskSingularVectorCompression(rank_fraction=0.25).run(pool)
        found = self.weights(model, "a")
        target = pool["a"][2].weight.detach()
        lost = torch.linalg.svdvals(target - pool["_pretrained_"][2].weight.detach())
        error = (found["2.weight"] - target).square().sum()
        torch.testing.assert_close(error, lost[3:].square().sum())
        torch.testing.assert_close(found["0.weight"], pool["a"][0].weight.detach())

    def test_storage(self):
        pool = models()
        model = TaskSingularVectorCompression(rank_fraction=0.25).run(pool)
        whole = sum(
            p.numel() for n, p in pool["a"].named_parameters() if n != "2.weight"
        )
        self.assertEqual(model.numel(), 2 * (3 * (32 + 12) + whole))

    def test_switching_changes_no_bit(self):
        pool = models()
        before = deepcopy(pool["_pretrained_"].state_dict())
        model = TaskSingularVectorCompression().run(pool)
        first = {task: self.weights(model, task) for task in ("a", "b")}
        for task in ("a", "b") * 5:
            for name, value in self.weights(model, task).items():
                self.assertTrue(torch.equal(value, first[task][name]))
        model.modulators["b"].remove(model)
        for name, value in model.backbone.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]))
        for name, value in pool["_pretrained_"].state_dict().items():
            self.assertTrue(torch.equal(value, before[name]), "the pool's own model")


if __name__ == "__main__":
    unittest.main()
