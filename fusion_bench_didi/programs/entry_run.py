"""One row of a comparison in the making: merge, account, evaluate, and let go of everything."""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
from omegaconf import OmegaConf
from torch import nn

from ..artifacts.saving import save_artifact
from ..pools.entries import load_model
from ..pools.opening import backbone_reference, load_backbone
from ..pools.task_names import resolve_task
from ..report.metrics import ACCURACY, metric_of, named
from ..task_vectors.watched import Watched
from .entries import ComparisonError, Entry, completed
from .measure import free_memory, measured
from .progress import Watch
from .results import blank_row
from .rows import ARTIFACTS, RowStore
from .scoring import Scorer
from .sizes import PoolFacts, Size, individuals_size, model_size

log = logging.getLogger(__name__)

Row = dict[str, Any]
Rows = Mapping[str, Row | None]


@dataclass(frozen=True)
class Bench:
    """Pools and settings that every entry of a comparison runs on.

    Args:
        new_modelpool: makes a model pool that no earlier method has touched.
        instantiate: makes a method of its configuration, tied to the running program.
        scorer: evaluates on single tasks.
        facts: of the model pool.
        inputs: the files of its models, which must stay as they were when the facts were found.
        store: takes a row after every evaluated task.
        declared: settings of every entry, by its key, as by :func:`.entries.declared`.
        aliases: task pool name -> model name.
        seed: that every entry starts from, or None.
        save_artifacts: write every model that is made, and hold the account against the bytes.
    """

    new_modelpool: Callable[[], Any]
    instantiate: Callable[[Any], Any]
    scorer: Scorer
    facts: PoolFacts
    inputs: Sequence[Watched]
    store: RowStore
    declared: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, str] | None = None
    seed: int | None = None
    save_artifacts: bool = False

    def check_inputs(self) -> None:
        """
        Raises:
            CheckpointMismatchError: naming a file that changed, so that no more figures would be of the same models.
        """
        for files in self.inputs:
            files.check_all()


def run_entry(bench: Bench, entry: Entry, rows: Rows, watch: Watch) -> Row:
    """Evaluate an entry on the tasks that its row lacks.

    Args:
        rows: of all entries by key, as far as they are there.
        watch: is told the stages.

    Returns:
        the row, with figures or the error.
    """
    asked = bench.declared[entry.key]
    row = blank_row(entry, asked) | (rows[entry.key] or {})
    row |= {"entry": asked, "error": None, "complete": False}
    if bench.seed is not None:
        L.seed_everything(bench.seed, verbose=False)
    try:
        _fill(row, bench, entry, rows, watch)
    except Exception as error:  # one method that fails is a row, not the end
        log.exception("%s failed", entry.key)
        row["error"] = f"{type(error).__name__}: {error}"
        row["traceback"] = traceback.format_exc().strip().splitlines()[-6:]
    else:
        row["complete"] = True
        row.pop("traceback", None)
    finally:
        bench.scorer.release()
        free_memory()
    bench.store.save(entry.key, row)
    return row


def _fill(row: Row, bench: Bench, entry: Entry, rows: Rows, watch: Watch) -> None:
    """Everything that an entry may fail at; the row holds what was found until then."""
    bench.check_inputs()
    pool, types = bench.new_modelpool(), bench.facts.types
    if entry.method == "individuals":
        model, size = None, individuals_size(bench.facts)
        artifact: Any = ((name, load_model(pool, name)) for name in pool.model_names)
    elif entry.method == "pretrained":
        artifact = model = load_backbone(pool)
        size, types = Size(0.0, 1.0), {}
    else:
        artifact = model = _merged(row, bench, entry, rows, pool, watch)
        size = model_size(model, load_backbone(pool), bench.facts)
    bench.check_inputs()
    _account(row, size, bench.facts)
    _note(row, _unspent(row))
    if bench.save_artifacts:
        watch.stage("saving")
        place = bench.store.directory / ARTIFACTS / entry.key
        _save(row, artifact, place, pool, types, bench.facts)
    for task in bench.scorer.tasks:
        if task in row["accuracy"]:  # an earlier run got as far as this
            continue
        watch.stage(f"evaluating {task}", done=1 + len(row["accuracy"]))
        if entry.method == "individuals":
            name = resolve_task(task, pool.model_names, bench.aliases)
            model = load_model(pool, name)
        accuracy, loss = bench.scorer.scores(model, task)
        if entry.method == "individuals":
            bench.check_inputs()
        row["accuracy"][task] = accuracy
        if (metric := bench.scorer.metrics[task]) != ACCURACY:
            row.setdefault("metrics", {})[task] = metric
        if loss is not None:
            row["loss"][task] = loss
        bench.store.save(entry.key, row)


