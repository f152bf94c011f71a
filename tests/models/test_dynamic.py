"""The merged model: exact switching (law 6), the host's interface, plain models of one task, the account."""

import copy

import pytest
import torch
from fusion_bench.models.modulator import ModulatedModel, TaskModulator
from helpers import BASE, TOWER, OpenClipLike, didi, family, floats, same_bits
from torch import nn
from transformers import CLIPVisionModel

from fusion_bench_didi.deltas.plain import DenseDelta, LowRankDelta
from fusion_bench_didi.errors import DiDiError, SettingsError, UnknownTaskError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.models.experts import NamedModules, TaskExpert
from fusion_bench_didi.serving.banks import Serving

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_clip):
    return didi(tiny_clip.pool_models(), budget=0.9)


def test_thousand_switches_change_no_bit(model):
    # bfloat16 is where adding and subtracting drifts most
    model = model.bfloat16()
    base = floats(model.backbone)
    first = {}
    for task in model.tasks:
        model.set_task(task)
        first[task] = floats(model.backbone)
    generator = torch.Generator().manual_seed(0)
    for pick in torch.randint(len(model.tasks), (1000,), generator=generator):
        model.set_task(model.tasks[pick])
    for task in model.tasks:
        model.set_task(task)
        assert same_bits(first[task], floats(model.backbone))
    assert not same_bits(first["mnist"], first["svhn"])
    model.unset_task()
    assert same_bits(base, floats(model.backbone))


def test_is_the_hosts_modulated_model(model):
    assert isinstance(model, ModulatedModel)
    assert all(isinstance(m, TaskModulator) for m in model.modulators.values())
    assert model.current_task is None
    with pytest.raises(UnknownTaskError, match=r"No task is set.*'mnist', 'svhn'"):
        model(IMAGES)
    model.set_task("svhn")
    assert model.current_task == "svhn"
    assert model(IMAGES).pooler_output.shape == (2, 32)
    assert model.config is model.backbone.config  # what host classifiers look up
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing


@pytest.mark.parametrize("odd", [3, None, Serving, {"memory_limit_gb": 1}])
def test_what_is_no_serving_is_refused_where_it_is_set(model, odd):
    model.serving = slim = Serving(memory_limit_gb=1)
    with pytest.raises(SettingsError, match=r"expected .*Serving\(memory_limit_gb"):
        model.serving = odd
    assert model.serving is slim and copy.deepcopy(model).serving == slim


def test_unknown_task_names_those_there_are(model):
    model.set_task("mnist")
    for method in (model.set_task, model.materialize, model.remove_modulator):
        with pytest.raises(
            UnknownTaskError, match=r"'cars' is not .*'mnist', 'svhn', 'eurosat'"
        ):
            method("cars")
        for odd in (None, 0, ["mnist"]):
            with pytest.raises(UnknownTaskError, match="is not in the merged model"):
                method(odd)
    assert model.current_task == "mnist"


def test_materialize_gives_an_ordinary_independent_model(model, tmp_path):
    model.set_task("svhn")
    expected = model(IMAGES).pooler_output
    plain = model.materialize("svhn")
    other = model.materialize("mnist")
    assert type(plain) is CLIPVisionModel
    assert model.current_task == "svhn"
    assert plain(IMAGES).pooler_output.equal(expected)
    assert not other(IMAGES).pooler_output.equal(expected)

    plain.save_pretrained(tmp_path / "plain")
    again = CLIPVisionModel.from_pretrained(tmp_path / "plain").eval()
    assert same_bits(floats(again), floats(plain))

    before = floats(model.backbone)
    with torch.no_grad():
        for value in plain.parameters():
            value.zero_()
    assert same_bits(before, floats(model.backbone))
    model.set_task("mnist")
    model.set_task("svhn")
    assert model(IMAGES).pooler_output.equal(expected)


def test_a_task_can_be_added_and_removed(model):
    names = [f"{TOWER}encoder.layers.0.mlp.fc1.weight"]
    model.set_task("mnist")
    before = {task: floats(model.materialize(task)) for task in model.tasks}
    shape = (64, 32)
    delta = LowRankDelta(shape, torch.ones(64, 1), torch.ones(1, 32))
    bits = model.storage.excl_bits
    model.add_modulator("extra", TaskExpert({names[0]: delta}))
    assert model.tasks == ["mnist", "svhn", "eurosat", "extra"]
    assert model.storage.expert_bits["extra"] == 32 * (64 + 32)
    assert model.storage.excl_bits == bits + 32 * (64 + 32)
    with pytest.raises(ValueError, match="'extra' already exists"):
        model.add_modulator("extra", TaskExpert({}))
    model.set_task("extra")
    model.remove_modulator("extra")
    assert model.current_task is None and model.storage.excl_bits == bits
    for task in model.tasks:
        assert same_bits(before[task], floats(model.materialize(task)))


