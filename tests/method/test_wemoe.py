"""WEMoE on the demo suite, in a few steps: the host's training, and the authors'."""

import math
from types import SimpleNamespace

import pytest
import torch
from fusion_bench.models.we_moe import WeightEnsemblingMoE
from helpers import REPOSITORY, same_bits
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import nn

from fusion_bench_didi.demo.pools import (
    DemoCLIPVisionModelPool,
    DemoCLIPVisionModelTaskPool,
)
from fusion_bench_didi.errors import UnknownTaskError
from fusion_bench_didi.method.wemoe import WEMoEMerging

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:CLIPDataset:DeprecationWarning"
)
FEW = {
    "init_lambda": 0.3,
    "router_hidden_layers": 2,
    "max_steps": 4,
    "batch_size": 2,
    "use_grad_accumulate": True,
    "num_workers": 0,
}


class Renamed(DemoCLIPVisionModelPool):
    """Models under other names than their tasks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        models = dict(self._models)
        self._models = {n if n[0] == "_" else f"{n}-v1": m for n, m in models.items()}


def trained(demo_suite: dict, monkeypatch, pool=DemoCLIPVisionModelPool, **settings):
    """The model, and learning rate and kind of gates of every step."""
    seen: list[tuple[float, bool]] = []
    method = WEMoEMerging(**{**FEW, **settings})
    taskpool = DemoCLIPVisionModelTaskPool(**demo_suite)
    taskpool.setup()
    method._program = SimpleNamespace(taskpool=taskpool)
    stock = torch.optim.Adam.step

    def step(optimizer, *args, **kwargs):
        gates = {m.batch_reduce for m in mixtures(method.moe)}
        seen.append((optimizer.param_groups[0]["lr"], *gates))
        return stock(optimizer, *args, **kwargs)

    adapt = WEMoEMerging.test_time_adaptation

    def watched(self, module):
        self.moe = module
        return adapt(self, module)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(WEMoEMerging, "test_time_adaptation", watched)
    torch.manual_seed(0)
    return method.run(pool(**demo_suite)), seen


def mixtures(model) -> list[WeightEnsemblingMoE]:
    return [m for m in model.modules() if isinstance(m, WeightEnsemblingMoE)]


def test_the_hosts_training(demo_suite, monkeypatch):
    model, seen = trained(demo_suite, monkeypatch)
    assert seen == [(1e-4, True)] * 4
    assert not any(m.batch_reduce for m in mixtures(model)), "routes by image at test"
    assert not any(p.requires_grad for p in model.parameters())


def test_the_authors_training(demo_suite, monkeypatch):
    """A learning rate of 1e-3 that falls by a cosine, and a gate per image."""
    _, seen = trained(demo_suite, monkeypatch, training="published")
    expected = [5e-4 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [lr for lr, _ in seen] == pytest.approx(expected)
    assert {per_batch for _, per_batch in seen} == {False}


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"lr": 0.01}, (0.01, False)),
        ({"batch_reduce": True}, (1e-3, True)),
        ({"lr_schedule": "constant", "max_steps": 2}, (1e-3, False)),
    ],
)
def test_single_settings_come_first(demo_suite, monkeypatch, changed, expected):
    _, seen = trained(demo_suite, monkeypatch, training="published", **changed)
    assert seen[0] == pytest.approx(expected)
    assert (seen[-1][0] == seen[0][0]) == ("lr_schedule" in changed)


def test_tasks_at_once_or_one_after_the_other(demo_suite, monkeypatch):
    """Gradients add up to the same; memory is the only difference."""
    routers = []
    for accumulate in (True, False):
        with monkeypatch.context() as patch:
            model, _ = trained(demo_suite, patch, use_grad_accumulate=accumulate)
        gates = [m.gate.state_dict() for m in mixtures(model)]
        routers.append(torch.cat([v.flatten() for g in gates for v in g.values()]))
    torch.testing.assert_close(*routers, rtol=1e-4, atol=1e-6)


def test_training_moves_the_routers(demo_suite, monkeypatch):
    still, _ = trained(demo_suite, monkeypatch, max_steps=0, batch_size=16)
    moved, _ = trained(demo_suite, monkeypatch, training="published")
    pairs = zip(still.named_parameters(), moved.named_parameters())
    changed = {name for (name, a), (_, b) in pairs if not torch.equal(a, b)}
    assert changed and all(".gate." in name for name in changed)


def test_other_names_of_tasks(demo_suite, monkeypatch):
    """Test images and class names are looked up under the task pool's names, by the aliases."""
    names = DemoCLIPVisionModelPool(**demo_suite).model_names
    aliases = {name: f"{name}-v1" for name in names}
    model, _ = trained(demo_suite, monkeypatch, pool=Renamed, task_aliases=aliases)
    plain, _ = trained(demo_suite, monkeypatch)
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="none for|any for"):
        trained(demo_suite, monkeypatch, pool=Renamed)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("wrapped", [dict, nn.ModuleDict])
