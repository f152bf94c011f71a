"""Apply the contributions to a scratch copy of the released host, run their tests there and one merge with each.

The host is the source distribution of the installed version, from the package index; where there is none to be had, the
installed package's own files. The models are CLIP towers of width 32 made on the spot. Ends with status 1 if anything fails.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from apply import CONTRIBUTIONS, DoesNotFit, apply

REPOSITORY = Path(__file__).resolve().parents[1]
#: Tests that a contribution brings.
TESTS = {
    "task_aware_evaluation": "tests.test_task_aware_evaluation",
    "tsv_c": "tests.test_tsvc",
    "didi_merging": "tests.test_didi_merging",
}
#: What a user of a contribution would run.
MERGES = {
    "task_aware_evaluation": ("emr_merging/emr_merging",),
    "tsv_c": ("task_singular_vector/TaskSingularVectorCompression",),
    "didi_merging": tuple(f"didi_merging/didi_merging_{size}" for size in "sml"),
}
#: Tests of the plugin that meet the host's task pools.
OWN_TESTS = ("tests/upstream", "tests/taskpool/test_task_switching.py")
#: Runs the host's command with a host from elsewhere: the folder in front of all others.
COMMAND = "from fusion_bench.scripts.cli import _hydra_main; _hydra_main()"
WORKPLACE = """
import sys
from pathlib import Path
from conftest import build_tiny_clip
from workplaces import write_workplace
write_workplace(Path(sys.argv[1]), build_tiny_clip())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", type=Path, help="an unpacked sdist or a checkout")
    parser.add_argument("--keep", type=Path, help="a new folder to work in, and leave")
    given = parser.parse_args()
    if given.keep:
        given.keep.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        scratch = given.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="upstream-"))
        )
        sys.exit(check(scratch, given.host))


def check(scratch: Path, host: Path | None) -> int:
    """Everything, in a folder of its own; the exit status."""
    tree = scratch / "host"
    print(f"host: FusionBench {source(tree, host)}\n")
    try:
        for change in apply(tree, CONTRIBUTIONS):
            print(f"{change.contribution:22} {change.kind:9} {change.file}")
    except DoesNotFit as error:
        print(f"does not fit: {error}")
        return 1
    print()
    results = [*tested(tree), *merged(tree, scratch), *with_the_plugin(tree)]
    failed = [name for name, passed in results if not passed]
    print(f"\n{len(results) - len(failed)} of {len(results)} passed", *failed)
    return int(bool(failed))


def source(tree: Path, host: Path | None) -> str:
    """Copy the host to a folder; says which it is."""
    if host is not None:
        shutil.copytree(host, tree, ignore=shutil.ignore_patterns(".git"))
        return f"of {host}"
    release = version("fusion_bench")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", ":all:", "--no-build-isolation", "--dest", folder]
        if not run([*pip, f"fusion_bench=={release}"]).returncode:
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
            (unpacked,) = (p for p in Path(folder).iterdir() if p.is_dir())
            shutil.move(unpacked, tree)
            return f"{release}, source distribution"
    site = Path(find_spec("fusion_bench.constants").origin).parents[2]
    for part in ("fusion_bench", "fusion_bench_config"):
        shutil.copytree(site / part, tree / part)
    return f"{release}, installed files (no source distribution to be had)"


def tested(tree: Path) -> Iterator[tuple[str, bool]]:
    """Each contribution's own tests, as the host runs tests."""
    for contribution in CONTRIBUTIONS:
        command = [sys.executable, "-W", "ignore", "-m", "unittest"]
        with timed(f"{contribution}: {TESTS[contribution]}") as told:
            done = run([*command, TESTS[contribution]], tree, tree)
            yield told(done, last_line(done.stderr, "Ran"))


def merged(tree: Path, scratch: Path) -> Iterator[tuple[str, bool]]:
    """One merge, and its evaluation task by task, with each method."""
    place = scratch / "workplace"
    place.mkdir()
    made = [sys.executable, "-W", "ignore", "-c", WORKPLACE, str(place)]
    done = run(made, REPOSITORY, REPOSITORY / "tests", REPOSITORY)
    if done.returncode:
        print(done.stderr[-3000:])
        yield "models made on the spot", False
        return
    for contribution in CONTRIBUTIONS:
        for method in MERGES[contribution]:
            with timed(f"{contribution}: method={method}") as told:
                out = place / "out" / method
                settings = [f"--config-dir={place / 'conf'}", f"hydra.run.dir={out}"]
                settings += [f"path.log_dir={out}", "print_config=false"]
                settings += [f"method={method}", "modelpool=tiny", "taskpool=tiny"]
                done = run([sys.executable, "-c", COMMAND, *settings], place, tree)
                yield told(done, figures(out / "program_report.json"))


def with_the_plugin(tree: Path) -> Iterator[tuple[str, bool]]:
    """The plugin's tests of task pools, and of its likeness to the compact form, with the host that has the hooks."""
    for tests in OWN_TESTS:
        with timed(f"plugin on this host: {tests}") as told:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            if tests == "tests/upstream":
                command += ["-k", "compact"]  # the edits are there already
            done = run([*command, tests], REPOSITORY, tree, REPOSITORY)
            yield told(done, last_line(done.stdout, "passed"))


@contextlib.contextmanager
def timed(name: str) -> Iterator:
    """Print a line about a step: what it was, how it ended, how long it took."""
    start = time.perf_counter()

    def told(done: subprocess.CompletedProcess, what: str) -> tuple[str, bool]:
        passed = not done.returncode
        seconds = time.perf_counter() - start
        print(f"{'ok' if passed else 'FAILED':7}{seconds:6.1f} s  {name}  {what}")
        if not passed:
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        return name, passed

    yield told


def run(
    command: Sequence[str], folder: Path | None = None, *front: Path
) -> subprocess.CompletedProcess:
    """A program without a network, packages of some folders before all others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": ""}
    if front:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, front))
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )


def last_line(text: str, word: str) -> str:
    """The last line with a word."""
    return next((x for x in reversed(text.splitlines()) if word in x), "")


def figures(report: Path) -> str:
    """Losses of a report (accuracies on a dozen pictures tell little), and its count of parameters."""
    if not report.exists():
        return "no report"
    found = json.loads(report.read_text())
    losses = [f"{t} {v['loss']:.4f}" for t, v in found.items() if "loss" in v]
    return (
        f"losses: {', '.join(losses)}; {found['model_info']['all_params']} parameters"
    )


if __name__ == "__main__":
    main()
