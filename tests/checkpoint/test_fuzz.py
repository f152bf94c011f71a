"""Damaged and hostile saved files: read or refused, never anything else. ``python -m tests.fuzz`` tries as many as one likes."""

import os
from pathlib import Path

import pytest
import torch
from fuzz import CASES, MEMORY, limits, run


@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_read_or_refused(name):
    outcomes = run([name], 60)
    faults = outcomes.keys() - {"read", "refused"}
    assert not faults, {fault: outcomes[fault][:3] for fault in faults}
    assert len(outcomes["refused"]) > 20, "most changes are seen"


def test_the_limits_are_limits():
    """Else nothing could be found."""
    with limits():
        torch.ones(MEMORY // 16)
        with pytest.raises((RuntimeError, MemoryError)):
            torch.ones(MEMORY)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: os.kill(os.getpid(), 9), "the process ended with status 9"),
        (lambda _: os.system("true"), "RunsCode"),
        (lambda _: torch.ones(MEMORY), "RuntimeError|MemoryError"),
    ],
)
def test_faults_are_found(monkeypatch, read, fault):
    """A process that runs code, takes memory or dies is a fault of the input that it read."""
    import re

    from fuzz import Case

    calls = []

    def once(place: Path) -> None:
        calls.append(place)
        if len(calls) > 1:  # what is unchanged is read first
            read(place)

    def write(place: Path) -> None:
        place.mkdir()
        (place / "config.json").write_text('{"a": 1}')

    monkeypatch.setitem(CASES, "bad", Case(write, once))
    outcomes = run(["bad"], 3)
    assert sum(map(len, outcomes.values())) == 3
    assert all(re.search(fault, outcome) for outcome in outcomes)
