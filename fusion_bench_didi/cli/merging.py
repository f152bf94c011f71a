"""``didi merge`` and ``didi settings``."""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from ..errors import CheckpointMismatchError, DiDiError, SettingsError, spelled
from ..files import as_text, from_home
from . import options

#: Loggers with levels of their own, which count for nothing what all others were told.
_LIGHTNING = ("lightning", "lightning.fabric", "lightning.pytorch")


@click.command(no_args_is_help=True)
@click.argument("base")
@click.argument("models", nargs=-1, required=True, metavar="[TASK=]MODEL...")
@options.out
@click.option("--method", default="didi", show_default=True, help="As after method= on the host's command line: didi/paper, didi/emr, didi/tsv_c, ...")  # fmt: skip
@click.option("--budget", type=float, default=None, help="What is stored beyond the base model, in units of one fine-tuned model; 1.4 if left out.")  # fmt: skip
@options.settings
@options.overwrite
@options.device_or_auto
@click.option("--devices", type=click.IntRange(1), default=None, help="Processes that share the matrices, one to a device; as many as torchrun started, or one, if left out.")  # fmt: skip
@click.option("--model-class", default=None, help="Class of transformers; the one that the models' config.json names if left out.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check all headers, print the plan, and read no weights.")  # fmt: skip
def merge(
    base: str,
    models: tuple[str, ...],
    out: str,
    method: str,
    budget: float | None,
    settings: tuple[str, ...],
    overwrite: bool,
    device: str,
    devices: int | None,
    model_class: str | None,
    dry_run: bool,
) -> None:
    """Merge fine-tuned models, or LoRA adapters, of one base model.

    BASE and every MODEL are directories or repositories of the hub. A task is called as its MODEL's directory unless
    TASK= says otherwise.

    \b
    Examples:
      didi merge openai/clip-vit-base-patch32 mnist=./a svhn=./b -o merged
      didi merge base a b c -o merged --budget 0.5 -s refine_sweeps=5
      didi merge base a b -o merged --method didi/emr
      didi merge base a b -o merged --dry-run
      didi merge base a b -o merged --devices 2

    All settings of a method: didi settings METHOD
    """
    from ..checkpoint.directory import check_target
    from ..models import DynamicModel
    from ..pools.merged_adapters import adapted

    given = options.values_of(settings)
    options.not_beside(given, "--out", "output_dir")
    options.not_beside(given, "--overwrite", "overwrite")
    for key, value in (("budget", budget), ("dry_run", dry_run or None)):
        if value is not None:
            options.not_beside(given, f"--{key.replace('_', '-')}", key)
            given[key] = value
    faults = options.Faults()
    with faults:
        if not dry_run:
            check_target(out, overwrite=overwrite)
    with faults:
        pool = pool_of(base, models, model_class)
    with faults:
        made = _method(method, given, out, overwrite)
    with faults:
        fabric, count = _fabric(device, devices)
    faults.check()
    if not dry_run:
        if count > 1 and not made.config.get("output_dir"):
            raise click.UsageError(
                f"{method} merges in one process, and there would be {count}: leave --devices out."
            )
        fabric.launch()
    made._fabric_instance = fabric
    start = time.perf_counter()
    heard = nullcontext() if made.config.get("dry_run") else options.host_unheard()
    with heard:
        model = made.run(adapted(pool))  # the host's methods merge whole models
    if model is None or not fabric.is_global_zero:
        return
    if not made.config.get("output_dir"):
        _save(model, out, method, overwrite=overwrite)
    seconds = time.perf_counter() - start
    told = str(model) if isinstance(model, DynamicModel) else type(model).__name__
    click.echo(f"{told}\n\nmerged in {seconds:.1f} s; written to {out}")


