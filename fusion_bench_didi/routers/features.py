"""Routing by states that layers return, by a head on those of the shared model, and by being told."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DiDiError
from ..options import checked
from ..serving.requests import task_numbers
from .base import RoutedModel, Router
from .capture import layer_names, pooled, record


class StateRouter(Router):
    """Looks at what layers return, a vector per sample.

    Attributes:
        layers: blocks by position, or names of modules.
        pooling: as of :func:`.capture.pooled`.
    """

    layers: list[int | str]
    pooling: str

    def bind(self, model: RoutedModel) -> None:
        super().bind(model)
        self.names = layer_names(model.backbone, self.layers)

    def states(
        self,
        model: RoutedModel,
        row: Tensor | None,
        args: tuple,
        kwargs: dict,
        **options: Any,
    ) -> list[Tensor]:
        """(B, n) per layer, under one row of weights for all samples; options as of :func:`.capture.record`.

        Args:
            row: None for the shared model.
        """
        found = record(
            model, args, kwargs, weights=row, outputs_of=self.names, **options
        )
        return [pooled(found.states[n], self.pooling, found.mask) for n in self.names]


@checked
class FeatureRouter(StateRouter):
    """A small network on pooled states of the shared model, trained on images whose task is known (no class labels).

    Args:
        layers: blocks by position, or names of modules.
        pooling: ``cls``, ``mean``, or ``both`` (first token, mean and standard deviation).
        **options: of :class:`Router`.
    """

    kind, own_options = "mlp", ("layers", "pooling")

    def __init__(
        self,
        tasks: list[str],
        *,
        layers: Sequence[int | str] = (0,),
        pooling: Literal["cls", "mean", "both"] = "both",
        head: Literal["discriminant", "mlp"] = "mlp",
        **options: Any,
    ):
        super().__init__(tasks, head=head, **options)
        self.layers, self.pooling = list(layers), pooling

    def features(self, model: RoutedModel, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat(self.states(model, None, args, kwargs), 1).float()


@checked
class OracleRouter(Router):
    """Is told the tasks of the next batch by :meth:`tell`; what the mixed-stream pool measures others against."""

    kind = "oracle"

    def tell(self, task_ids: Any) -> None:
        """Tell the oracle the tasks of the next batch, see :func:`~fusion_bench_didi.serving.requests.task_numbers`."""
        self.told = task_numbers(task_ids, self.tasks)

    def features(self, model: RoutedModel, *args: Any, **kwargs: Any) -> Tensor:
        if getattr(self, "told", None) is None:
            raise DiDiError(
                "An oracle router must be told the tasks of every batch: router.tell(task_ids)."
            )
        told, self.told = self.told, None
        count = len(self.tasks)
        return torch.eye(count + 1, count, device=told.device)[told]

    def forward(self, features: Tensor) -> Tensor:
        return features
