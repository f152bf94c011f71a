"""One forward for samples of different tasks, without a model per sample.

``theta(x) = theta_0 + s S + sum_t w_t(x) E_t`` with S the shared change, ``s`` a number (1 but for methods that rescale
everything), and ``E_t`` what task t adds to it. A row of ``w`` that is one-hot gives the model of that task, a row of
zeros base plus shared part.

Two ways to run it. *Layered*: the batch is sorted by task once and runs through a network whose changed layers work by
slices of it. *Grouped*: samples of equal weights are run together through ``functional_call``; right for any
architecture whose outputs are batch-first. The first is used where every changed tensor belongs to a module that has a
per-sample form, and where it agrees with the second on a few samples of the first batch; the second otherwise.

On a CPU, where a batch that overflows the cache is slower than its parts, the sorted batch is cut between tasks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .banks import Serving, bank_of
from .layers import Current, PerSampleLinear, UnsupportedShape, is_turned
from .mixtures import ByTask, Mix, batch_size, mix_of, regrouped
from .network import per_sample_network
from .shadow import network_with

if TYPE_CHECKING:
    from ..models.dynamic import DynamicModel

log = logging.getLogger(__name__)
#: relative; a wrong layer order is off by far more, rounding by far less
AGREEMENT = 1e-3
#: samples of the first batch on which the two ways are compared
PROBES = 4
#: bytes of a layer's output that stay near the processor
CACHE = 8 * 2**20


class MixedForward:
    """The mixed forward of one model.

    Args:
        model: whose experts are mixed. Changes to it afterwards are not seen; make another.
        shared_scale: ``s``.
        serving: memory against time.
    """

    def __init__(
        self,
        model: "DynamicModel",
        *,
        shared_scale: float = 1.0,
        serving: Serving = Serving(),
    ):
        self.backbone, self.count = model.backbone, len(model.tasks)
        # tensors that are made in inference mode could not be used outside of it
        with torch.inference_mode(False):
            self.tables = {}
            for name in model.touched:
                owner, _, leaf = name.rpartition(".")
                self.tables[name] = bank_of(
                    model.base_tensor(name),
                    model.shared.get(name),
                    [model.modulators[task].deltas.get(name) for task in model.tasks],
                    shared_scale=shared_scale,
                    turned=is_turned(self.backbone.get_submodule(owner), leaf),
                    serving=serving,
                )
            self.current = Current()
            self.network = per_sample_network(self.backbone, self.tables, self.current)
            self.common = self.network and network_with(
                self.backbone, {n: t.value(self.count) for n, t in self.tables.items()}
            )
        self.trusted, self.limit = False, PROBES

    @torch.no_grad()
    def __call__(self, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's output, sample by sample under its own weights.

        Args:
            weights: (B, T); columns in the order of the model's tasks.
            *args, **kwargs: of the backbone; tensors whose first side is B are split by sample, all others shared.
        """
        return self._run(mix_of(weights), args, kwargs)

    @torch.no_grad()
    def by_task(self, task_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As above for one task per sample, (B,) in 0 ... T; T is the shared model."""
        return self._run(ByTask.of(task_ids, self.count), args, kwargs)

    @torch.no_grad()
    def shared(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the shared model, for all samples."""
        if self.network is None:
            device = next(self.backbone.parameters()).device
            none = torch.full((batch_size(args, kwargs),), self.count, device=device)
            return self.by_task(none, *args, **kwargs)
        return _following(self.backbone, self.common)(*args, **kwargs)

    def layered(self, mix: Mix, args: tuple, kwargs: dict) -> Any:
        """The whole batch at once, or on a CPU in pieces whose activations stay in its cache."""
        network = _following(self.backbone, self.network)
        whole = torch.compiler.is_compiling() or mix.order.device.type != "cpu"

        def run(piece: Mix, args: tuple, kwargs: dict) -> Any:
            self.current.mix = piece
            return network(*args, **kwargs)

        return _in_pieces([mix] if whole else mix.pieces(self.limit), run, args, kwargs)

    def grouped(self, mix: Mix, args: tuple, kwargs: dict) -> Any:
        """One pass per distinct row of weights."""

        def run(piece: Mix, args: tuple, kwargs: dict) -> Any:
            tensors = {n: piece.value(t) for n, t in self.tables.items()}
            return functional_call(self.backbone, tensors, args, kwargs)

        return _in_pieces(list(mix.groups()), run, args, kwargs)

    def _run(self, mix: Mix, args: tuple, kwargs: dict) -> Any:
        self.verify(mix.size, args, kwargs)
        if self.network is None or mix.uniform:
            return self.grouped(mix, args, kwargs)
        try:
            return self.layered(mix, args, kwargs)
        except UnsupportedShape as reason:
            self._give_up(reason)
            return self.grouped(mix, args, kwargs)

    def verify(self, size: int, args: tuple, kwargs: dict) -> None:
        """At the first batch, of ``size`` samples: see whether the two ways agree."""
        if self.network is not None and not self.trusted:
            self._compare(size, args, kwargs)

    @torch.compiler.disable
    def _compare(self, size: int, args: tuple, kwargs: dict) -> None:
        """Run a few samples, each under another task, both ways."""
        device = next(self.backbone.parameters()).device
        tasks = torch.arange(min(PROBES, self.count), device=device)
        picked = regrouped((args, kwargs), tasks % size, size)
        mix = ByTask.of(tasks, self.count)
        try:
            with _largest_output(self.network) as largest:
                found = self.layered(mix, *picked)
        except UnsupportedShape as reason:
            return self._give_up(reason)
        self.limit = CACHE // max(largest)
        if _agree(self.grouped(mix, *picked), found):
            self.trusted = True
        else:
            self._give_up("results differ from those of single tasks")

    def _give_up(self, reason: Any) -> None:
        log.warning("Mixed batches are run group by group: %s.", reason)
        self.network = None


def _following(backbone: nn.Module, network: nn.Module) -> nn.Module:
    """A mirrored network, in the backbone's mode."""
    if network.training != backbone.training:
        network.train(backbone.training)
    return network


@contextmanager
def _largest_output(network: nn.Module) -> Iterator[list[int]]:
    """Yields a list that fills with the bytes per sample that products give."""
    sizes = [1]

    def see(_: nn.Module, args: tuple, y: Tensor) -> None:
        sizes.append(y.nbytes // len(y))

    products = [m for m in network.modules() if isinstance(m, PerSampleLinear)]
    handles = [module.register_forward_hook(see) for module in products]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _in_pieces(
    pieces: list[Mix], run: Callable[[Mix, tuple, dict], Any], args: tuple, kwargs: dict
) -> Any:
    """The output of the batch as given, from runs of parts of it."""
    order = torch.cat([piece.order for piece in pieces])
    size, parts = len(order), []
    for piece in pieces:
        parts.append(run(piece, *regrouped((args, kwargs), piece.order, size)))
    output = parts[0]
    if len(parts) > 1:
        output = _joined(parts, [piece.size for piece in pieces])
    return regrouped(output, order.argsort(), size)


def _joined(parts: list[Any], sizes: list[int]) -> Any:
    """Outputs of the pieces as the output of one batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        rows = all(p.ndim and len(p) == n for p, n in zip(parts, sizes))
        return torch.cat(parts) if rows else first
    if isinstance(first, Mapping):
        joined = {key: _joined([p[key] for p in parts], sizes) for key in first}
        return type(first)(**joined)
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(p), sizes) for p in zip(*parts))
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
