"""Tables, plots and one HTML page from a finished (or half finished) comparison.

Everything is derived from ``comparison.json``; nothing here needs torch, the host or the models, so a report can be made
anew from the file alone: ``python -m fusion_bench_didi.report DIRECTORY``.
"""

from collections.abc import Sequence
from pathlib import Path

from ..files import from_home
from .comparison import Comparison

__all__ = ["Comparison", "whereabouts", "write_report"]


def write_report(directory: str | Path) -> list[Path]:
    """Write tables, plots and the page beside ``comparison.json``.

    Returns:
        the files written.
    """
    from . import page, plots, tables

    directory = from_home(directory)
    comparison = Comparison.read(directory / "comparison.json")
    files = tables.write(comparison, directory) + plots.write(comparison, directory)
    return [*files, page.write(comparison, directory)]


def whereabouts(files: Sequence[Path]) -> str:
    """Where :func:`write_report` has written, in a line."""
    page, beside = files[-1], sorted({file.suffix[1:] for file in files[:-1]})
    return f"page    {page}; tables and plots beside it ({', '.join(beside)})"
