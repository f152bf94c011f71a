"""Every method through the same pools, one storage account, one table.

Example:

    fusion_bench --config-name didi_compare modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 path.log_dir=outputs/b32_ta8
"""

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from fusion_bench.programs import FabricModelFusionProgram
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from ..checkpoint import versions, write_json
from ..naming import check_tasks, resolve_task
from ..pool_reader import check_pool, load_backbone
from .entries import ComparisonError, Entry, declared, method_config, read_entries
from .measure import free_memory, measured
from .progress import Watch, quiet, terminal
from .results import FORMAT, assemble, blank_row
from .rows import RowStore
from .scoring import Scorer
from .sizes import Size, individuals_size, model_size, pool_facts, pretrained_size

log = logging.getLogger(__name__)


class ComparisonProgram(FabricModelFusionProgram):
    """Runs each entry's method, evaluates it on each task with its own expert, frees it, and writes a row.

    Args:
        entries: key -> :class:`~fusion_bench_didi.programs.entries.Entry`.
        only, skip: keys of entries; all if empty.
        restart: forget the rows in the directory instead of continuing.
        task_aliases: task pool name -> model name.
        report: write tables, plots and the page at the end.
        **kwargs: the host program's: modelpool, taskpool, fabric, path, seed.
    """

    def __init__(
        self,
        entries: DictConfig,
        modelpool: DictConfig,
        taskpool: DictConfig,
        *,
        only: Sequence[str] = (),
        skip: Sequence[str] = (),
        restart: bool = False,
        task_aliases: Mapping[str, str] | None = None,
        report: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            method=None,
            modelpool=modelpool,
            taskpool=taskpool,
            print_config=False,
            **kwargs,
        )
        self.entries = read_entries(entries, list(only or ()), list(skip or ()))
        self.restart, self.report = restart, report
        self.task_aliases = task_aliases
        self.directory = Path(self.path.log_dir)

    def run(self) -> dict[str, Any]:
        """Make the rows that are not there yet, and write everything that follows from them.

        Returns:
            what is in ``comparison.json``.

        Raises:
            ComparisonError: if the directory holds rows of another configuration.
        """
        store = RowStore(self.directory, self._settings(), restart=self.restart)
        self.declared = {entry.key: declared(entry) for entry in self.entries}
        for key, asked in self.declared.items():
            store.check(key, asked)
        console = terminal()
        with quiet(self.directory / "host.log"):
            console.print("reading every checkpoint once ...")
            self._prepare()
            comparison = self._run(store, console)
            if self.report:
                from ..report import write_report

                for file in write_report(self.directory):
                    console.print(f"wrote {file}")
        return comparison

    def _run(self, store: RowStore, console: Console) -> dict[str, Any]:
        rows = {entry.key: store.load(entry.key) for entry in self.entries}
        had = [key for key, row in rows.items() if row and row["complete"]]
        methods, tasks = len(self.entries), len(self.scorer.tasks)
        console.print(f"{methods} methods on {tasks} tasks; rows in {store.rows}")
        with Watch(console, methods, 1 + tasks, had=len(had)) as watch:
            for entry in self.entries:
                if entry.key in had:
                    watch.had(entry.name, _summary(rows[entry.key]))
                    continue
                watch.method(entry.name)
                rows[entry.key] = _Run(self, entry, store, watch, rows).row
                watch.done(_summary(rows[entry.key]))
                self._write(rows)
        return self._write(rows)

    def fresh_modelpool(self) -> Any:
        """A model pool that no earlier method has touched."""
        self.modelpool = self._instantiate_and_setup(self._modelpool)
        return self.modelpool

    def _prepare(self) -> None:
        pool = self.fresh_modelpool()
        check_pool(pool)
        self.taskpool = self._instantiate_and_setup(self._taskpool)
        self.scorer = Scorer(self.taskpool, self.task_aliases)
        check_tasks(self.scorer.tasks, pool.model_names, self.task_aliases)
        self.facts = pool_facts(pool, load_backbone(pool), self.fabric.device)

    def _settings(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "modelpool": OmegaConf.to_container(self._modelpool, resolve=True),
            "taskpool": OmegaConf.to_container(self._taskpool, resolve=True),
            "task_aliases": dict(self.task_aliases or {}),
            "seed": self.seed,
            "accelerator": self.fabric.device.type,
            "versions": versions(),
        }

    def _write(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        comparison = assemble(
            [rows[e.key] for e in self.entries if rows.get(e.key)],
            entries=self.entries,
            settings=self._settings(),
            tasks=self.scorer.tasks,
            facts=self.facts,
        )
        write_json(self.directory / "comparison.json", comparison)
        return comparison


class _Run:
    """One entry: merge, account, evaluate the tasks that are missing, and let go of everything."""

    def __init__(
        self,
        program: ComparisonProgram,
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
        self._account(pretrained_size())
        self._evaluate(load_backbone(self.program.modelpool))

    def _individuals(self) -> None:
        self._account(individuals_size(self.program.facts))
        pool = self.program.fresh_modelpool()
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


def _summary(row: Mapping[str, Any]) -> str:
    if row["error"]:
        return "FAILED " + row["error"].splitlines()[0]
    values = list(row["accuracy"].values())
    seconds = row["seconds"]
    return f"accuracy {sum(values) / len(values):.4f}  stored {row['x_excl']:.3f}x" + (
        f"  merged in {seconds:.1f} s" if seconds is not None else ""
    )
