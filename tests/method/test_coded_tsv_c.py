"""TSV-C in the codes of DiDi's experts: the same ranks, within the bits, and as good as the factors when bits suffice."""

import pytest
import torch
from helpers import family
from steep_layers import decaying
from torch import nn

from fusion_bench_didi import method as methods

SHAPES = {"tall": (96, 64), "wide": (64, 96), "square": (64, 64)}


def models() -> dict[str, nn.Module]:
    """Steep task vectors of three shapes, a vector and a convolution."""
    base = nn.ModuleDict({k: nn.Linear(n, m) for k, (m, n) in SHAPES.items()})
    base["conv"] = nn.Conv2d(3, 32, 3)
    pool = family(base)
    for seed, task in enumerate(pool):
        if task != "_pretrained_":
            for key, shape in SHAPES.items():
                change = decaying(*shape, seed=seed)
                pool[task][key].weight.data = base[key].weight + 0.05 * change
    return pool


def lost(pool: dict[str, nn.Module], model) -> dict[str, float]:
    """Relative squared error per tensor, of all tasks."""
    found: dict[str, list[float]] = {}
    base = dict(pool["_pretrained_"].named_parameters())
    for task in (name for name in pool if name != "_pretrained_"):
        model.set_task(task)
        merged = dict(model.backbone.named_parameters())
        for name, tuned in pool[task].named_parameters():
            change = tuned - base[name]
            error = (merged[name] - tuned).square().sum() / change.square().sum()
            found.setdefault(name, []).append(error.item())
    return {name: max(errors) for name, errors in found.items()}


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    return models()


@pytest.mark.parametrize("conv", ["dense", "matrix"])
def test_more_bits_lose_less_down_to_what_the_rank_loses(pool, conv):
    runs = [methods.TSVCompression(bits=b, conv=conv) for b in (0.5, 1, 2, 4, 8, None)]
    errors = [lost(pool, method.run(dict(pool))) for method in runs]
    for name in (f"{key}.weight" for key in [*SHAPES, "conv"]):
        falling = [found[name] for found in errors[:-1]]
        assert falling == sorted(falling, reverse=True) and falling[0] > 2 * falling[-1]
        assert falling[-1] == pytest.approx(errors[-1][name], rel=0.01, abs=1e-4)
    assert max(errors[0][f"{key}.bias"] for key in SHAPES) < 1e-4  # bfloat16


@pytest.mark.parametrize("bits", [0.25, 1.0, 3.0])
def test_codes_take_the_bits_per_value_of_the_factors(pool, bits):
    model = methods.TSVCompression(bits=bits).run(dict(pool))
    for expert in model.modulators.values():
        for name, delta in expert.deltas.items():
            values = delta.numel  # the convolution's, and where factors are larger
            if name in ("tall.weight", "wide.weight"):
                assert delta.rank <= 32  # of two tasks
                values = 32 * sum(delta.sides)
            if name.endswith("weight"):
                taken = delta.bits
                assert 0.9 * bits * values - 100 < taken < bits * values + 160, name
