"""The demo suite behind the host's own pools: ``modelpool=didi/demo taskpool=didi/demo``.

These are the pools of a suite in a folder (:mod:`.folder_pools`), with a suite that is made where it is missing.
"""

from pathlib import Path
from typing import Any

from ..options import Seed, checked
from .folder_pools import FolderCLIPVisionModelPool, FolderCLIPVisionModelTaskPool
from .suite import Size, build_suite


class _DemoSuite:
    """In front of a folder pool: the suite's own arguments in place of the folder."""

    def __init__(
        self,
        *,
        seed: Seed = 0,
        cache_dir: str | Path | None = None,
        size: Size = "full",
        **kwargs: Any,
    ) -> None:
        super().__init__(root=str(build_suite(cache_dir, seed, size=size)), **kwargs)
        self.seed, self.cache_dir, self.size = seed, cache_dir, size

    @staticmethod
    def mapping(pool: type) -> Any:
        """The folder pool's keys, without ``root``."""
        own = {key: key for key in ("seed", "cache_dir", "size")}
        kept = {k: v for k, v in pool._config_mapping.items() if k != "root"}
        return type(pool._config_mapping)(kept | own)


@checked
class DemoCLIPVisionModelPool(_DemoSuite, FolderCLIPVisionModelPool):
    """The base model and the fine-tuned models of the demo suite, with its pictures.

    Args:
        seed: of the suite.
        cache_dir: where suites live, see :func:`.suite.build_suite`.
        size: ``full``, or ``tiny`` for tests.
        **kwargs: those of :class:`.folder_pools.FolderCLIPVisionModelPool`, except ``root``.
    """

    _config_mapping = _DemoSuite.mapping(FolderCLIPVisionModelPool)


@checked
class DemoCLIPVisionModelTaskPool(_DemoSuite, FolderCLIPVisionModelTaskPool):
    """Zero-shot classification on the demo suite's pictures.

    Args:
        seed, cache_dir, size: as for :class:`DemoCLIPVisionModelPool`.
        **kwargs: those of :class:`.folder_pools.FolderCLIPVisionModelTaskPool`, except ``root``.
    """

    _config_mapping = _DemoSuite.mapping(FolderCLIPVisionModelTaskPool)
