"""Weights that a forward must leave as they are: tasks are switched by writing to them, and mixed batches share them."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import DiDiError, some
from ..task_vectors.live_models import DIVIDED, EVERY, check_undivided

log = logging.getLogger(__name__)
Parameters = list[nn.Parameter]
#: Base values of what merged models have overwritten in their backbones, by name; none while no task is set.
_overwritten = WeakKeyDictionary[nn.Module, dict[str, Tensor]]()


class Unwritten:
    """Watches that forwards of a backbone, and of networks over its parameters, do not write to these, nor other merged models.

    It goes by the counters that torch keeps of writes, so that training between forwards is the user's own. Writes past the
    counters (``.data``, tensors made in inference mode) are not seen. Embeddings with ``max_norm`` write what they would write
    again under any task, which does no harm.

    Args:
        backbone: whose parameters they are.
        kept: base values of what the merged model itself has overwritten, as they are at any time.
    """

    def __init__(self, backbone: nn.Module, kept: dict[str, Tensor]):
        self.backbone, self._kept = backbone, kept
        self._fault: str | None = None
        self._begun = self._ended = 0  # writes of the merged model itself
        self._lasting = WeakKeyDictionary[nn.Module, Parameters]()

    def __getstate__(self) -> dict[str, Any]:
        held = {"backbone": self.backbone, "_kept": self._kept}
        return {**held, "_fault": self._fault, "_begun": 0, "_ended": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lasting=WeakKeyDictionary())
        if self._kept:
            _overwritten[self.backbone] = self._kept

    def check(self) -> None:
        """No forward has written to them, and no task of another merged model is in them.

        Raises:
            DiDiError: from the first forward that did on; and while such a task is set.
        """
        if self._fault is not None:
            raise DiDiError(self._fault)
        kept = _overwritten.get(self.backbone)
        if kept and kept is not self._kept:
            raise DiDiError(
                f"Another merged model has set a task on this one's backbone ({type(self.backbone).__name__}), whose weights would be taken "
                "for the base model's. Call unset_task() of that model first; or give each model a backbone of its own, "
                "copy.deepcopy(backbone) before any task is set, or the place that it is loaded from."
            )

    def writing(self) -> None:
        """The merged model is about to overwrite weights.

        Raises:
            DiDiError: as :meth:`check`.
        """
        self.check()
        _overwritten[self.backbone] = self._kept

    def run(
        self, network: nn.Module, forward: Callable[[], Any], *, lasting: bool = True
    ) -> Any:
        """What a forward returns, which may not write to the parameters of a network.

        Args:
            lasting: they are those of its last run, see :meth:`switching`.

        Raises:
            DiDiError: naming what was written to; and if a task was set meanwhile on the backbone that runs, which is no fault of the
                model.
        """
        if torch.compiler.is_compiling():
            return forward()
        self.check()
        parameters = self._lasting.get(network) if lasting else None
        if parameters is None:
            parameters = _watched(network)
            if lasting:
                self._lasting[network] = parameters
        switches = self._ended  # before counters are read, and the others after
        before = [parameter._version for parameter in parameters]
        try:
            return forward()
        finally:
            after = [parameter._version for parameter in parameters]
            if before != after and switches == self._begun:
                pairs = zip(parameters, before)
                written = {id(p) for p, count in pairs if p._version != count}
                self._fault = _fault(network, written)
                self.check()
            if before != after and network is self.backbone:
                raise DiDiError(
                    f"A task was set by another thread while {type(network).__name__} ran, so that its output would be of weights of both. "
                    "Switch and run a model in one thread; several may run batches with task_ids=[...] at the same time, or each a "
                    "model of its own, materialize(task) or copy.deepcopy(model)."
                )

    @contextmanager
    def switching(self) -> Iterator[None]:
        """While it lasts, values of the backbone become another task's: no forward of another thread writes them. Its parameters
        may be others afterwards, too. By one thread at a time."""
        self._begun += 1
        try:
            yield
        finally:
            self._lasting.pop(self.backbone, None)
            self._ended += 1


def _watched(network: nn.Module) -> Parameters:
    return [
        parameter
        for module in network.modules()
        for parameter in module._parameters.values()
        if parameter is not None
        and not parameter.is_inference()
        and vars(module).get("max_norm") is None
    ]


def _fault(network: nn.Module, written: set[int]) -> str:
    names = [
        f"{name} of {type(network.get_submodule(name.rpartition('.')[0])).__name__}"
        for name, parameter in network.named_parameters()
        if id(parameter) in written
    ]
    return (
        f"A forward of {type(network).__name__} wrote to its own weights ({some(names)}), by which tasks are switched: the merged model "
        "in memory is spoiled. Load it again, fusion_bench_didi.load(directory, backbone=...), or merge again, with a base model whose "
        "forwards leave its weights alone, as a setting of its configuration may make it do."
    )


def without_rescaling(backbone: nn.Module) -> nn.Module:
    """The model itself, kept from dividing its weights, as RWKV models do.

    Transformers divides weights of layer i by ``2 ** (i // rescale_every)`` at the first forward after training, and halves
    activations as often, for the range of float16. Outputs are the same without, but for the constants of layer norms.

    Raises:
        DiDiError: if weights are divided already.
    """
    check_undivided(backbone, "The base model")
    for module in backbone.modules():
        config = getattr(module, "config", None)
        every = getattr(config, EVERY, None) or 0
        if hasattr(module, DIVIDED) and every > 0:
            module.config = copy.copy(config)
            setattr(module.config, EVERY, 0)
            log.warning(
                "%s runs with %s=0 in place of %d: its forwards would divide the weights by which tasks are switched. Activations of "
                "deep models may be too large for float16.",
                type(module).__name__,
                EVERY,
                every,
            )
    return backbone
