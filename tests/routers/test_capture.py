"""What routers look at: layers with one row per sample, called once; blocks; and nothing of a cache."""

import pytest
import torch
from exact_models import (  # fmt: skip
    GROUPED,
    SIDES,
    exact_model,
    gpt2,
    llama,
    pool_of,
    qwen,
    seeded,
    tokens,
)
from helpers import TRANSFORMERS, normal
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
    SwinConfig,
    SwinModel,
)

from fusion_bench_didi.errors import DiDiError, SettingsError
from fusion_bench_didi.routers.capture import blocks, pooled, record
from fusion_bench_didi.routers.files import make_router

KINDS = ["projection", "representation", "mlp"]


def qwen3_moe(experts: int = 8) -> nn.Module:
    return seeded(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **GROUPED,
                **SIDES,
                head_dim=8,
                moe_intermediate_size=16,
                num_experts=experts,
                num_experts_per_tok=2,
            )
        )
    )


def mixtral() -> nn.Module:
    sides = {**GROUPED, **SIDES, "num_hidden_layers": 3}
    return seeded(
        lambda: MixtralForCausalLM(MixtralConfig(**sides, num_local_experts=2))
    )


def swin(depths: tuple[int, ...] = (1, 2)) -> nn.Module:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=depths, num_heads=[2, 2], window_size=4)  # fmt: skip
    return seeded(lambda: SwinModel(config))


def clip() -> nn.Module:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    text = {**tower, "vocab_size": 64, "eos_token_id": 63, "max_position_embeddings": 16}  # fmt: skip
    vision = {**tower, "image_size": 32, "patch_size": 8}
    return seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision)))


