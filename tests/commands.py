"""The command ``didi`` as a test runs it."""

import sys

from click.testing import CliRunner
from transformers.utils import logging

from fusion_bench_didi.cli import didi, main

logging.disable_progress_bar()  # of loading, which transformers 5 shows amid what is told


def run(*arguments: object) -> str:
    """What a command prints; what it raises is raised."""
    found = CliRunner().invoke(didi, [*map(str, arguments)], catch_exceptions=False, standalone_mode=False)  # fmt: skip
    if isinstance(found.exception, Exception):
        raise found.exception
    return found.output


def run_whole(monkeypatch, *arguments: object) -> None:
    """As the installed command runs, to its exit."""
    monkeypatch.setattr(sys, "argv", ["didi", *map(str, arguments)])
    main()
