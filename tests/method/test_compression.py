"""Delta compression by other methods: weights against the formulas, bytes against the counts of the papers."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

from fusion_bench_didi import method as methods
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method.baselines.compression import DeltaCompression
from fusion_bench_didi.models.dynamic import DynamicModel

M64 = 2**64 - 1
Tensors = dict[str, np.ndarray]


def floats(module: nn.Module) -> Tensors:
    return {n: p.detach().double().numpy() for n, p in module.named_parameters()}


def task_vectors(clip) -> dict[str, Tensors]:
    """Rounded as the plugin has them, which is float32."""
    base = {n: p.detach() for n, p in clip.base.named_parameters()}
    return {
        task: {
            n: (p.detach() - base[n]).double().numpy()
            for n, p in model.named_parameters()
        }
        for task, model in clip.tuned.items()
    }


def changes(model: DynamicModel, clip) -> dict[str, Tensors]:
    """What a merged model adds to the base model, by task."""
    base, found = floats(clip.base), {}
    for task in clip.tasks:
        plain = floats(model.materialize(task))
        found[task] = {name: plain[name] - base[name] for name in base}
    return found


def is_linear(name: str, value: np.ndarray) -> bool:
    return value.ndim == 2 and "embed" not in name


def assert_changes(model: DynamicModel, clip, expected, tolerance: float = 3e-7):
    """Of every task and tensor; float32 rounds the sum with the base value."""
    tau = task_vectors(clip)
    for task, found in changes(model, clip).items():
        for name, change in found.items():
            value = expected(task, name, tau[task][name])
            np.testing.assert_allclose(
                change, value, atol=tolerance, err_msg=f"{task} {name}"
            )


def grid(values: np.ndarray, bits: int) -> np.ndarray:
    """Every value moved to the nearest of evenly spaced ones from the smallest to the largest."""
    if values.size == 0 or values.min() == values.max():
        return values
    points = np.linspace(values.min(), values.max(), 2**bits)
    nearest = np.abs(values[..., None] - points).argmin(-1)
    return points[nearest]


def bits_per_entry(method: DeltaCompression, tau: torch.Tensor) -> float:
    method._tasks = ["a"]
    return method.delta("w", "a", tau).bits / tau.numel()


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3


# --- BitDelta ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", ["checkpoint", "bfloat16", "pretrained"])
def test_bitdelta(tiny_clip, others):
    def expected(task, name, tau):
        if is_linear(name, tau):
            return np.abs(tau).mean() * np.where(tau < 0, -1, 1)
        if others == "bfloat16":
            return torch.tensor(tau).bfloat16().double().numpy()
        return tau * (others == "checkpoint")

    model = methods.BitDelta(others=others).run(tiny_clip.pool_models())
    assert_changes(model, tiny_clip, expected)
    linear = [
        p.numel() for n, p in tiny_clip.base.named_parameters() if is_linear(n, p)
    ]
    rest = sum(p.numel() for p in tiny_clip.base.parameters()) - sum(linear)
    width = {"checkpoint": 32, "bfloat16": 16, "pretrained": 0}[others]
    bits = sum(linear) + 64 * len(linear) + width * rest
    assert model.storage.excl_bits == 3 * bits


@pytest.mark.parametrize("tensors", ["linear", "matrices", "all"])
def test_which_tensors_are_compressed(tiny_clip, tensors):
    model = methods.BitDelta(tensors=tensors).run(tiny_clip.pool_models())
    deltas = model.modulators["mnist"].deltas
    for name, value in tiny_clip.base.named_parameters():
        wanted = {"linear": is_linear(name, value), "all": True}
        chosen = wanted.get(tensors, value.ndim > 1)
        assert (deltas.get(name).kind == "uniform") == chosen, name


def test_a_choice_that_there_is_not_is_refused():
    for settings in ({"tensors": "some"}, {"others": "float16"}):
        with pytest.raises(SettingsError, match="Input should be"):
            methods.BitDelta(**settings)
    for settings in ({"drop": 1.0}, {"width": 5}, {"positions": "none"}, {"gain": 0}):
        with pytest.raises(SettingsError, match="Settings of another"):
            methods.DARE(**settings)


# --- DARE -------------------------------------------------------------------------------------------------------------


def words(seed: int, count: int) -> np.ndarray:
    """Upper halves of SplitMix64's numbers, one after the other."""
    found, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & M64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & M64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & M64
        found.append((z ^ (z >> 31)) >> 32)
    return np.array(found)


def words_of(seed: int, task: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    key = zlib.crc32(f"{seed}\0{task}\0{name}".encode())
    return words(key, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("positions", ["seed", "stored"])
@pytest.mark.parametrize("width", [4, 16])
def test_dare(tiny_clip, positions, width):
    def expected(task, name, tau):
        kept = words_of(3, task, name, tau.shape) < round(0.3 * 2**32)
        values = 0.8 / 0.3 * tau[kept]
        if width == 16:
            values = torch.tensor(values).float().bfloat16().double().numpy()
        else:
            values = grid(values, width)
        out = np.zeros_like(tau)
        out[kept] = values
        return out

    settings = {"drop": 0.7, "gain": 0.8, "seed": 3}
    method = methods.DARE(width=width, positions=positions, **settings)
    assert_changes(method.run(tiny_clip.pool_models()), tiny_clip, expected)


@pytest.mark.parametrize("positions, ratio", [("stored", 23.7), ("seed", 33.3)])
def test_dare_is_as_small_as_the_literature_counts(positions, ratio):
    """At a drop rate of .97, against 16 bits."""
    method = methods.DARE(drop=0.97, positions=positions)
    found = 16 / bits_per_entry(method, gaussian(1500, 1000))
    assert found == pytest.approx(ratio, rel=0.01)


def test_dare_keeps_the_expected_change():
    """Averaged over seeds, what is kept is the task vector."""
    tau, total = gaussian(20, 30), 0.0
    for seed in range(400):
        method = methods.DARE(drop=0.5, seed=seed)
        total = total + method.delta("w", "a", tau).own() / 400
    spread = tau.abs() / 400**0.5
    assert float(((total - tau).abs() <= 4.5 * spread + 1e-5).double().mean()) == 1.0


def test_nothing_is_stored_where_nothing_is_kept():
    assert methods.DARE(drop=0.999999).delta("w", "a", gaussian(3, 3)) is None
