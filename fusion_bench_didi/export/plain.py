"""Plain checkpoints: one ordinary model per task, as any library loads it."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.companions import companions_at, companions_of, copy_companions
from ..checkpoint.tensors import write_tensors
from ..errors import some
from ..models.dynamic import DynamicModel
from ..models.task_settings import with_own_vocabulary
from ..task_vectors.ties import tied_names
from .checks import check_equal, missing
from .common import (
    asked_tasks,
    export_directory,
    folder,
    source_of,
    weight_bytes,
    write_report,
)
from .report import Carried, ExportReport


def to_plain(
    model: DynamicModel,
    directory: str | Path,
    *,
    tasks: Sequence[str] | str | None = None,
    base: str | Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> ExportReport:
    """Write a whole checkpoint per task, ``directory/TASK``, in the base model's type.

    Weights are read back and are bit for bit those of ``materialize``.

    Args:
        tasks: all if None.
        base: where the base model's tokenizer and processor lie, for tasks whose checkpoints have none; where the merge took it
            from if None.
        max_shard_size: of a file with weights, as ``5GB``.

    Raises:
        UnknownTaskError: for tasks that the model does not hold.
        DiDiError: for a tokenizer's file that goes while it is read.
        FileExistsError: if the directory exists and ``overwrite`` is false, or it is no export, or other weights lie in it.
    """
    asked, of_base = asked_tasks(model, tasks), companions_at(**source_of(model, base))
    others = with_own_vocabulary(model)
    parents = model.info.get("parents", {})
    notes: dict[str, list[str]] = {}
    with export_directory(directory, overwrite=overwrite) as (place, final):
        sizes = {}
        for task in asked:
            whole, home = model.materialize(task), place / folder(task)
            write_checkpoint(whole, home, max_shard_size=max_shard_size)
            own, other = companions_of(parents.get(task)), task in others
            note = copy_companions(home, of_base, own, own_vocabulary=other)
            check_equal(read_again(home, whole), whole, f"The checkpoint of {task}")
            sizes[task] = weight_bytes(home)
            if note:
                notes.setdefault(note, []).append(task)
        carried = dict.fromkeys(model.touched, Carried("whole"))
        tensors = dict.fromkeys(asked, carried)
        told = tuple(f"{some(of)}: {note}" for note, of in notes.items())
        report = ExportReport("plain", str(final), tensors, sizes, notes=told)
        return write_report(place, report)


def write_checkpoint(
    model: nn.Module, place: Path, *, max_shard_size: str = "5GB"
) -> None:
    """Write weights and configuration."""
    place.mkdir()
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(place, max_shard_size=max_shard_size)
    else:
        write_tensors(place, untied(model))


def untied(model: nn.Module) -> dict[str, Tensor]:
    """A state dict without the second names of tied tensors, for which safetensors has no place."""
    second = tied_names(model)
    return {n: v for n, v in model.state_dict().items() if n not in second}


def read_again(place: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the model's names, of a class that translates names or computes what it does not save (tables
    of positions) as it reads them."""
    found: dict[str, Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        found |= load_file(file)
    wanted = model.state_dict()
    whole = found.keys() <= wanted.keys() and not missing(found, wanted)
    if whole or not isinstance(model, PreTrainedModel):
        return found
    return type(model).from_pretrained(place).to(model.dtype).state_dict()
