"""One forward for samples of different tasks, without a model per sample.

``theta(x) = theta_0 + s S + sum_t w_t(x) E_t`` with S the shared change, ``s`` a number (1 but for methods that rescale
everything), and ``E_t`` what task t adds to it. A row of ``w`` that is one-hot gives the model of that task, a row of
zeros base plus shared part.

Two ways to run it. *Layered*: the batch is sorted by task once and runs through a network whose changed layers work by
slices of it. *Grouped*: samples of equal weights are run together through ``functional_call``; right for any
architecture whose outputs are batch-first. The first is used where every changed tensor belongs to a module that has a
per-sample form, and where it agrees with the second on a few samples of the first batch; the second otherwise.

On a CPU, where a batch that overflows the cache is slower than its parts, the sorted batch is cut between tasks.

Threads may share a mixed forward. Layered passes run side by side; what puts other tensors into the backbone itself, as
grouped passes do, waits for its turn.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .banks import AnyBank
from .layers import PerSampleLinear, UnsupportedShape
from .mixtures import ByTask, Mix, batch_size, mix_of, regrouped
from .network import per_sample_network
from .running import Pass, Running
from .shadow import network_with

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
        backbone: whose layers are run.
        banks: of the tensors that some task changes, by name.
        count: T.
        lock: held while the backbone's own tensors are replaced; one for all mixed forwards of a backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        banks: Mapping[str, AnyBank],
        count: int,
        *,
        lock: AbstractContextManager | None = None,
    ):
        self.backbone, self.banks, self.count = backbone, dict(banks), count
        self.lock = threading.RLock() if lock is None else lock
        self.running = Running()
        self.network = per_sample_network(backbone, self.banks, self.running)
        self.shared_network = self.network and network_with(
            backbone, {name: bank.value(count) for name, bank in self.banks.items()}
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
        return _following(self.backbone, self.shared_network)(*args, **kwargs)

    def with_tensors(
        self, tensors: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> Any:
        """The backbone's output with other tensors in place of its own, one thread at a time."""
        with self.lock:
            return functional_call(self.backbone, dict(tensors), args, kwargs)

    def layered(self, network: nn.Module, mix: Mix, args: tuple, kwargs: dict) -> Any:
        """The whole batch at once, or on a CPU in pieces whose activations stay in its cache."""
        network = _following(self.backbone, network)
        whole = torch.compiler.is_compiling() or mix.order.device.type != "cpu"

        def run(piece: Mix, args: tuple, kwargs: dict) -> Any:
            outer = self.running.current
            self.running.current = Pass(piece)
            try:
                return network(*args, **kwargs)
            finally:
                self.running.current = outer

        return _in_pieces([mix] if whole else mix.pieces(self.limit), run, args, kwargs)

    def grouped(self, mix: Mix, args: tuple, kwargs: dict) -> Any:
        """One pass per distinct row of weights."""

        def run(piece: Mix, args: tuple, kwargs: dict) -> Any:
            tensors = {name: piece.value(bank) for name, bank in self.banks.items()}
            return self.with_tensors(tensors, args, kwargs)

        return _in_pieces(list(mix.groups()), run, args, kwargs)

    def _run(self, mix: Mix, args: tuple, kwargs: dict) -> Any:
        self.verify(mix.size, args, kwargs)
        network = self.network
        if network is None or mix.uniform:
            return self.grouped(mix, args, kwargs)
        try:
            return self.layered(network, mix, args, kwargs)
        except UnsupportedShape as reason:
            self._give_up(reason)
            return self.grouped(mix, args, kwargs)

    def verify(self, size: int, args: tuple, kwargs: dict) -> None:
        """At the first batch, of ``size`` samples: see whether the two ways agree."""
        if self.network is not None and not self.trusted:
            self._compare(size, args, kwargs)

    @torch.compiler.disable
    def _compare(self, size: int, args: tuple, kwargs: dict) -> None:
        """Run a few samples, each under another task, both ways; other threads wait for the outcome."""
        with self.lock:
            if self.network is None or self.trusted:
                return
            device = next(self.backbone.parameters()).device
            tasks = torch.arange(min(PROBES, self.count), device=device)
            picked = regrouped((args, kwargs), tasks % size, size)
            mix = ByTask.of(tasks, self.count)
            try:
                with _largest_output(self.network) as largest:
                    found = self.layered(self.network, mix, *picked)
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
        output = _concatenated(parts, [piece.size for piece in pieces])
    return regrouped(output, order.argsort(), size)


def _concatenated(parts: list[Any], sizes: list[int]) -> Any:
    """Outputs of the pieces as the output of one batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        rows = all(p.ndim and len(p) == n for p, n in zip(parts, sizes))
        return torch.cat(parts) if rows else first
    if isinstance(first, Mapping):
        whole = {key: _concatenated([p[key] for p in parts], sizes) for key in first}
        return type(first)(**whole)
    if isinstance(first, (tuple, list)):
        return type(first)(_concatenated(list(p), sizes) for p in zip(*parts))
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
