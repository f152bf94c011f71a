"""Routing by how far the merged model's representation of a sample lies from each expert's (SE-Merging).

``d_t(x) = || h(x) - h_t(x) ||``, h and h_t the states of merged model and expert t at a layer. Small distance = the merged
model behaves like expert t on x, hence the sample is of task t; scores are minus the distances. Costs T + 1 forwards up
to the deepest layer asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..deltas.names import escaped, unescaped
from ..options import Scale, checked
from .base import RoutedModel, Router
from .features import StateRouter

_ANCHOR = "anchor:"


def distance(merged: Tensor, expert: Tensor, how: str) -> Tensor:
    """(B,) from (B, n) and (B, n)."""
    if how == "cosine":
        return 1 - torch.cosine_similarity(merged, expert, dim=1)
    return (merged - expert).norm(dim=1)


def normalized(distances: Tensor, how: str) -> Tensor:
    """Distances of one sample to T experts, made comparable between samples and layers.

    Args:
        distances: (B, T).
        how: ``none``; ``mean`` divides by the mean over tasks; ``minmax`` maps to [0, 1].
    """
    if how == "none":
        return distances
    if how == "mean":
        return distances / distances.mean(1, keepdim=True).clamp_min(1e-12)
    low, high = distances.aminmax(dim=1, keepdim=True)
    return (distances - low) / (high - low).clamp_min(1e-12)


@checked
class RepresentationRouter(StateRouter):
    """SE-Merging's router: weights by distance of representations.

    Args:
        layers: blocks by position, or names of modules; distances are averaged over them.
        pooling: ``cls`` (first token) or ``mean`` over tokens.
        distance: ``l2`` or ``cosine``.
        normalization: ``none``, ``mean`` or ``minmax``, over the tasks.
        prefer: ``near`` (as SE-Merging's abstract reads) or ``far``: see docs/routing.md for where that is the right sign.
        merged_weight: the merged model is base + ``merged_shared`` * shared + ``merged_weight`` * sum of the experts; 0: the
            shared model.
        merged_shared: see there.
        total_mass: sum of the weights.
        **options: of :class:`Router`.
    """

    kind, looks_at_experts = "representation", True
    own_options = ("layers", "pooling", "distance", "normalization", "prefer")
    own_options += ("merged_weight", "merged_shared", "total_mass")

    def __init__(
        self,
        tasks: list[str],
        *,
        layers: Sequence[int | str] = (-1,),
        pooling: Literal["cls", "mean"] = "cls",
        distance: Literal["l2", "cosine"] = "l2",
        normalization: Literal["none", "mean", "minmax"] = "mean",
        prefer: Literal["near", "far"] = "near",
        merged_weight: Scale | None = None,
        merged_shared: Scale = 1.0,
        total_mass: Scale = 1.0,
        **options: Any,
    ):
        super().__init__(tasks, **options)
        self.layers, self.pooling, self.distance = list(layers), pooling, distance
        self.normalization, self.prefer = normalization, prefer
        if merged_weight is None:
            merged_weight = 1 / len(tasks)
        self.merged_weight, self.merged_shared = float(merged_weight), merged_shared
        self.total_mass = total_mass

    @property
    def shared_scale(self) -> float:
        return self.total_mass

    def anchor(self, changes: Mapping[str, Tensor]) -> Router:
        """Keep a merged model that is no sum of the experts: its change of every tensor, stored with the router."""
        for name, change in changes.items():
            self.register_buffer(_ANCHOR + escaped(name), change.clone())
        return self

    def anchor_changes(self) -> dict[str, Tensor]:
        return {unescaped(k): change for k, change in self.stored(_ANCHOR).items()}

    def features(self, model: RoutedModel, *args: Any, **kwargs: Any) -> Tensor:
        """Distances of a batch's representations to each expert's, (B, L T)."""
        merged = self.merged_states(model, args, kwargs)
        columns = []
        for row in torch.eye(len(self.tasks)):
            expert = self.states(model, row, args, kwargs)
            columns.append(
                [distance(m, e, self.distance) for m, e in zip(merged, expert)]
            )
        by_layer = (torch.stack(layer, 1) for layer in zip(*columns))  # L of (B, T)
        return torch.cat(list(by_layer), 1).float()

    def merged_states(
        self, model: RoutedModel, args: tuple, kwargs: dict
    ) -> list[Tensor]:
        """The merged model's representation, one (B, n) per layer."""
        if changes := self.anchor_changes():
            tensors = {n: model.base_tensor(n) + c for n, c in changes.items()}
            return self.states(model, None, args, kwargs, tensors=tensors)
        row = torch.full((len(self.tasks),), self.merged_weight)
        return self.states(model, row, args, kwargs, shared_scale=self.merged_shared)

    def plain_scores(self, features: Tensor) -> Tensor:
        parts = features.split(len(self.tasks), 1)
        mean = sum(normalized(part, self.normalization) for part in parts) / len(parts)
        return mean if self.prefer == "far" else -mean

    def scores(self, features: Tensor) -> Tensor:
        if self.head == "none":
            return super().scores(features)
        return super().scores(features.clamp_min(1e-6).log())

    def fit(self, features: Tensor, labels: Tensor, **options: Any) -> Router:
        return super().fit(features.clamp_min(1e-6).log(), labels, **options)

    def forward(self, features: Tensor) -> Tensor:
        return self.total_mass * super().forward(features)
