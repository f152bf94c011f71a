"""Every page of docs/ that shows figures, and the README's table, made anew by its own command.

    python -m benchmarks.figures                          # all of them, one after another; hours
    python -m benchmarks.figures comparison_real8 exact   # some
    python -m benchmarks.figures --list                   # what there is

Stops at the first page that fails. Accuracy is first held against what is expected (``benchmarks.expectations``): figures
of code that keeps less than its predecessor are not worth making.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec

#: Pages, and the arguments of ``python -m`` that write them.
PAGES = {
    "tuned_scales": "benchmarks.tuned_scales",
    "comparison_real8": "benchmarks.comparison_page real8",
    "comparison_demo": "benchmarks.comparison_page demo",
    "over_seeds": "benchmarks.seeds",
    "comparison_text": "benchmarks.text_suite",
    "comparison_language": "benchmarks.language_suite",
    "multimodal": "benchmarks.multimodal_suite",
    "frontier": "benchmarks.frontier --anew",
    "own_storage": "benchmarks.own_storage --anew",
    "coded": "benchmarks.coded",
    "bound": "benchmarks.bound",
    "models": "benchmarks.pool_table",
    "architectures": "benchmarks.architectures",
    "real_suite_real8": "benchmarks.real_suite",
    "ranks_and_bits": "benchmarks.ranks_and_bits",
    "exact": "benchmarks.exact",
    "objectives": "benchmarks.objectives",
    "ablation": "benchmarks.ablation",
    "overlap": "benchmarks.overlap",
    "adapters": "benchmarks.adapters",
    "routing": "benchmarks.routing",
    "routing_demo": "benchmarks.routing --suite demo",
    "routing_limits": "benchmarks.routing_limits",
    "merge_front": "benchmarks.merge_front --evaluations 300 --samples 48 --seeds 0 1 2",
    "stages": "benchmarks.stages",
    "speed": "benchmarks.speed",
    "speed_budgets": "benchmarks.speed budgets",
    "speed_cold": "benchmarks.speed --cold --only didi tsv_m",
    "speed_growth": "benchmarks.speed growth",
    "memory": "benchmarks.memory --runs 3",
    "large_models": "benchmarks.large_models",
    "editing": "benchmarks.editing",
    "serving": "benchmarks.serving",
    "slim_serving": "benchmarks.slim_serving",
    "service": "benchmarks.service --minutes 10",
    "scaling": "benchmarks.scaling",
    "cost_model": "benchmarks.cost_model",
    "reliability": "benchmarks.reliability",
    "what_we_learned": "benchmarks.what_we_learned",
}

#: Packages that a page cannot be made without, beside those of the tests.
NEEDS = {"models": ("lm_eval",), "own_storage": ("nncodec",)}


def missing(pages: Iterable[str]) -> set[str]:
    """Packages that some of the pages need and that are not installed."""
    needed = {package for page in pages for package in NEEDS.get(page, ())}
    return {package for package in needed if find_spec(package) is None}


def check_packages(parser: argparse.ArgumentParser, *pages: str) -> None:
    """End with a message if packages that the pages need are missing, before anything is measured."""
    if absent := missing(pages):
        parser.error(f"{', '.join(sorted(absent))} not installed: pip install -e '.[test,figures]', or make figures")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", metavar="page", help="all if none is named")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.pages) - set(PAGES):
        parser.error(f"no page {', '.join(sorted(unknown))}; there are {', '.join(PAGES)}")  # fmt: skip
    chosen = {name: PAGES[name] for name in arguments.pages or PAGES}
    if arguments.list:
        for name, command in chosen.items():
            print(f"{name:20} python -m {command}")
        return 0
    check_packages(parser, *chosen)
    for name, command in {"expectations": "benchmarks.expectations", **chosen}.items():
        start = time.perf_counter()
        line = [sys.executable, "-m", *shlex.split(command)]
        if status := subprocess.run(line).returncode:
            print(f"{name}: python -m {command} ended with {status}", file=sys.stderr)
            return status
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
