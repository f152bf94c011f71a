"""The weights of a backbone: base values kept, live ones written."""

import threading
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointMismatchError


class BackboneWeights:
    """Tensors of a backbone that are overwritten and come back.

    Args:
        backbone: whose tensors they are.

    Attributes:
        lock: held while tensors are read or written; also by whoever replaces the backbone's tensors for a while.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self.lock = threading.RLock()
        self._base: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"backbone": self.backbone, "_base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def live(self, name: str) -> Tensor:
        """The tensor as it is now.

        Raises:
            CheckpointMismatchError: if the backbone lacks it.
        """
        owner, _, leaf = name.rpartition(".")
        try:
            return getattr(self.backbone.get_submodule(owner), leaf).detach()
        except AttributeError:
            raise CheckpointMismatchError(
                f"The backbone ({type(self.backbone).__name__}) has no tensor {name!r}, which the merged model changes. "
                "Pass the base model of the merge."
            ) from None

    def base(self, name: str) -> Tensor:
        """The base value, whatever was written; in the live tensor's type and on its device."""
        with self.lock:
            live = self.live(name)
            kept = self._base.get(name, live)
            if kept.device != live.device or kept.dtype != live.dtype:
                kept = self._base[name] = kept.to(live.device, live.dtype)
            return kept

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a live tensor, keeping its base value."""
        with self.lock:
            live = self.live(name)
            if name not in self._base:
                self._base[name] = live.clone()
            live.copy_(value)

    def restore(self) -> None:
        """Write all base values back."""
        with self.lock:
            for name, value in self._base.items():
                self.live(name).copy_(value)

    def forget(self, name: str) -> None:
        """Write a base value back for good."""
        with self.lock:
            if name in self._base:
                self.live(name).copy_(self._base.pop(name))
