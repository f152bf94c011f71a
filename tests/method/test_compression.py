"""Delta compression by other methods: weights against the formulas, bytes against the counts of the papers."""

import zlib

import numpy as np
import pytest
import torch
from helpers import tower_of
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from fusion_bench_didi import method as methods
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method.baselines import compression
from fusion_bench_didi.method.baselines.bitdelta import BitDelta
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


SMALL = {
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
    "bert": {"hidden_size": 12, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 12, "n_layer": 1},
    "llama": {"hidden_size": 32, "num_hidden_layers": 1},
    "opt": {"hidden_size": 12, "num_hidden_layers": 1},
    "t5": {"d_model": 8, "num_layers": 1},
    "vit": {"hidden_size": 12, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("kind", SMALL)
def test_linear_layers_are_told_from_embeddings_by_their_names(kind):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL[kind]))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            linear = not isinstance(module, nn.Embedding)
            found = compression.is_linear(f"{name}.weight", module.weight.shape)
            assert found == linear or min(module.weight.shape) == 1, name


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


def test_a_method_without_the_settings_of_all_of_them_is_told_how_to_have_them():
    class Bare(BitDelta):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    class Undeclared(DeltaCompression):
        def __init__(self, **kwargs):
            super().__init__(tensors="linear", others="checkpoint", **kwargs)

        def delta(self, name, task, tau):
            return None

    assert Bare(others="bfloat16").others == "bfloat16"
    with pytest.raises(SettingsError, match="not take others, tensors, .*@auto_reg"):
        Undeclared()


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


# --- T-Switch and ComPEFT ---------------------------------------------------------------------------------------------


def top_of_sign(tau: np.ndarray, share: float) -> np.ndarray:
    """Signs of the largest positive and negative entries, zero elsewhere."""
    out = np.zeros(tau.size)
    for sign in (1, -1):
        order = [i for i in np.argsort(-sign * tau.ravel()) if sign * tau.flat[i] > 0]
        out[order[: int(len(order) * share)]] = sign
    return out.reshape(tau.shape)


@pytest.mark.parametrize("norm", ["kept", "whole"])
@pytest.mark.parametrize("drop", [0.6, 0.9])
def test_t_switch(tiny_clip, drop, norm):
    def expected(task, name, tau):
        kept = top_of_sign(tau, 1 - drop)
        if not kept.any():
            return kept
        lengthy = tau * (kept != 0) if norm == "kept" else tau
        return kept * np.linalg.norm(lengthy) / np.linalg.norm(kept)

    method = methods.TSwitch(drop=drop, norm=norm)
    assert_changes(method.run(tiny_clip.pool_models()), tiny_clip, expected)


@pytest.mark.parametrize("drop", [0.6, 0.9])
def test_t_switch_takes_the_entropy_of_its_mask_and_a_bit_per_sign(drop):
    keep = 1 - drop
    entropy = -keep * np.log2(keep) - drop * np.log2(drop)
    found = bits_per_entry(methods.TSwitch(drop=drop), gaussian(1500, 1000))
    assert found == pytest.approx(entropy + keep, rel=0.001)


def test_compeft(tiny_clip):
    tau = task_vectors(tiny_clip)
    flat = {t: np.concatenate([v.ravel() for v in x.values()]) for t, x in tau.items()}

    def expected(task, name, value):
        sizes = np.sort(np.abs(flat[task]))
        limit = sizes[len(sizes) - int(0.1 * len(sizes)) - 1]
        scale = 1.5 * flat[task].std()
        return np.where(np.abs(value) >= limit, scale * np.sign(value), 0)

    model = methods.ComPEFT(alpha=1.5).run(tiny_clip.pool_models())
    assert_changes(model, tiny_clip, expected)


def test_compeft_looks_at_the_tensors_that_it_compresses(tiny_clip):
    """A huge change of another tensor moves neither threshold nor scale."""
    settings = {"tensors": "linear", "others": "pretrained"}
    before = methods.ComPEFT(**settings).run(tiny_clip.pool_models())
    found = changes(before, tiny_clip)
    for model in tiny_clip.tuned.values():
        tower_of(model).embeddings.class_embedding.data += 100
    after = methods.ComPEFT(**settings).run(tiny_clip.pool_models())
    for task, tensors in changes(after, tiny_clip).items():
        for name, value in tensors.items():
            np.testing.assert_array_equal(value, found[task][name])


# --- TVQ --------------------------------------------------------------------------------------------------------------


def quantized(tau: np.ndarray, bits: int) -> np.ndarray:
    if tau.min() == tau.max():
        return tau
    step = (tau.max() - tau.min()) / (2**bits - 1)
    zero = -np.round(tau.min() / step)
    codes = np.clip(np.round(tau / step) + zero, 0, 2**bits - 1)
    return (codes - zero) * step


