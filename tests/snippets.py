"""Blocks of code in pages of Markdown, and what a line of a shell asks for, checked without running it."""

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click
from fusion_bench.utils.hydra_utils import get_default_config_path
from helpers import REPOSITORY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusion_bench_didi.cli import didi
from fusion_bench_didi.programs.entries import read_entries
from fusion_bench_didi.service.messages import ASKED

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: A block without a language is a shell's where it starts so.
_PROGRAMS = ("didi ", "fusion_bench ", "python -m ")


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Commands, continued lines joined, without comments."""
        whole = re.sub(r"\\\n\s*", "", self.text)
        found = (shlex.join(shlex.split(line, comments=True)) for line in whole.splitlines())  # fmt: skip
        return [line for line in found if line]


def blocks(page: Path) -> Iterator[Block]:
    """Of Python and of shells."""
    for language, text in _BLOCK.findall(page.read_text()):
        if not language and text.startswith(_PROGRAMS):
            language = "bash"
        if language in ("python", "bash"):
            yield Block(page, language, text)


@functools.cache
def fault(line: str) -> str | None:
    """Why a command would not start, None if it would.

    Raises:
        KeyError: for a program that is not known here.
    """
    program, *rest = shlex.split(line)
    if (REPOSITORY / program).is_file():
        return None
    return {
        "didi": _didi,
        "fusion_bench": _host,
        "python": _module,
        "torchrun": _launched,
        "curl": _request,
        "make": _target,
        "pip": _requirement,
        "sbatch": _script,
    }[program](rest)


def _didi(words: list[str]) -> str | None:
    """By its own parser: every option there is, every value of its type."""
    command = didi.commands.get(words[0])
    if command is None:
        return f"no command {words[0]}"
    try:
        asked = command.make_context(words[0], list(words[1:])).params
        if words[0] == "compare":
            names = {k: asked[k].split(",") for k in ("only", "skip") if asked[k]}
            return _host(["--config-name", "didi_compare", *asked["overrides"]], names)
    except click.exceptions.Exit:  # --help
        return None
    except click.ClickException as error:
        return error.format_message()
    return None


def _host(words: list[str], names: dict[str, list[str]] | None = None) -> str | None:
    """By composing the configuration that it would run; a comparison's ``only`` and ``skip`` must be entries."""
    name, overrides, words = "fabric_model_fusion", [], [*words]
    while words:
        word = words.pop(0)
        if word == "--config-name":
            name = words.pop(0)
        elif word == "--config-dir":
            overrides.append(f"hydra.searchpath=[file://{REPOSITORY / words.pop(0)}]")
        else:
            overrides.append(word)
    if name == "didi_compare":
        overrides.append("path.log_dir=anywhere")  # else Hydra's, which does not run
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(get_default_config_path(), version_base=None):
            config = compose(name, overrides=overrides)
        if name == "didi_compare":
            chosen = names or {key: config[key] for key in ("only", "skip")}
            read_entries(config.entries, **chosen)
    except Exception as error:  # of Hydra's parser, loader or OmegaConf
        return f"{type(error).__name__}: {error}"
    return None


def _module(words: list[str]) -> str | None:
    """The module is there, and its source names every option."""
    if words[0] != "-m":
        return None if (REPOSITORY / words[0]).is_file() else f"no file {words[0]}"
    _, name, *arguments = words
    spec = importlib.util.find_spec(name)
    if spec is None:
        return f"no module {name}"
    source = Path(spec.origin).read_text()
    options = [a for a in arguments if a.startswith("--")]
    missing = [a for a in options if f'"{a}"' not in source]
    return f"{name} has no {missing}" if missing else None


def _launched(words: list[str]) -> str | None:
    at = words.index("-m")
    name, rest = words[at + 1], words[at + 2 :]
    if name == "fusion_bench.scripts.cli" and "fabric.devices=2" not in rest:
        return "processes that do not know of one another"
    known = {"fusion_bench.scripts.cli": _host, "fusion_bench_didi": _didi}
    return known[name](rest) if name in known else f"no program of ours: {name}"


def _target(words: list[str]) -> str | None:
    makefile = (REPOSITORY / "Makefile").read_text()
    missing = [w for w in words if not re.search(rf"^{w}:", makefile, re.MULTILINE)]
    return f"no target {missing}" if missing else None


def _request(words: list[str]) -> str | None:
    """To a path of the service, of a body that it takes."""
    path = urlsplit(words[0]).path
    if path not in ASKED:
        return f"no path {path}"
    try:
        ASKED[path].model_validate_json(words[words.index("-d") + 1])
    except ValueError as error:
        return str(error)
    return None


def _requirement(words: list[str]) -> str | None:
    """Extras of ours are in setup.cfg."""
    known = re.findall(r"^([\w-]+) =", (REPOSITORY / "setup.cfg").read_text(), re.M)
    asked = re.findall(r"fusion-bench-didi\[([\w,-]+)\]", " ".join(words))
    missing = [e for group in asked for e in group.split(",") if e not in known]
    return f"no extra {missing}" if missing else None


def _script(words: list[str]) -> str | None:
    """A script that hands its words to the host, after some of its own."""
    if not (REPOSITORY / words[0]).is_file():
        return f"no file {words[0]}"
    script = (REPOSITORY / words[0]).read_text()
    own = re.findall(r"^ +(\+*\w[\w.]*=\S+) \\$", script, re.MULTILINE)
    return _host([*(re.sub(r'"\$\w+"', "2", word) for word in own), *words[1:]])
