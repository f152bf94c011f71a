"""Routing by how strongly the input of a layer excites each expert.

For layer l let Q_t (k, n) be the leading right singular vectors of what task t changes there, and x the layer's input in
the shared model. The response ``|Q_t x|^2 / |x|^2``, averaged over tokens, is the part of the input that lies where the
expert acts; the score is the sum of its logarithms over layers. Nothing is stored: Q_t comes out of the experts.

Where a change has fewer than k directions the rest of Q_t is zero, for nothing lies where no expert acts. A task that does
not change a layer has none at all, and its response would be 0, of which the logarithm alone would decide over all layers.
It has half the least response of the others there instead: the lowest of the layer, and close enough for other layers to
outweigh it.

With a head the k responses of a task are not added up but all given to it: tasks differ in *which* directions they
excite more than in how strongly.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SettingsError, some
from ..lowrank.svd import spectrum
from ..options import PositiveCount, checked
from ..serving.layers import apart, patches
from ..task_vectors.layers import is_conv1d
from .base import RoutedModel, Router
from .capture import blocks, layer_names, record, squarable, token_mask

EPS = 1e-6
#: Singular values below this part of the largest may be rounding, of sides whose Gram matrix is in float32.
RANK_TOLERANCE = 1e-3


def responses(x: Tensor, basis: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logarithm of the mean squared response of each direction, and of the input's energy.

    Args:
        x: (B, N, n).
        basis: (K, n) orthonormal or zero rows per task.
        mask: (B, N), the tokens that count; all if None.

    Returns:
        (B, K + 1) in float32; the last column is the energy.
    """
    if mask is not None:
        # zeros respond with nothing: only the number of tokens is left to mend
        weights = mask / mask.float().mean(1, keepdim=True)
        x = x * weights.sqrt()[..., None].to(x)
    inner = (x.flatten(0, 1) @ basis.mT).square_().view(*x.shape[:2], -1)
    inner = inner.mean(1, dtype=torch.float32)  # (B, K)
    energy = x.square().sum(-1, dtype=torch.float32).mean(1, keepdim=True)  # (B, 1)
    return torch.cat([inner, energy], 1).add(EPS).log()


@checked
class ProjectionRouter(Router):
    """Training-free routing by expert subspaces.

    Args:
        layers: blocks (by position), names or patterns of linear layers or convolutions; null: :func:`early_layers`, a
            fraction of a forward.
        directions: k, per task and layer.
        **options: of :class:`Router`.
    """

    kind, own_options = "projection", ("layers", "directions")
    looks_at_experts = True
    _of: "weakref.ref[RoutedModel] | None" = None  # whose directions these are

    def __init__(
        self,
        tasks: list[str],
        *,
        layers: Sequence[int | str] | None = None,
        directions: PositiveCount = 16,
        **options: Any,
    ):
        super().__init__(tasks, **options)
        self.layers = None if layers is None else list(layers)
        self.directions = directions

    @torch.no_grad()
    def bind(self, model: RoutedModel) -> None:
        super().bind(model)
        bases = {name: self._basis(model, name) for name in self._layers(model)}
        self.names = [name for name, basis in bases.items() if basis.any()]
        if not self.names:
            raise SettingsError(
                f"No task changes {some(bases)}. Name other layers: layers=[...]."
            )
        for i, name in enumerate(self.names):
            basis = bases[name]
            self.register_buffer(f"basis_{i}", basis, persistent=False)
            acts = basis.view(len(self.tasks), -1).any(1)
            self.register_buffer(f"acts_{i}", acts, persistent=False)
        self._of = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """Copies go with copies of the model."""
        return {key: value for key, value in self.__dict__.items() if key != "_of"}

    def features(self, model: RoutedModel, *args: Any, **kwargs: Any) -> Tensor:
        """(B, F) from the backbone's arguments.

        Raises:
            SettingsError: if the router was attached to another model since.
        """
        if self._of is not None and self._of() is not model:
            raise SettingsError(
                "The router was attached to another model since, and would route by what the tasks of that one change. Attach it again "
                "to this one, or a copy to each: copy.deepcopy(router)."
            )
        found = record(model, args, kwargs, inputs_of=self.names)
        parts = []
        for i, name in enumerate(self.names):
            given = found.states[name]
            x = squarable(rows_of(model.backbone.get_submodule(name), given))
            basis = self._buffers[f"basis_{i}"].to(x)
            mask = token_mask(given, found.mask)
            parts.append(responses(x, basis, mask))
        return torch.cat(parts, 1)

    def plain_scores(self, features: Tensor) -> Tensor:
        count, scores = len(self.tasks), 0.0
        sizes = [len(self._buffers[f"basis_{i}"]) for i in range(len(self.names))]
        parts = features.exp().split([size + 1 for size in sizes], 1)
        for i, part in enumerate(parts):
            inner = part[:, :-1].view(len(part), count, -1).sum(2)
            acts = self._buffers[f"acts_{i}"]
            least = inner[:, acts].amin(1, keepdim=True)
            inner = torch.where(acts, inner, least / 2)
            scores = scores + (inner / part[:, -1:]).log()
        return scores

    def _layers(self, model: RoutedModel) -> list[str]:
        backbone, touched = model.backbone, set(model.touched)
        asked = self.layers
        if asked is None:
            asked = early_layers(backbone)
        else:
            asked = [
                f"{name}.*" if isinstance(layer, int) else name
                for layer in asked
                for name in layer_names(backbone, [layer])
            ]
        names = [
            name
            for name in layer_names(backbone, asked)
            if f"{name}.weight" in touched
            and _is_linear(backbone.get_submodule(name))
            and _comparable(model, f"{name}.weight")
        ]
        if not names:
            raise SettingsError(
                f"layers={self.layers} names no linear layer that the tasks change, and have of one shape."
            )
        return names

    def _basis(self, model: RoutedModel, name: str) -> Tensor:
        """Leading input directions of all experts, (T k, n)."""
        module, weight = model.backbone.get_submodule(name), f"{name}.weight"
        base, bases = model.base_tensor(weight).float(), []
        for task in model.tasks:
            change = model.task_tensor(weight, model.modulators[task]) - base
            change = change.flatten(1)
            if is_conv1d(module):
                change = change.mT
            count = min(self.directions, *change.shape)
            found = spectrum(change, max_rank=count, name=weight)
            known = found.S > RANK_TOLERANCE * found.S.amax()
            bases.append(found.Vh * known[:, None])
        return torch.cat(bases)


