"""What a version pin cannot mend in the released host (FusionBench 0.2.33).

Each workaround has a test in ``tests/test_compat.py`` that fails once it is no longer needed.

``typing.override``
    The host's OpenCLIP, ConvNeXt, DINOv2 and ResNet pools import ``override`` from ``typing``, where it
    exists only since Python 3.12, although the host supports 3.10. ``typing_extensions`` has the same object.

The program instantiates the model pool before the method, so importing this package from the method would be
too late for ``modelpool=OpenCLIPVisionModelPool/...``. Hence :func:`apply` runs when ``fusion_bench_didi`` is
imported, and the Hydra search-path plugin imports it at every start of Hydra. It must stay cheap: no torch here.
"""

import typing

import typing_extensions


def apply() -> None:
    """Make the host's modules importable. Safe to call any number of times."""
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override
