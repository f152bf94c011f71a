"""Task pools tell models with ``set_task`` which task comes next. Runs offline."""

import unittest
from unittest import mock

import torch
from fusion_bench.models.modulator import (
    ModulatedModel,
    TaskModulator,
    find_switchable,
    set_task,
)
from fusion_bench.taskpool import BaseTaskPool, CLIPVisionModelTaskPool
from torch import nn
from transformers import CLIPConfig, CLIPModel

TASKS = ("mnist", "svhn")


class Shift(TaskModulator):
    """Adds a number to a bias."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def apply(self, modulated_model):
        modulated_model.backbone.bias.data += self.by

    def remove(self, modulated_model):
        modulated_model.backbone.bias.data -= self.by
        modulated_model._current_task = None


def modulated() -> ModulatedModel:
    modulators = {task: Shift(i + 1.0) for i, task in enumerate(TASKS)}
    return ModulatedModel(nn.Linear(2, 2), modulators)


class Loop(BaseTaskPool):
    """The smallest task pool that goes task by task."""

    switches_tasks = True

    def evaluate(self, model, **kwargs):
        report = {}
        for task in TASKS:
            self.set_task(model, task)
            report[task] = float(model.backbone.bias.detach()[0])
        return report


class TestSetTask(unittest.TestCase):
    def test_finds_the_model_in_what_wraps_it(self):
        model = modulated()
        for wrapped in (model, nn.Sequential(nn.ReLU(), model)):
            self.assertIs(find_switchable(wrapped), model)
        self.assertTrue(set_task(nn.Sequential(model), "svhn"))
        self.assertEqual(model.current_task, "svhn")

    def test_leaves_other_models_alone(self):
        for plain in (nn.Linear(2, 2), {"models": {}}, None):
            self.assertFalse(set_task(plain, "mnist"))

    def test_unknown_tasks_are_refused(self):
        with self.assertRaisesRegex(ValueError, "cifar10"):
            set_task(modulated(), "cifar10")


class TestTaskPools(unittest.TestCase):
    def test_each_task_is_evaluated_with_its_weights(self):
        model = modulated()
        with torch.no_grad():
            model.backbone.bias.zero_()
        report = Loop().evaluate(model)
        self.assertEqual(report, {"mnist": 1.0, "svhn": 2.0})
        self.assertEqual(Loop().evaluate(model), report)

    def test_pools_say_whether_they_switch(self):
        self.assertFalse(BaseTaskPool.switches_tasks)
        self.assertTrue(CLIPVisionModelTaskPool.switches_tasks)

    def test_clip_pool_switches_before_it_evaluates(self):
        text = dict(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        vision = dict(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8,
            patch_size=8,
        )
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        pool = CLIPVisionModelTaskPool(
            test_datasets={}, processor=None, clip_model=None
        )
        pool._is_setup, pool.processor = True, None
        pool.clip_model = CLIPModel(config)
        pool.test_dataloaders = {task: [] for task in TASKS}
        model, seen = modulated(), {}

        def evaluated(classifier, loader, num_classes, task_name):
            seen[task_name] = model.current_task
            return {"accuracy": 1.0, "loss": 0.0}

        classifier = "fusion_bench.models.hf_clip.HFCLIPClassifier"
        with (
            mock.patch(f"{classifier}.set_classification_task"),
            mock.patch.object(pool, "_evaluate", evaluated),
        ):
            pool.evaluate(model)
        self.assertEqual(seen, {task: task for task in TASKS})


if __name__ == "__main__":
    unittest.main()
