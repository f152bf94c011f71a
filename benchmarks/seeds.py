"""The comparison on three re-trainings of the embedded suite: means, and how far averages lie apart.

    python -m benchmarks.seeds            # some minutes per seed; what is there already is taken
    python -m benchmarks.seeds --pages    # the page from stored figures

Every seed draws other pictures and trains other towers. Writes docs/over_seeds.json and docs/over_seeds.md.
"""

import argparse
import shlex
from pathlib import Path

from benchmarks.comparison_page import compared, figures, shown
from benchmarks.suites import NOTES, in_words, write_json
from fusion_bench_didi.report.comparison import Comparison
from fusion_bench_didi.report.seeds import over_seeds
from fusion_bench_didi.report.tables import as_markdown

FILE, PAGE = Path("docs") / "over_seeds.json", Path("docs") / "over_seeds.md"  # fmt: skip
SEEDS = (0, 1, 2)
#: Rows whose searches and trainings take minutes.
SKIPPED = (
    *("wemoe", "merge_oracle", "merge_performance"),
    *("merge_balanced", "merge_storage"),
)


def place_of(seed: int) -> Path:
    return Path("outputs") / f"demo_seed{seed}"


def command(seed: int) -> list[str]:
    return [
        *("fusion_bench", "--config-name", "didi_compare"),
        *("modelpool=didi/demo", "taskpool=didi/demo"),
        *(f"modelpool.seed={seed}", f"taskpool.seed={seed}"),
        f"skip=[{','.join(SKIPPED)}]",
        f"path.log_dir={place_of(seed)}",
    ]


def write_page() -> None:
    comparison = Comparison.read(FILE)
    fields = figures(comparison) | {
        "command": "\n".join(shlex.join(command(seed)) for seed in SEEDS),
        "table": as_markdown(comparison).rstrip(),
        "machine": in_words(comparison.data["machine"]),
    }
    PAGE.write_text((NOTES / "over_seeds.md").read_text().format(**fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", action="store_true", help="run nothing")
    if not parser.parse_args().pages:
        found = [compared(command(seed), place_of(seed)) for seed in SEEDS]
        write_json(FILE, shown(over_seeds(found)))
    write_page()


if __name__ == "__main__":
    main()