def _fabric(device: str, devices: int | None) -> tuple[Any, int]:
    """The host's engine, on the processes that ``torchrun`` started or on so many that it starts itself; how many there are."""
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    for name in _LIGHTNING:  # which say twice what processes there are
        logging.getLogger(name).setLevel(logging.getLogger().level)
    nodes = 1
    if TorchElasticEnvironment.detect():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
        if devices not in (None, here):
            raise click.BadParameter(
                f"torchrun started {here} processes here; give {here} or leave it out.",
                param_hint="--devices",
            )
        devices = here
    devices = devices or 1
    strategy = "ddp" if nodes * devices > 1 else "auto"
    fabric = lightning.Fabric(
        accelerator=device, strategy=strategy, devices=devices, num_nodes=nodes
    )
    return fabric, nodes * devices


def pool_of(base: str, models: tuple[str, ...], model_class: str | None) -> Any:
    """The host's pool of directories, every model in the type that its checkpoint says.

    Raises:
        click.BadParameter: for two tasks of one name, for a name that is no task's, and for a class that transformers lacks.
    """
    from fusion_bench.modelpool import BaseModelPool

    from ..pools.entries import BASE, PLACE, TARGET

    places = {BASE: as_text(base)}
    for model in models:
        task, equals, place = model.partition("=")
        if not equals:
            task, place = Path(model).name, model
        if BaseModelPool.is_special_model(task):
            raise click.BadParameter(
                f"names in underscores are no tasks, as {task!r}; give TASK={place}.",
                param_hint="models",
            )
        if task in places:
            raise click.BadParameter(
                f"two models are called {task!r}; give TASK=MODEL.", param_hint="models"
            )
        places[task] = as_text(place)
    if model_class is not None:
        _check_class(model_class)
    name = model_class or _class_of(places)
    load = {TARGET: f"transformers.{name}.from_pretrained", "dtype": "auto"}
    return BaseModelPool({n: {**load, PLACE: place} for n, place in places.items()})


def _check_class(name: str) -> None:
    """A class must be one of transformers.

    Raises:
        click.BadParameter: naming the nearest that is.
    """
    import transformers

    if hasattr(transformers, name):
        return
    close = get_close_matches(name, dir(transformers), n=1)
    hint = f"Did you mean {close[0]}?" if close else "Leave it out for the models' own."
    raise click.BadParameter(
        f"transformers has no class {name}. {hint}", param_hint="--model-class"
    )


def _class_of(places: dict[str, str]) -> str:
    """The class that all fine-tuned models name, else the base model's; where none does, what transformers takes for it."""
    from ..pools.entries import BASE
    from ..task_vectors.lora_config import CONFIG

    named, faults = {}, []
    for task, place in places.items():
        if (Path(place) / CONFIG).is_file():
            continue
        try:
            named[task] = _architecture(place)
        except DiDiError:
            raise  # says all of it
        except FileNotFoundError as error:
            faults.append(str(error))
        except (OSError, ValueError) as error:
            reason = options.first_line(error)[:200]
            faults.append(f"{place} is no model that transformers knows ({reason})")
    if faults:
        faults = [*dict.fromkeys(faults)]
        raise click.BadParameter("\n  ".join(faults), param_hint="models")
    base = named.pop(BASE, None)
    tuned = set(named.values())
    return (tuned.pop() if len(tuned) == 1 else base) or "AutoModel"


def _architecture(place: str) -> str | None:
    """The class that a model's configuration names, of a directory or of the hub.

    Raises:
        FileNotFoundError: if it is in neither.
        CheckpointMismatchError: if its file is broken, or what no class makes a configuration of.
        ModelPoolError: if it is a merged model.
        OSError, ValueError: if it is nothing that transformers reads.
    """
    from transformers import AutoConfig

    from ..pools.weight_files import WeightFiles
    from ..task_vectors.file_sources import read_settings
    from ..task_vectors.places import check_place, check_to_be_had

    check_place(place, owned=False)
    path = from_home(place)
    if local := path.exists():
        place = str(path)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{place} is no model: it holds no config.json.")
        read_settings(path / "config.json", path.name, "the configuration of a model")
        WeightFiles(path, path.name).check_unmerged()
        WeightFiles(path, path.name).check_counts()
    else:
        check_to_be_had(place)
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=local)
        return (config.architectures or [None])[0]
    except (OSError, ValueError):
        raise
    except Exception as error:  # of any type: what a class makes of a file
        raise CheckpointMismatchError(
            f"{Path(place, 'config.json')} is not the configuration of a model ({type(error).__name__}: {error}). Download or write "
            "it again."
        ) from error


