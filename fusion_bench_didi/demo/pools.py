"""The demo suite behind the host's own pools: ``modelpool=didi/demo taskpool=didi/demo``.

These are the pools of a suite in a folder (:mod:`.folder_pools`), with a suite that is made where it is missing.
"""

import os
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..options import Seed, checked
from .folder_pools import FolderCLIPVisionModelPool, FolderCLIPVisionModelTaskPool
from .suite import Size, build_suite

#: The settings that decide which suite it is.
_OF_SUITE = ("seed", "cache_dir", "size")


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
        own = {key: key for key in _OF_SUITE}
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

    Raises:
        SettingsError: when a program takes it, if the program's model pool is of another suite.
    """

    _config_mapping = _DemoSuite.mapping(FolderCLIPVisionModelTaskPool)
    _taken_by: Any = None

    @property
    def _program(self) -> Any:
        """The program that evaluates by this pool; it has its model pool by then, and no method has run."""
        return self._taken_by

    @_program.setter
    def _program(self, program: Any) -> None:
        _check_same_suite(getattr(program, "modelpool", None), self)
        self._taken_by = program


def _check_same_suite(modelpool: Any, taskpool: DemoCLIPVisionModelTaskPool) -> None:
    """Models must be evaluated on the pictures of their own suite; a model pool of anything else is its user's concern.

    Raises:
        SettingsError: naming the settings that differ.
    """
    if not isinstance(modelpool, _DemoSuite):
        return
    places = [os.path.realpath(pool.root) for pool in (modelpool, taskpool)]
    if places[0] == places[1]:
        return
    pairs = {
        key: (getattr(modelpool, key), getattr(taskpool, key)) for key in _OF_SUITE
    }
    told = " and ".join(
        f"modelpool.{key}={one} with taskpool.{key}={other}"
        for key, (one, other) in pairs.items()
        if one != other
    )
    raise SettingsError(
        f"{told}: the models would be evaluated on the pictures of another suite, {places[1]} instead of {places[0]}. Give both pools "
        "the same seed, cache_dir and size."
    )
