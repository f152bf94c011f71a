"""What a version pin cannot mend in the released host (FusionBench 0.2.33), and what was called something else before.

Each workaround has a test in ``tests/test_compat.py`` that fails once it is no longer needed.

``typing.override``
    The host's OpenCLIP, ConvNeXt, DINOv2 and ResNet pools import ``override`` from ``typing``, where it
    exists only since Python 3.12, although the host supports 3.10. ``typing_extensions`` has the same object.

:data:`GONE`
    The host's CLIP task pools import ``CLIPVisionTransformer``, which transformers 5 merged into ``CLIPVisionModel``. The
    name is put back when transformers' module is loaded; where transformers has it, nothing happens.

:data:`MOVED`, :data:`RENAMED`, :func:`renamed`
    Old modules, names and settings work for one release, with a warning that says what to write instead.

The program instantiates the model pool before the method, so importing this package from the method would be
too late for ``modelpool=OpenCLIPVisionModelPool/...``. Hence :func:`apply` runs when ``fusion_bench_didi`` is
imported, and the Hydra search-path plugin imports it at every start of Hydra. It must stay cheap: no torch here.
"""

import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import typing_extensions

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
    "sources": "task_vectors.sources",
    "storage": "deltas.storage",
}
#: (old module, old name) -> new name
RENAMED = {
    ("artefact", "load_artefact"): "load_artifact",
    ("artefact", "save_artefact"): "save_artifact",
}
#: module of another library -> names that the host imports from it, and what they are called there now
GONE = {
    "transformers.models.clip.modeling_clip": {
        "CLIPVisionTransformer": "CLIPVisionModel"
    }
}
_PACKAGE = __name__.rpartition(".")[0]


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


class _GoneNames(MetaPathFinder):
    """Has the modules of :data:`GONE` found by others, and completes them when they are loaded."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname not in GONE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                complete(module)

            spec.loader.exec_module = exec_module
        return spec


def complete(module: ModuleType) -> None:
    """Put the names of :data:`GONE` that a module lacks back into it."""
    for name, now in GONE[module.__name__].items():
        if not hasattr(module, name) and hasattr(module, now):
            setattr(module, name, getattr(module, now))


_OLD_MODULES, _GONE_NAMES = _OldModules(), _GoneNames()


def apply() -> None:
    """Make the host's modules importable, and ours by their old names. Safe to call any number of times."""
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override
    if _OLD_MODULES not in sys.meta_path:
        sys.meta_path.append(_OLD_MODULES)
        sys.meta_path.insert(0, _GONE_NAMES)
        for module in GONE:
            if module in sys.modules:
                complete(sys.modules[module])


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


def lazy(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose public names are loaded at first use.

    Args:
        package: its name.
        home: public name -> module within the package, or ``module:name`` where the name is another there.
    """

    def find(name: str) -> Any:
        if name in home:
            module, _, inner = home[name].partition(":")
            return getattr(import_module(f"{package}.{module}"), inner or name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
