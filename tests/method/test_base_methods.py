"""Methods that run another: its class is looked at before the work, and what the owner was given holds for it too."""

import pytest
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import BaseModelPool
from helpers import QUICK, family
from lightning.fabric import Fabric
from torch import nn

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method import CATMerging, DiDiMerging, EMRMerging, RoutedMethod
from fusion_bench_didi.method.se_merging import SEMerging


class Untouched(BaseModelPool):
    """Refuses to load anything."""

    def load_model(self, *args, **kwargs):
        raise AssertionError("a model was loaded")


@pytest.fixture
def models():
    return family(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))


AVERAGE = {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}
EMR = {"_target_": "fusion_bench_didi.method.EMRMerging"}
WEMOE = {"_target_": "fusion_bench_didi.method.wemoe.WEMoEMerging"}


@pytest.mark.parametrize(
    "method, base, message",
    [
        (RoutedMethod, None, "base_method is missing"),
        (RoutedMethod, AVERAGE, "is SimpleAverageAlgorithm, whose result holds no"),
        (RoutedMethod, CATMerging(), "is CATMerging, whose result holds no experts"),
        (RoutedMethod, WEMOE, "is WEMoEMerging, whose result holds no"),
        (RoutedMethod, DiDiMerging(dry_run=True), "dry_run leaves no model for Routed"),
        (RoutedMethod, "didi/s", "is 'didi/s', expected a method's configuration"),
        (RoutedMethod, {"budget": 1}, "expected a method's configuration"),
        (SEMerging, "simple_average", "expected a method's configuration"),
        (SEMerging, None, "base_method is missing"),
        (SEMerging, EMR, "is EMRMerging, whose result holds experts"),
        (SEMerging, RoutedMethod(EMRMerging()), "is RoutedMethod, whose result holds"),
    ],
)
def test_a_wrong_base_method_is_named_before_the_work(models, method, base, message):
    with pytest.raises(SettingsError, match=message):
        method(base_method=base).run(Untouched(models))


def test_experts_that_would_only_be_told_of(models):
    method = SEMerging(AVERAGE, experts="didi", didi={"dry_run": True})
    with pytest.raises(SettingsError, match="dry_run leaves no model for SE-Merging"):
        method.run(Untouched(models))


class Unknown(SimpleAverageAlgorithm):
    """Of another package, so that only its result tells."""


class Experts(EMRMerging):
    """As above."""

    dynamic = False


@pytest.mark.parametrize(
    "method, base, message",
    [
        (RoutedMethod, Unknown(), "gives a Sequential, which holds no experts"),
        (SEMerging, Experts(), "gives a DynamicModel; SE-Merging starts from one"),
    ],
)
def test_a_result_that_is_of_another_kind(models, method, base, message):
    with pytest.raises(SettingsError, match=message):
        method(base_method=base).run(models)


@pytest.mark.parametrize("own", [False, True])
def test_a_base_method_runs_on_the_device_of_its_owner(models, monkeypatch, own):
    """Unless it has one of its own."""
    asked, other = (Fabric(accelerator="cpu", devices=1) for _ in range(2))
    used, run = [], DiDiMerging.run
    monkeypatch.setattr(
        DiDiMerging,
        "run",
        lambda self, pool: used.append(self.fabric) or run(self, pool),
    )
    base = DiDiMerging(**QUICK)
    if own:
        base.fabric = other
    method = RoutedMethod(base_method=base, router="oracle")
    method.fabric = asked
    method.run(models)
    assert used == [other if own else asked]
