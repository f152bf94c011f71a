"""Fine-tuned models in a finer type than the base model's, read in the base model's.

A pool may load models in a smaller type than their files have. Read as they are, they would differ from the base model in
every entry by what rounding took of it, and the merged model could not hold these differences.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .sources import TensorInfo, TensorSource, WrappedSource


class CastSource(WrappedSource):
    """A source some of whose tensors are of other types.

    Args:
        types: by name.
    """

    def __init__(self, source: TensorSource, types: Mapping[str, torch.dtype]):
        infos = {
            name: TensorInfo(info.shape, types.get(name, info.dtype))
            for name, info in source.infos().items()
        }
        super().__init__(source, infos)
        self._types = types

    @classmethod
    def over(cls, source: TensorSource, base: TensorSource) -> TensorSource:
        """The source, wrapped where its numbers are finer than the base model's."""
        coarse, types = base.infos(), {}
        for name, info in source.infos().items():
            if name in coarse and info.floating and coarse[name].floating:
                if coarse[name].dtype.itemsize < info.dtype.itemsize:
                    types[name] = coarse[name].dtype
        return cls(source, types) if types else source

    def read(self, name: str) -> Tensor:
        value = self._source.read(name)
        return value.to(self._types.get(name, value.dtype))
