"""One row of a comparison in the making."""

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import lightning as L
from omegaconf import OmegaConf
from torch import nn

from ..artifacts.saving import save_artifact
from ..pools.opening import backbone_reference, load_backbone
from ..pools.task_names import resolve_task
from .entries import ComparisonError, Entry, method_config
from .measure import free_memory, measured
from .progress import Watch
from .results import blank_row
from .rows import ARTIFACTS, RowStore
from .sizes import Size, individuals_size, model_size, pretrained_size

if TYPE_CHECKING:
    from .compare import ComparisonProgram

log = logging.getLogger(__name__)


class EntryRun:
    """One entry: merge, account, evaluate the tasks that are missing, and let go of everything.

    ``row`` is what came of it: figures, or the error.

    Args:
        program: pools, scorer and settings.
        store: takes the row after every evaluated task.
        rows: of the entries before, by key.
    """

    def __init__(
        self,
        program: "ComparisonProgram",
        entry: Entry,
        store: RowStore,
        watch: Watch,
        rows: Mapping[str, Any],
    ):
        self.program, self.entry, self.store, self.watch = program, entry, store, watch
        asked = program.declared[entry.key]
        self.row = blank_row(entry, asked) | (store.load(entry.key) or {})
        self.row |= {"entry": asked, "error": None}
        if program.seed is not None:
            L.seed_everything(program.seed, verbose=False)
        try:
            self._fill(rows)
        except Exception as error:  # one method that fails is a row, not the end
            log.exception("%s failed", entry.key)
            last = traceback.format_exc().strip().splitlines()[-6:]
            self.row["error"] = f"{type(error).__name__}: {error}"
            self.row["traceback"] = last
        else:
            self.row["complete"] = True
            self.row.pop("traceback", None)
        finally:
            program.method = None
            program.scorer.release()
            free_memory()
        store.save(entry.key, self.row)

    def _fill(self, rows: Mapping[str, Any]) -> None:
        if self.entry.method == "pretrained":
            self._pretrained()
        elif self.entry.method == "individuals":
            self._individuals()
        else:
            self._method(rows)

    def _pretrained(self) -> None:
        pool = self.program.modelpool
        model = load_backbone(pool)
        self._account(pretrained_size())
        self._save(model, pool, {})
        self._evaluate(model)

    def _individuals(self) -> None:
        self._account(individuals_size(self.program.facts))
        pool = self.program.fresh_modelpool()
        models = ((name, pool.load_model(name)) for name in pool.model_names)
        self._save(models, pool, self.program.facts.types)
        for task in self.program.scorer.tasks:
            if task not in self.row["accuracy"]:
                name = resolve_task(task, pool.model_names, self.program.task_aliases)
                self._evaluate(pool.load_model(name), [task])

    def _method(self, rows: Mapping[str, Any]) -> None:
        program, entry = self.program, self.entry
        config = method_config(
            entry,
            smallest_side=program.facts.smallest_side,
            budget=self._budget(rows),
        )
        self.row["config"] = config
        self.row["budget"] = config.get("budget")
        if entry.fit_to_side:
            ranks = ", ".join(
                f"{k}={config[k]}" for k in entry.fit_to_side if k != "at"
            )
            self._note(f"here {ranks}")
        pool = program.fresh_modelpool()
        program.method = program._instantiate_and_setup(OmegaConf.create(config))
        self.watch.stage("merging")
        with measured() as cost:
            program.method.on_run_start()
            model = program.method.run(pool)
            program.method.on_run_end()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{entry.name} returned {type(model).__name__}, a comparison needs one model."
            )
        self.row.update(asdict(cost))
        self._account(model_size(model, load_backbone(pool), program.facts))
        self._save(model, pool, program.facts.types)
        self._details(model)
        program.method = None  # some methods hold their models
        self._evaluate(model)

    def _budget(self, rows: Mapping[str, Any]) -> float | None:
        if self.entry.budget_of is None:
            return None
        other = rows[self.entry.budget_of]
        if other is None or other["x_excl"] is None:
            raise ComparisonError(
                f"Its budget is the storage of {self.entry.budget_of!r}, which has none: {(other or {}).get('error')}"
            )
        return other["x_excl"]

    def _account(self, size: Size) -> None:
        unit = self.program.facts.unit_bits / 8
        self.row.update(
            x_excl=size.x_excl,
            x_incl=size.x_incl,
            bytes_excl=round(size.x_excl * unit),
            bytes_incl=round(size.x_incl * unit),
        )
        self._note(size.note)

    def _save(self, model: Any, pool: Any, types: Mapping[str, Any]) -> None:
        """Write the artifact, if asked to, and hold the account against it."""
        if not self.program.save_artifacts:
            return
        self.watch.stage("saving")
        base = load_backbone(pool)
        found = save_artifact(
            model,
            self.program.directory / ARTIFACTS / self.entry.key,
            base=base,
            types=types,
            known=backbone_reference(pool, base),
            overwrite=True,
        )
        row = self.row
        backbone = row["bytes_incl"] - row["bytes_excl"]
        for what, wrote, counted in (
            ("beyond the backbone", found.beyond, row["bytes_excl"]),
            ("in the backbone's place", found.backbone or backbone, backbone),
        ):
            if wrote != counted:
                raise ComparisonError(
                    f"The account of {self.entry.name} is wrong: it has {counted} bytes {what}, its artifact {wrote}."
                )
        row["bytes_written"] = found.beyond + found.headers
        row["bytes_of_headers"] = found.headers

    def _note(self, text: str) -> None:
        if text and text not in self.row["notes"]:
            self.row["notes"].append(text)

    def _details(self, model: nn.Module) -> None:
        info = vars(model).get("info") or {}
        for key in ("ranks", "energy_kept", "relative_error"):
            if key in info:
                self.row[key] = info[key]

    def _evaluate(self, model: nn.Module, tasks: Sequence[str] | None = None) -> None:
        tasks = self.program.scorer.tasks if tasks is None else tasks
        accuracy = self.row["accuracy"]
        for task in tasks:
            if task in accuracy:  # an earlier run got as far as this
                continue
            self.watch.stage(f"evaluating {task}", done=1 + len(accuracy))
            accuracy[task] = self.program.scorer.score(model, task)
            self.store.save(self.entry.key, self.row)


def summary(row: Mapping[str, Any]) -> str:
    """A finished row in one line."""
    if row["error"]:
        return "FAILED " + row["error"].splitlines()[0]
    values = list(row["accuracy"].values())
    seconds = row["seconds"]
    return f"accuracy {sum(values) / len(values):.4f}  stored {row['x_excl']:.3f}x" + (
        f"  merged in {seconds:.1f} s" if seconds is not None else ""
    )
