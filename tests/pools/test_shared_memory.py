"""Tensors that are two objects over one memory, as SAM's tables of positions: files hold one name of them, or both."""

import copy

import pytest
import torch
from exact_models import pool_of as family_of
from exact_models import seeded
from helpers import BASE, TRANSFORMERS, didi
from mixed_net import close
from saved_checkpoints import assert_exact, pool_of, saved, tuned
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.task_vectors.ties import separate, tied_names

FIRST = "shared_image_embedding.positional_embedding"
SECOND = "prompt_encoder.shared_embedding.positional_embedding"


def sam() -> SamModel:
    few = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SamConfig(
        vision_config={**few, "output_channels": 16, "image_size": 32, "patch_size": 8, "mlp_dim": 16, "global_attn_indexes": [0], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**few, "mlp_dim": 16, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    return seeded(lambda: SamModel(config))


@pytest.mark.skipif(TRANSFORMERS > 4, reason="they are tied as one object there")
def test_files_with_one_name_and_with_both_are_merged_alike(tmp_path, capfd):
    base = sam()
    assert tied_names(base) == {SECOND: FIRST}
    both = tuned(base, 2)
    both.prompt_encoder.shared_embedding.positional_embedding = both.get_buffer(FIRST).clone()  # fmt: skip
    saved(tmp_path, {"base": base, "a": tuned(base, 1), "b": both})
    pool = pool_of(tmp_path, SamModel)
    assert didi(pool, budget=1e9, dry_run=True) is None and capfd.readouterr().out
    assert_exact(pool)


@pytest.mark.skipif(TRANSFORMERS > 4, reason="they are tied as one object there")
def test_models_in_memory_too():
    base = sam()
    both = tuned(base, 2)
    both.prompt_encoder.shared_embedding.positional_embedding = both.get_buffer(FIRST).clone()  # fmt: skip
    models = {BASE: base, "a": tuned(base, 1), "b": both}
    merged = didi(models, budget=1e9)
    assert SECOND not in merged.touched
    both.get_buffer(SECOND).add_(1)
    found = didi(models, budget=1e9).materialize("b")
    for name in (FIRST, SECOND):
        torch.testing.assert_close(found.get_buffer(name), both.get_buffer(name))


class Net(nn.Module):
    """Multiplies by one matrix, at first and at last."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight.data = self.first.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def test_a_batch_of_several_tasks_has_both_of_its_own_task():
    models = family_of(seeded(Net))
    for value in models.values():
        value.last.weight.data = value.first.weight.data  # copies have two
    assert tied_names(models[BASE]) == {"last.weight": "first.weight"}
    model, x, tasks = didi(models, budget=1e9), torch.randn(4, 4), ["a", "b", "b", "a"]
    assert "last.weight" not in model.touched
    for grouped in (False, True):
        if grouped:
            model.mixed.network = None
        found = model(x, task_ids=tasks)
        for i, task in enumerate(tasks):
            close(found[i], models[task](x[i : i + 1])[0])
    model.set_task("b")
    close(model(x), models["b"](x))
    close(model.materialize("a")(x), models["a"](x))
    close(copy.deepcopy(model).double()(x.double()).float(), models["b"](x))


# --- over one memory in another layout ----------------------------------------------

VIEWS = {
    "transposed": lambda weight: weight.t(),
    "flat": lambda weight: weight.view(-1),
    "a slice": lambda weight: weight[1:3, 2:],
    "expanded": lambda weight: weight[:, :1].expand(4, 4),
}


class Views(nn.Module):
    """Multiplies by a matrix and by a view of its memory, a parameter or a buffer that has two names."""

    def __init__(self, view: str, parameter: bool, weight: Tensor | None = None):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        if weight is not None:
            self.first.weight.data = weight.clone()
        other = VIEWS[view](self.first.weight.detach())
        for name in ("other", "again"):
            if parameter:
                self.register_parameter(name, getattr(self, "other", nn.Parameter(other)))  # fmt: skip
            else:
                self.register_buffer(name, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.other * x.sum()).sum() + self.again.mean()


@pytest.fixture(params=VIEWS)
def view(request):
    return request.param


@pytest.mark.parametrize("parameter", [True, False], ids=["parameter", "buffer"])
def test_tensors_over_one_memory_in_another_layout_are_each_tasks_own(
    view, parameter, tmp_path, caplog
):
    weights = {name: torch.randn(4, 4) for name in (BASE, "a", "b")}
    models, entries = {}, {}
    for name, weight in weights.items():
        models[name] = Views(view, parameter, weight)
        torch.save(weight, tmp_path / name)
        entries[name] = {"_target_": f"{__name__}.opened", "view": view, "parameter": parameter, "place": str(tmp_path / name)}  # fmt: skip
    opened = didi(entries, budget=1e9)
    # a module's own parameters come first, and all before the buffers
    assert f"another layout ({'first.weight' if parameter else 'other'})" in caplog.text
    opened.save_pretrained(tmp_path / "merged")
    base = Views(view, parameter, weights[BASE])
    again = DiDiModel.from_pretrained(tmp_path / "merged", backbone=base)
    x = torch.randn(3, 4)
    for model in (opened, again, didi(models, budget=1e9)):
        for task in ("a", "b", "a"):
            model.set_task(task)
            close(model(x), models[task](x))
            close(model.materialize("b")(x), models["b"](x))
            close(copy.deepcopy(model)(x), models[task](x))
        model.unset_task()
        close(model.backbone(x), models[BASE](x))
        found = model(x, task_ids=["b", "a", None])
        for i, task in enumerate(("b", "a", BASE)):
            close(found[i], models[task](x[i : i + 1])[0])


def opened(view: str, parameter: bool, place: str) -> Views:
    return Views(view, parameter, torch.load(place))


def test_apart_are_only_those_that_reach_into_others(view, caplog):
    model = Views(view, True)
    first, other = model.first.weight, model.other
    values = [first.detach().clone(), other.detach().clone()]
    separate(model)
    assert model.first.weight is first and model.other is other is model.again
    assert first.equal(values[0]) and other.equal(values[1])
    first.data.add_(1)
    assert other.equal(values[1])
    caplog.clear()
    separate(model)
    assert not caplog.text


def test_slices_side_by_side_and_tied_tensors_stay_where_they_are(caplog):
    flat = torch.randn(32)
    matrix = flat[:16].view(4, 4)
    tensors = [matrix[:, :2], matrix[:, 2:], flat[16:20], flat[20:], flat[20:], flat[:0]]  # fmt: skip
    model = nn.ParameterList(nn.Parameter(t) for t in tensors)
    before = [parameter.data_ptr() for parameter in model]
    separate(model)
    assert [parameter.data_ptr() for parameter in model] == before and not caplog.text
    assert tied_names(model) == {"4": "3"}
