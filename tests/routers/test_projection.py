"""The projection router: where it looks by default, and directions that experts do not have."""

import copy
import pickle

import pytest
import torch
from exact_models import GROUPED, SIDES, exact_model, llama, seeded, t5
from helpers import BASE, TRANSFORMERS, normal
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    ConvNextConfig,
    ConvNextModel,
    DeepseekV3Config,
    DeepseekV3Model,
    GraniteMoeConfig,
    GraniteMoeModel,
)

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.routers.projection import early_layers

# --- default layers -----------------------------------------------------------------


def granite_moe() -> nn.Module:
    return GraniteMoeModel(GraniteMoeConfig(**GROUPED, **SIDES, num_local_experts=4))


def deepseek() -> nn.Module:
    return DeepseekV3Model(
        DeepseekV3Config(
            **GROUPED,
            **SIDES,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    )


def albert() -> nn.Module:
    sides = {k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}
    return AlbertModel(AlbertConfig(**sides, **SIDES, embedding_size=16))


def convnext() -> nn.Module:
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 5, 1])
    return ConvNextModel(config)


@pytest.mark.parametrize(
    "make, expected",
    [
        (llama, ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]),
        (granite_moe, ["layers.0.self_attn.q_proj"]),
        (deepseek, ["layers.0.self_attn.q_a_proj"]),
        (t5, ["encoder.block.0.layer.0.SelfAttention.q"]),
        (albert, ["encoder.albert_layer_groups.0.albert_layers.0.attention.query"]),
        (convnext, ["embeddings.patch_embeddings", "encoder.stages.0.layers.0.pwconv1"]),  # fmt: skip
    ],
)
def test_experts_and_their_gates_are_not_looked_at(make, expected):
    if make is convnext and TRANSFORMERS >= 5:
        pytest.skip("layers are called otherwise")
    assert early_layers(seeded(make)) == expected


# --- directions ---------------------------------------------------------------------

SIDE = 24


class Net(nn.Module):
    """Two blocks of one layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def merged(changes: dict[str, list[torch.Tensor]]) -> DynamicModel:
    """A model of tasks that change the layers along rows (k, n), one set of rows per layer."""
    models = {BASE: seeded(Net)}
    for task, rows in changes.items():
        models[task] = seeded(Net)
        for i, (block, found) in enumerate(zip(models[task].blocks, rows)):
            block.weight.data += normal(SIDE, len(found), seed=i) @ found
    return exact_model(models)


EYE, NONE = torch.eye(SIDE), torch.zeros(0, SIDE)


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("directions", [2, 8, 16])
def test_directions_are_those_of_the_change(rank, directions):
    """As many as there are; the rest is zero. What is found within them does not depend on how many are asked for."""
    model = merged({"a": [EYE[:rank], NONE], "b": [EYE[-rank:], NONE]})
    model.attach_router("subspace", layers=["blocks.0"], directions=directions)
    basis = model.router._buffers["basis_0"].view(2, directions, SIDE)
    sizes = basis.norm(dim=2)
    known = min(rank, directions)
    torch.testing.assert_close(sizes[:, :known], torch.ones(2, known))
    assert not sizes[:, known:].any()
    assert basis[0, :, rank:].abs().max() < 1e-4
    inside = torch.zeros(1, SIDE)
    inside[:, :rank] = 1
    if rank < SIDE // 2:
        assert model.router.route(model, inside).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("directions", [4, 16])
@pytest.mark.parametrize("order", ["first", "last"])
def test_a_task_that_does_not_change_a_layer_is_the_least_likely_there(
    order, directions
):
    """However weak the others are there; and by no more than other layers can outweigh."""
    tasks = {"strong": [EYE[:4], NONE], "weak": [EYE[4:8], NONE], "none": [NONE, NONE]}
    names = list(tasks) if order == "last" else list(reversed(tasks))
    model = merged({name: tasks[name] for name in names})
    model.attach_router("subspace", layers=["blocks.0"], directions=directions)
    x = torch.zeros(5, SIDE)
    x[:, :4], x[:, 4:8] = 1.0, 1e-2
    scores = model.router.scores(model.router.features(model, x))
    strong, weak, none = (scores[:, names.index(task)] for task in tasks)
    assert scores.isfinite().all()
    assert (strong > weak).all() and (weak > none).all()
    torch.testing.assert_close(none, weak - torch.tensor(2.0).log())


def test_other_layers_outweigh_one_that_a_task_leaves_as_it_is():
    model = merged({"a": [EYE[:4], EYE[4:8]], "b": [NONE, EYE[:4]]})
    model.attach_router("subspace", layers=["blocks.*"], directions=4)
    first = model.backbone.blocks[0]
    # what goes into the second block lies mostly where b acts
    given = 10 * EYE[0] + 3 * EYE[4]
    x = torch.linalg.solve(first.weight, given - first.bias)[None]
    assert model.router.route(model, x).tolist() == [[0.0, 1.0]]


def test_layers_that_no_task_changes_are_not_looked_at():
    model = merged({"a": [EYE[:2], NONE], "b": [EYE[2:4], NONE]})
    model.attach_router("subspace", layers=["blocks.*"])
    assert model.router.names == ["blocks.0"]
    with pytest.raises(SettingsError, match="layers="):
        model.attach_router(make_router("projection", model.tasks, layers=["blocks.1"]))


def test_a_router_is_of_the_model_that_it_was_attached_to_last():
    """It would route the samples of one by what the tasks of the other change."""
    first = merged({"a": [EYE[:2], NONE], "b": [EYE[2:4], NONE]})
    second = merged({"a": [EYE[4:6], NONE], "b": [EYE[6:8], NONE]})
    router = make_router("projection", first.tasks, layers=["blocks.*"])
    first.attach_router(router)
    x = torch.randn(4, 24)
    kept = router.features(first, x)
    assert torch.equal(kept, pickle.loads(pickle.dumps(router)).features(first, x))
    twin = copy.deepcopy(first)
    second.attach_router(router)
    assert not torch.equal(kept, router.features(second, x))
    assert torch.equal(kept, twin.router.features(twin, x))
    with pytest.raises(SettingsError, match="deepcopy"):
        first.router.route(first, x)
    second.attach_router(copy.deepcopy(router))
    first.attach_router(router)
    assert torch.equal(kept, router.features(first, x))
    router.features(second.attach_router(router), x)