def early_layers(backbone: nn.Module) -> list[str]:
    """The first convolution, and the first linear layer of each part (attention, MLP) of the first block.

    Parts that hold experts, or blocks of their own, are left out where there are others: layers in them need not see one row
    per sample.
    """
    convs = [n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)]
    first = blocks(backbone)[0]
    linear: dict[str, bool] = {}
    for part, module in backbone.get_submodule(first).named_children():
        for name, inner in module.named_modules():
            if _is_linear(inner):
                found = ".".join(filter(None, (first, part, name)))
                linear[found] = _holds_alike(module)
                break
    apart = [name for name, alike in linear.items() if not alike]
    return [*convs[:1], *(apart or linear)]


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """The vectors that a linear layer or convolution multiplies, (B, N, n)."""
    if isinstance(module, nn.Conv2d) and apart(module):
        return patches(x.to(module.weight.dtype), module.kernel_size)
    if isinstance(module, nn.Conv2d):
        return F.unfold(
            x.to(module.weight.dtype),
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,
            stride=module.stride,
        ).mT
    return x.reshape(len(x), -1, x.shape[-1])


def _comparable(model: RoutedModel, weight: str) -> bool:
    """Whether the tensor is of one shape under all tasks; heads need not be."""
    deltas = (model.modulators[task].deltas.get(weight) for task in model.tasks)
    shape = tuple(model.base_tensor(weight).shape)
    return all(delta is None or delta.shape == shape for delta in deltas)


def _holds_alike(part: nn.Module) -> bool:
    """Whether a part of a block holds experts or blocks: modules alike in a list, or matrices side by side in one tensor."""
    for module in part.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            alike = list(module.children())
            inner = (linear for m in alike for linear in list(m.modules())[1:])
            if len({*map(type, alike)}) == 1 and any(map(_is_linear, inner)):
                return True
        elif not isinstance(module, nn.modules.conv._ConvNd):
            if any(p.ndim == 3 and len(p) > 1 for p in module.parameters(False)):
                return True
    return False


def _is_linear(module: nn.Module) -> bool:
    plain_conv = isinstance(module, nn.Conv2d) and module.groups == 1
    return isinstance(module, nn.Linear) or plain_conv or is_conv1d(module)
