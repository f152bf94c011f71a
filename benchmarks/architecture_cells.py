"""What a merge must be able to do with models of an architecture, a function per column: each returns nothing, or raises."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool

from benchmarks.architecture_bench import (
    BASE,
    GENEROUS,
    TASKS,
    TOLERANCE,
    Bench,
    NotTried,
    close,
    distance,
    output_of,
    same_tensors,
)
from fusion_bench_didi import load
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.export.plain import to_plain


def read(bench: Bench) -> None:
    """By transformers itself: what it wrote, all of it."""
    lost = set(bench.loaded[BASE].state_dict()) - bench.kept
    if lost:
        raise NotTried(f"transformers reads {len(lost)} tensors otherwise than it wrote them: {', '.join(sorted(lost)[:2])}")  # fmt: skip


def dry_run(bench: Bench) -> None:
    """Accepts what is merged, and refuses what is not, in the same words."""
    planned = _refusal(bench, **GENEROUS, dry_run=True)
    merged = None
    try:
        bench.merged
    except DiDiError as refusal:
        merged = f"{type(refusal).__name__}: {refusal}"
    assert planned == merged, f"planned: {planned}; merged: {merged}"
    assert merged is None, merged


def planned(bench: Bench) -> None:
    """At a usual budget and at a small one."""
    for budget in (1.4, 0.1):
        refused = _refusal(bench, budget=budget, dry_run=True)
        assert refused is None, f"{budget}: {refused}"


def small_budget(bench: Bench) -> None:
    """Is kept to; of language models alone, for this takes longest."""
    if not bench.pooled:
        raise NotTried("not a language model")
    stored = bench.merge(budget=0.3).storage.x_excl
    assert 0 < stored <= 0.3, stored


def _refusal(bench: Bench, **settings: Any) -> str | None:
    said = (bench.place / "plan.txt").open("a")
    try:
        with said, contextlib.redirect_stdout(said):
            bench.merge(**settings)
    except DiDiError as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return None


def tensors(bench: Bench) -> None:
    """Every tensor of every fine-tuned model, tied names too, is there again."""
    wrong = []
    for task in TASKS:
        plain = bench.merged.materialize(task)
        found, expected = plain.state_dict(), bench.loaded[task].state_dict()
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]  # fmt: skip
        base = bench.loaded[BASE].state_dict()
        for name in bench.kept:
            value = expected[name]
            change = (value.double() - base[name].double()).norm()
            off = (found[name].double() - value.double()).norm()
            if not off <= 1e-2 * change + 1e-5 * value.double().norm():
                wrong.append(f"{task}: {name} {float(off / (change + 1e-12)):.2g}")
    account = bench.merged.info["tensors"]
    left = {t: {k: v for k, v in told.items() if v and k in ("left as in the base model", "excluded")} for t, told in account.items()}  # fmt: skip
    assert not wrong, f"{len(wrong)} tensors wrong: {wrong[:4]} account {left}"


def outputs(bench: Bench) -> None:
    """Of each task as its fine-tuned model's."""
    bench.comparable
    for task in TASKS:
        expected = output_of(bench.loaded[task], bench.batch)
        assert not close(expected, output_of(bench.loaded[BASE], bench.batch), 1e-4), "outputs tell nothing"  # fmt: skip
        bench.merged.set_task(task)
        away = distance(output_of(bench.merged, bench.batch), expected)
        bench.merged.unset_task()
        assert away <= TOLERANCE, f"{task} is {away:.2g} away"


def in_memory(bench: Bench) -> None:
    """Loaded models are merged as their directories are."""
    merged = bench.merge(BaseModelPool(dict(bench.loaded)), **GENEROUS)
    for task in TASKS:
        one, other = merged.materialize(task), bench.merged.materialize(task)
        wrong = [n for n, v in one.state_dict().items() if n in bench.kept and not torch.allclose(v.double(), other.state_dict()[n].double(), atol=1e-4, rtol=1e-3)]  # fmt: skip
        assert not wrong, f"{task}: {wrong[:4]}"


