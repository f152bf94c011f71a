"""Every method through the same pools, one storage account, one table.

Example:

    fusion_bench --config-name didi_compare modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 \\
        taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 path.log_dir=outputs/b32_ta8
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion_bench.programs import FabricModelFusionProgram
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from .. import compat
from ..checkpoint.deltas import versions
from ..checkpoint.directory import alone, check_seen, write_json
from ..distributed.fabrics import fabric_of_one
from ..distributed.ranks import Ranks, by_itself, check_started, ranks_here
from ..errors import as_key, spelled_unless_told
from ..options import check_keywords
from ..pools.host_forms import as_pool
from ..pools.merged_adapters import adapted
from ..pools.opening import check_pool, load_backbone, open_pool
from ..pools.task_names import check_tasks
from ..report import whereabouts, write_report
from ..report.metrics import log_metrics, metric_of, odd_figures, row_metrics
from ..report.terminal import print_table
from ..taskpool.evaluation_files import evaluation_files
from ..taskpool.rehearsal import check_rehearsal
from .checks import checked
from .entries import ComparisonError, declared, dependent, read_entries
from .entry_run import Bench, run_entry, summary
from .measure import standing
from .progress import Watch, quiet, terminal
from .results import FORMAT, assemble, made
from .rows import COMPARISON, SETTINGS, RowStore, read_row
from .scoring import Scorer
from .sizes import facts_of

#: Keys of the host's program that are of the one merge it makes.
_OF_ONE_MERGE = (
    *("method", "merged_model_save_path", "merged_model_save_kwargs"),
    "report_save_path",
)


class FailedRowsError(ComparisonError):
    """Some methods failed; everything is written, their rows with what went wrong.

    Args:
        comparison: what is in ``comparison.json``.
        directory: of the run.
    """

    def __init__(self, comparison: Mapping[str, Any], directory: Path):
        self.comparison = comparison
        rows = comparison["rows"]
        failed = {row["key"]: row["error"] for row in rows if row["error"]}
        first, *others = failed
        more = f"; {', '.join(others)} too" if others else ""
        super().__init__(
            f"{len(failed)} of {len(rows)} methods failed: {first} ({failed[first].splitlines()[0]}){more}. All rows are in "
            f"{directory / COMPARISON}; those are made anew when the same command is run again."
        )


class ComparisonProgram(FabricModelFusionProgram):
    """Runs each entry's method, evaluates it on each task with its own expert, frees it, and writes a row.

    Of several processes (``fabric.devices``) each takes the next entry that nobody has, and makes its row alone.

    Args:
        entries: key -> :class:`~fusion_bench_didi.programs.entries.Entry`.
        only, skip: keys of entries; all if empty.
        restart: forget the rows in the directory instead of continuing.
        save_artifacts: write every model that is made, and hold the account against the bytes written.
        task_aliases: task pool name -> model name, for evaluation and for every method that takes some.
        report: write tables, plots and the page at the end.
        print_config: print pools, Fabric and paths first.
        dry_run: check it, and end before anything is read or written.
        save_artefacts: what ``save_artifacts`` was called before.
        **kwargs: the host program's: modelpool, taskpool, fabric, path, seed.
    """

    def __init__(
        self,
        entries: DictConfig,
        modelpool: DictConfig,
        taskpool: DictConfig,
        *,
        only: Sequence[str] | str = (),
        skip: Sequence[str] | str = (),
        restart: bool = False,
        save_artifacts: bool = False,
        task_aliases: Mapping[str, str] | None = None,
        report: bool = True,
        print_config: bool = False,
        dry_run: bool = False,
        save_artefacts: bool | None = None,
        **kwargs: Any,
    ):
        check_keywords(type(self), kwargs)
        if idle := [key for key in _OF_ONE_MERGE if kwargs.get(key) is not None]:
            raise ComparisonError(
                f"{', '.join(idle)} would do nothing: a comparison has a method and a model for each of its entries. Leave it out; "
                "save_artifacts=true writes the models."
            )
        super().__init__(
            method=None,
            modelpool=modelpool,
            taskpool=taskpool,
            print_config=print_config,
            **kwargs,
        )
        self.entries = read_entries(entries, only, skip)
        if not self.entries:
            raise ComparisonError(
                f"only={only} and skip={skip} leave no method to compare. Leave one of them out, or name other methods."
            )
        self.restart, self.report, self.dry_run = restart, report, dry_run
        self.save_artifacts = compat.renamed(
            "save_artefacts", save_artefacts, "save_artifacts", save_artifacts
        )
        self.task_aliases = task_aliases
        self.directory = Path(self.path.log_dir)

    def run(self) -> dict[str, Any]:
        """Make the rows that are not there yet, and write everything that follows from them.

        Returns:
            what is in ``comparison.json``; no rows after a dry run.

        Raises:
            ComparisonError: if the directory holds rows of another configuration, or entries are known to fail.
            DiDiError: if another run is writing to it.
            RankError: if another process failed.
            FailedRowsError: when everything is written, if a method failed.
        """
        if self.dry_run:
            with spelled_unless_told(as_key):
                self._checked()
            keys = ", ".join(entry.key for entry in self.entries)
            print(f"Nothing is known to fail of {keys}. Nothing was run (dry_run).")
            return {"rows": []}
        self.fabric  # starts them
        ranks = ranks_here()
        check_started(ranks)
        try:
            with spelled_unless_told(as_key):
                comparison = self._on(ranks)
        except BaseException as error:
            ranks.fail(error)
            raise
        # of several processes the first says so: that one of them ends otherwise would end it
        if ranks.leads and any(row["error"] for row in comparison["rows"]):
            raise FailedRowsError(comparison, self.directory)
        return comparison

    def _on(self, ranks: Ranks) -> dict[str, Any]:
        """The comparison on several processes, each of which makes whole rows by itself; rank 0 writes what follows from them."""
        whole, store = self.fabric, None
        with ExitStack() as stack:
            if ranks.leads:
                place = self.directory / SETTINGS
                stack.enter_context(alone(place, named=self.directory))
                asked = self._checked()
                store = self._store(asked, restart=self.restart)
            if ranks.size > 1:
                ranks.gather(None)  # settings and rows are there
                check_seen(ranks, self.directory / SETTINGS)
                self._fabric_instance = fabric_of_one(whole)
                stack.callback(setattr, self, "_fabric_instance", whole)
            if store is None:
                asked = {entry.key: declared(entry) for entry in self.entries}
                store = self._store(asked)
            comparison = self._compare(ranks, store, asked)
        if ranks.leads:  # the Fabric that has the loggers is back
            for row in comparison["rows"]:
                log_metrics(self.fabric, row_metrics(row))
        return comparison

    def _checked(self) -> dict[str, dict[str, Any]]:
        """What the entries declare, by key, if nothing is known to fail."""
        keys = {entry.key for entry in self.entries}
        if not self.restart:
            rows = {key: read_row(self.directory, key) for key in keys}
            keys -= {key for key, row in rows.items() if row and self._is_whole(row)}
        return checked(self.entries, left=keys)

    def _store(
        self, asked: Mapping[str, Mapping[str, Any]], *, restart: bool = False
    ) -> RowStore:
        store = RowStore(self.directory, self._settings(), restart=restart)
        for key, one in asked.items():
            store.check(key, one)
        return store

    def _compare(
        self, ranks: Ranks, store: RowStore, asked: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        console = terminal() if ranks.leads else Console(quiet=True)
        name = "host.log" if ranks.leads else f"host.{ranks.rank}.log"
        chatter, files = self.directory / name, []
        with quiet(chatter):
            console.print("reading every checkpoint once ...")
            with by_itself():
                bench = self._bench(store, asked, reads=ranks.leads)
            bench = replace(bench, facts=ranks.from_first(bench.facts))
            with standing():
                comparison = self._run(bench, console, ranks)
            if self.report and ranks.leads:
                files = write_report(self.directory)
        if ranks.leads:
            title = f"{len(comparison['tasks'])} tasks, {self.directory}"
            print_table(comparison, title)
            print(
                f"details {self.directory / COMPARISON}; what methods print: {chatter}"
            )
            if files:
                print(whereabouts(files))
        return comparison

    def _bench(
        self, store: RowStore, asked: Mapping[str, Mapping[str, Any]], *, reads: bool
    ) -> Bench:
        """The pools of the configuration, checked, and read once by who reads."""
        pool = self.new_modelpool()
        check_pool(pool)
        self.taskpool = self._instantiate_and_setup(self._taskpool)
        check_rehearsal(self.taskpool, self._taskpool)
        if reads:
            store.agree_on_data(evaluation_files(self.taskpool))
        scorer = Scorer(self.taskpool, self.task_aliases)
        check_tasks(scorer.tasks, pool.model_names, self.task_aliases)
        backbone, facts = load_backbone(pool), None
        vectors = open_pool(pool, backbone)
        if reads:
            facts = facts_of(vectors, backbone, self.fabric.device)
            store.agree_on_models({n: f.content for n, f in vectors.watched.items()})
        return Bench(
            new_modelpool=self.new_modelpool,
            instantiate=self._instantiate_and_setup,
            scorer=scorer,
            facts=facts,
            inputs=tuple(vectors.watched.values()),
            store=store,
            declared=asked,
            aliases=self.task_aliases,
            seed=self.seed,
            save_artifacts=self.save_artifacts,
        )

    def _run(self, bench: Bench, console: Console, ranks: Ranks) -> dict[str, Any]:
        rows = {e.key: _usable(bench.store.load(e.key)) for e in self.entries}
        rows = ranks.from_first(rows)  # one of them may be made meanwhile
        for row in filter(None, rows.values()):
            bench.scorer.metrics |= {t: metric_of(row, t) for t in row["accuracy"]}
        had = [key for key, row in rows.items() if row and self._is_whole(row)]
        methods, tasks = len(self.entries), len(bench.scorer.tasks)
        console.print(f"{methods} methods on {tasks} tasks; rows in {bench.store.rows}")
        with Watch(console, methods, 1 + tasks, had=len(had)) as watch:
            for entry in self.entries:
                if entry.key in had:
                    watch.had(entry.name, summary(rows[entry.key]))
            left = [entry for entry in self.entries if entry.key not in had]
            groups = [left] if ranks.size == 1 else dependent(left)
            for number in ranks.share(len(groups)):
                for entry in groups[number]:
                    watch.method(entry.name)
                    with ranks.working(entry.key), by_itself():
                        rows[entry.key] = run_entry(bench, entry, rows, watch)
                    watch.done(summary(rows[entry.key]))
                    if ranks.leads:
                        self._write(rows, bench)
        if ranks.size > 1:
            ranks.gather(None)  # all rows are there
            rows = {entry.key: bench.store.load(entry.key) for entry in self.entries}
        if not ranks.leads:
            return self._assembled(rows, bench)
        return self._write(rows, bench)

    def _is_whole(self, row: Mapping[str, Any]) -> bool:
        """Whether nothing of a row is left to make: its model neither, where models are to be written."""
        return row["complete"] and ("bytes_written" in row or not self.save_artifacts)

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
            "fast_dev_run": bool(self.fast_dev_run),
            "accelerator": self.fabric.device.type,
            "precision": self.fabric.strategy.precision.precision,
            "versions": versions(),
        }

    def _write(self, rows: Mapping[str, Any], bench: Bench) -> dict[str, Any]:
        comparison = self._assembled(rows, bench) | {"made": made()}
        write_json(self.directory / COMPARISON, comparison)
        return comparison

    def _assembled(self, rows: Mapping[str, Any], bench: Bench) -> dict[str, Any]:
        return assemble(
            [rows[e.key] for e in self.entries if rows.get(e.key)],
            entries=self.entries,
            settings=self._settings(),
            tasks=bench.scorer.tasks,
            facts=bench.facts,
        )


def _usable(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """A row without figures that no comparison takes: they are to be made anew."""
    odd = odd_figures(row) if row else {}
    if not odd:
        return row
    found = {task: v for task, v in row["accuracy"].items() if task not in odd}
    return {**row, "accuracy": found, "complete": False}
