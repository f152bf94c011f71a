"""What a version pin cannot mend in the released host (FusionBench 0.2.33).

Each workaround has a test in ``tests/test_compat.py`` that fails once it is no longer needed.

``typing.override``
    The host's OpenCLIP, ConvNeXt, DINOv2 and ResNet pools import ``override`` from ``typing``, where it
    exists only since Python 3.12, although the host supports 3.10. ``typing_extensions`` has the same object.

:data:`GONE`
    The host's CLIP task pools import ``CLIPVisionTransformer``, which transformers 5 merged into ``CLIPVisionModel``. The
    name is put back when transformers' module is loaded; where transformers has it, nothing happens.
"""

import sys
import typing
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import typing_extensions

#: module of another library -> names that the host imports from it, and what they are called there now
GONE = {
    "transformers.models.clip.modeling_clip": {
        "CLIPVisionTransformer": "CLIPVisionModel"
    }
}


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


_GONE_NAMES = _GoneNames()


def mend() -> None:
    """Make the host's modules importable."""
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override
    if _GONE_NAMES not in sys.meta_path:
        sys.meta_path.insert(0, _GONE_NAMES)
        for module in GONE:
            if module in sys.modules:
                complete(sys.modules[module])