def save_and_load(bench: Bench) -> None:
    """The base model found by itself."""
    place = bench.place / "merged"
    bench.merged.save_pretrained(place)
    again = load(place)
    assert type(again.backbone) is type(bench.merged.backbone)
    for task in TASKS:
        same_tensors(
            again.materialize(task), bench.merged.materialize(task), bench.kept
        )


def export(bench: Bench) -> None:
    """A plain checkpoint per task, as transformers reads it."""
    bench.loaded
    place = bench.place / "plain"
    to_plain(bench.merged, place)
    for task in TASKS:
        same_tensors(
            bench.read(place / task), bench.merged.materialize(task).float(), bench.kept
        )


def mixed_batch(bench: Bench) -> None:
    """Every sample as its own task has it."""
    tuned, rows = bench.loaded["frozen"], output_of(bench.loaded["frozen"], bench.batch)
    try:
        alone = output_of(tuned, {k: v[1:2] for k, v in bench.batch.items()})
    except Exception as error:
        raise NotTried(f"no sample runs by itself: {type(error).__name__}") from error
    pairs = [(a[0], b[1]) for a, b in zip(alone, rows) if len(a) == 1 and a.shape[1:] == b.shape[1:]]  # fmt: skip
    if not pairs or not close(*map(list, zip(*pairs))):
        raise NotTried("a sample has other outputs by itself than among others")
    expected = _by_task(bench, lambda model, **task: output_of(model, bench.batch, **task))  # fmt: skip
    tasks = [TASKS[i % len(TASKS)] for i in range(4)]
    found = output_of(bench.merged, bench.batch, task_ids=tasks)
    for i, task in enumerate(tasks):
        mine = [t[i] for t in found if len(t) == 4], [t[i] for t in expected[task] if len(t) == 4]  # fmt: skip
        away = distance(*mine) if mine[1] else 0.0
        assert away <= TOLERANCE, f"sample {i} of {task} is {away:.2g} away"


def generate(bench: Bench) -> None:
    """Greedy, of prompts of several tasks, as of each by itself."""
    batch = bench.batch
    if not bench.kind.can_generate():
        raise NotTried("does not generate")
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder")}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        try:
            model, prompt = bench.loaded["frozen"], {
                k: v[1:2] for k, v in batch.items()
            }
            alone = model.generate(**prompt, **settings)[0]
            if not alone.equal(model.generate(**batch, **settings)[1]):
                raise NotTried(
                    "a prompt is continued otherwise by itself than among others"
                )
        except NotTried:
            raise
        except Exception as error:
            raise NotTried(f"does not generate by itself: {type(error).__name__}: {error}")  # fmt: skip
        expected = _by_task(bench, lambda model: model.generate(**batch, **settings))
        tasks = [TASKS[i % len(TASKS)] for i in range(4)]
        found = bench.merged.generate(**batch, **settings, task_ids=tasks)
    for i, task in enumerate(tasks):
        assert found[i].equal(expected[task][i]), f"sample {i} of {task}: {found[i].tolist()} {expected[task][i].tolist()}"  # fmt: skip


def _by_task(bench: Bench, run: Callable[[Any], Any]) -> dict[str, Any]:
    found, model = {}, bench.merged
    bench.batch
    for task in TASKS:
        model.set_task(task)
        found[task] = run(model)
    model.unset_task()
    return found


CELLS: dict[str, Callable[[Bench], None]] = {
    "read": read,
    "dry run": dry_run,
    "tensors": tensors,
    "outputs": outputs,
    "in memory": in_memory,
    "save and load": save_and_load,
    "export": export,
    "mixed batch": mixed_batch,
    "generate": generate,
    "planned": planned,
    "small budget": small_budget,
}