@pytest.mark.parametrize("before", [None, "mnist"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_switch_that_is_cut_off_leaves_the_base_model(
    model, monkeypatch, before, after
):
    """Some tensors would be of one task and some of another, under the name of the first."""
    base = floats(model.backbone)
    model.set_task("svhn")
    expected = floats(model.backbone)
    model.unset_task()
    if before:
        model.set_task(before)
    write, written = type(model).write, []

    def cut_off(self, name, value):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model), "write", cut_off)
        model.set_task("svhn")
    assert model.current_task is None and same_bits(base, floats(model.backbone))
    with pytest.raises(UnknownTaskError, match="No task is set"):
        model(IMAGES)
    model.set_task("svhn")
    assert same_bits(expected, floats(model.backbone))


def test_another_expert_under_the_same_name_is_served(model):
    """Mixed batches, which are made for the tasks that there were, are of the tasks that there are."""
    name, last = f"{TOWER}encoder.layers.0.mlp.fc1.weight", model.tasks[-1]
    before = model.eval()(IMAGES, task_ids=[last, last]).pooler_output
    model.remove_modulator(last)
    delta = LowRankDelta((64, 32), torch.ones(64, 1), torch.ones(1, 32))
    model.add_modulator(last, TaskExpert({name: delta}))
    found = model(IMAGES, task_ids=[last, last]).pooler_output
    assert not found.equal(before)
    expected = model.materialize(last).eval()(IMAGES).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["projection", "representation", "mlp"])
def test_tasks_do_not_come_and_go_under_a_router(model, kind):
    """It would not know them: what was saved could not be loaded."""
    model.attach_router(kind)
    experts = {
        task: dict(model.modulators[task].deltas.items()) for task in model.tasks
    }
    for change in (
        lambda: model.add_modulator("extra", TaskExpert({})),
        lambda: model.remove_modulator("mnist"),
        lambda: model.hold({}, experts),
    ):
        with pytest.raises(
            DiDiError, match=r"router of the tasks.*attach_router\(None\)"
        ):
            change()
    assert model.tasks == model.router.tasks
    model.attach_router(None).remove_modulator("mnist")


def test_a_tensor_that_only_a_removed_task_changed_is_the_base_again(tiny_clip):
    tensor = f"{TOWER}post_layernorm.bias"
    base = floats(tiny_clip.base)[tensor]
    for task in ("svhn", "eurosat"):
        tiny_clip.tuned[task].get_parameter(tensor).data.copy_(base)
    model = didi(tiny_clip.pool_models(), budget=0.9)
    for current in (None, "mnist", "svhn"):
        each = copy.deepcopy(model)
        if current:
            each.set_task("mnist")
            each.set_task(current)
        each.remove_modulator("mnist")
        assert tensor not in each.touched
        assert floats(each.backbone)[tensor].equal(base)
        assert each.current_task == ("svhn" if current == "svhn" else None)
        each.set_task("eurosat")
        expected = floats(model.materialize("eurosat"))
        assert same_bits(floats(each.backbone), expected)


def test_a_copy_is_independent(model):
    """The host's GPT-2 pool copies the model for every task."""
    model.set_task("mnist")
    twin = copy.deepcopy(model)
    before = floats(model.backbone)
    twin.set_task("svhn")
    assert same_bits(before, floats(model.backbone))
    assert model.current_task == "mnist"
    assert same_bits(floats(twin.backbone), floats(model.materialize("svhn")))


def test_casting_the_model_casts_base_and_tasks(model):
    model.set_task("mnist")
    model.bfloat16()
    model.set_task("svhn")
    model.unset_task()
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}


def test_nothing_is_trainable_and_all_parameters_are_counted(model):
    """The host's report counts parameters only: experts must not hide in buffers."""
    stored = sum(
        p.numel() for m in (model.shared, model.modulators) for p in m.parameters()
    )
    assert 32 * stored == model.storage.excl_bits
    assert not [p for p in model.parameters() if p.requires_grad]


def test_account_adds_up(model):
    account = model.storage
    assert sum(account.layer_bits.values()) == account.excl_bits
    assert account.shared_bits + sum(account.expert_bits.values()) == account.excl_bits
    assert account.x_excl == account.excl_bits / account.unit_bits <= 0.9
    assert account.x_incl == pytest.approx(account.x_excl + 1)
    assert set(account.expert_bits) == set(model.tasks)
    plain = account.as_dict()
    assert plain["x_excl"] == account.x_excl and plain["expert_bits"]


