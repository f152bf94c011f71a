"""Sources of tensors that merging reads in place of checkpoints: a base model with a shared part, and stored deltas."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..deltas.base import Delta, last_of
from ..lowrank.factors import LowRankFactors
from ..task_vectors.sources import TensorInfo, TensorSource, WrappedSource


class SharedBase(WrappedSource):
    """A base model with what tasks share: ``W_0 + S``, in float32 where there is an S.

    Args:
        shared: deltas by tensor name.
    """

    def __init__(self, base: TensorSource, shared: Mapping[str, Delta]):
        super().__init__(base, base.infos())
        self._shared = shared

    def read(self, name: str) -> Tensor:
        value, shared = self._source.read(name), self._shared.get(name)
        return value if shared is None else shared.applied(value)


class BesideShared(WrappedSource):
    """An adapter of a base model as one of the base model with a shared part; factored where both are.

    Args:
        adapter: what it does not hold is as in the base model.
        base: the base model, without the shared part.
        shared: deltas by tensor name.
    """

    def __init__(
        self, adapter: TensorSource, base: TensorSource, shared: Mapping[str, Delta]
    ):
        infos = base.infos()
        self._base = base
        self._shared = {n: d for n, d in shared.items() if n in infos}
        super().__init__(adapter, {**{n: infos[n] for n in self._shared}, **adapter.infos()})  # fmt: skip

    def rank(self, name: str) -> int | None:
        own, shared = self._source.rank(name), self._shared.get(name)
        if own is None or shared is None:
            return own
        product = shared.product()
        return None if product is None else own + product.rank

    def factors(self, name: str) -> LowRankFactors:
        own = self._source.factors(name) if self._source.rank(name) else None
        shared = self._shared.get(name)
        if shared is None:
            return own
        rest = shared.product() * -1.0
        return rest if own is None else own + rest

    def read(self, name: str) -> Tensor:
        if self._source.rank(name) is None:
            return self._source.read(name)
        return self._source.applied(name, self._base.read(name))


class Zeros(TensorSource):
    """A base model of nothing but zeros.

    Args:
        infos: of its tensors.
    """

    label = "what is stored"

    def __init__(self, infos: Mapping[str, TensorInfo]):
        self._infos = infos

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        return torch.zeros(self._infos[name].shape)


class DecodedExpert(Zeros):
    """A task's stored deltas as changes of a base model of zeros, so that they can be merged again.

    Args:
        task: the label.
        deltas: of the task, none of them a tensor of its own.
        shared: of all tasks.
        infos: of the tensors that some task changes.
    """

    partial = True

    def __init__(
        self,
        task: str,
        deltas: Mapping[str, Delta],
        shared: Mapping[str, Delta],
        infos: Mapping[str, TensorInfo],
    ):
        super().__init__(infos)
        self.label, self._deltas, self._shared = task, deltas, shared
        self._ranks: dict[str, int | None] = {}
        #: the last one that was decoded: ranks and factors are asked for one after the other
        self._last: tuple[str, LowRankFactors | None] | None = None

    def rank(self, name: str) -> int | None:
        if name not in self._ranks:
            product, shape = self.factors(name), self._infos[name].shape
            m, n = product.shape if product else (1, 1)
            few = product is not None and product.rank * (m + n) <= m * n
            self._ranks[name] = product.rank if few and len(shape) > 1 else None
        return self._ranks[name]

    def factors(self, name: str) -> LowRankFactors | None:
        last = self._last
        if last is None or last[0] != name:
            self._last = last = name, self._decoded(name)
        return last[1]

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        last, below = last_of(self._deltas.get(name), self._shared.get(name))
        return super().read(name) if last is None else last.change(below)

    def applied(self, name: str, base: Tensor) -> Tensor:
        return base + self.read(name)

    @torch.no_grad()
    def _decoded(self, name: str) -> LowRankFactors | None:
        last, below = last_of(self._deltas.get(name), self._shared.get(name))
        if last is not None:
            return last.product(below)
        m, *rest = self._infos[name].shape or (1,)
        return LowRankFactors.zeros(
            m, int(torch.Size(rest).numel()), like=torch.empty(0)
        )
