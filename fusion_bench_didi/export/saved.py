"""A saved merged model in the form of another library: ``didi export`` and the same from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..artifacts.saving import load
from ..checkpoint.directory import check_target
from ..errors import DiDiError, SettingsError
from ..models.dynamic import DynamicModel
from ..options import check_keywords
from .common import EXPORT, source_of
from .patch import to_patch
from .peft import to_peft
from .plain import to_plain
from .report import ExportReport
from .settings import AdapterSettings

#: LoRA adapters for PEFT and servers; whole checkpoints; what differs from the base model, to be put on a copy of it.
Form = Literal["peft", "plain", "patch"]


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
        SettingsError: for settings that there are not, for those of another form, and for a model in memory.
        DiDiError: if what lies there is no dynamic model, or cannot be exported.
        FileExistsError: if ``out`` exists and ``overwrite`` is false, or it is no export, or other weights lie in it.
    """
    if isinstance(directory, nn.Module):
        raise SettingsError(
            f"export takes the directory of a saved merged model, and {type(directory).__name__} is given. Give it to to_peft, to_plain "
            "or to_patch, or the directory that it was saved in."
        )
    if form not in get_args(Form):
        raise SettingsError(
            f"form={form!r} is none of {', '.join(get_args(Form))}. Choose one of them."
        )
    check_keywords(AdapterSettings, settings)
    if settings and form != "peft":
        raise SettingsError(
            f"{', '.join(sorted(settings))}: of form=peft, not {form}. Leave them out."
        )
    adapters = AdapterSettings(**settings)
    check_target(out, overwrite=overwrite, kind=EXPORT)
    model = load(directory, base)
    if not isinstance(model, DynamicModel):
        raise DiDiError(
            f"{directory} is no backbone with an expert per task, which is what can be exported. Merge by a method that makes one, "
            "such as didi."
        )
    place = source_of(model, base).get("place")
    if base is None and place and not Path(place).is_dir():
        beside = Path(directory) / place
        base = beside if beside.is_dir() else None
    common: dict[str, Any] = {"tasks": tasks, "base": base, "overwrite": overwrite}
    if form == "peft":
        return to_peft(model, out, settings=adapters, **common)
    return (to_plain if form == "plain" else to_patch)(model, out, **common)