def test_dense_and_low_rank_deltas_apply_shared_and_own_change():
    up, down = torch.randn(6, 2), torch.randn(2, 12)
    low = LowRankDelta((6, 3, 2, 2), up, down)
    shared = torch.randn(6, 3, 2, 2)
    torch.testing.assert_close(low.change(), (up @ down).view(6, 3, 2, 2))
    dense = DenseDelta((6, 3, 2, 2), shared)
    torch.testing.assert_close(low.change(dense), shared + low.change())
    assert dense.change(dense).equal(2 * shared)
    assert (low.bits, dense.bits) == (32 * 2 * 18, 32 * 72)
    view = DenseDelta((2,), torch.zeros(1000)[:2])
    assert view.value.untyped_storage().nbytes() == 8


def test_attributes_of_a_backbone_are_those_of_the_model():
    base = nn.Sequential(nn.Linear(2, 2))
    base.stored = "on disk"
    assert DynamicModel(base, {}, {"a": {}}, unit_bits=1).stored == "on disk"


def test_a_subclass_may_write_more_into_its_configuration(model, tmp_path):
    class Told(type(model)):
        def write_config(self, directory, parts, **options):
            (directory / "told.txt").write_text("here")
            super().write_config(directory, parts, **options)

    model.__class__ = Told
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "told.txt").read_text() == "here"


def test_attributes_of_an_openclip_encoder_are_found():
    model = didi(family(OpenClipLike()), budget=0.9)
    assert model.train_preprocess is None and model.val_preprocess is None
    assert BASE not in model.tasks


# --- names --------------------------------------------------------------------------

#: dots, what dots were once written as, names of attributes, and what escapes look like
ODD = ("a.b", "a/b", "a\u2024b", "a~1b", "a~b", "type", "keys", "training", "forward")
#: the same for tensors: of a submodule ``m`` and of the backbone itself
TENSORS = ("m.x", "m/x", "m\u2024x", "m~1x", "keys", "items", "get", "values")


class OddlyNamed(nn.Module):
    """Tensors whose names differ by what stands between their parts only."""

    def __init__(self):
        super().__init__()
        self.m = nn.Module()
        for i, name in enumerate(TENSORS):
            value = nn.Parameter(torch.full((3,), float(i)))
            owner = self.m if name == "m.x" else self
            owner.register_parameter(name.removeprefix("m."), value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * value for value in self.parameters()], 1)


def oddly_named() -> DynamicModel:
    """Every task changes every tensor by a number of its own."""
    experts = {
        task: {
            name: DenseDelta((3,), torch.full((3,), 100.0 * (t + 1) + i))
            for i, name in enumerate(TENSORS)
        }
        for t, task in enumerate(ODD)
    }
    shared = {name: DenseDelta((3,), torch.full((3,), 0.5)) for name in TENSORS}
    return DynamicModel(OddlyNamed(), shared, experts, unit_bits=1)


@pytest.mark.parametrize("how", ["in memory", "saved", "copied", "pickled"])
def test_names_of_tasks_and_tensors_are_taken_as_they_are(how, tmp_path):
    model = oddly_named()
    if how == "saved":
        model.save_pretrained(tmp_path / "model")
        model = DynamicModel.from_pretrained(tmp_path / "model", OddlyNamed())
    if how == "copied":
        model = copy.deepcopy(model)
    if how == "pickled":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    assert model.tasks == list(ODD) == list(model.storage.expert_bits)
    assert model.touched == list(TENSORS) == list(model.storage.layer_bits)
    x, ids = torch.ones(len(ODD), 3), torch.arange(len(ODD))
    mixed = model(x, task_ids=ids)
    for t, task in enumerate(ODD):
        model.set_task(task)
        assert model.current_task == task
        for i, name in enumerate(TENSORS):
            value = model.backbone.get_parameter(name)
            assert value.equal(torch.full((3,), i + 0.5 + 100.0 * (t + 1) + i))
        assert model(x)[t].equal(mixed[t])
        assert model.materialize(task)(x)[t].equal(mixed[t])
    model.unset_task()
    assert same_bits(floats(model.backbone), floats(OddlyNamed()))
    model.remove_modulator("a/b")
    assert "a.b" in model.modulators and "a/b" not in model.modulators
    assert model.tasks == [task for task in ODD if task != "a/b"]


def test_named_modules_are_a_dictionary():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    modules = NamedModules({"type": first, "": second})
    assert modules["type"] is first and modules.get("") is second
    assert list(modules) == modules.keys() == ["type", ""] and len(modules) == 2
    assert modules.items() == [("type", first), ("", second)]
    assert modules.values() == [first, second] == list(modules.children())
    assert modules.get("/type") is None and "/type" not in modules
    with pytest.raises(KeyError, match="no.such"):
        modules["no.such"]
    del modules["type"]
    assert modules.keys() == [""]
    modules.train(), modules.half()
    assert second.weight.dtype == torch.half