def test_models_in_memory_stay_as_they_were(demo_suite, monkeypatch, frozen, wrapped):
    """The host subtracts the base model in place, and deletes the parameters of experts of a frozen one."""

    class Loaded(DemoCLIPVisionModelPool):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            models = {name: self.load_model(name) for name in self._models}
            models["_pretrained_"].requires_grad_(not frozen)
            self._models = wrapped(models)
            self._test_datasets = datasets
            pools.append(self)

    pools, datasets = [], dict(DemoCLIPVisionModelPool(**demo_suite)._test_datasets)
    model, _ = trained(demo_suite, monkeypatch, pool=Loaded, max_steps=0, batch_size=16)
    files, (used,) = DemoCLIPVisionModelPool(**demo_suite), pools
    for name in files.all_model_names:
        found, expected = used._models[name], files.load_model(name)
        assert found.state_dict().keys() == expected.state_dict().keys()
        for a, b in zip(found.parameters(), expected.parameters()):
            assert a.equal(b) and a.requires_grad == (name[0] != "_" or not frozen)
    assert used._test_datasets is datasets
    plain, _ = trained(demo_suite, monkeypatch, max_steps=0, batch_size=16)
    for block, other in zip(mixtures(model), mixtures(plain)):
        assert same_bits(block.task_vectors.state_dict(), other.task_vectors.state_dict())  # fmt: skip


def test_training_is_on_the_device_that_was_asked_for(demo_suite, monkeypatch):
    """The host's constructor makes a Fabric of its own where there is CUDA."""
    asked, own = (Fabric(accelerator="cpu", devices=1) for _ in range(2))
    monkeypatch.setattr(WEMoEMerging, "_fabric", own)
    monkeypatch.setattr(WEMoEMerging, "_fabric_instance", asked)
    used = []
    monkeypatch.setattr(
        Fabric, "setup", lambda self, *modules: used.append(self) or modules
    )
    trained(demo_suite, monkeypatch, max_steps=0, batch_size=16)
    assert used == [asked]


def test_an_alias_of_no_model(demo_suite, monkeypatch):
    with pytest.raises(UnknownTaskError, match="task_aliases=.*no model of the pool"):
        trained(demo_suite, monkeypatch, task_aliases={"mnist": "nothing"})


@pytest.mark.parametrize(
    "settings, message",
    [({"training": "mine"}, "training='mine'"), ({"lr_schedule": "step"}, "'step'")],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WEMoEMerging(**FEW, **settings)


def test_yaml_gives_the_hosts_training():
    file = REPOSITORY / "config/method/didi/wemoe.yaml"
    config = OmegaConf.to_container(OmegaConf.load(file))
    config.pop("_target_")
    method = WEMoEMerging(**config)
    assert (method.config.lr, method.config.batch_reduce) == (1e-4, True)
    assert method.config.lr_schedule == "constant"
