"""What a user finds without reading the source."""

from pathlib import Path
from typing import get_args, get_type_hints

import fusion_bench_didi
from fusion_bench_didi.method.didi import DiDiMerging


def test_public_names_are_listed_and_there():
    names = dir(fusion_bench_didi)
    assert {"DiDiMerging", "DiDiModel", "Budget", "load", "merge"} <= set(names)
    for name in names:
        found = getattr(fusion_bench_didi, name)
        assert getattr(found, "__name__", name) == name  # help() says the same name


def test_types_are_for_others_too():
    assert (Path(fusion_bench_didi.__file__).parent / "py.typed").is_file()


def test_closed_sets_of_values_are_literals():
    hints = get_type_hints(DiDiMerging.__init__)
    for name in ("shared", "residual", "allocation", "refinement", "factor_dtype"):
        default = getattr(DiDiMerging(), name)
        assert default in get_args(hints[name])
