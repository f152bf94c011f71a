"""The base class of routers: features of the input in, weights over the tasks out.

``features(model, inputs)`` (B, F)  ->  ``scores`` (B, T)  ->  ``weights`` (B, T), one-hot or a softmax at a temperature.

Scores come from the features alone (training-free), or from a small head fitted to features of unlabelled images whose
task is known (:mod:`.heads`). What a router stores are its buffers; they are written with the model and counted.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..deltas.base import keeping_type
from ..errors import DiDiError, NonFiniteError, UnknownTaskError
from ..options import Fraction, Positive, checked
from ..serving.forward import MixedForward
from .heads import fit_head, head_scores

#: What names of tensors of a head begin with.
_HEAD = "head_"


class RoutedModel(Protocol):
    """The interface that routers need of a model.

    Attributes:
        backbone: whose layers are looked at.
        tasks: in the order of the weights' columns.
        touched: names of the tensors that some task changes.
        modulators: the expert of each task, for :meth:`task_tensor`.
    """

    backbone: nn.Module
    modulators: Mapping[str, Any]

    @property
    def tasks(self) -> list[str]: ...

    @property
    def touched(self) -> list[str]: ...

    def base_tensor(self, name: str) -> Tensor:
        """The base model's value."""

    def task_tensor(self, name: str, expert: Any) -> Tensor:
        """The value under one expert, in float32."""

    def mixed_at(self, shared_scale: float) -> MixedForward:
        """The mixed forward with the shared part counted ``shared_scale`` times."""


def weights_from(
    scores: Tensor, *, hard: bool, temperature: float = 1.0, threshold: float = 0.0
) -> Tensor:
    """Weights over tasks from scores.

    Args:
        scores: (B, T), larger is likelier.
        hard: one-hot at the largest score; false: ``softmax(scores / temperature)``.
        threshold: samples whose largest softmax weight is below it get a row of zeros, the shared model.

    Returns:
        (B, T).

    Raises:
        NonFiniteError: naming samples whose scores are no numbers.
    """
    _check_finite(scores, "scores", "The input, or states of the model,")
    soft = (scores.float() / temperature).softmax(1)
    weights = soft
    if hard:
        best = scores.argmax(1)
        weights = torch.eye(scores.shape[1], device=scores.device)[best]
    if threshold > 0:
        weights = weights * (soft.amax(1, keepdim=True) >= threshold)
    return weights


def _check_finite(values: Tensor, what: str, source: str) -> None:
    """Of what is no number the first task would be the likeliest."""
    if bad := (~values.isfinite().all(1)).nonzero().flatten().tolist():
        raise NonFiniteError(
            f"The router's {what} of {len(bad)} of {len(values)} samples, the first of them in row {bad[0]}, are not finite. {source} "
            "hold NaN or infinity: leave such samples out."
        )


