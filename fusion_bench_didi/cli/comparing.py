"""``didi compare`` and ``didi report``."""

import os

import click

from ..files import from_home
from . import options

#: Overrides that an option of ``didi compare`` stands for.
_STANDS_FOR = {
    "out": ("path.log_dir",),
    "suite": ("modelpool", "taskpool"),
    "only": ("only",),
    "skip": ("skip",),
    "tasks": ("modelpool.tasks", "taskpool.tasks"),
    "seed": ("seed",),
    "no_report": ("report",),
}


@click.command()
@click.option("-o", "--out", required=True, help="Directory to write, or of a run to go on with.")  # fmt: skip
@click.option("--suite", default=None, help="Folder of CLIP towers and images; the demo, which is made on the spot, if left out.")  # fmt: skip
@click.option("--only", default="", help="Names of methods, with commas between; all if left out.")  # fmt: skip
@click.option("--skip", default="", help="Names of methods that are left out.")
@click.option("--tasks", default="", help="Some of the tasks, with commas between; all if left out.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of whatever methods draw.")
@click.option("--no-report", is_flag=True, help="Only the table, no plots and page.")
@click.argument("overrides", nargs=-1)
def compare(
    out: str,
    suite: str | None,
    only: str,
    skip: str,
    tasks: str,
    seed: int,
    no_report: bool,
    overrides: tuple[str, ...],
) -> None:
    """Run many methods on one suite, and print one table of accuracy and storage.

    A run that was stopped goes on where it was; restart=true forgets the rows that lie there. OVERRIDES are those of
    fusion_bench --config-name didi_compare, which is the same: modelpool=... taskpool=...

    \b
    Examples:
      didi compare -o outputs/demo --only pretrained,individuals,didi_140,emr
      didi compare -o outputs/mine --suite ./suite
      didi compare -o outputs/demo --tasks digits,signs restart=true
    """
    from fusion_bench.utils import instantiate
    from fusion_bench.utils.hydra_utils import initialize_hydra_config
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from ..programs.entries import searched

    keys = [one.partition("=")[0].lstrip("+~") for one in overrides]
    for option, stands_for in _STANDS_FOR.items():
        if options.given(option):
            called = f"--{option.replace('_', '-')}"
            options.not_beside(keys, called, *stands_for)
    here = {
        "path.log_dir": str(from_home(out)),
        "path.work_dir": os.getcwd(),
        "seed": seed,
    }
    try:
        config = initialize_hydra_config(
            "didi_compare", list(overrides), return_hydra_config=True
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise _not_composed(error) from None
    with open_dict(config):
        places = config.pop("hydra").searchpath
        for key in here.keys() - set(keys):
            OmegaConf.update(config, key, here[key])
        if only:
            config.only = _names(only)
        if skip:
            config.skip = _names(skip)
        if no_report:
            config.report = False
        if suite is not None:
            home = "fusion_bench_didi.demo.folder_pools"
            for pool, cls in (
                ("modelpool", f"{home}.FolderCLIPVisionModelPool"),
                ("taskpool", f"{home}.FolderCLIPVisionModelTaskPool"),
            ):
                config[pool] = {"_target_": cls, "_recursive_": False, "root": suite}
        for pool in ("modelpool", "taskpool") if tasks else ():
            config[pool].tasks = _names(tasks)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise _not_composed(error) from None
    options.silence_host()
    with searched(places):
        instantiate(config).run()


def _not_composed(error: Exception) -> click.BadParameter:
    return click.BadParameter(
        f"{options.first_line(error)}. They are KEY=VALUE, as of fusion_bench --config-name didi_compare.",
        param_hint="overrides",
    )


@click.command(no_args_is_help=True)
@click.argument("directories", nargs=-1, required=True)
@click.option("-o", "--out", default=None, help="Directory to write to, of several: means over them and ranges, for comparisons that differ in their seeds.")  # fmt: skip
def report(directories: tuple[str, ...], out: str | None) -> None:
    """Make tables, plots and page of a comparison anew from its comparison.json, and print the table.

    \b
    Examples:
      didi report outputs/demo
      didi report outputs/seed0 outputs/seed1 outputs/seed2 -o outputs/seeds
    """
    if (len(directories) > 1) != (out is not None):
        raise click.UsageError("--out is for several directories, and they need it.")
    from ..checkpoint.directory import write_json
    from ..programs.rows import SETTINGS
    from ..report import Comparison, whereabouts, write_report
    from ..report.seeds import over_seeds
    from ..report.terminal import print_table

    places = [from_home(d) for d in directories]
    found = [Comparison.read(d / "comparison.json") for d in places]
    directory = from_home(out or places[0])
    if out is not None:
        given = any(directory.resolve() == d.resolve() for d in places)
        if given or (directory / SETTINGS).exists():
            raise click.UsageError(
                f"{out} holds a comparison that was run, which means would replace. Give another --out."
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "comparison.json", over_seeds(found))
    comparison = Comparison.read(directory / "comparison.json")
    files = write_report(directory)
    print_table(comparison.data)
    click.echo(whereabouts(files))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
