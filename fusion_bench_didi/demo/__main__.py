"""``python -m fusion_bench_didi.demo``: the main job on the embedded suite, and one table.

Methods come from the same YAML that ``fusion_bench method=... modelpool=didi/demo taskpool=didi/demo`` composes; pools
and evaluation are the host's.
"""

import contextlib
import logging
import os
import time
import warnings

os.environ.setdefault("TQDM_DISABLE", "1")  # one table, not a hundred progress bars

import torch  # noqa: E402
from fusion_bench.utils import instantiate  # noqa: E402
from fusion_bench.utils.hydra_utils import initialize_hydra_config  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from ..taskpool import task_switching as attach
from .pools import DemoCLIPVisionModelPool, DemoCLIPVisionModelTaskPool

METHODS = (
    ("weight average", ["method=simple_average"]),
    ("DiDi-S", ["method=didi/s"]),
    ("DiDi-M", ["method=didi/m"]),
    ("DiDi-M, float32 factors", ["method=didi/m", "method.factor_dtype=float32"]),
    ("DiDi, smallest", ["method=didi", "method.budget=0.25"]),
)


def composed(overrides: list[str]):
    """The method that the command line would run."""
    config = initialize_hydra_config("fabric_model_fusion", overrides)
    return instantiate(config.method, _recursive_=False)


@contextlib.contextmanager
def _quiet():
    """Swallow what is printed (the host's panels); it asks for a file descriptor, so a real file."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class Scoring:
    """Accuracy per task by the host's task pool, each task evaluated once per model."""

    def __init__(self):
        self.pool = DemoCLIPVisionModelTaskPool(dataloader_kwargs={"batch_size": 250})
        attach(self.pool)
        self.pool.setup()

    def __call__(self, model: torch.nn.Module, *tasks: str) -> dict[str, float]:
        loaders = self.pool.test_dataloaders
        self.pool.test_dataloaders = {t: loaders[t] for t in tasks or loaders}
        try:
            report = self.pool.evaluate(model)
            return {t: report[t]["accuracy"] for t in self.pool.test_dataloaders}
        finally:
            self.pool.test_dataloaders = loaders


def main() -> None:
    """Make the suite if need be, merge it, print the table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    models, console = DemoCLIPVisionModelPool(), Console(width=150)
    with _quiet():  # the host's panels
        score = Scoring()
    tasks = models.model_names
    tuned: dict[str, float] = {}
    for task in tasks:
        tuned |= score(models.load_model(task), task)
    rows = [
        ("base model", score(models.load_pretrained_model()), "0.00", 0.0),
        ("individuals", tuned, f"{len(tasks):.2f}", 0.0),
    ]
    for label, overrides in METHODS:
        console.print(f"merging: {label} ({' '.join(overrides)})", highlight=False)
        with _quiet():
            method = composed(overrides)
            start = time.perf_counter()
            model = method.run(models)
            seconds = time.perf_counter() - start
        storage = getattr(model, "storage", None)
        stored = f"{storage.x_excl:.2f}" if storage else "1.00"
        rows.append((label, score(model), stored, seconds))
    console.print(_table(rows, tuned))
    console.print(
        "stored: beyond the backbone, in units of one fine-tuned model. retention: mean over tasks of accuracy /\n"
        "fine-tuned accuracy. The same from the command line:\n"
        "  fusion_bench method=didi modelpool=didi/demo taskpool=didi/demo",
        highlight=False,
    )


def _table(rows, tuned: dict[str, float]) -> Table:
    table = Table(title="DiDi-Merging on the embedded suite, test accuracy in %")
    table.add_column("method", no_wrap=True)
    for name in ("average", "retention", "stored", "seconds", *tuned):
        table.add_column(name, justify="right", no_wrap=True)
    for label, scores, stored, seconds in rows:
        average = sum(scores.values()) / len(scores)
        kept = sum(scores[t] / tuned[t] for t in tuned) / len(tuned)
        table.add_row(
            label,
            f"{100 * average:.1f}",
            f"{100 * kept:.1f}",
            stored,
            f"{seconds:.1f}" if seconds else "-",
            *(f"{100 * scores[t]:.0f}" for t in tuned),
        )
    return table


if __name__ == "__main__":
    main()
