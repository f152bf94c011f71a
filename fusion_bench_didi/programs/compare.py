"""Every method through the same pools, one storage account, one table.

Example:

    fusion_bench --config-name didi_compare modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 path.log_dir=outputs/b32_ta8
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_bench.programs import FabricModelFusionProgram
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from .. import compat
from ..checkpoint.deltas import versions
from ..checkpoint.directory import alone, write_json
from ..distributed.ranks import check_alone, ranks_here
from ..options import check_keywords
from ..pools.host_forms import as_pool
from ..pools.merged_adapters import adapted
from ..pools.opening import check_pool, load_backbone
from ..pools.task_names import check_tasks
from ..report.loggers import log_metrics, row_metrics
from ..report.terminal import print_table
from .entries import declared, read_entries
from .entry_run import Bench, run_entry, summary
from .progress import Watch, quiet, terminal
from .results import FORMAT, assemble
from .rows import COMPARISON, SETTINGS, RowStore
from .scoring import Scorer
from .sizes import pool_facts


class ComparisonProgram(FabricModelFusionProgram):
    """Runs each entry's method, evaluates it on each task with its own expert, frees it, and writes a row.

    Args:
        entries: key -> :class:`~fusion_bench_didi.programs.entries.Entry`.
        only, skip: keys of entries; all if empty.
        restart: forget the rows in the directory instead of continuing.
        save_artifacts: write every model that is made, and hold the account against the bytes written.
        task_aliases: task pool name -> model name, for evaluation and for every method that takes some.
        report: write tables, plots and the page at the end.
        save_artefacts: what ``save_artifacts`` was called before.
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
        save_artifacts: bool = False,
        task_aliases: Mapping[str, str] | None = None,
        report: bool = True,
        save_artefacts: bool | None = None,
        **kwargs: Any,
    ):
        check_keywords(type(self), kwargs)
        super().__init__(
            method=None,
            modelpool=modelpool,
            taskpool=taskpool,
            print_config=False,
            **kwargs,
        )
        self.entries = read_entries(entries, list(only or ()), list(skip or ()))
        self.restart, self.report = restart, report
        self.save_artifacts = compat.renamed(
            "save_artefacts", save_artefacts, "save_artifacts", save_artifacts
        )
        self.task_aliases = task_aliases
        self.directory = Path(self.path.log_dir)

    def run(self) -> dict[str, Any]:
        """Make the rows that are not there yet, and write everything that follows from them.

        Returns:
            what is in ``comparison.json``.

        Raises:
            ComparisonError: if the directory holds rows of another configuration.
            DiDiError: if another run is writing to it.
            RankError: on several processes.
        """
        self.fabric  # starts them
        check_alone(ranks_here(), "The comparison")
        with alone(self.directory / SETTINGS, named=self.directory):
            return self._compare()

    def _compare(self) -> dict[str, Any]:
        store = RowStore(self.directory, self._settings(), restart=self.restart)
        for entry in self.entries:
            store.check(entry.key, declared(entry))
        console = terminal()
        with quiet(self.directory / "host.log"):
            console.print("reading every checkpoint once ...")
            comparison = self._run(self._bench(store), console)
            if self.report:
                from ..report import write_report

                for file in write_report(self.directory):
                    console.print(f"wrote {file}")
        print_table(comparison, f"{len(comparison['tasks'])} tasks, {self.directory}")
        return comparison

    def _bench(self, store: RowStore) -> Bench:
        """The pools of the configuration, checked and read once."""
        pool = self.new_modelpool()
        check_pool(pool)
        self.taskpool = self._instantiate_and_setup(self._taskpool)
        scorer = Scorer(self.taskpool, self.task_aliases)
        check_tasks(scorer.tasks, pool.model_names, self.task_aliases)
        return Bench(
            new_modelpool=self.new_modelpool,
            instantiate=self._instantiate_and_setup,
            scorer=scorer,
            facts=pool_facts(pool, load_backbone(pool), self.fabric.device),
            store=store,
            aliases=self.task_aliases,
            seed=self.seed,
            save_artifacts=self.save_artifacts,
        )

    def _run(self, bench: Bench, console: Console) -> dict[str, Any]:
        rows = {entry.key: bench.store.load(entry.key) for entry in self.entries}
        had = [key for key, row in rows.items() if row and row["complete"]]
        methods, tasks = len(self.entries), len(bench.scorer.tasks)
        console.print(f"{methods} methods on {tasks} tasks; rows in {bench.store.rows}")
        with Watch(console, methods, 1 + tasks, had=len(had)) as watch:
            for entry in self.entries:
                if entry.key in had:
                    watch.had(entry.name, summary(rows[entry.key]))
                    continue
                watch.method(entry.name)
                rows[entry.key] = run_entry(bench, entry, rows, watch)
                watch.done(summary(rows[entry.key]))
                self._write(rows, bench)
        comparison = self._write(rows, bench)
        for row in comparison["rows"]:
            log_metrics(self.fabric, row_metrics(row))
        return comparison

    def new_modelpool(self) -> Any:
        """A model pool that no earlier method has touched; the program's from now on."""
        pool = as_pool(self._instantiate_and_setup(self._modelpool))
        self.modelpool = adapted(pool)
        return self.modelpool

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

    def _write(self, rows: Mapping[str, Any], bench: Bench) -> dict[str, Any]:
        comparison = assemble(
            [rows[e.key] for e in self.entries if rows.get(e.key)],
            entries=self.entries,
            settings=self._settings(),
            tasks=bench.scorer.tasks,
            facts=bench.facts,
        )
        write_json(self.directory / COMPARISON, comparison)
        return comparison
