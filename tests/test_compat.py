"""Every workaround works, is light, and is still needed: a test here fails when one can go."""

import sys
from importlib.metadata import version

import pytest

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


def test_start_of_hydra_lets_the_openclip_pools_import(run_python):
    """The command builds the model pool before it has any reason to import our method."""
    done = run_python(
        "from fusion_bench.utils.hydra_utils import initialize_hydra_config as start\n"
        f"start('fabric_model_fusion')\n{HOST_OPENCLIP}"
    )
    assert done.returncode == 0, done.stderr


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


@pytest.mark.skipif(
    int(version("transformers").split(".")[0]) >= 5, reason="runs with transformers 5"
)
def test_pin_of_transformers_is_still_needed(run_python):
    """setup.cfg allows no transformers 5, which has no ``CLIPVisionTransformer``."""
    module = "transformers.models.clip.modeling_clip"
    without = f"import {module} as clip; del clip.CLIPVisionTransformer\n"
    host = "import fusion_bench.taskpool.clip_vision"
    done = run_python(without + expect_import_error(host, module))
    assert done.returncode == 3, (
        "The host's CLIP task pool imports without CLIPVisionTransformer (or fails for "
        f"another reason): try setup.cfg without `transformers<5`. {done.stderr}"
    )
