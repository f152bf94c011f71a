"""Every rival at its own storage, and the default at the same: MiniLM's text tasks and real8, test split.

    python -m benchmarks.own_storage                  # both; what is measured already is not measured again
    python -m benchmarks.own_storage real8 --ours     # the default anew, rivals as they are
    python -m benchmarks.own_storage text --compared  # rivals that docs/comparison_text.json has are taken from there
    python -m benchmarks.own_storage --pages          # page and figure from stored figures

A rival has one row per place of its dial. Where a place has several candidates (gains, scales, lengths), the validation split
chooses; test is scored for the one that is chosen: once, or once per draw of a method that draws entries at random, whose row
is the mean. NNCodec is among them where it is installed
(``benchmarks/nncodec_rows.py``). Writes docs/own_storage.json, docs/own_storage.md and docs/img/own_storage.png.
"""

import argparse
import json
import math
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks import figures, nncodec_rows
from benchmarks.few_bit_rows import NNCODEC, Row, rivals
from benchmarks.frontier import pools
from benchmarks.frontier import rivals as compared_rows
from benchmarks.own_storage_page import FILE, LEAST, MOST, TITLES, write_page
from benchmarks.suites import DEFAULT, machine, retention, write_json
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.programs.scoring import Scorer

#: Seeds of methods that draw; the first one's candidates are chosen among.
DRAWS = (0, 1, 2, 3, 4)
#: Texts of each task, the first ones (None: as many as in the comparison); images are all that there are.
TEXTS = {"test": None, "validation": 75}


class Bench:
    """Pools of a suite, and what its fine-tuned models reach on both splits.

    Args:
        known: record of the suite; their accuracy is taken from there, or put in.
    """

    def __init__(self, name: str, known: dict[str, Any]):
        found = {split: pools(name, split, texts) for split, texts in TEXTS.items()}
        self.modelpool = found["test"][0]
        self.scorers = {split: scorer for split, (_, scorer) in found.items()}
        self.tasks = list(self.modelpool.model_names)
        if "individuals" not in known:
            models = {task: self.modelpool.load_model(task) for task in self.tasks}
            known["individuals"] = {
                split: {task: scorer.score(models[task], task) for task in self.tasks}
                for split, scorer in self.scorers.items()
            }
        self.individuals = known["individuals"]

    def kept(self, model: Any, split: str) -> float:
        """Retention in per cent."""
        scorer: Scorer = self.scorers[split]
        coded = isinstance(model, nncodec_rows.Coded)
        scores = {
            task: scorer.score(model.task(task) if coded else model, task)
            for task in self.tasks
        }
        return 100 * retention(scores, self.individuals[split])

    def merged(self, row: Row) -> tuple[Any, float]:
        """What a row's method makes of the pool, and its storage."""
        torch.manual_seed(0)
        if row.method == NNCODEC:
            coded = nncodec_rows.Coded(self.modelpool, **row.overrides)
            return coded, coded.x_excl
        model = instantiate(OmegaConf.create(row.config())).run(self.modelpool)
        return model, model.storage.x_excl


def best_of(bench: Bench, candidates: list[Row]) -> dict[str, Any]:
    """The candidate of a place that keeps most on validation, on test; the error's words where one fails."""
    found: dict[str, Any] = {}
    for row in candidates:
        begun = time.process_time()
        model, x = bench.merged(row)
        seconds = time.process_time() - begun
        held_out = bench.kept(model, "validation") if len(candidates) > 1 else None
        if not found or held_out > found["validation"]:
            found = {"validation": held_out, "x": x, "seconds": seconds, "overrides": dict(row.overrides)}  # fmt: skip
            best = model
    found["candidates"] = len(candidates)
    found["retention"] = bench.kept(best, "test")
    return found


def draws(row: Row) -> bool:
    """Whether the method draws what it keeps."""
    return row.method != NNCODEC and "seed" in row.config()


