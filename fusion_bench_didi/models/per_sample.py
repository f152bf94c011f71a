"""Leaf modules whose weights differ from sample to sample.

Every function takes the batch sorted by its weights. Operations that are linear in their weight are run group by group
where few samples differ, and otherwise as ``common(x) + sum_t w_t(x) change_t(x)``, which needs no weight per sample.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mixing import Routing, Table

PerSample = Callable[..., Any]

#: bare parameters that broadcast over the batch in their module's forward, which takes them per sample as (B, 1, n)
BROADCAST = {"CLIPVisionEmbeddings": "class_embedding"}


class UnsupportedShape(Exception):
    """An input whose first side is not the batch; says which."""


def per_sample_of(module: nn.Module, leaves: Mapping[str, Table]) -> PerSample | None:
    """The per-sample forward of a module, or None for kinds not known here.

    Args:
        leaves: its changed tensors by their name in the module.
    """
    kind = type(module)
    if BROADCAST.get(kind.__name__) in leaves and len(leaves) == 1:
        return _broadcast(module, leaves[BROADCAST[kind.__name__]])
    if not set(leaves) <= {"weight", "bias"}:
        return None
    if kind is nn.Linear:
        return _affine(module, leaves, F.linear, transposed=False)
    if kind.__name__ == "Conv1D":  # the (n, m) linear layer of GPT-2
        return _affine(module, leaves, lambda x, w: x @ w, transposed=True)
    if kind is nn.Conv2d and module.padding_mode == "zeros":
        options = (module.stride, module.padding, module.dilation, module.groups)
        return _affine(
            module,
            leaves,
            lambda x, w: F.conv2d(x, w, None, *options),
            transposed=False,
        )
    if kind is nn.LayerNorm:
        return _layer_norm(module, leaves)
    if kind is nn.Embedding and module.max_norm is None:
        return _embedding(leaves["weight"])
    return None


def _affine(
    module: nn.Module,
    leaves: Mapping[str, Table],
    apply: Callable[[Tensor, Tensor], Tensor],
    *,
    transposed: bool,
) -> PerSample:
    """``apply(x, W) + b`` where ``apply`` is linear in both."""
    weight, bias, kind = leaves.get("weight"), leaves.get("bias"), type(module)
    sides = -1 if not isinstance(module, nn.Conv2d) else 1  # of the channels

    def run(routing: Routing, plain: Any, x: Tensor) -> Tensor:
        _batched(x, routing, module)
        if kind is nn.Linear and routing.few and not (weight and weight.factored):
            return _linear_by_group(module, weight, bias, routing, x)
        if weight is None:
            y = apply(x, module.weight)
        elif weight.factored:
            y = apply(x, weight.common)
            y = y + _thin(x, weight, routing, transposed)
        elif routing.few:
            y = torch.cat([apply(x[g.where], weight.mixed(g)) for g in routing.groups])
        else:
            y = _summed(x, weight, routing, apply)
        rows = None
        if bias is not None:
            rows = bias.rows(routing.sorted)  # (B, m)
        elif module.bias is not None:
            rows = module.bias[None]
        if rows is None:
            return y
        if sides == 1:
            return y + rows[:, :, None, None]
        return y + rows.view(len(rows), *(1,) * (y.ndim - 2), -1)

    return run


def _linear_by_group(
    module: nn.Linear,
    weight: Table | None,
    bias: Table | None,
    routing: Routing,
    x: Tensor,
) -> Tensor:
    """One product per group, written where it belongs."""
    y = x.new_empty(*x.shape[:-1], module.out_features)
    per_sample = x[0].numel() // x.shape[-1]
    sizes = [per_sample * group.size for group in routing.groups]
    rows = x.reshape(-1, x.shape[-1]).split(sizes)
    outs = y.view(-1, module.out_features).split(sizes)
    for group, given, out in zip(routing.groups, rows, outs):
        w = module.weight if weight is None else weight.mixed(group)
        b = module.bias if bias is None else bias.mixed(group)
        if b is None:
            torch.mm(given, w.mT, out=out)
        else:
            torch.addmm(b, given, w.mT, out=out)
    return y


def _thin(x: Tensor, table: Table, routing: Routing, transposed: bool) -> Tensor:
    """``sum_t w_t(x) B_t (A_t x)``."""

    def product(x: Tensor, up: Tensor, down: Tensor, scale: Any = None) -> Tensor:
        first, last = (up, down.T) if transposed else (down.T, up)
        inner = x @ first
        if scale is not None:
            inner = inner * scale
        return F.linear(inner, last)

    one_hot = [group.task for group in routing.groups]
    if routing.few and None not in one_hot:
        return torch.cat(
            [
                product(x[g.where], *table.tasks[task])
                for g, task in zip(routing.groups, one_hot)
            ]
        )
    up, down, owner = table.factors()
    scale = routing.sorted.to(x)[:, owner]  # (B, R)
    return product(x, up, down, _over(scale, x))


def _summed(x: Tensor, table: Table, routing: Routing, apply: Any) -> Tensor:
    """``(1 - sum_t w_t) common(x) + sum_t w_t value_t(x)``."""
    weights = routing.sorted.to(x)
    common = apply(x, table.common)
    y = _over(1 - weights.sum(1, keepdim=True), common, channels_last=False) * common
    for task in weights.abs().sum(0).nonzero().squeeze(1).tolist():
        part = apply(x, table.value(task))
        scale = weights[:, task : task + 1]
        y = y + _over(scale, part, channels_last=False) * part
    return y


def _layer_norm(module: nn.LayerNorm, leaves: Mapping[str, Table]) -> PerSample:
    def run(routing: Routing, plain: Any, x: Tensor) -> Tensor:
        _batched(x, routing, module)
        if routing.few:
            parts = []
            for group in routing.groups:
                w, b = (
                    (
                        leaves[leaf].mixed(group)
                        if leaf in leaves
                        else getattr(module, leaf)
                    )
                    for leaf in ("weight", "bias")
                )
                part = x[group.where]
                parts.append(
                    F.layer_norm(part, module.normalized_shape, w, b, module.eps)
                )
            return torch.cat(parts)
        y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        for leaf, combine in (("weight", torch.mul), ("bias", torch.add)):
            if leaf in leaves:
                rows = leaves[leaf].rows(routing.sorted)
                missing = y.ndim - rows.ndim
                rows = rows.view(len(rows), *(1,) * missing, *rows.shape[1:])
                y = combine(y, rows)
            elif getattr(module, leaf) is not None:
                y = combine(y, getattr(module, leaf))
        return y

    return run


def _embedding(table: Table) -> PerSample:
    def run(routing: Routing, plain: Any, ids: Tensor) -> Tensor:
        size = len(routing.weights)
        if ids.ndim > 1 and ids.shape[0] == 1:
            ids = ids.expand(size, *ids.shape[1:])
        if ids.ndim < 2 or len(ids) != size:
            raise UnsupportedShape(f"an embedding of positions {tuple(ids.shape)}")
        weights = routing.sorted.to(table.common)
        y = F.embedding(ids, table.common)
        for task in weights.abs().sum(0).nonzero().squeeze(1).tolist():
            change = table.value(task) - table.common
            scale = weights[:, task].view(-1, *(1,) * (y.ndim - 1))
            y = y + scale * F.embedding(ids, change)
        return y

    return run


def _broadcast(module: nn.Module, table: Table) -> PerSample:
    (leaf,) = (n for n, p in module._parameters.items() if p is not None)

    def run(routing: Routing, plain: Any, *args: Any, **kwargs: Any) -> Any:
        kept = module._parameters.pop(leaf)
        try:
            setattr(module, leaf, table.rows(routing.sorted)[:, None])  # (B, 1, n)
            return plain(*args, **kwargs)
        finally:
            module.__dict__.pop(leaf, None)
            module._parameters[leaf] = kept

    return run


def _batched(x: Tensor, routing: Routing, module: nn.Module) -> None:
    if x.ndim < 2 or len(x) != len(routing.weights):
        raise UnsupportedShape(f"{type(module).__name__} is given {tuple(x.shape)}")


def _over(rows: Tensor, like: Tensor, *, channels_last: bool = True) -> Tensor:
    """(B, c) laid out to multiply (B, ..., c), or (B, 1) to multiply anything."""
    if channels_last:
        return rows.view(len(rows), *(1,) * (like.ndim - 2), -1)
    return rows.view(len(rows), *(1,) * (like.ndim - 1))
