"""What a user gets: sdist and wheel are complete, and the command finds our configuration from anywhere.

The wheel goes into a fresh virtual environment that borrows every other distribution from the running
interpreter, so nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import REPOSITORY
from omegaconf import DictConfig, OmegaConf

CONFIG = "fusion_bench_didi/config/method/didi.yaml"
PLUGIN = "hydra_plugins/fusion_bench_didi_searchpath/__init__.py"


def _run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """A virtual environment that holds our wheel."""

    python: Path
    site_packages: Path

    def fusion_bench(self, *arguments: str, cwd: Path) -> str:
        """Runs the real ``fusion_bench`` command.

        Its script lies in the environment that the host was installed into; the fresh interpreter runs that very
        file. ``python -m fusion_bench.scripts.cli`` would put the current directory on the import path, and our
        sources with it.
        """
        script = Path(sysconfig.get_path("scripts")) / "fusion_bench"
        return _run(self.python, script, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source") / "repository"
    # A copy: building writes into the tree, and an old build folder would leak into the wheel.
    unwanted = (".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    ignore = shutil.ignore_patterns(*unwanted)
    shutil.copytree(REPOSITORY, source, symlinks=True, ignore=ignore)
    target = source.parent / "dist"
    _run(sys.executable, "-m", "build", "-n", "-o", target, source, cwd=source.parent)
    (sdist,) = target.glob("*.tar.gz")
    (wheel,) = target.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Installed:
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    _run(*pip, "install", "--no-deps", "--no-index", archives[1], cwd=home)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(_run(python, "-I", "-c", purelib, cwd=home).strip())
    # Only now, or pip would take our editable install there for an earlier version.
    # Plain paths: the .pth files of those directories, editable installs among them, are not read.
    borrowed = {sysconfig.get_path(kind): None for kind in ("purelib", "platlib")}
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return Installed(python, site_packages)


def test_sdist_holds_configuration_as_real_files(archives):
    with tarfile.open(archives[0]) as sdist:
        # The first part of each name is the distribution's own folder.
        members = {m.name.partition("/")[2]: m for m in sdist.getmembers()}
    assert members[CONFIG].isreg()
    assert members[PLUGIN].isreg()
    assert not [name for name, member in members.items() if member.issym()]


def test_wheel_is_complete(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    assert {CONFIG, PLUGIN} <= names
    # It would hide the plugins of every other distribution.
    assert "hydra_plugins/__init__.py" not in names
    ours = REPOSITORY / "config"
    expected = {
        f"fusion_bench_didi/config/{file.relative_to(ours)}"
        for file in ours.rglob("*.yaml")
    }
    assert {name for name in names if name.endswith(".yaml")} == expected
    top_level = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"fusion_bench_didi", "hydra_plugins"}


def test_package_is_imported_from_the_fresh_environment(installed, tmp_path):
    code = "import fusion_bench_didi; print(fusion_bench_didi.__file__)"
    file = _run(installed.python, "-I", "-c", code, cwd=tmp_path).strip()
    assert Path(file).is_relative_to(installed.site_packages)


#: What is asked of the command, and of the start of Hydra that it makes.
ASKED = ["method=didi", "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8"]
COMPOSES = f"""
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from omegaconf import OmegaConf
print(OmegaConf.to_yaml(initialize_hydra_config("fabric_model_fusion", {ASKED})))
"""


@pytest.mark.parametrize("place", ["repository", "elsewhere", "beside_own_config"])
def test_command_finds_our_configuration_and_the_hosts(installed, place, tmp_path):
    """The command itself in the folder that is the worst, which has another configuration."""
    cwd = REPOSITORY if place == "repository" else tmp_path
    if place == "beside_own_config":
        (cwd / "config").mkdir()
        (cwd / "config" / "unrelated.yaml").write_text("answer: 42\n")
        printed = installed.fusion_bench("--cfg", "job", *ASKED, cwd=cwd)
    else:
        printed = _run(installed.python, "-I", "-c", COMPOSES, cwd=cwd)
    config = OmegaConf.create(printed)
    assert isinstance(config, DictConfig)
    assert config.method._target_ == "fusion_bench_didi.method.DiDiMerging"
    assert config.modelpool._target_ == "fusion_bench.modelpool.CLIPVisionModelPool"
    assert "sun397" in config.modelpool.models
