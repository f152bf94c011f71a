"""Every workaround works, is light, and is still needed: a test here fails when one can go."""

import importlib
import sys
import types

import pytest
from helpers import TRANSFORMERS

from fusion_bench_didi.compat.host import complete
from fusion_bench_didi.compat.old_names import MOVED, RENAMED

# What the host cannot import without typing.override, and we need.
HOST_OPENCLIP = "import fusion_bench.modelpool.openclip_vision, fusion_bench.taskpool.openclip_vision"
# Ends with 3 on the one error that the workaround is for, with 1 on any other.
EXPECT_IMPORT_ERROR = """
try:
    {code}
except ImportError as error:
    raise SystemExit(3 if error.name == {module!r} else repr(error))
"""


def expect_import_error(code: str, module: str) -> str:
    """A program that ends with status 3 if ``code`` misses a name of ``module``."""
    return EXPECT_IMPORT_ERROR.format(code=code, module=module)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="typing has override")
def test_typing_override_is_still_needed(run_python):
    done = run_python(expect_import_error(HOST_OPENCLIP, "typing"))
    assert done.returncode == 3, (
        "The host's OpenCLIP pools import without our help (or fail for another reason): "
        f"remove the workaround fusion_bench_didi.compat for typing.override. {done.stderr}"
    )


def test_import_of_the_package_applies_the_workaround(run_python):
    done = run_python("import fusion_bench_didi; from typing import override")
    assert done.returncode == 0, done.stderr


def test_start_of_hydra_applies_the_workaround(run_python):
    """The command builds the model pool before it has any reason to import our method."""
    done = run_python(
        "from fusion_bench.utils.hydra_utils import initialize_hydra_config as start\n"
        "start('fabric_model_fusion')\nfrom typing import override"
    )
    assert done.returncode == 0, done.stderr


def test_openclip_pools_import_with_the_workaround():
    exec(HOST_OPENCLIP, {})


def test_apply_leaves_an_existing_override_alone(monkeypatch):
    import typing

    from fusion_bench_didi import compat

    existing = object()
    monkeypatch.setattr(typing, "override", existing, raising=False)
    compat.apply()
    assert typing.override is existing


def test_start_of_hydra_stays_light(run_python):
    """Our plugin runs in every Hydra program of the environment."""
    done = run_python(
        "import sys, hydra_plugins.fusion_bench_didi_searchpath\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)\n"
        "raise SystemExit(f'imported {heavy}' if heavy else 0)"
    )
    assert done.returncode == 0, done.stderr


GONE_NAME = "transformers.models.clip.modeling_clip"
HOST_CLIP = "import fusion_bench.taskpool.clip_vision"


@pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 has the name")
def test_name_that_transformers_5_lacks_is_still_needed(run_python):
    """The host alone: our finder is put away before it looks."""
    done = run_python(expect_import_error(HOST_CLIP, GONE_NAME))
    assert done.returncode == 3, (
        "The host's CLIP task pools import under transformers 5 without our help (or fail for another reason): remove "
        f"fusion_bench_didi.compat.host.GONE. {done.stderr}"
    )


@pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 has the name")
@pytest.mark.parametrize("first", ["fusion_bench_didi", GONE_NAME])
def test_import_of_the_package_puts_the_name_back(run_python, first):
    """Whichever is imported first."""
    done = run_python(f"import {first}, fusion_bench_didi; {HOST_CLIP}")
    assert done.returncode == 0, done.stderr


def test_import_of_the_package_is_light_and_warns_of_nothing(run_python):
    done = run_python(
        "import sys, warnings\n"
        "warnings.simplefilter('error', DeprecationWarning)\n"
        "import fusion_bench_didi\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr


def test_names_are_put_back_only_where_they_are_gone():
    """As under transformers 5: a name that is not there, and left alone where it is."""
    clip = types.ModuleType(GONE_NAME)
    clip.CLIPVisionModel = object()
    complete(clip)
    assert clip.CLIPVisionTransformer is clip.CLIPVisionModel
    clip.CLIPVisionTransformer = None
    complete(clip)
    assert clip.CLIPVisionTransformer is None


@pytest.mark.parametrize("old", MOVED)
def test_old_modules_are_the_new_ones(old, monkeypatch):
    """Under the old name every name of the new modules, and one warning that says where they are."""
    name = f"fusion_bench_didi.{old}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{name} is now") as told:
        found = importlib.import_module(name)
    homes = [f"fusion_bench_didi.{home}" for home in MOVED[old].split()]
    assert all(home in str(told[-1].message) for home in homes)
    assert told[-1].filename == importlib.__file__, "the importing line is named"
    modules = list(map(importlib.import_module, homes))
    for module in modules:
        for attribute in vars(module):
            assert attribute.startswith("__") or hasattr(found, attribute)
    first = [n for n in vars(modules[0]) if not n.startswith("__")]
    assert all(getattr(found, n) is getattr(modules[0], n) for n in first)
    with pytest.raises(AttributeError, match=name):
        found.nothing_of_that_name
    importlib.import_module(name)
    assert len([w for w in told if str(w.message).startswith(f"{name} is")]) == 1


@pytest.mark.parametrize("old, name", RENAMED)
@pytest.mark.filterwarnings("ignore:fusion_bench_didi:DeprecationWarning")
def test_old_names_are_the_new_ones(old, name):
    module = importlib.import_module(f"fusion_bench_didi.{old}")
    assert getattr(module, name) is getattr(module, RENAMED[old, name])


def test_old_modules_are_not_found_where_others_look():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fusion_bench_didi.no_such_module")


def test_loading_an_artifact_by_its_old_name(monkeypatch):
    """What a script of an earlier release says."""
    monkeypatch.delitem(sys.modules, "fusion_bench_didi.artefact", raising=False)
    with pytest.warns(DeprecationWarning, match="load_artefact: load_artifact"):
        from fusion_bench_didi.artefact import load_artefact
    from fusion_bench_didi.artifacts import load_artifact

    assert load_artefact is load_artifact
