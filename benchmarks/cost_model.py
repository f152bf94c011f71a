"""What a merge costs: its work counted, against the measured rates of a machine; held against what was measured.

    python -m benchmarks.cost_model               # counts of merges that are not counted yet, rates, and docs/cost_model.md
    python -m benchmarks.cost_model count --only vit-b-32    # counts anew
    python -m benchmarks.cost_model rates         # rates of this machine alone
    python -m benchmarks.cost_model page

Counts are those of one thread, as ``benchmarks.counting`` sees them. No rate is fitted to what is predicted. A merge is held against
the rates that were measured beside it; those of this command are for forecasts.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES
from benchmarks.cost_page import page
from benchmarks.cost_rates import beside
from benchmarks.counting import counting
from benchmarks.scaling import CASES, COUNTS, Case, small_pool
from benchmarks.suites import machine, write_json
from fusion_bench_didi.method.didi import DiDiMerging

#: Numbers of tasks that docs/speed.json has beside eight, and the files of which are there for other pages too.
GROWING = (2, 4)


def counted(case: Case) -> dict:
    """Counts of a merge, with the bytes that it writes and takes checksums of, and what it is a merge of."""
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        target = place / "merged"
        if case.shape == "small":
            pool = small_pool(case.tasks)
        else:
            pool = case.pool(place)()
        with counting() as counts:
            model = DiDiMerging(budget=case.budget, output_dir=str(target)).run(pool)
        written = sum(f.stat().st_size for f in target.iterdir())
        base = sum(p.nbytes for p in model.backbone.parameters())
        shutil.rmtree(target)
    counts["shared"] |= {"written": written, "hashed": 2 * written}
    counts["own"] |= {"hashed": base}
    energy = model.info["ranks"]["shared"]
    sides = [tuple(model.base_tensor(name).shape) for name in energy]
    numbers = sum(model.base_tensor(name).numel() for name in energy)
    side = sum(
        min(s[0], model.base_tensor(n).numel() // s[0]) * model.base_tensor(n).numel()
        for n, s in zip(energy, sides)
    )
    about = {"numbers": numbers, "matrices": len(sides), "side": side / max(numbers, 1)}
    return {**asdict(case), "counts": counts, **about}


def cases() -> list[Case]:
    """The merges of docs/scaling.json and docs/speed.json; those of one process are counted."""
    small = [Case("small", tasks, budget) for budget in (1.4, 0.2) for tasks in COUNTS]
    adapters = [Case("adapters", tasks // 5, 0.3) for tasks in COUNTS]
    growing = [Case("vit-b-32", tasks, 1.4) for tasks in GROWING]
    return list(dict.fromkeys([*CASES, *small, *adapters, *growing]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("count", "rates", "page"))
    shapes = [*SHAPES, "adapters", "small"]
    parser.add_argument("--only", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out / "cost_model.json"
    found = json.loads(file.read_text()) if file.exists() else {"cases": []}
    there = [{k: c[k] for k in asdict(CASES[0])} for c in found["cases"]]
    anew = arguments.what == "count"
    for case in cases() if arguments.what in (None, "count") else ():
        key = asdict(case)
        if case.shape in arguments.only and (anew or key not in there):
            kept = [c for c in found["cases"] if not key.items() <= c.items()]
            found["cases"] = [*kept, counted(case)]
            write_json(file, found)
            print(found["cases"][-1], flush=True)
    if arguments.what in (None, "rates"):
        found["machine"], found["rates"] = machine(), asdict(beside(1))
        write_json(file, found)
    (arguments.out / "cost_model.md").write_text(page(found, arguments.out))


if __name__ == "__main__":
    main()
