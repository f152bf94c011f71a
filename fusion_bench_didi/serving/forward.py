"""One forward for samples of different tasks, without a model per sample.

``theta(x) = theta_0 + s S + sum_t w_t(x) E_t`` with S the shared change, ``s`` a number (1 but for methods that rescale
everything), and ``E_t`` what task t adds to it. A row of ``w`` that is one-hot gives the model of that task, a row of
zeros base plus shared part.

Two ways to run it. *Layered*: the batch is sorted by task once and runs through a network whose changed layers work by
slices of it. *Grouped*: samples of equal weights are run together through the backbone with their tensors in place of its own;
right for any architecture. The first is used where every changed tensor belongs to a module that has a per-sample form, and
where it agrees with the second on a few samples of the first batch of its kind; the second otherwise. Neither changes the
backbone.

On a CPU, where a batch that overflows the cache is slower than its parts, the sorted batch is cut between tasks.

Threads may share a mixed forward. Layered passes run side by side; what puts other tensors into the backbone itself, as
grouped passes do, waits for its turn.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiDiError
from .agreement import agree, rounded_again
from .banks import OwnBank
from .caches import Caches, caches_of
from .calls import Call, media_tokens, names_of_tasks, parameter_names, towers
from .forward_only import check_forward_only
from .held import Held
from .in_place import Places
from .layers import PerSampleLinear, UnsupportedShape
from .making import AnyBank
from .mixtures import ByTask, Mix, mix_of, product_dtype
from .network import per_sample_network
from .outputs import Layout, joined, reordered
from .own_settings import OwnSettings, put
from .requests import checked_weights, task_numbers
from .running import Pass, Running
from .sequences import check_lengths, sequence_lengths
from .shadow import OwnBuffers, network_with, watch_states
from .weights import BackboneWeights

log = logging.getLogger(__name__)
#: samples of the first batch on which the two ways are compared
PROBES = 4
#: bytes of a layer's output that stay near the processor
CACHE = 16 * 2**20


class MixedForward:
    """The mixed forward of one model.

    Args:
        weights: of the backbone whose layers are run; their lock is held while the backbone's own tensors are replaced.
        banks: of the tensors that some task changes, by name.
        tasks: their names, in the order of the banks.
        held: what banks hold decoded within a limit; None where they hold all, and then the shared model too.
        settings: of the configuration that tasks have of their own.

    Attributes:
        of_several_shapes: names of tensors that are not of one shape for all tasks.
        takes_tasks: the backbone's forward has arguments of its own that are called as those of tasks.
    """

    def __init__(
        self,
        weights: BackboneWeights,
        banks: Mapping[str, AnyBank],
        tasks: Sequence[str],
        *,
        held: Held | None,
        settings: OwnSettings,
    ):
        backbone = self.backbone = weights.backbone
        self.weights, self.banks, self.tasks = weights, dict(banks), list(tasks)
        self.count = len(self.tasks)
        self.settings, self.running = settings, Running()
        watch_states(backbone)
        self.network = None
        if not weights.derived.of_results:
            self.network = per_sample_network(backbone, self.banks, self.running)
        self.held, self.shared_network = held, None
        if self.network is not None and held is None:
            shared = {name: bank.value(self.count) for name, bank in banks.items()}
            self.shared_network = network_with(backbone, shared)
        self._buffers = {
            network: OwnBuffers(network, backbone)
            for network in (self.network, self.shared_network)
            if network is not None
        }
        self._places = Places(weights, self.banks)
        self._names = parameter_names(backbone.forward)
        self.takes_tasks = bool(names_of_tasks(backbone.forward))
        self._main = getattr(backbone, "main_input_name", None)
        self._tokens, self._ways = media_tokens(backbone), towers(backbone)
        self.of_several_shapes = [
            name
            for name, bank in banks.items()
            if isinstance(bank, OwnBank) and bank.shapes_differ
        ]
        self._layouts: dict[Hashable, Layout] = {}
        self._agreeing: dict[Hashable, bool] = {}
        self.limit = PROBES

    def __call__(
        self,
        task_ids: Any,
        task_weights: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        method: str | None = None,
    ) -> Any:
        """The backbone's output, sample by sample under its own weights.

        Args:
            task_ids: one per sample, see :func:`~.requests.task_numbers`; or None.
            task_weights: (B, T) otherwise, columns in the order of the model's tasks.
            args, kwargs: of the backbone; tensors whose first side is B are split by sample, all others shared.
            method: of the backbone; its forward if None.

        Raises:
            DiDiError: for tasks of another number of samples, for outputs that cannot be told apart by sample, and where
                gradients are asked for.
        """
        given = task_ids, task_weights, args, kwargs
        check_forward_only(self.backbone, given)
        with torch.no_grad():
            call = self.call(args, kwargs, method)
            return self.run(self.mix(task_ids, task_weights, call), call)

    def shared(self, mix: Mix, call: Call) -> Any:
        """The output for a call all of whose samples are the shared model's."""
        if self.network is None or self.shared_network is None:
            return self.run(mix, call)
        return self.on(self.shared_network, call)

    def call(
        self, args: tuple, kwargs: Mapping[str, Any], method: str | None = None
    ) -> Call:
        """A call of the backbone's forward, or of another of its methods."""
        names = self._names
        if method is not None:
            names = parameter_names(getattr(self.backbone, method))
        return Call(args, kwargs, method, names, self._main, tokens=self._tokens)

    def mix(self, task_ids: Any, task_weights: Any, call: Call) -> Mix:
        """The mixture of a call's samples, from task ids or weights, whichever is not None.

        Raises:
            DiDiError: if both are given, or are not of these samples; and if images are not one per sample.
        """
        if task_ids is not None and task_weights is not None:
            raise DiDiError("Give task_ids or task_weights, not both.")
        if task_weights is not None:
            weights = checked_weights(task_weights, self.tasks)
            call.fits(len(weights), "rows of task_weights")
            mix = mix_of(weights.to(self._device))
        else:
            ids = task_numbers(task_ids, self.tasks)
            call.fits(len(ids), "task_ids")
            mix = ByTask.of(ids.to(self._device), self.count)
        if self._tokens and not torch.compiler.is_compiling():
            if len(list(mix.groups())) > 1:
                call.check_media()
        if self.held is not None:
            self._ask(mix)
        return mix

    @torch.compiler.disable
    def _ask(self, mix: Mix) -> None:
        self.held.ask({*mix.asked, self.count})  # factors add to the shared matrix

    @property
    def trusted(self) -> bool:
        """Whether layered passes were found to be right."""
        return any(self._agreeing.values())

    def with_tensors(
        self,
        tensors: Mapping[str, Tensor],
        call: Call,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        """The backbone's output with other tensors in place of its own, one thread at a time.

        Args:
            settings: that come before those which follow from the tensors' shapes; the caller puts back what was there.
        """
        with self.weights.lock, self._places.holding(tensors):
            put(self.backbone, settings)
            return self.weights.unwritten.run(
                self.backbone, lambda: call.on(self.backbone), lasting=False
            )

    def run(self, mix: Mix, call: Call, *, watched: bool = False) -> Any:
        """Run a batch.

        Args:
            watched: for layers inside; tensors of tasks that have no common shape may then be the base model's.
        """
        network = self.network  # other threads may give it up
        apart = mix.uniform or self.settings.read_by(call)
        if network is not None and not apart and self.verify(mix, call):
            try:
                return self.layered(network, mix, call)
            except UnsupportedShape as reason:
                self.give_up(reason)
        return self.grouped(mix, call, watched=watched)

    def layered(self, network: nn.Module, mix: Mix, call: Call) -> Any:
        """The whole batch at once, or on a CPU in pieces whose activations stay in its cache."""
        if torch.compiler.is_compiling():
            output = self.passed(network, mix, call.picked(mix.order))
            return reordered(output, mix.order, None)
        pieces, cpu = [mix], mix.order.device.type == "cpu"
        if cpu and self.learned(mix, call).separable and not caches_of(call):
            pieces = mix.pieces(self.limit)
        run = functools.partial(self.passed, network)
        return self._in_parts(mix, call, pieces, run)

    @torch.compiler.disable
    def grouped(self, mix: Mix, call: Call, *, watched: bool = False) -> Any:
        """One pass per distinct row of weights."""
        run = functools.partial(self.alone, watched=watched)
        return self._in_parts(mix, call, list(mix.groups()), run)

    def _in_parts(
        self,
        mix: Mix,
        call: Call,
        pieces: Sequence[Mix],
        run: Callable[[Mix, Call], Any],
    ) -> Any:
        """The output of the batch as given, from runs of parts of it."""
        if len(pieces) == 1 and mix.in_order:
            return run(mix, call)
        layout = self.learned(mix, call)
        calls = [call.picked(piece.order) for piece in pieces]
        caches = Caches(call, calls)
        parts = [caches.marked(run(p, c)) for p, c in zip(pieces, calls)]
        if not all(layout.covers(part, p.size) for part, p in zip(parts, pieces)):
            layout = self._learn(mix, call)
        orders = [piece.order for piece in pieces]
        if len(parts) == 1:
            output = reordered(parts[0], orders[0], layout)
        else:
            output = joined(
                parts,
                orders,
                layout,
                names=lambda i: pieces[i].named(self.tasks),
                given=[c.given for c in calls],
                ways=() if call.method else self._ways,
            )
        return caches.filled(output, orders)

    def passed(self, network: nn.Module, mix: Mix, call: Call) -> Any:
        """The output of the network of per-sample layers for a call of the samples of a mix, in its order."""
        outer = self.running.current
        self.running.current = Pass(mix)
        try:
            return self.on(network, call)
        finally:
            self.running.current = outer

    def verify(self, mix: Mix, call: Call) -> bool:
        """At the first call of a kind: see whether the two ways agree; whether the layered way can be used."""
        if self.network is None:
            return False
        if not torch.compiler.is_compiling():
            return self._verify(mix, call)
        if not self.trusted and not self._verify(mix, call):
            return False
        # of other outputs the graph could not put the samples back
        return all(layout.usual for layout in self._layouts.values())

    @torch.compiler.disable
    def _verify(self, mix: Mix, call: Call) -> bool:
        kind = self._kind(call)
        if kind not in self._agreeing:
            with self.weights.lock:  # other threads wait for the outcome
                if kind not in self._agreeing:
                    reason = self._disagreement(mix, call)
                    self._agreeing[kind] = reason is None
                    lasting = reason and not isinstance(reason, DiDiError)
                    if lasting and not self.backbone.training:
                        self.give_up(reason)
        return self.network is not None and self._agreeing[kind]

    def _disagreement(self, mix: Mix, call: Call) -> Any:
        """Run a few samples, each under another task, both ways; why the layered way cannot be used."""
        try:
            layout = self.learned(mix, call)
        except DiDiError as reason:  # outputs of no form may still be those of one task
            return reason
        # beside a single task the shared model: one sample would not tell rows that are mixed up
        tasks = torch.arange(min(PROBES, max(self.count, 2)), device=self._device)
        if self.backbone.training:  # batch norm takes no single sample
            tasks = tasks.repeat_interleave(2)
        rows = torch.arange(len(tasks), device=self._device) % call.size
        probe, mix = call.picked(rows), ByTask.of(tasks, self.count)
        groups = list(mix.groups())

        def one_by_one(nudged: bool) -> list[Any]:
            return [self.alone(g, probe.picked(g.order), nudged=nudged) for g in groups]

        alone, network = one_by_one(nudged=False), self.network
        try:
            with _largest_output(network) as largest:
                found = self.passed(network, mix, probe.picked(mix.order))
        except (UnsupportedShape, RuntimeError) as reason:
            return reason
        self.limit = CACHE // max(largest)
        if agree(alone, found, layout):
            return None
        if self._few_bits and agree(alone, found, layout, one_by_one(nudged=True)):
            return None
        return "results differ from those of single tasks"

    @property
    def _few_bits(self) -> bool:
        if product_dtype(self._device) is not None:
            return True
        dtypes = {p.dtype for p in self.backbone.parameters() if p.is_floating_point()}
        return not dtypes <= {torch.float32, torch.float64}

    def learned(self, mix: Mix, call: Call) -> Layout:
        """How outputs of this kind of call are laid out."""
        kind = self._kind(call)
        return self._layouts[kind] if kind in self._layouts else self._learn(mix, call)

    def _learn(self, mix: Mix, call: Call) -> Layout:
        with self.weights.lock:
            if self.of_several_shapes:
                # what one task takes, such as a token, may be too much for another
                mix = max(mix.groups(), key=lambda group: group.size)
            first, other = mix.order[:1], mix.order[1:2]
            rows = torch.cat([first, other if len(other) else first, first])
            outputs, lengths = [], []
            for n in (2, 3):
                with sequence_lengths(self.backbone) as found:
                    outputs.append(self._of_some(mix, call, rows[:n]))
                lengths.append(found)
            check_lengths(self.backbone, *lengths)
            layout = self._layouts[self._kind(call)] = Layout.of(*outputs)
            return layout

    def _of_some(self, mix: Mix, call: Call, rows: Tensor) -> Any:
        """The output for some samples, all under the weights of the first.

        Raises:
            DiDiError: if the model takes all samples and not some, so that what is given is no rows of samples.
        """
        try:
            return self.alone(mix.like_first(len(rows)), call.picked(rows))
        except DiDiError:
            raise
        except Exception as error:  # of any type, of the model's own code
            every = torch.arange(call.size, device=self._device)
            self.alone(mix.like_first(call.size), call.picked(every))
            raise call.undivided(error) from error

    def alone(
        self, piece: Mix, call: Call, *, watched: bool = False, nudged: bool = False
    ) -> Any:
        """Samples of equal weights through the backbone.

        Args:
            nudged: with what is put into it rounded once more.
        """

        def value(bank: AnyBank) -> Tensor:
            try:
                return piece.value(bank)
            except DiDiError:
                if not watched or not isinstance(bank, OwnBank):
                    raise
                return bank.value(self.count)

        tensors = {name: value(bank) for name, bank in self.banks.items()}
        if nudged:
            dtype = product_dtype(self._device)
            tensors = {n: rounded_again(value, dtype) for n, value in tensors.items()}
        with self.weights.lock, self.settings.of(piece.asked, call) as own:
            return self.with_tensors(tensors, call, own)

    def on(self, network: nn.Module, call: Call) -> Any:
        """The output of a mirrored network, in the backbone's mode."""
        if network.training != self.backbone.training:
            network.train(self.backbone.training)
        if torch.compiler.is_compiling():
            return call.on(network)
        try:
            with self.weights.shapes.following(self.backbone, {}):
                return self.weights.unwritten.run(network, lambda: call.on(network))
        finally:
            self._buffers[network].restore()

    def _kind(self, call: Call) -> Hashable:
        return self.backbone.training, product_dtype(self._device), call.kind()

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def give_up(self, reason: Any) -> None:
        """Run group by group from now on."""
        log.warning("Mixed batches are run group by group: %s.", reason)
        self.network = None


@contextmanager
def _largest_output(network: nn.Module) -> Iterator[list[int]]:
    """Yields a list that fills with the bytes per sample that products give."""
    sizes = [1]

    def see(_: nn.Module, args: tuple, y: Tensor) -> None:
        sizes.append(y.nbytes // len(y))

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, PerSampleLinear):
                hooks.enter_context(module.register_forward_hook(see))
        yield sizes
