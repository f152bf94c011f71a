"""The whole merge, from task vectors to stored deltas: scan, look, choose, allocate, encode.

A matrix is read three times: for its energy and a sample; to be decomposed, while every storage form offers what it can do;
and to be encoded as was decided. One matrix of all T models at a time: what a look leaves behind are curves and, while they
fit ``factor_memory_gb``, half SVDs. Tasks are worked on in sorted order and matrices by sorted name, so that neither order of
the pool changes a bit of the result. Of several processes each does this for the tensors that it owns (``distributed/``), and
knows all curves, so that all decide alike.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..allocation.leftover import climb
from ..allocation.spectra import total_cost
from ..checkpoint.journal import Journal
from ..deltas.sink import Experts, InMemory, Shared, Sink
from ..deltas.storage import account, told
from ..distributed.ownership import Crew
from ..distributed.ranks import ALONE, Ranks
from ..errors import BudgetError, SettingsError, some, spelled
from ..task_vectors.loop import Progress, no_progress
from ..task_vectors.parallel import HeapTrimmer
from ..task_vectors.reader import TaskVectors
from ..task_vectors.scan import Scan, account_of, scan
from ..task_vectors.tensor import ChangedTensor
from .basis_store import BasisStore
from .context import MergeContext, loss_weights
from .encoding import encode_all
from .finished import Finished
from .forms import Decision
from .forms.base import Choice, Observed
from .forms.choice import Ranked, choose_forms, experts_only
from .forms.early_decision import sample_of
from .forms.uneven import dense_beyond_gaussian
from .given import Given
from .inventory import matrix_budget, named_budget, take_inventory
from .rank_bounds import RankBounds
from .ranks import allocate, refined
from .results import MergeReport, MergeResult, RankAllocation
from .settings import MergeSettings
from .spectra import extended


@dataclass(frozen=True)
class Plan:
    """The first half of a merge: everything is decided, nothing is encoded yet.

    Args:
        decisions: per tensor that competes for bits, sorted by name.
        seconds: per stage.
    """

    context: MergeContext
    scan: Scan
    decisions: Mapping[str, Decision]
    seconds: dict[str, float]

    @property
    def matrices(self) -> dict[str, Decision]:
        """Decisions without those of vectors, which have no ranks."""
        return {n: self.decisions[n] for n in self.context.inventory.matrices}

    @property
    def ranks(self) -> RankAllocation:
        """Rank of what is stored, per matrix."""
        tasks = self.context.tasks
        rows = {n: d.form.ranks(d, len(tasks)) for n, d in self.matrices.items()}
        return RankAllocation(
            shared={name: k[0] for name, k in rows.items()},
            experts={
                task: {name: k[t + 1] for name, k in rows.items()}
                for t, task in enumerate(tasks)
            },
        )

    def report(
        self, errors: Mapping[str, Tensor], shared: Shared, experts: Experts
    ) -> MergeReport:
        """The report of the merge, with errors per tensor that is stored; the energy of others is lost."""
        decisions, matrices = self.decisions.items(), self.matrices.items()
        energy = {
            name: self.context.energy[name]
            for name in sorted({*self.decisions, *self.context.inventory.vectors})
        }
        return MergeReport(
            self.context.tasks,
            energy,
            {name: errors.get(name, whole) for name, whole in energy.items()},
            precision={name: d.precision.name for name, d in decisions},
            forms={name: d.form.name for name, d in matrices},
            subspaces={n: d.point for n, d in matrices if d.form.name == "tucker"},
            seconds=self.seconds,
            tensors=account_of(
                self.context.task_vectors,
                self.scan,
                told(shared),
                {task: told(deltas) for task, deltas in experts.items()},
            ),
        )


def plan(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    given: Given | None = None,
    ranks: Ranks = ALONE,
    journal: Journal | None = None,
) -> Plan:
    """Scan, look, choose and allocate; arguments and errors as of :func:`merge`."""
    if not isinstance(task_vectors, TaskVectors):
        raise SettingsError(
            f"TaskVectors and MergeSettings are expected, and {type(task_vectors).__name__} is given. Models are merged by "
            'DiDiMerging(budget=1.4).run({"_pretrained_": base, "mnist": model, "svhn": other}).'
        )
    seconds: dict[str, float] = {}
    task_vectors = task_vectors.ordered(sorted(task_vectors.tasks))
    joint = settings.joint or bool(given and given.bases)
    store = BasisStore(settings.factor_memory_gb, journal)
    memory = None if journal is None else Finished(journal, store)
    crew = Crew.of(ranks, task_vectors.sizes, memory)
    with _timed(seconds, "scan"):
        bounds = _bounds_by_headers(task_vectors, settings, given, device)
        observe = partial(_observed, bounds) if joint else None
        found = scan(task_vectors, device, observe=observe, crew=crew)
    inventory = take_inventory(task_vectors, settings, found, given=given)
    weighed = found.energy if given is None else given.weighed(found.energy)
    energies = {name: weighed[name] for name in inventory.competing}
    context = MergeContext(
        task_vectors,
        settings,
        inventory,
        found.energy,
        loss_weights(energies, settings.normalization),
        device,
        progress,
        store,
        given,
        crew,
        {name: seen.beyond for name, seen in found.observed.items()},
        HeapTrimmer(ranks.size),
    )
    budget = matrix_budget(inventory, settings)
    bounds = RankBounds(task_vectors, inventory, settings, budget, device)
    placed: dict[str, tuple[Choice, Any]] = {}
    with _timed(seconds, "decompose"):
        if joint:
            seen = found.observed.items()
            samples = {n: one.sample for n, one in seen if one.sample is not None}
            ranked, placed = choose_forms(context, bounds, samples)
        else:
            ranked = experts_only(context, bounds)
    curves = {name: choice.curve for name, (choice, _) in placed.items()}
    points = {name: point for name, (_, point) in placed.items()}
    budget -= sum(curves[name].rate(point) for name, point in points.items())
    bounds = replace(bounds, budget=budget)
    decisions, spent = _allocated(context, bounds, ranked, seconds)
    for name, point in climb(curves, points, budget - spent).items():
        choice, _ = placed[name]
        decisions[name] = Decision(
            name, choice.form, choice.precision, point, choice.bases
        )
    decisions = {name: decisions[name] for name in inventory.competing}
    if given is None or not given.enough:
        _check_something_fits(context, decisions)
    return Plan(context, found, decisions, seconds)


def _bounds_by_headers(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    given: Given | None,
    device: torch.device | str,
) -> RankBounds:
    """Bounds as if every tensor was changed, by which it is decided what is sampled while all is scanned."""
    expected = take_inventory(task_vectors, settings, given=given)
    budget = settings.budget.bits(expected.unit_bits) - expected.fixed_bits
    return RankBounds(task_vectors, expected, settings, max(budget, 0), device)


def _check_something_fits(
    context: MergeContext, decisions: Mapping[str, Decision]
) -> None:
    """A merge of which all tasks are the base model is none.

    Raises:
        BudgetError: with a budget that holds one module.
        SettingsError: if everything that tasks change is left out.
    """
    inventory, settings, tasks = context.inventory, context.settings, context.tasks
    ranks = (d.form.ranks(d, len(tasks)) for d in decisions.values())
    if any(map(any, ranks)) or inventory.fixed_bits:
        return
    if not decisions:
        raise SettingsError(
            f"{spelled('vectors', 'pretrained')} leaves out all that the tasks change ({some(inventory.vectors)}), so that all of them "
            f"would be the base model. Keep them: {spelled('vectors', 'expert')}, or {spelled('vectors', 'shared')}."
        )
    rates = [
        inventory.rate(name) if decision.spectra is None else decision.spectra.rate
        for name, decision in decisions.items()
    ]
    bits = min(rate.per_rank if rate.cap else rate.dense for rate in rates)
    raise BudgetError(
        f"budget={settings.budget.ratio} is too small: nothing of any task fits, so that all of them would be the base model. "
        f"What is cheapest takes {named_budget(bits, inventory, settings)}; give at least that."
    )


def _observed(
    bounds: RankBounds, tensor: ChangedTensor, energy: Tensor, norms: Tensor | None
) -> Observed:
    """What the choice of forms wants to know of a tensor while it is read for its energies."""
    allowed, beyond = bounds.inventory.precisions.get(tensor.name, ()), ()
    if norms is not None and len(allowed) > 1 and bool((energy > 0).any()):
        beyond = dense_beyond_gaussian(tensor, norms, allowed)
    return Observed(sample_of(bounds, tensor, energy), beyond)


def _allocated(
    context: MergeContext,
    bounds: RankBounds,
    ranked: dict[str, Ranked],
    seconds: dict[str, float],
) -> tuple[dict[str, Decision], int]:
    """Ranks of the matrices that have any, spectra extended until they suffice; and the bits that they take."""
    budget = bounds.budget
    while True:
        rows = [matrix.one.spectra for matrix in ranked.values()]
        with _timed(seconds, "allocate"):
            context.progress("allocate", 0, 1)
            ranks = allocate(context, rows, budget)
            precisions = [matrix.precision for matrix in ranked.values()]
            if context.settings.factor_dtype == "auto":
                ranks, precisions = refined(context, rows, ranks, budget)
        with _timed(seconds, "decompose"):
            table = {name: matrix.one for name, matrix in ranked.items()}
            longer = extended(context, bounds, table, dict(zip(table, ranks)))
        if not longer:
            break
        for name, one in longer.items():
            ranked[name] = replace(ranked[name], one=one)
    decisions = {}
    for (name, matrix), k, precision in zip(ranked.items(), ranks, precisions):
        one = matrix.one.priced(precision)
        decisions[name] = Decision(
            name, matrix.form, precision, k, one.bases, one.spectra
        )
    spent = total_cost([d.spectra for d in decisions.values()], ranks)
    return decisions, spent


def merge(
    task_vectors: TaskVectors,
    settings: MergeSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    sink: Sink | None = None,
    given: Given | None = None,
    ranks: Ranks = ALONE,
    journal: Journal | None = None,
) -> MergeResult:
    """DiDi-Merging of T task vectors under one budget.

    Args:
        task_vectors: aligned checkpoints.
        settings: all choices.
        device: where the arithmetic happens; results are on the CPU.
        progress: called with (stage, tensors done, tensors in all).
        sink: where stored deltas go, of the tasks sorted; kept in memory if None.
        given: the finished model that tasks are added to; a merge from the start if None.
        ranks: the processes that do it together; all of them call this with the same arguments and get the same result.
        journal: what earlier runs finished, which is not done again; a sink that writes has it too.

    Raises:
        SettingsError: for models in place of task vectors.
        NonFiniteError, ModelPoolError: from the first read.
        BudgetError: if the vectors alone exceed the budget, or nothing fits into it.
    """
    planned = plan(
        task_vectors,
        settings,
        device=device,
        progress=progress,
        given=given,
        ranks=ranks,
        journal=journal,
    )
    context = planned.context
    with _timed(planned.seconds, "refine"):
        sink = sink or InMemory(context.tasks)
        order, errors = encode_all(context, planned.decisions, sink)
        shared, experts = sink.close(order, ranks)
    unit_bits = context.inventory.unit_bits
    storage = account(shared, experts, unit_bits=unit_bits)
    report = planned.report(errors, shared, experts)
    return MergeResult(shared, experts, planned.ranks.of(experts), storage, report)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
