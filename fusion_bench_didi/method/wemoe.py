"""WEMoE (Tang et al., ICML 2024, arXiv 2402.00433): the host's class with what keeps it from running put right.

MLP of each block: ``W_0 + sum_t g_t(x) tau_t``, with a small router g per block; everything else is task arithmetic. The
routers are trained by entropy minimisation on unlabelled **test** images.

Five things are put right in FusionBench 0.2.33:

- its ``task_arithmetic_merge`` asks ``state_dict_sub`` to compare parameters with tensors, which that refuses
  (``TypeError``, on every version of transformers);
- it uses the class heads of the model pool's base model, which is a vision tower without text side in local pools; the
  task pool's CLIP model has both;
- after training it means to route every image by itself but sets the flag on the wrong module, so that a batch is routed
  by its mean: a batch of one task then tells the task;
- loaders are cached for the life of the process;
- it asks towers for their ``vision_model``, which those of transformers 5 are themselves.

Its training is not the authors' (tanganke/weight-ensembling_MoE at c401fdc), which ``training=published`` gives: learning rate
1e-3 with a cosine to 0 in place of a constant 1e-4, and a gate per image in training in place of one per batch. Both: Adam,
1000 steps of 16 images of every task, no labels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal
from unittest.mock import patch

import torch
from fusion_bench.method.we_moe import clip_we_moe
from fusion_bench.method.we_moe.we_moe import entropy_loss
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import trange
from transformers import CLIPVisionModel

from ..errors import ModelPoolError, spelled
from ..options import (
    Aliases,
    Count,
    Positive,
    PositiveCount,
    Scale,
    check_fields,
    refuse_idle,
    unknown_setting,
)
from ..pools.host_forms import as_pool
from ..pools.merged_adapters import adapted
from ..pools.opening import check_pool
from ..pools.task_names import check_aliases, names_of, pool_tasks
from .se_merging import with_own_modules

#: values of keys that are left open, by training
TRAINING: dict[str, dict[str, Any]] = {
    "host": {"lr": 1e-4, "lr_schedule": "constant", "batch_reduce": True},
    "published": {"lr": 1e-3, "lr_schedule": "cosine", "batch_reduce": False},
}
#: settings that nothing reads without steps
_OF_TRAINING = (
    *("training", "lr", "lr_schedule", "batch_size", "batch_reduce"),
    *("use_grad_accumulate", "num_workers"),
)


@dataclass(frozen=True)
class WEMoESettings:
    """The keys of ``config/method/didi/wemoe.yaml``; what is None is as the training has it.

    Raises:
        SettingsError: for values of another type or range.
    """

    init_lambda: Scale = 0.3
    router_hidden_layers: Literal[0, 1, 2] = 2
    training: Literal["host", "published"] = "host"
    lr: Positive | None = None
    lr_schedule: Literal["constant", "cosine"] | None = None
    max_steps: Count = 1000
    batch_size: PositiveCount = 16
    batch_reduce: bool | None = None
    batch_reduce_at_test: bool = False
    use_grad_accumulate: bool = True
    num_workers: Count = 0
    task_aliases: Aliases = None

    def __post_init__(self):
        check_fields(self)
        if not self.max_steps:
            of = "of training, and max_steps=0"
            refuse_idle(self, dict.fromkeys(_OF_TRAINING, of))
        for key, value in TRAINING[self.training].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)


class WEMoEMerging(clip_we_moe.CLIPWeightEnsemblingMoEAlgorithm):
    """Weight-ensembling mixture of experts on CLIP vision towers.

    Args: as the fields of :class:`WEMoESettings`.

    Raises:
        SettingsError: for a setting that there is not.
    """

    task_aliases: Mapping[str, str] | None = None

    def __init__(self, **settings: Any):
        known = [field.name for field in fields(WEMoESettings)]
        if unknown := sorted(set(settings) - set(known)):
            raise unknown_setting(type(self).__name__, unknown[0], known)
        found = asdict(WEMoESettings(**settings))
        self.batch_reduce_at_test = found.pop("batch_reduce_at_test")
        self.task_aliases = found.pop("task_aliases")
        super().__init__(OmegaConf.create(found))

    def run(self, modelpool: Any) -> nn.Module:
        """Build, adapt on the test images, and route every image by itself.

        Raises:
            UnknownTaskError: if an alias means no model.
            ModelPoolError: if neither the model pool nor the task pool has test images of every task.
        """
        modelpool = as_pool(modelpool)
        check_pool(modelpool)
        modelpool = adapted(modelpool)
        taskpool = getattr(self._program, "taskpool", None)
        models = modelpool.model_names
        check_aliases(self.task_aliases, models)
        datasets = modelpool._test_datasets if modelpool.has_test_dataset else None
        datasets = datasets or getattr(taskpool, "_test_datasets", None) or {}
        names = names_of(models, datasets, self.task_aliases)
        if missing := [model for model in models if model not in names]:
            raise ModelPoolError(
                f"WEMoE trains its routers on unlabelled test images, and neither pool has any for {missing}. "
                f"Give {spelled('modelpool.test_datasets')}."
            )
        modelpool = _with_own_models(modelpool)
        modelpool._test_datasets = {model: datasets[names[model]] for model in models}
        # class names are registered under what the task pool calls a task
        asked = names_of(models, pool_tasks(taskpool), self.task_aliases)
        self._heads = names | asked
        # the host makes one of its own where there is CUDA, whatever device was asked for
        self._fabric = self.fabric
        try:
            model = super().run(modelpool)
        finally:
            type(self).get_shuffled_test_loader_iter.cache_clear()
        for module in model.modules():
            if isinstance(module, WeightEnsemblingMoE):
                module.batch_reduce = self.batch_reduce_at_test
        return model.requires_grad_(False).eval()

    def test_time_adaptation(self, module: nn.Module) -> nn.Module:
        """Train the routers: the host's loop, and a schedule."""
        self.on_test_time_adaptation_start()
        steps, tasks = self.config.max_steps, self.modelpool.model_names
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.config.lr)
        schedule = None
        if self.config.lr_schedule == "cosine":
            schedule = CosineAnnealingLR(optimizer, steps)
        module, optimizer = self._fabric.setup(module, optimizer)
        module.train()
        for _ in trange(steps, desc="test-time adaptation", leave=False):
            waiting: list[Tensor] = []
            for task in tasks:
                batch = next(self.get_shuffled_test_loader_iter(task))
                waiting.append(entropy_loss(self.compute_logits(module, batch, task)))
                if self.config.use_grad_accumulate or task == tasks[-1]:
                    self._fabric.backward(torch.stack(waiting).sum())
                    waiting = []
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
        return module

    def construct_moe_model(self) -> nn.Module:
        # towers that have no module vision_model are it meanwhile
        tower = property(lambda tower: tower._modules.get("vision_model", tower))
        with (
            patch.object(clip_we_moe, "task_arithmetic_merge", _task_arithmetic),
            patch.object(CLIPVisionModel, "vision_model", tower, create=True),
        ):
            return super().construct_moe_model()

    @torch.no_grad()
    def on_test_time_adaptation_start(self) -> None:
        """Class heads from the task pool's CLIP model where there is one."""
        taskpool = getattr(self._program, "taskpool", None)
        clip = getattr(taskpool, "clip_model", None)
        processor = getattr(taskpool, "processor", None)
        if clip is None:
            clip = self.modelpool.load_clip_model("_pretrained_")
            processor = self.clip_processor
        self._clip_processor = processor
        classifier = HFCLIPClassifier(self.fabric.to_device(clip), processor)
        self.zeroshot_weights = {}
        for task in self.modelpool.model_names:
            names = get_classnames_and_templates(self._heads[task])
            classifier.set_classification_task(*names)
            self.zeroshot_weights[task] = classifier.zeroshot_weights.clone()
        self.visual_projection = clip.visual_projection
        self.logit_scale_exp = clip.logit_scale.detach().exp()


def _with_own_models(modelpool: BaseModelPool) -> BaseModelPool:
    """The pool with models that the host may overwrite, trainable: of frozen ones it makes no task vectors."""
    pool = with_own_modules(modelpool)
    stock = pool.load_model

    def load_model(name: Any, *args: Any, **kwargs: Any) -> nn.Module:
        return stock(name, *args, **kwargs).requires_grad_(True)

    pool.load_model = load_model
    return pool


@torch.no_grad()
def _task_arithmetic(
    pretrained_model: nn.Module,
    finetuned_models: list[nn.Module],
    scaling_factor: float,
) -> nn.Module:
    """``W_0 + scale * sum_t (W_t - W_0)``, in place, as the host's function of that purpose means to."""
    tuned = [model.state_dict() for model in finetuned_models]
    for name, base in pretrained_model.state_dict().items():
        if base.is_floating_point():
            change: Tensor = sum(state[name] - base for state in tuned)
            base.add_(change, alpha=scaling_factor)
    return pretrained_model
