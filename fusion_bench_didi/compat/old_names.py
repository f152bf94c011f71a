"""Old modules, names and settings: they work for one release, with a warning that says what to write instead."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: old module of names that users import -> the modules that hold them now
MOVED = {
    "artefact": "artifacts.saving",
    "budget": "merging.settings",
    "layout": "merging.settings",
    "method.cat": "method.baselines.cat",
    "method.emr": "method.baselines.emr",
    "method.free": "method.baselines.free",
    "method.tall_mask": "method.baselines.tall_mask",
    "method.tsv_c": "method.baselines.tsv_c",
    "method.twin": "method.baselines.twin",
    "naming": "pools.task_names",
    "pipeline": "merging.pipeline merging.results",
    "pool_reader": "pools.opening",
    "quantised": "deltas.quantized",
    "sources": "task_vectors.sources task_vectors.file_sources task_vectors.renaming",
    "storage": "deltas.storage",
}
#: (old module, old name) -> new name
RENAMED = {
    ("artefact", "load_artefact"): "load_artifact",
    ("artefact", "save_artefact"): "save_artifact",
}
_PACKAGE = __name__.partition(".")[0]


class _OldModules(MetaPathFinder, Loader):
    """Finds the modules of :data:`MOVED`, whose names are those of the new modules, loaded at first use."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != _PACKAGE or old not in MOVED:
            return None
        homes = [f"{_PACKAGE}.{home}" for home in MOVED[old].split()]
        homes += [f"{name}: {new}" for (o, name), new in RENAMED.items() if o == old]
        warnings.warn(
            f"{fullname} is now {', '.join(homes)}; the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]

        def find(name: str) -> Any:
            for home in () if name.startswith("__") else MOVED[old].split():
                found = import_module(f"{_PACKAGE}.{home}")
                with_new_name = RENAMED.get((old, name), name)
                if hasattr(found, with_new_name):
                    return getattr(found, with_new_name)
            raise AttributeError(
                f"module {module.__name__!r} has no attribute {name!r}"
            )

        module.__getattr__ = find


_OLD_MODULES = _OldModules()


def find() -> None:
    """Have the old modules found."""
    if _OLD_MODULES not in sys.meta_path:
        sys.meta_path.append(_OLD_MODULES)


def renamed(old: str, given: Any, new: str, value: Any) -> Any:
    """The value of a setting that may still be given by its old name; None there if it was not."""
    if given is None:
        return value
    warnings.warn(
        f"{old} is now called {new}; the old name goes with the next release.",
        FutureWarning,
        stacklevel=3,
    )
    return given
