"""``python -m fusion_bench_didi.export DIR OUT --form peft``: a saved merged model in the form of another library."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..artifacts.saving import load
from ..checkpoint.directory import check_target
from ..errors import DiDiError, SettingsError
from ..models.dynamic import DynamicModel
from .common import MANIFEST, source_of
from .patch import to_patch
from .peft import to_peft
from .plain import to_plain
from .report import ExportReport
from .settings import AdapterSettings

#: LoRA adapters for PEFT and servers; whole checkpoints; what differs from the base model, to be put on a copy of it.
Form = Literal["peft", "plain", "patch"]
_NAMES = frozenset(
    {"directory", "out", "form", "tasks", "base", "overwrite"}
    | {field.name for field in fields(AdapterSettings)}
)


def export(
    directory: str | Path,
    out: str | Path,
    *,
    form: Form,
    tasks: Sequence[str] | str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> ExportReport:
    """Export a saved merged model.

    Args:
        directory: of the merged model.
        out: to write.
        tasks: all if None.
        base: repository or directory of the base model; where the merge took it from if None.
        settings: of :class:`~.settings.AdapterSettings`, for ``form=peft``.

    Raises:
        SettingsError: for settings of another form.
        DiDiError: if what lies there is no dynamic model, or cannot be exported.
        FileExistsError: if ``out`` exists and ``overwrite`` is false.
    """
    if form not in get_args(Form):
        raise SettingsError(
            f"form={form!r} is none of {', '.join(get_args(Form))}. Choose one of them."
        )
    if settings and form != "peft":
        raise SettingsError(
            f"{', '.join(sorted(settings))}: of form=peft, not {form}. Leave them out."
        )
    adapters = AdapterSettings(**settings)
    check_target(out, overwrite=overwrite, mark=MANIFEST)
    model = _loaded(directory, base)
    if base is None:
        place = source_of(model, None).get("place")
        beside = Path(directory) / place if place else None
        base = (
            beside if beside and not Path(place).is_dir() and beside.is_dir() else None
        )
    common: dict[str, Any] = {"tasks": tasks, "base": base, "overwrite": overwrite}
    if form == "peft":
        return to_peft(model, out, settings=adapters, **common)
    return (to_plain if form == "plain" else to_patch)(model, out, **common)


def _loaded(directory: str | Path, base: str | Path | None) -> DynamicModel:
    model = load(directory, base)
    if not isinstance(model, DynamicModel):
        raise DiDiError(
            f"{directory} is no backbone with an expert per task, which is what can be exported. Merge by a method that makes one, "
            "such as didi."
        )
    return model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, whose names are those of :func:`export`."""
    parser.add_argument("directory", help="of the merged model")
    parser.add_argument("out", help="directory to write, with one entry per task")
    parser.add_argument("--form", required=True, choices=get_args(Form))
    parser.add_argument(
        "--task", dest="tasks", action="append", help="may be repeated; all if left out"
    )
    parser.add_argument(
        "--base", help="repository or directory of the base model, if it moved"
    )
    parser.add_argument("--overwrite", action="store_true")
    only = parser.add_argument_group("of --form peft")
    only.add_argument(
        "--shared",
        choices=("concat", "fold"),
        help="what all tasks share: in every adapter (default), or in a base checkpoint",
    )
    only.add_argument("--max-rank", type=int, help="of any module of an adapter")
    only.add_argument(
        "--pad-rank",
        action="store_true",
        default=None,
        help="one rank for all modules of an adapter, filled up with zeros",
    )
    only.add_argument("--factor-dtype", choices=("float32", "bfloat16", "float16"))
    only.add_argument(
        "--carry",
        choices=("linear", "all"),
        help="layers that servers read (default), or all that PEFT reads",
    )


def run(arguments: argparse.Namespace) -> ExportReport:
    """Export as the arguments of :func:`add_arguments` say, and print the report."""
    given = {k: v for k, v in vars(arguments).items() if v is not None and k in _NAMES}
    report = export(given.pop("directory"), given.pop("out"), **given)
    print(report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        SystemExit: with a message, for what cannot be exported.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fusion_bench_didi.export", description=__doc__.split(": ")[1]
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (DiDiError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