@checked
class Router(nn.Module):
    """Finds weights over tasks for every sample.

    Args:
        tasks: of the model, in its order.
        hard: one task per sample; false: soft weights.
        temperature: of the softmax, also of the confidence that ``threshold`` is held against.
        fallback: what happens to samples below the threshold: ``shared`` (base + shared part, no expert) or ``none``
            (they are routed like all others).
        threshold: smallest confidence, in [0, 1].
        head: ``none`` (training-free), ``discriminant`` (closed form) or ``mlp``; the last two need :meth:`fit`.
    """

    kind: ClassVar[str]
    #: arguments beside those of every router
    own_options: ClassVar[tuple[str, ...]] = ()
    #: whether its features come out of the experts; it is for those that there are then
    looks_at_experts: ClassVar[bool] = False

    def __init__(
        self,
        tasks: list[str],
        *,
        hard: bool = True,
        temperature: Positive = 1.0,
        fallback: Literal["none", "shared"] = "none",
        threshold: Fraction = 0.0,
        head: Literal["none", "discriminant", "mlp"] = "none",
    ):
        super().__init__()
        self.tasks = list(tasks)
        self.hard, self.temperature = hard, temperature
        self.fallback, self.threshold, self.head = fallback, threshold, head
        self.last: Tensor | None = None
        self.reset()

    def bind(self, model: RoutedModel) -> None:
        """Prepare the router for a model.

        Raises:
            UnknownTaskError: if it holds other tasks.
        """
        if self.tasks != model.tasks:
            raise UnknownTaskError(
                f"The router is for {self.tasks}, the merged model holds {model.tasks}. Make a router for this model."
            )

    def features(self, model: RoutedModel, *args: Any, **kwargs: Any) -> Tensor:
        """(B, F) from the backbone's arguments."""
        raise NotImplementedError

    def plain_scores(self, features: Tensor) -> Tensor:
        """(B, T) without anything learned."""
        raise NotImplementedError(f"A {self.kind} router needs a head.")

    def scores(self, features: Tensor) -> Tensor:
        """(B, T), by the head if there is one.

        Raises:
            DiDiError: for a head that was not fitted, or not to as many features.
        """
        if self.head == "none":
            return self.plain_scores(features)
        tensors = self.stored(_HEAD)
        if "mean" not in tensors:
            raise DiDiError(
                f"The head of this {self.kind} router was never fitted. Fit it to inputs of every task "
                "(method.routed.fit_router_to, or method=didi/routed of the host), or take one that needs no data: projection."
            )
        given, known = features.shape[1], len(tensors["mean"])
        if given != known:
            raise DiDiError(
                f"The head of this {self.kind} router was fitted to {known} features, and {given} are given: its layers are others "
                "now. Fit it again."
            )
        return head_scores(self.head, features, tensors)

    def forward(self, features: Tensor) -> Tensor:
        """Weights over tasks of a batch, (B, T)."""
        threshold = self.threshold if self.fallback == "shared" else 0.0
        return weights_from(
            self.scores(features),
            hard=self.hard,
            temperature=self.temperature,
            threshold=threshold,
        )

    @torch.compiler.disable
    @torch.no_grad()
    def route(self, model: RoutedModel, *args: Any, **kwargs: Any) -> Tensor:
        """Weights for the backbone's arguments; kept in ``last``, and counted."""
        weights = self(self.features(model, *args, **kwargs))
        self.last = weights
        self.samples += len(weights)
        self.unknown += int((weights == 0).all(1).sum())
        return weights

    def fit(self, features: Tensor, labels: Tensor, **options: Any) -> "Router":
        """Fit the head to features (N, F) of samples whose tasks (N,) are known.

        Args:
            labels: positions among the tasks.
            **options: of the head: ``width``, ``epochs``, ``lr`` and ``seed`` of ``mlp``, ``shrinkage`` of ``discriminant``.

        Raises:
            DiDiError: naming tasks of which there is no sample; for labels that are none of the tasks, and other than one per sample.
            NonFiniteError: for features that are no numbers.
            SettingsError: for options that the head does not have.
        """
        labels = self._checked_labels(features, labels)
        _check_finite(features, "features", "The samples")
        counts = torch.bincount(labels, minlength=len(self.tasks)).tolist()
        if missing := [task for task, n in zip(self.tasks, counts) if not n]:
            raise DiDiError(
                f"There is no sample of {missing}, which a head could not know then. Give some of every task."
            )
        for name, value in fit_head(self.head, features, labels, **options).items():
            self.register_buffer(_HEAD + name, value)
        return self

    def _checked_labels(self, features: Tensor, labels: Tensor) -> Tensor:
        one_each = features.ndim == 2 and labels.shape == features.shape[:1]
        if labels.is_floating_point() or not one_each:
            raise DiDiError(
                f"Labels are one position among {self.tasks} per sample, and these are {labels.dtype} of {tuple(labels.shape)} for "
                f"features of {tuple(features.shape)}. Give whole numbers, one per row of the features."
            )
        labels, count = labels.long(), len(self.tasks)
        if bad := labels[(labels < 0) | (labels >= count)].unique().tolist():
            raise DiDiError(
                f"Labels {bad} are no positions among the {count} tasks {self.tasks}, counted from 0. Give labels of these tasks only."
            )
        return labels

    @property
    def shared_scale(self) -> float:
        """Factor on the model's shared part."""
        return 1.0

    @property
    def bits(self) -> int:
        """Bits that are stored for routing."""
        return sum(8 * tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that are written to the file."""
        return dict(self.state_dict())

    def load(self, tensors: dict[str, Tensor]) -> "Router":
        """Take over what :meth:`tensors` gave."""
        for name, value in tensors.items():
            self.register_buffer(name, value)
        return self

    def options(self) -> dict[str, Any]:
        """Constructor arguments, JSON-plain."""
        names = ("tasks", "hard", "temperature", "fallback", "threshold", "head")
        return {name: getattr(self, name) for name in (*names, *self.own_options)}

    def reset(self) -> None:
        """Reset the counts."""
        self.samples = self.unknown = 0

    @property
    def unknown_rate(self) -> float:
        """Fraction of the samples since :meth:`reset` that no expert took."""
        return self.unknown / max(self.samples, 1)

    def report(self) -> dict[str, Any]:
        """JSON-plain facts for the task pool's report."""
        facts = {k: v for k, v in self.options().items() if k != "tasks"}
        return {
            "kind": self.kind,
            **facts,
            "bits": self.bits,
            "samples": self.samples,
            "unknown_rate": self.unknown_rate,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What is stored moves with the model and keeps its type."""
        return super()._apply(lambda part: keeping_type(part, fn), recurse)

    def stored(self, prefix: str) -> dict[str, Tensor]:
        """What is stored under names that begin so, by the rest of these."""
        found = self._buffers.items()
        return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}
