"""No method is without the check of its account against the bytes that are written: a new one that has none fails here."""

import inspect
from importlib import import_module
from pkgutil import walk_packages

from dynamic_methods import DYNAMIC
from helpers import REPOSITORY
from hydra.utils import get_class
from omegaconf import OmegaConf

import fusion_bench_didi.method as methods
from fusion_bench_didi.method.base import DynamicMethod, PoolMethod

CONFIGS = REPOSITORY / "config" / "method" / "didi"


def classes() -> set[type]:
    """All methods that are written in the package, without what they have in common."""
    found = set()
    for module in walk_packages(methods.__path__, f"{methods.__name__}."):
        for _, kind in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(kind, PoolMethod) and kind.__module__ == module.name:
                found.add(kind)
    return {kind for kind in found if not any(kind in m.__bases__ for m in found)}


def configured() -> dict[str, type]:
    """Classes by the names of their configurations; others are settings of one of these."""
    files = {"didi": CONFIGS.parent / "didi.yaml"}
    files |= {f"didi/{file.stem}": file for file in sorted(CONFIGS.glob("*.yaml"))}
    targets = {
        name: OmegaConf.load(file).get("_target_") for name, file in files.items()
    }
    return {name: get_class(target) for name, target in targets.items() if target}


def test_every_method_has_a_configuration():
    assert classes() <= set(configured().values())
    assert set(methods.__all__) <= {kind.__name__ for kind in configured().values()}


def test_every_method_is_a_row_of_the_comparison():
    """Whose files are held against the account, row by row, in ``tests/artifacts``."""
    entries = OmegaConf.load(REPOSITORY / "config" / "didi_compare.yaml").entries
    compared = {entry.method for entry in entries.values()}
    rows = {configured()[name] for name in compared if name in configured()}
    assert set(configured().values()) == rows


def test_every_dynamic_method_is_checked_like_the_others():
    """By the laws of ``test_baselines``: files and account, order of the pool, idle tasks, types, excluded tensors."""
    checked = {type(make()) for make in DYNAMIC.values()}
    assert {kind for kind in classes() if issubclass(kind, DynamicMethod)} == checked