class Twice(nn.Module):
    """Two blocks that share a layer."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.shared(self.shared(x)))


# --- blocks -------------------------------------------------------------------------


class Block(nn.Module):
    """A block with a list of its own."""

    def __init__(self, parts: nn.Module | None = None):
        super().__init__()
        self.parts = parts or nn.ModuleList(nn.Linear(2, 2) for _ in range(9))


class OtherBlock(Block):
    """One of another class."""


def plain_blocks(count: int) -> list[nn.Module]:
    return [Block(nn.Linear(2, 2)) for _ in range(count)]


@pytest.mark.parametrize(
    "network, first, count",
    [
        (nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}), "layers.0", 2),
        (nn.ModuleDict({"a": nn.ModuleList([Block(), OtherBlock()])}), "a.0", 2),
        (nn.ModuleDict({"layers": nn.ModuleList([Block()])}), "layers.0", 1),
        (nn.ModuleDict({"layers": nn.Sequential(Block(), Block())}), "layers.0", 2),
        (nn.Sequential(Block(), Block()), "0", 2),
        (nn.Sequential(nn.Linear(2, 2), nn.ModuleList(plain_blocks(4))), "1.0", 4),
        (
            nn.ModuleDict(
                {n: nn.ModuleList(plain_blocks(i)) for i, n in enumerate("abc", 1)}
            ),
            "c.0",
            3,
        ),
        (
            nn.ModuleDict(
                {"a": nn.ModuleList(nn.ModuleList(plain_blocks(2)) for _ in range(3))}
            ),
            "a.0.0",
            2,
        ),
    ],
)
def test_blocks_are_the_longest_list_that_is_in_no_block(network, first, count):
    found = blocks(network)
    assert (found[0], len(found)) == (first, count)


# --- one row per sample -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [qwen3_moe, mixtral, swin])
def test_what_routers_look_at_by_default_is_of_one_sample_each(make, kind):
    """Alone, in another order, or beside others: a sample's features are its own."""
    model = exact_model(pool_of(make(), scale=0.1))
    given = normal(3, 3, 32, 32) if make is swin else tokens(3, 4)
    model.attach_router(router := make_router(kind, model.tasks))
    found = router.features(model, given)
    for rows in ([0], [2, 1, 0]):
        own = router.features(model, given[rows])
        torch.testing.assert_close(own, found[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make, layer",
    [
        (swin, f"encoder.layers.0.blocks.0.attention.{'self.query' if TRANSFORMERS < 5 else 'q_proj'}"),  # fmt: skip
        pytest.param(
            mixtral,
            "model.layers.0.block_sparse_moe.gate",
            marks=pytest.mark.skipif(TRANSFORMERS >= 5, reason="gates are otherwise"),
        ),
        pytest.param(
            lambda: qwen3_moe(2),  # both of which every token goes to
            "model.layers.0.mlp.experts.1.up_proj",
            marks=pytest.mark.skipif(TRANSFORMERS >= 5, reason="experts are tensors"),
        ),
    ],
)
def test_a_layer_without_one_row_per_sample_is_named(make, layer, kind):
    model = exact_model(pool_of(make(), scale=0.1))
    model.attach_router(make_router(kind, model.tasks, layers=[layer]))
    given = normal(3, 3, 32, 32) if make is swin else tokens(3, 4)
    with pytest.raises(SettingsError, match=f"{layer} sees .* of 3 samples.*layers="):
        model(given)


def test_towers_of_other_numbers_of_samples_are_named():
    model = exact_model(pool_of(clip(), scale=0.1))
    route = model.attach_router("subspace").router.route
    pixels = normal(4, 3, 32, 32)
    assert route(model, input_ids=tokens(4, 5), pixel_values=pixels).shape == (4, 2)
    with pytest.raises(SettingsError, match="sees .* of 2 samples.*layers="):
        route(model, input_ids=tokens(2, 5), pixel_values=pixels)


def test_a_layer_that_is_called_twice_is_named():
    model = exact_model(pool_of(Twice()))
    with pytest.raises(SettingsError, match="shared is called more than once"):
        record(model, (normal(3, 6),), {}, outputs_of=["shared", "last"])


# --- tokens that count --------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, torch.ones(3, 1)])
def test_one_token_does_not_spread(mask):
    states = normal(3, 1, 4)
    expected = torch.cat([states[:, 0], states[:, 0], torch.zeros(3, 4)], 1)
    assert pooled(states, "both", mask).equal(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_a_token_is_named(kind):
    model = exact_model(pool_of(llama()))
    model.attach_router(make_router(kind, model.tasks))
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(DiDiError, match=r"Rows \[1\] of attention_mask.*task_ids"):
        model(tokens(3, 4), attention_mask=mask)


# --- caches -------------------------------------------------------------------------


def mamba() -> nn.Module:
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **SIDES)
    return seeded(lambda: MambaForCausalLM(config))


EMPTY = {
    "none": lambda _: {},
    "dynamic": lambda _: {"past_key_values": DynamicCache()},
    "static": lambda config: {
        "past_key_values": StaticCache(config, max_cache_len=8),
        "cache_position": torch.arange(4),
    },
}


@pytest.mark.parametrize("kind", ["projection", "representation"])
@pytest.mark.parametrize(
    "make, empty",
    [
        (llama, "none"),
        (llama, "dynamic"),
        (llama, "static"),
        (qwen, "dynamic"),
        (gpt2, "none"),
        (mamba, "none"),
    ],
)
def test_tasks_are_found_before_there_is_a_cache_and_not_after(make, empty, kind):
    """An empty cache is not written to by a router, and of what goes on from a full one it does not see what came before."""
    base = make()
    model = exact_model(pool_of(base))
    model.attach_router(make_router(kind, model.tasks))
    ids, step = tokens(3, 4), tokens(3, 1, seed=1)
    out = model(ids, use_cache=True, **EMPTY[empty](base.config))
    weights = model.router.last
    torch.testing.assert_close(out.logits, model(ids, task_weights=weights).logits)
    name = "past_key_values" if "past_key_values" in out else "cache_params"
    given = {name: out[name], "use_cache": True, "cache_position": torch.tensor([4])}
    with pytest.raises(DiDiError, match=f"{name} holds .*task_ids"):
        model(step, **given)
    if make is mamba:
        return  # whose states are refused, or not, as without a router
    found = model(step, **given, task_weights=weights).logits
    whole = model(torch.cat([ids, step], 1), task_weights=weights).logits[:, -1:]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(TRANSFORMERS >= 5, reason="caches are objects")
def test_a_cache_of_plain_tuples_is_one_too():
    model = exact_model(pool_of(gpt2()))
    model.attach_router("subspace")
    cache = model(tokens(3, 4), use_cache=True).past_key_values.to_legacy_cache()
    with pytest.raises(DiDiError, match="past_key_values holds .*task_ids"):
        model(tokens(3, 1), past_key_values=cache)


def test_who_is_told_the_tasks_goes_on_from_a_cache():
    model = exact_model(pool_of(llama()))
    model.attach_router(router := make_router("oracle", model.tasks))
    router.tell(["a", "b", "a"])
    out = model(tokens(3, 4), use_cache=True)
    router.tell(["a", "b", "a"])
    assert model(tokens(3, 1), past_key_values=out.past_key_values).logits.isfinite().all()  # fmt: skip
