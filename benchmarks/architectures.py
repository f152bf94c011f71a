"""What a merge can do with every architecture of the installed transformers, on small random models of it.

    python -m benchmarks.architectures                         # writes docs/architectures.{json,md}; half an hour of two cores
    python -m benchmarks.architectures Llama.* T5Model         # classes by pattern, their rows anew
    python -m benchmarks.architectures --every                 # all classes of each architecture; twice as long
    python -m benchmarks.architectures --page                  # the page anew from docs/architectures.json

Each class in a process of its own that may take so long, for a class of transformers may end it.
"""

import argparse
import json
import logging
import multiprocessing
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from benchmarks.suites import NOTES, write_json

DOCS = Path("docs")
DATA = DOCS / "architectures.json"
#: of one class
SECONDS = 240
KINDS = {
    "language": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "text to text": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classes of texts": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "classes of images": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "images and text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "without a head": modeling_auto.MODEL_MAPPING_NAMES,
}
BUILT, NOT_TRIED = "built", "not tried: "
#: needs no line
UNTOLD = {NOT_TRIED + why for why in ("does not generate", "not a language model")}


def classes(*, every: bool = False) -> dict[str, str]:
    """What a class of each architecture is for: the first where it is for several.

    Args:
        every: all classes of an architecture.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    for kind, names in KINDS.items():
        for architecture, given in names.items():
            if every or architecture not in seen:
                for name in (given,) if isinstance(given, str) else given:
                    found.setdefault(name, kind)
                seen.add(architecture)
    return found


def row(
    name: str, kind: str, without: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Columns but some, and ``yes`` or what came instead."""
    from benchmarks.architecture_bench import Bench, NotTried
    from benchmarks.architecture_cells import CELLS

    with tempfile.TemporaryDirectory() as place:
        try:
            bench = Bench(getattr(transformers, name), Path(place), kind == "language")
            bench.models
        except Exception as error:
            yield BUILT, _said(error, place)
            return
        yield BUILT, "yes"
        for column in [c for c in CELLS if c not in without]:
            try:
                CELLS[column](bench)
            except NotTried as reason:
                yield column, f"{NOT_TRIED}{reason}"
            except Exception as error:
                yield column, _said(error, place)
            else:
                yield column, "yes"


def _said(error: Exception, place: str) -> str:
    text = f"{type(error).__name__}: {str(error).strip()}".replace(place, "DIRECTORY")
    return " ".join(text.split())[:400]


def table(wanted: Iterable[tuple[str, str]], workers: int) -> Iterator[tuple[str, dict]]:  # fmt: skip
    """Rows as they are done, so many at a time."""
    waiting, running = list(wanted), {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < workers:
            name, kind = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, kind, theirs))
            process.start()
            theirs.close()
            running[ours] = process, time.monotonic(), name, {"kind": kind}
        ready = wait(list(running), timeout=1)
        for pipe, (process, start, name, found) in list(running.items()):
            if pipe in ready:
                try:
                    column, outcome = pipe.recv()
                    found[column] = outcome
                    continue
                except EOFError:
                    process.join()
                    if process.exitcode:
                        found["ended"] = f"by signal or status {process.exitcode}"
            elif time.monotonic() - start < SECONDS:
                continue
            else:
                process.kill()
                process.join()
                found["ended"] = f"after {SECONDS} s"
            del running[pipe]
            yield name, found


def _child(name: str, kind: str, out: Connection) -> None:
    for found in row(name, kind):
        out.send(found)


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


# --- the page ------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """How many classes pass each column, and every class that does not, with the reason."""
    rows = found["rows"]
    built = {name: cells for name, cells in rows.items() if cells[BUILT] == "yes"}
    columns = [c for c in dict.fromkeys(k for r in built.values() for k in r) if c not in ("kind", BUILT, "ended")]  # fmt: skip
    lines = ["| models | classes | built | " + " | ".join(columns) + " |", "|---|--:|--:|" + "--:|" * len(columns)]  # fmt: skip
    for kind in (*KINDS, "all"):
        mine = [cells for cells in rows.values() if kind in ("all", cells["kind"])]
        counts = [sum(r.get(BUILT) == "yes" for r in mine), *(_passed(c, mine) for c in columns)]  # fmt: skip
        lines.append(f"| {kind} | {len(mine)} | {' | '.join(map(str, counts))} |")
    failed = [*_reasons(built, columns, tried=True)]
    failed += [f"- `{n}`: ended {r['ended']}" for n, r in rows.items() if "ended" in r]
    left = _reasons(built, columns, tried=False)
    unbuilt = [
        line.replace(f"**{BUILT}**, ", "")
        for line in _reasons(rows, [BUILT], tried=True)
    ]
    return (NOTES / "architectures.md").read_text().format(
        versions=found["versions"],
        classes=len(rows),
        built=len(built),
        table="\n".join(lines),
        failed="\n".join(failed) or "None.",
        left="\n".join(left),
        unbuilt="\n".join(unbuilt),
    )  # fmt: skip


def _passed(column: str, rows: Iterable[dict[str, str]]) -> str:
    """``passed/tried``, or what passed where all did."""
    counts = Counter(r[column] if r[column] == "yes" else r[column].startswith(NOT_TRIED) for r in rows if column in r)  # fmt: skip
    return f"{counts['yes']}/{counts['yes'] + counts[False]}" if counts[False] else str(counts["yes"])  # fmt: skip


def _reasons(
    rows: dict[str, dict[str, str]], columns: Iterable[str], *, tried: bool
) -> list[str]:
    """Lines of what came instead of ``yes``, numbers and names in it aside, in which columns and for which classes."""
    found: dict[str, tuple[str, dict[str, None], dict[str, None]]] = {}
    for name, cells in rows.items():
        for column in columns:
            said = cells.get(column, "yes")
            if said == "yes" or said in UNTOLD or said.startswith(NOT_TRIED) == tried:
                continue
            key = re.sub(r"\d+|\[.*?\]|'.*?'|model\.\S*", "", said)[:60]
            _, where, names = found.setdefault(key, (said, {}, {}))
            where[column] = names[name] = None
    most_first = sorted(found.values(), key=lambda one: -len(one[2]))
    return [
        f"- **{', '.join(where)}**, {', '.join(f'`{n}`' for n in names)}: {said.removeprefix(NOT_TRIED)[:200]}"
        for said, where, names in most_first
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="of names of classes")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--every", action="store_true", help="classes, not one each")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if not given.page:
        _quiet()
        wanted = [
            (name, kind)
            for name, kind in classes(every=given.every or bool(given.patterns)).items()
            if not given.patterns or any(re.fullmatch(p, name) for p in given.patterns)
        ]
        dict(row("LlamaForCausalLM", "language"))  # what children need is imported
        rows = json.loads(DATA.read_text())["rows"] if given.patterns else {}
        for done, (name, found) in enumerate(table(wanted, given.workers), 1):
            rows[name] = found
            rest = {k: v for k, v in found.items() if v not in ("yes", found["kind"])}
            print(f"{done}/{len(wanted)} {name}: {rest or 'all'}", flush=True)
            if done % 20 == 0 or done == len(wanted):
                ordered = {name: rows[name] for name in sorted(rows)}
                write_json(DATA, {"versions": f"transformers {version('transformers')}", "rows": ordered})  # fmt: skip
    (DOCS / "architectures.md").write_text(page(json.loads(DATA.read_text())))


if __name__ == "__main__":
    main()
