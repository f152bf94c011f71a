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

from fusion_bench_didi.task_vectors.ties import tied_names

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
