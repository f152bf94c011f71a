"""Small models to be saved, and what is found of them."""

from pathlib import Path

from fuzz_cases import body, every_form
from helpers import REPOSITORY

from fusion_bench_didi.artifacts import load_artifact
from fusion_bench_didi.models.dynamic import DiDiModel

TESTS = REPOSITORY / "tests"


def small(**info) -> DiDiModel:
    return DiDiModel(body(), *every_form(), unit_bits=10000, info=info)


def marked(target: Path) -> str:
    """Which of the models that tests write lies there, all of it read."""
    return load_artifact(target, body()).info["mark"]


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