def drawn(bench: Bench, row: Row, first: float) -> dict[str, Any]:
    """Retention on test of every draw, and the mean.

    Args:
        first: of the first seed.
    """
    found = [first]
    for seed in DRAWS[1:]:
        model, _ = bench.merged(replace(row, overrides={**row.overrides, "seed": seed}))
        found.append(bench.kept(model, "test"))
    return {"draws": found, "retention": mean(found)}


def measure_rivals(bench: Bench, rows: dict[str, Any], *, text: bool) -> Iterator[str]:
    """Every place that is not known yet; its name when it is."""
    asked = rivals(text=text)
    for place, candidates in groupby(asked, key=lambda row: row.place):
        chosen = list(candidates)
        known = rows.get(place, {})
        if known and ("draws" in known or not draws(chosen[0])):
            continue
        try:
            found = dict(known) or best_of(bench, chosen)
            best = replace(chosen[0], overrides=found["overrides"])
            if draws(best):
                found |= drawn(bench, best, found["retention"])
        except Exception as failure:
            found = {"failed": f"{type(failure).__name__}: {failure}"}
            traceback.print_exc()
        rows[place] = {"family": chosen[0].family, "dial": chosen[0].dial} | found
        yield place


def compared(name: str) -> dict[str, Any]:
    """Methods of few bits as the suite's comparison has them, one setting each."""
    return {
        method: {"family": re.split(r" \d", method)[0], "dial": "", "x": x, "retention": kept}
        | {"candidates": 0, "overrides": {}}
        for method, x, kept in compared_rows(name, math.inf)
    }  # fmt: skip


def measure_ours(bench: Bench, known: dict[str, Any]) -> Iterator[str]:
    """The default at the storage of every rival; places of about the same storage share a merge, at the least of them."""
    ours = known.setdefault("ours", {})
    stored = {min(row["x"], MOST) for row in known["rivals"].values() if "x" in row}
    for budget in sorted(stored):
        key = repr(budget)
        near = (row["x"] for row in ours.values())
        if key in ours or any(LEAST * budget <= x <= budget for x in near):
            continue
        begun = time.process_time()
        model = DiDiMerging(budget=budget).run(bench.modelpool)
        seconds = time.process_time() - begun
        ours[key] = {
            "x": model.storage.x_excl,
            "retention": bench.kept(model, "test"),
            "seconds": seconds,
        }
        yield key


def measure(name: str, record: dict[str, Any], search: bool) -> None:
    """A suite, into the record; written after each row.

    Args:
        search: rivals at every setting; otherwise those of the suite's comparison.
    """
    known = record["suites"].setdefault(name, {})
    bench = Bench(name, known)
    rows = known.setdefault("rivals", {})
    if not search:
        rows |= compared(name)
    for place in measure_rivals(bench, rows, text=name == "text") if search else ():
        print(name, place, rows[place], flush=True)
        write_json(FILE, record | {"machine": machine()})
    for key in measure_ours(bench, known):
        print(name, "DiDi", known["ours"][key], flush=True)
        write_json(FILE, record | {"machine": machine()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[[], *TITLES])
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    parser.add_argument("--ours", action="store_true", help="forget the default's rows")
    parser.add_argument("--anew", action="store_true", help="forget all rows")
    parser.add_argument("--compared", action="store_true", help="search no settings")
    arguments = parser.parse_args()
    if not (arguments.pages or arguments.compared):
        figures.check_packages(parser, "own_storage")
    record = json.loads(FILE.read_text()) if FILE.exists() else {"suites": {}}
    there = {"real8": DEFAULT.is_dir(), "text": Path("outputs/text/models").is_dir()}
    for name in arguments.suites or [n for n in TITLES if there[n]]:
        if arguments.pages:
            break
        if arguments.anew:
            record["suites"].pop(name, None)
        if arguments.ours:
            record["suites"].get(name, {}).pop("ours", None)
        measure(name, record, not arguments.compared)
    write_page(json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
