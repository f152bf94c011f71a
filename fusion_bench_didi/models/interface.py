"""What the modules of this room need of a merged model, whose own module imports them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..deltas.base import Delta
from ..deltas.storage import StorageReport
from ..routers.base import RoutedModel, Router
from ..serving.forward import MixedForward


class Merged(RoutedModel, Protocol):
    """The interface of :class:`~.dynamic.DynamicModel`, where everything is described."""

    unit_bits: int
    backbone_bits: int
    info: dict[str, Any]
    router: Router | None
    shared: Mapping[str, Delta]

    @property
    def current_task(self) -> str | None: ...

    @property
    def _stored(self) -> tuple[dict[str, Delta], dict[str, dict[str, Delta]]]: ...

    @property
    def storage(self) -> StorageReport: ...

    @property
    def mixed(self) -> MixedForward: ...

    def mixed_for(self, task_weights: Any) -> MixedForward: ...

    def run_alone(self, function: Callable, *args: Any, **kwargs: Any) -> Any: ...

    def backbone_changed(self) -> None: ...

    def base_tensors(self) -> dict[str, Tensor]: ...

    def write(self, name: str, value: Tensor) -> None: ...

    def restore(self) -> None: ...

    def attach_router(self, router: Router | None) -> Any: ...

    def write_parts(self, directory: Path) -> dict[str, Any]: ...

    def write_config(
        self, directory: Path, parts: Mapping[str, Any], **beside: Any
    ) -> None: ...

    @classmethod
    def from_parts(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        backbone: nn.Module,
        info: Mapping[str, Any],
    ) -> "Merged": ...
