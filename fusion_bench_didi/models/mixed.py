"""One forward for samples of different tasks, without a model per sample.

``theta(x) = theta_0 + s S + sum_t w_t(x) E_t`` with S the shared change, ``s`` a number (1 but for methods that rescale
everything), and ``E_t`` what task t adds to it. A row of ``w`` that is one-hot gives the model of that task, a row of
zeros base plus shared part. For a linear layer with low-rank experts

``y = (W_0 + s S) x + sum_t w_t(x) B_t (A_t x)``

so that a sample costs two thin products more and no weight is ever written. Factors are kept where they are small, r (m + n)
<= m n / 2 values; elsewhere the task's dense matrix is, which takes the common one's place and costs no time. Norms, biases and embeddings are a table with a row per task, from which every sample mixes its own.

Two ways to run it. *Layered*: the backbone runs once over the whole batch; its leaf modules are made per-sample for the
length of the call. *Grouped*: samples of equal weights are run together through ``functional_call``; right for any
architecture whose outputs are batch-first. The first is used where every changed tensor belongs to a module that is
known here, and where it agrees with the second on the first batch; the second otherwise.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .mixing import Routing, Table, regrouped
from .per_sample import PerSample, UnsupportedShape, per_sample_of

if TYPE_CHECKING:
    from .dynamic import DynamicModel

log = logging.getLogger(__name__)
AGREEMENT = (
    1e-3  # relative; a wrong layer order is off by far more, rounding by far less
)


class MixedForward:
    """The mixed forward of one model; working copies of its changes are made at the first call.

    Args:
        model: whose experts are mixed. Changes to it after the first call are not seen; make another.
        shared_scale: ``s``.
        layered: false: always by groups.
    """

    def __init__(
        self, model: "DynamicModel", *, shared_scale: float = 1.0, layered: bool = True
    ):
        self.model = model
        self.tables = {
            name: Table.of(
                model.base_tensor(name),
                model.shared.get(name),
                [model.modulators[task].deltas.get(name) for task in model.tasks],
                shared_scale,
            )
            for name in model.touched
        }
        self.owners = owners(model.backbone, self.tables) if layered else None
        self.trusted = False

    @torch.no_grad()
    def __call__(self, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's output, sample by sample under its own weights.

        Args:
            weights: (B, T); columns in the order of ``model.tasks``.
            *args, **kwargs: of the backbone; tensors whose first side is B are split by sample, all others shared.
        """
        routing = Routing.of(weights)
        if self.owners is None:
            return self.grouped(routing, args, kwargs)
        try:
            output = self.layered(routing, args, kwargs)
        except UnsupportedShape as reason:
            return self._give_up(reason, routing, args, kwargs)
        if not self.trusted and len(routing.groups) > 1:
            few = routing.probe()
            picked = regrouped((args, kwargs), few, len(weights))
            expected = self.grouped(Routing.of(weights[few]), *picked)
            if not _agree(expected, regrouped(output, few, len(weights))):
                reason = "results differ from those of single tasks"
                return self._give_up(reason, routing, args, kwargs)
            self.trusted = True
        return output

    def layered(self, routing: Routing, args: tuple, kwargs: dict) -> Any:
        """One pass over the batch, sorted so that equal weights lie side by side."""
        size = len(routing.weights)
        if len(routing.groups) > 1:
            args, kwargs = regrouped((args, kwargs), routing.order, size)
        with _replaced(self.owners, routing) as called:
            output = self.model.backbone(*args, **kwargs)
        silent = [name for name in self.owners if name not in called]
        if silent:
            raise UnsupportedShape(f"weights are used without a call of {silent[0]}")
        if len(routing.groups) == 1:
            return output
        return regrouped(output, routing.back, size)

    def grouped(self, routing: Routing, args: tuple, kwargs: dict) -> Any:
        """One pass per distinct row of weights."""
        size, parts = len(routing.weights), []
        for group in routing.groups:
            index = routing.order[group.where]
            picked, named = regrouped((args, kwargs), index, size)
            tensors = {n: t.mixed(group) for n, t in self.tables.items()}
            parts.append(functional_call(self.model.backbone, tensors, picked, named))
        return regrouped(_joined(parts, routing), routing.back, size)

    def _give_up(self, reason: Any, routing: Routing, args: tuple, kwargs: dict) -> Any:
        log.warning("Mixed batches are run group by group: %s.", reason)
        self.owners = None
        return self.grouped(routing, args, kwargs)


def owners(
    backbone: nn.Module, tables: Mapping[str, Table]
) -> dict[str, tuple[nn.Module, PerSample]] | None:
    """The per-sample form of each module that owns changed tensors; None if one of them has none."""
    by_module: dict[str, dict[str, Table]] = {}
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        by_module.setdefault(owner, {})[leaf] = table
    names: dict[int, int] = {}
    for _, parameter in backbone.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    found = {}
    for owner, leaves in by_module.items():
        module = backbone.get_submodule(owner)
        tied = any(names.get(id(getattr(module, leaf)), 1) > 1 for leaf in leaves)
        make = None if tied else per_sample_of(module, leaves)
        if make is None:
            log.info("No per-sample form of %s (%s).", owner, type(module).__name__)
            return None
        found[owner] = (module, make)
    return found


@contextmanager
def _replaced(owners: Mapping[str, tuple[nn.Module, PerSample]], routing: Routing):
    """The modules with their per-sample forward; yields the names of those that were called."""
    called: set[str] = set()

    def calling(name: str, module: nn.Module, run: PerSample) -> Callable[..., Any]:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return run(routing, plain, *args, **kwargs)

        return forward

    try:
        for name, (module, run) in owners.items():
            module.forward = calling(name, module, run)
        yield called
    finally:
        for module, _ in owners.values():
            module.__dict__.pop("forward", None)


def _joined(parts: list[Any], routing: Routing) -> Any:
    """Outputs of the groups as the output of one batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        sizes = [group.size for group in routing.groups]
        rows = all(p.ndim and len(p) == n for p, n in zip(parts, sizes))
        return torch.cat(parts) if rows else first
    if isinstance(first, Mapping):
        joined = {key: _joined([p[key] for p in parts], routing) for key in first}
        return type(first)(**joined)
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(p), routing) for p in zip(*parts))
    return first


def _agree(expected: Any, found: Any) -> bool:
    """Whether all floating-point tensors of two outputs are equal but for rounding."""
    if isinstance(expected, Tensor):
        if not expected.is_floating_point() or expected.shape != found.shape:
            return expected.shape == found.shape
        scale = expected.abs().max().clamp_min(1e-6)
        coarse = AGREEMENT if expected.dtype == torch.float32 else 30 * AGREEMENT
        return bool((expected - found).abs().max() <= coarse * scale)
    if isinstance(expected, Mapping):
        return all(_agree(expected[key], found[key]) for key in expected)
    if isinstance(expected, (tuple, list)):
        return all(map(_agree, expected, found))
    return True