def _merged(
    row: Row, bench: Bench, entry: Entry, rows: Rows, pool: Any, watch: Watch
) -> nn.Module:
    """The entry's merged model, measured while it is made."""
    config = completed(
        entry,
        row["entry"]["config"],
        smallest_side=bench.facts.smallest_side,
        budget=_budget(entry, rows),
        aliases=bench.aliases,
    )
    row |= {"config": config, "budget": config.get("budget")}
    if entry.fit_to_side:
        ranks = (f"{k}={config[k]}" for k in entry.fit_to_side if k != "at")
        _note(row, f"here {', '.join(ranks)}")
    method = bench.instantiate(OmegaConf.create(config))
    watch.stage("merging")
    with measured() as cost:
        method.on_run_start()
        model = method.run(pool)
        method.on_run_end()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{entry.name} returned {type(model).__name__}, a comparison needs one model."
        )
    info = vars(model).get("info") or {}
    details = ("ranks", "energy_kept", "relative_error")
    row |= asdict(cost) | {key: info[key] for key in details if key in info}
    return model


def _budget(entry: Entry, rows: Rows) -> float | None:
    """The storage of the entry that this one is held against, if any."""
    if entry.budget_of is None:
        return None
    other = rows[entry.budget_of]
    if other is None or other["x_excl"] is None:
        raise ComparisonError(
            f"Its budget is the storage of {entry.budget_of!r}, which has none: {(other or {}).get('error')}"
        )
    return other["x_excl"]


def _account(row: Row, size: Size, facts: PoolFacts) -> None:
    unit = facts.unit_bits / 8
    for part in ("excl", "incl"):
        row[f"x_{part}"] = getattr(size, f"x_{part}")
        row[f"bytes_{part}"] = round(row[f"x_{part}"] * unit)
    _note(row, size.note)


def _unspent(row: Row) -> str:
    """Why a row stores clearly less than it was allowed; empty where it does not."""
    budget = row["budget"]
    if budget is None:
        return ""
    if row["config"].get("budget_includes_backbone"):
        budget -= 1
    if row["x_excl"] > 0.99 * budget:
        return ""
    why = "what is left buys no matrix's next finer form, which is of all tasks at once"
    if row.get("relative_error") == 0:
        why = "nothing is left to store"
    return f"stores {row['x_excl']:.2f} of {budget:.2f}: {why}"


def _save(
    row: Row, artifact: Any, place: Path, pool: Any, types: Mapping, facts: PoolFacts
) -> None:
    """Write the artifact, and hold the account against its bytes and those of the base model that it needs beside it."""
    base = load_backbone(pool)
    found = save_artifact(
        artifact,
        place,
        base=base,
        types=types,
        known=backbone_reference(pool, base),
        overwrite=True,
    )
    needed = facts.unit_bits // 8 - found.replaced
    for what, there, counted, rounding in (
        ("beyond the backbone", found.beyond, row["bytes_excl"], 0),
        (
            "of the backbone",
            needed + found.backbone,
            row["bytes_incl"] - row["bytes_excl"],
            facts.sizes,
        ),
    ):
        if abs(there - counted) > rounding:
            raise ComparisonError(
                f"The account of {row['method']} is wrong: it has {counted} bytes {what}, its artifact {there}."
            )
    row["bytes_written"] = found.beyond + found.headers
    row["bytes_of_headers"] = found.headers


def _note(row: Row, text: str) -> None:
    if text and text not in row["notes"]:
        row["notes"].append(text)


#: Characters of what is printed of an error; the row has all of it.
_LONGEST = 600


def summary(row: Mapping[str, Any]) -> str:
    """A finished row in one line."""
    if row["error"]:
        return shorten(f"FAILED {row['error']}", _LONGEST, placeholder=" ...")
    values = list(row["accuracy"].values())
    seconds = row["seconds"]
    average = 100 * sum(values) / len(values)
    metric = named(metric_of(row, task) for task in row["accuracy"])
    return f"{metric} {average:5.1f} %  stored {row['x_excl']:.3f}x" + (
        f"  merged in {seconds:.1f} s" if seconds is not None else ""
    )