def _method(name: str, given: dict[str, Any], out: str, overwrite: bool) -> Any:
    """A method from its YAML, writing to ``out`` while it merges if it can."""
    from fusion_bench.utils import instantiate
    from hydra.errors import ConfigCompositionException, MissingConfigException
    from omegaconf import OmegaConf

    from ..programs.checks import method_names
    from ..programs.entries import Entry, composed

    try:
        config = composed(Entry(name, name, name, "dynamic"))
    except (MissingConfigException, ConfigCompositionException):
        raise _no_method(name, method_names()) from None
    _check_keys(name, given, config)
    merged = OmegaConf.merge(config, given)
    if "output_dir" in config and not merged.get("dry_run"):
        merged["output_dir"], merged["overwrite"] = out, overwrite
    options.silence_host()
    return instantiate(merged)


def _check_keys(owner: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Settings must be among those that there are, on every level; an empty one is made to be filled."""
    from ..options import unknown_setting

    for key, value in given.items():
        if key not in known:
            raise unknown_setting(owner, key, known)
        inner = known[key]
        if isinstance(value, Mapping) and isinstance(inner, list):
            raise SettingsError(
                f"{owner}: {key} is a list, and has no {next(iter(value))}. Give all of it: {spelled(key, '[...]')}."
            )
        if isinstance(value, list) and isinstance(inner, Mapping):
            raise SettingsError(
                f"{owner}: {key} has settings of its own, and is no list. Give these: {spelled(f'{key}.KEY', 'VALUE')}."
            )
        if isinstance(value, Mapping) and isinstance(inner, Mapping) and inner:
            _check_keys(f"{owner}: {key}", value, inner)


def _methods() -> dict[str, Path]:
    """The methods of this package, by name: where each is explained."""
    place = Path(__file__).parents[1] / "config" / "method"
    return {
        str(file.relative_to(place).with_suffix("")): file
        for file in sorted(place.rglob("*.yaml"))
    }


def _no_method(name: str, known: Iterable[str]) -> click.UsageError:
    """The error for a method that there is not.

    Args:
        known: those that may have been meant, also by the last part of their names alone; the ones of this package are told if none was.
    """
    from ..options import nearest

    parts = {one.rpartition("/")[2]: one for one in known}
    close = get_close_matches(name.rpartition("/")[2].lower(), parts, n=1)
    hint = f"Did you mean {parts[close[0]]}?" if close else nearest(name, _methods())
    return click.UsageError(f"There is no method {name}. {hint}")


def _save(model: Any, out: str, method: str, *, overwrite: bool) -> None:
    """A model with experts by its own ``save_pretrained``, a static one as a plain checkpoint that says who wrote it."""
    from ..checkpoint.deltas import versions, write_manifest
    from ..checkpoint.directory import whole_directory
    from ..checkpoint.ours import PLAIN, held_by
    from ..models import DynamicModel

    if isinstance(model, DynamicModel):
        model.save_pretrained(out, overwrite=overwrite)
        return
    with whole_directory(out, overwrite=overwrite) as place:
        model.save_pretrained(place)
        files = sorted(path.name for path in held_by(place))
        told = {"method": method, "files": files, "versions": versions()}
        write_manifest(place / PLAIN, told)


@click.command()
@click.argument("method", required=False)
def settings(method: str | None) -> None:
    """Print every setting of a METHOD with what it does; without one, the names of the methods.

    These are the keys after method= on the host's command line, of -s KEY=VALUE here, and of the class in Python.

    \b
    Examples:
      didi settings
      didi settings didi
      didi settings didi/tvq
    """
    names = _methods()
    if method is None:
        click.echo("\n".join(names))
    elif method in names:
        click.echo(names[method].read_text().rstrip())
    else:
        raise _no_method(method, names)
