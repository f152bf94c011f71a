"""What README and pages say to run: Python runs, on small models; commands of a shell start.

A command is parsed as its program would (options by click, configurations by Hydra) and not run, but for the tutorial's, which
run in their order.
"""

import shlex
import shutil

import pytest
import torch
from commands import run
from helpers import BASE, REPOSITORY
from snippets import blocks, fault

import fusion_bench_didi

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "upstream" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
ALL = [block for page in PAGES for block in blocks(page)]

#: Pieces of a block that is not run or parsed -> why.
ELSEWHERE = {
    "llama.cpp/convert_hf_to_gguf.py": "scripts of llama.cpp; examples/serve runs them",
    "llama.cpp/convert_lora_to_gguf.py": "scripts of llama.cpp; examples/serve runs them",
    "llama-server ": "a program of llama.cpp",
}


def elsewhere(text: str) -> bool:
    return any(piece in text for piece in ELSEWHERE)


@pytest.fixture(scope="module")
def workplace(tiny_clip_dir, tmp_path_factory):
    """``base``, ``tuned/TASK``, and ``merged`` and ``other``, merged of two tasks each."""
    place = tmp_path_factory.mktemp("snippets")
    shutil.copytree(tiny_clip_dir / BASE, place / "base")
    for task in ("mnist", "svhn", "eurosat"):
        shutil.copytree(tiny_clip_dir / task, place / "tuned" / task)
    more = ("--budget", 0.5, "-s", "refine_sweeps=2")
    tuned = [place / "tuned" / task for task in ("mnist", "svhn", "eurosat")]
    run("merge", place / "base", *tuned[:2], "-o", place / "merged", *more)
    others = (tuned[2], f"cars={tuned[1]}")
    run("merge", place / "base", *others, "-o", place / "other", *more)
    return place


@pytest.fixture
def here(workplace, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(workplace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def names() -> dict:
    """What a snippet may take as there."""
    return {"pixel_values": torch.zeros(2, 3, 32, 32), "model": fusion_bench_didi.load("merged")}  # fmt: skip


def relative(page) -> str:
    return str(page.relative_to(REPOSITORY))


TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
PYTHON = sorted({b.page for b in ALL if b.language == "python"} - {TUTORIAL})


@pytest.mark.parametrize("page", PYTHON, ids=relative)
def test_python_runs(page, here):
    given = names()
    for block in ALL:
        if block.page == page and block.language == "python":
            exec(compile(block.text, relative(page), "exec"), given)


def test_the_tutorial_runs_from_its_first_line_to_its_last(here):
    given = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    for made in ("merged", "other"):
        shutil.rmtree(made)
    for block in blocks(TUTORIAL):
        if block.language == "python":
            exec(compile(block.text, "tutorial.md", "exec"), given)
            continue
        for line in block.lines:
            program, *words = shlex.split(line)
            assert program == "didi"
            run(*words)
    assert (here / "smaller").is_dir() and (here / "patches").is_dir()


SHELL = sorted(
    {(line, relative(b.page)) for b in ALL if b.language == "bash" for line in b.lines}
)


@pytest.mark.parametrize("page", sorted({page for _, page in SHELL}))
def test_commands_start(page):
    lines = [line for line, where in SHELL if where == page and not elsewhere(line)]
    faults = {line: fault(line) for line in lines}
    assert not {line: why for line, why in faults.items() if why}


def test_what_is_not_checked_here_is_still_said():
    every = "\n".join(line for line, _ in SHELL)
    assert not [piece for piece in ELSEWHERE if piece not in every]


@pytest.mark.parametrize(
    "line, why",
    [
        ("didi merge base a -o out --bugdet 1", "bugdet"),
        ("didi mergers", "no command"),
        ("fusion_bench method=didi/nothing", "nothing"),
        ("fusion_bench method=didi method.bugdet=1", "bugdet"),
        ("python -m benchmarks.nothing", "no module"),
        ("python -m benchmarks.frontier --pagse", "pagse"),
        ("make cake", "cake"),
        ("curl http://x:1/v1/cake -d {}", "/v1/cake"),
        ('curl http://x:1/v1/classify -d \'{"model": "a"}\'', "input"),
        ("pip install 'fusion-bench-didi[cake]'", "cake"),
    ],
)
def test_faults_are_found(line, why):
    assert why in fault(line)
