"""The group of all commands, and what becomes of errors: one line, and exit code 1."""

import logging
import os
import warnings

import click

from ..errors import DiDiError, spelled_as
from . import comparing, editing, exporting, merging, options, reading, serving

_HELP = """
Merge fine-tuned models of one base model into one model with an expert per task, within a storage budget.

\b
Examples:
  didi merge base/ mnist=a/ svhn=b/ -o merged       two fine-tuned models and their base, within 1.4 of one model
  didi merge base/ a/ b/ -o merged --budget 0.5     smaller; tasks are called as the directories
  didi inspect merged                               what is in it
  didi verify merged                                whether the files are whole and the base model is the right one
  didi export merged adapters --form peft           one LoRA adapter per task
  didi serve merged                                 answer HTTP requests, a model name per task
  didi settings didi                                every setting of a method, explained

The same from Python: fusion_bench_didi.DiDiMerging(budget=0.5).run({"_pretrained_": base, "mnist": a, "svhn": b}) on models, and
fusion_bench_didi.load("merged"); with task pools: fusion_bench method=didi ...
"""


@click.group(
    help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}  # fmt: skip
)
@click.version_option(package_name="fusion-bench-didi")
@click.option("-v", "--verbose", is_flag=True, help="Show what is logged.")
def didi(verbose: bool) -> None:
    context = click.get_current_context()
    command = didi.commands.get(context.invoked_subcommand or "")
    context.with_resource(spelled_as(options.spelling(command)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.INFO if verbose else logging.ERROR)
    logging.getLogger("fusion_bench_didi").setLevel(
        logging.INFO if verbose else logging.WARNING
    )
    if not verbose:
        warnings.simplefilter("ignore")


for module in (comparing, editing, exporting, merging, reading, serving):
    for command in vars(module).values():
        if isinstance(command, click.Command):
            didi.add_command(command)


def main() -> None:
    """Run the command; what a user can mend is said in one line."""
    try:
        didi(standalone_mode=False)
    except click.exceptions.Exit as ended:
        raise SystemExit(ended.exit_code) from None
    except click.Abort:
        raise SystemExit("stopped") from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (DiDiError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"Error: {error}") from None