def mostly_close(found: np.ndarray, expected: np.ndarray, atol: float) -> bool:
    """But for entries half-way between two codes, which float32 may round to the other one."""
    return (np.abs(found - expected) <= atol).mean() >= 1 - 2 / found.size - 1e-3


@pytest.mark.parametrize("width, base_width", [(3, None), (2, None), (2, 3), (4, 8)])
def test_tvq(tiny_clip, width, base_width):
    method = methods.TaskVectorQuantization(width=width, base_width=base_width)
    model = method.run(tiny_clip.pool_models())
    tau = task_vectors(tiny_clip)
    for task, found in changes(model, tiny_clip).items():
        for name, change in found.items():
            base = 0 * change
            if base_width is not None:
                mean = np.mean([tau[t][name] for t in tau], axis=0)
                base = quantized(mean, base_width)
            expected = base + quantized(tau[task][name] - base, width)
            assert mostly_close(change, expected, 3e-7), (task, name)
    sizes = [p.numel() for p in tiny_clip.base.parameters()]
    widths = [width] * 3 + ([] if base_width is None else [base_width])
    bits = sum(8 * -(-w * n // 8) + 64 for w in widths for n in sizes)
    assert model.storage.excl_bits == bits


def test_a_task_that_changed_nothing_is_itself_around_a_mean(tiny_clip):
    with torch.no_grad():
        for base, own in zip(
            tiny_clip.base.parameters(), tiny_clip.tuned["svhn"].parameters()
        ):
            own.copy_(base)
    method = methods.TaskVectorQuantization(width=8, base_width=3)
    found = changes(method.run(tiny_clip.pool_models()), tiny_clip)
    most = max(np.abs(v).max() for v in task_vectors(tiny_clip)["mnist"].values())
    assert max(np.abs(v).max() for v in found["svhn"].values()) < most / 100


# --- UltraDelta -------------------------------------------------------------------------------------------------------


def ultra_delta(tau: Tensors, task: str, drop: float, step: float, bits: int):
    """Pruned and raised codes of all linear layers of a task, as the description has it."""
    coded = {n: grid(v, bits) for n, v in tau.items() if is_linear(n, v)}
    total, passed, rates = sum(v.size for v in coded.values()), 0, {}
    for name in sorted(coded, key=lambda n: coded[n].std()):
        passed += coded[name].size
        third = 0 if passed <= total / 3 else 1 if passed <= 2 * total / 3 else 2
        rates[name] = [drop + step, drop, None][third]
    spent = sum(r * coded[n].size for n, r in rates.items() if r is not None)
    last = sum(coded[n].size for n, r in rates.items() if r is None)
    found = {}
    for name, value in coded.items():
        rate = rates[name]
        if rate is None:
            rate = min(0.99, max(0.0, (drop * total - spent) / last))
        order, out = words_of(5, task, name, value.shape), np.zeros_like(value)
        for code in np.unique(value):
            places = sorted(
                np.argwhere(value == code).tolist(), key=lambda p: order[tuple(p)]
            )
            for place in places[round(len(places) * rate) :]:
                out[tuple(place)] = code / (1 - drop)
        found[name] = out
    return found


@pytest.mark.parametrize("trace_norm", [True, False])
def test_ultra_delta(tiny_clip, trace_norm):
    settings = {"drop": 0.8, "step": 0.05, "width": 3, "seed": 5, "gain": 0.9}
    model = methods.UltraDelta(trace_norm=trace_norm, **settings).run(
        tiny_clip.pool_models()
    )
    tau = task_vectors(tiny_clip)
    known = {t: ultra_delta(tau[t], t, 0.8, 0.05, 3) for t in tau}
    norms = {
        t: sum(np.linalg.svd(v, compute_uv=False).sum() for v in known[t].values())
        for t in tau
    }
    for task, found in changes(model, tiny_clip).items():
        gain = 0.9 * (min(norms.values()) / norms[task] if trace_norm else 1)
        for name, change in found.items():
            expected = gain * known[task].get(name, 0 * change)
            assert mostly_close(change, expected, 1e-5), (task, name)
    kept = sum(np.count_nonzero(v) for v in known["mnist"].values())
    linear = sum(v.size for v in known["mnist"].values())
    assert kept / linear == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("drop, ratio", [(0.97, 50.9), (0.99, 132.5)])
def test_ultra_delta_is_as_small_as_the_paper_counts(drop, ratio):
    method = methods.UltraDelta()
    method._rates, method._gains = {"a": {"w": drop}}, {"a": 1.0}
    found = 16 / bits_per_entry(method, gaussian(1500, 1000))
    assert found == pytest.approx(ratio, rel=0.005)


def test_ultra_delta_of_vectors_too(tiny_clip):
    """Which have no trace norm: gains are those without them, where nothing else is pruned otherwise."""
    gains = []
    for tensors in ("matrices", "all"):
        method = methods.UltraDelta(drop=0.8, step=0.0, tensors=tensors)
        model = method.run(tiny_clip.pool_models())
        gains.append(method._gains)
    assert gains[0] == pytest.approx(gains[1])
    assert min(gains[0].values()) < max(gains[0].values()) == 1.0
    kept = model.modulators["mnist"].deltas
    assert any(kept.get(n).shape == (32,) for n in model.touched if kept.get(n))


def test_ultra_delta_refuses_to_drop_more_than_all():
    with pytest.raises(SettingsError, match=r"drop \+ step = 1.0"):
        methods.UltraDelta(drop=0.995, step=0.01)


# --- lossless ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lossless(make_tiny_clip, dtype):
    clip = make_tiny_clip()
    models = {n: m.to(dtype) for n, m in clip.pool_models().items()}
    model = methods.LosslessDifference().run(models)
    for task in clip.tasks:
        own = dict(models[task].named_parameters())
        for name, value in model.materialize(task).named_parameters():
            assert value.dtype == dtype and value.equal(own[name])
    assert 0.5 < model.storage.x_excl / len(clip.tasks) < 1


# --- Delta-CoMe -------------------------------------------------------------------------------------------------------


def fields(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """Levels of codes of ``width`` bits, low ones first; eight bits are two's complement without a half."""
    if width == 8:
        return packed[:count].view(np.int8).astype(float)
    number = int.from_bytes(packed.tobytes(), "little")
    codes = [number >> width * i & (2**width - 1) for i in range(count)]
    return np.array(codes) - 2 ** (width - 1) + 0.5


def unbanded(delta) -> np.ndarray:
    """Decoded one band after the other."""
    (m, n), parts = delta.shape, {k: v.numpy() for k, v in delta.tensors().items()}
    up, down, scale = parts["up"], parts["down"], parts["scale"].astype(float)
    total = np.zeros((m, n))
    for rank, width in zip(parts["ranks"], (8, 3, 2)):
        sizes = [-(-width * rank * side // 8) for side in (m, n)]
        left = fields(up, width, m * rank).reshape(m, rank)
        right = fields(down, width, n * rank).reshape(rank, n)
        total += left * scale[:rank] @ right
        up, down, scale = up[sizes[0] :], down[sizes[1] :], scale[rank:]
    assert len(up) == len(down) == len(scale) == 0
    return total


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (7, 5)])
def test_delta_come(shape):
    method = methods.DeltaCoMe(bits=3.0, eight=200, three=300)
    tau = gaussian(*shape) * torch.logspace(0, -2, shape[1])
    delta = method.delta("w", "a", tau)
    found = unbanded(delta)
    np.testing.assert_allclose(delta.own().numpy(), found, atol=1e-7)
    ranks = method.ranks(shape)
    assert delta.ranks.tolist() == ranks
    u, s, vh = np.linalg.svd(tau.double().numpy(), full_matrices=False)
    rank = sum(ranks)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    # two bits of both factors lose at most .12 * 1.5 of their energy, more bits less
    lost = np.linalg.norm(found - best) / np.linalg.norm(best)
    assert lost**2 < 0.18
    assert delta.bits <= 3.0 * tau.numel() + 96 + 6 * 8


@pytest.mark.parametrize(
    "sides, bits, ranks",
    [
        ((4096, 4096), 1.0, [2, 32, 966]),
        ((128, 128), 1.0, [1, 1, 24]),
        ((3, 3), 10.0, [1, 0, 0]),
        ((3, 3), 16.0, [1, 1, 0]),
        ((64, 64), 16.0, [1, 1, 62]),
        ((8, 8), 0.01, [0, 0, 0]),
    ],
)
def test_bands_of_delta_come_fill_their_bits(sides, bits, ranks):
    found = methods.DeltaCoMe(bits=bits).ranks(sides)
    assert found[:2] == ranks[:2] and found[2] == pytest.approx(ranks[2], rel=0.01)
    cost = [(w * sum(sides) + 32) * r for w, r in zip((8, 3, 2), found)]
    assert sum(cost) <= bits * sides[0] * sides[1]


def test_delta_come_is_a_bit_per_entry_of_linear_layers(tiny_clip):
    """As its paper counts: a sixteenth of 16 bits."""
    model = methods.DeltaCoMe().run(tiny_clip.pool_models())
    deltas = model.modulators["mnist"].deltas
    for name, value in tiny_clip.base.named_parameters():
        stored = deltas.get(name)
        assert (stored is not None) == is_linear(name, value), name
        if stored is not None:
            assert 0.5 < stored.bits / value.numel() < 1.2
