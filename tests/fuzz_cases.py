"""Saved files of every kind that the package reads, as small as they may be; what ``fuzz`` damages."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_inputs as more
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusion_bench_didi.artifacts import load_artifact, save_artifact
from fusion_bench_didi.deltas.banded import BandedLowRankDelta
from fusion_bench_didi.deltas.coded import CodedDelta, CodedLowRankDelta
from fusion_bench_didi.deltas.entries import (
    ScatteredDelta,
    SeededDelta,
    UniformDelta,
    between_ends,
    drawn,
    signs,
)
from fusion_bench_didi.deltas.lossless import LosslessDelta
from fusion_bench_didi.deltas.masks import MaskedDelta, SignedDelta, SparseDelta
from fusion_bench_didi.deltas.plain import (
    DenseDelta,
    LowRankDelta,
    OwnDelta,
    SpectralDelta,
)
from fusion_bench_didi.deltas.precision import Precision
from fusion_bench_didi.deltas.quantized import AffineDelta
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.quantization.coded_matrix import code_product, code_rows
from fusion_bench_didi.quantization.rounding import round_factors
from fusion_bench_didi.recombination.library import ModularExpert
from fusion_bench_didi.recombination.model import RecombinedModel
from fusion_bench_didi.recombination.objectives import Evaluation
from fusion_bench_didi.recombination.search import _load as load_state
from fusion_bench_didi.routers import make_router
from fusion_bench_didi.task_vectors.lora_adapter import AdapterSource
from fusion_bench_didi.task_vectors.sources import ModuleSource

M, N = 12, 10


M, N = 12, 10


class Body(nn.Module):
    """Something of each: a convolution, matrices, vectors, a tied head and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, M, 2)
        self.first = nn.Linear(N, M)
        self.second = nn.Linear(M, N)
        self.norm = nn.BatchNorm1d(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


def body() -> Body:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Body().eval()


def every_form() -> tuple[dict, dict]:
    """Deltas of all stored forms."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    mn, nm, conv = (M, N), (N, M), (M, 2, 2, 2)
    few, three = Precision("int4", 4), Precision("int3", 3)
    float32 = Precision("float32", 32, torch.float32)
    shared = {
        "first.weight": few.bases(mn, draw(M, 3), draw(2, N)),
        "second.weight": float32.bases(nm, draw(N, 3), draw(M, M)),
        "conv.weight": DenseDelta(conv, draw(*conv)),
        "first.bias": AffineDelta.of(draw(M)),
        "second.bias": DenseDelta((N,), draw(N)),
    }
    product = LowRankFactors(draw(M, 2), draw(2, 8))
    mask = draw(*conv) > 0
    experts = {
        "a": {
            "first.weight": few.core(mn, draw(3, 2)),
            "second.weight": float32.core(nm, draw(3, M)),
            "conv.weight": MaskedDelta.of(mask, 0.5),
            "first.bias": DenseDelta((M,), draw(M).bfloat16()),
            "norm.running_mean": OwnDelta((N,), draw(N)),
            "norm.num_batches_tracked": OwnDelta((), torch.tensor(3)),
            "conv.bias": SparseDelta.of(draw(M) * (draw(M) > 1), torch.float32),
            "norm.weight": UniformDelta.of(*between_ends(draw(N), 3), 3),
            "norm.bias": _scattered(draw(N)),
            "second.bias": SignedDelta.of((N,), draw(N)),
        },
        "b/c.d": {
            "first.weight": few.core(mn, draw(3, 2)),
            "second.weight": float32.core(nm, draw(3, M)),
            "conv.weight": three.low_rank(conv, product, None)[0],
            "norm.weight": SparseDelta.of(draw(N), torch.float16),
            "norm.bias": CodedDelta.of((N,), code_rows(draw(1, N), 0.1, 150.0)),
            "conv.bias": _seeded(draw(M)),
            "second.bias": LowRankDelta((N,), draw(N, 1), draw(1, 1)),
        },
        "e": {
            "first.weight": _coded_product(draw(*mn)),
            "conv.weight": Precision("int2", 2).dense(conv, [(draw(M, 8), None)])[0][0],
            "second.bias": AffineDelta.of(draw(N)),
            "second.weight": _banded(LowRankFactors(draw(N, 3), draw(3, M))),
            "norm.weight": LosslessDelta.of(draw(N), body().norm.weight.detach()),
            "norm.bias": SpectralDelta((N,), draw(N, 1), draw(1), draw(1, 1)),
        },
    }
    return shared, experts


def _banded(factors: LowRankFactors) -> BandedLowRankDelta:
    pairs = zip(factors.up.split(1, 1), factors.down.split(1), (8, 3, 2))
    bands = [round_factors(LowRankFactors(u, d), bits=bits) for u, d, bits in pairs]
    return BandedLowRankDelta.of(factors.shape, bands)


def _coded_product(target: Tensor) -> CodedLowRankDelta:
    wide = target.shape[0] < target.shape[1]
    a = target.mT if wide else target
    _, values, vectors = torch.linalg.svd(a, full_matrices=False)
    coded = code_product(target, vectors.mT[:, :2], values[:2], 0.1, 400.0)
    return CodedLowRankDelta.of(tuple(target.shape), coded)


def _scattered(value: Tensor) -> ScatteredDelta:
    kept = value > 0
    return ScatteredDelta.of(kept, *signs(value[kept], 0.5), 1)


def _seeded(value: Tensor) -> SeededDelta:
    values = value[drawn(7, 2**31, len(value))].bfloat16()
    return SeededDelta.of((len(value),), values, None, 16, seed=7, keep=2**31)


@dataclass(frozen=True)
class Case:
    """A kind of saved files.

    Args:
        write: makes a directory.
        read: reads it, and works out what it stands for.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]


def _tasks_of(model: nn.Module) -> None:
    """Decode everything that a loaded model holds."""
    if isinstance(model, DynamicModel):
        for task in model.tasks:
            model.set_task(task)
        model.unset_task()
        model.storage


def _read_model(place: Path) -> None:
    _tasks_of(load_artifact(place, body()))


def _didi(place: Path) -> None:
    DiDiModel(body(), *every_form(), unit_bits=10000).save_pretrained(place)


def _routed(place: Path) -> None:
    shared, experts = every_form()
    model = DynamicModel(body(), shared, experts, unit_bits=10000)
    router = make_router("mlp", model.tasks, layers=["first"], pooling="mean")
    g = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat(6)
    router.fit(torch.randn(18, M, generator=g), labels, epochs=1, width=4)
    model.attach_router(router).save_pretrained(place)


def _modules() -> dict[str, ModularExpert]:
    shared, experts = every_form()
    plain = {"second.bias": AffineDelta.of(torch.linspace(-1, 1, N))}
    forms = {k: v for k, v in shared.items() if k != "first.bias"}
    own = {t: {k: v for k, v in e.items() if k in forms} for t, e in experts.items()}
    found = (
        ModularExpert("all-1", "all", tuple(experts), "didi@0.1", forms, own),
        ModularExpert("rest-2", "rest", ("a", "e"), "average", plain, {}),
    )
    return {module.id: module for module in found}


def _recombined(place: Path) -> None:
    modules = _modules()
    chains = {"a": list(modules), "b/c.d": ["all-1"], "e": list(modules)}
    model = RecombinedModel(body(), modules, chains, unit_bits=10000)
    model.save_pretrained(place)


def _individuals(place: Path) -> None:
    models = [(task, _moved(i + 1)) for i, task in enumerate("ab")]
    base = body()
    types = {name: torch.float32 for name, _ in base.named_parameters()}
    models[1][1].second = nn.Linear(M, 3)  # a head of its own size
    save_artifact(models, place, base=base, types=types)


def _static(place: Path) -> None:
    base = body()
    types = {name: torch.float16 for name, _ in base.named_parameters()}
    save_artifact(_moved(1), place, base=base, types=types)


@torch.no_grad()
def _moved(seed: int) -> Body:
    g, model = torch.Generator().manual_seed(seed), body()
    for value in model.parameters():
        value += 0.1 * torch.randn(value.shape, generator=g)
    return model


def _smile(place: Path) -> None:
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear

    model, tuned = body(), [_moved(1), _moved(2)]
    model.first = SmileMoELinear(model.first, [m.first for m in tuned], gate_k=2, k=3)
    _mixture(model, place)


def _wemoe(place: Path) -> None:
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    model, tuned = body(), [_moved(1), _moved(2)]
    with torch.no_grad():
        model.second.weight += 0.1
    model.first = WeightEnsemblingMoE(
        N, model.first, [m.first for m in tuned], router_hidden_layers=1
    )
    _mixture(model, place)


def _mixture(model: nn.Module, place: Path) -> None:
    base = body()
    types = {name: torch.float32 for name, _ in base.named_parameters()}
    save_artifact(model, place, base=base, types=types)


def _write_adapter(place: Path) -> None:
    place.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"second": 3, r"conv\d*": 2},
        "alpha_pattern": {"first": 8},
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": ["norm"],
    }
    (place / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"base_model.model.norm.weight": torch.ones(N)}
    for name, (m, n), r in (("first", (M, N), 2), ("second", (N, M), 3)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(r, n)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(m, r)
    save_file(tensors, place / "adapter_model.safetensors")


def _read_adapter(place: Path) -> None:
    base = ModuleSource(body(), "base")
    adapter = AdapterSource.of_directory(place, "task", base.infos())
    if not adapter.faults:
        for name in adapter.infos():
            adapter.applied(name, base.read(name)) if name in base.infos() else None


class _Space:
    shape = (2, 2, 3)


def _write_state(place: Path) -> None:
    place.mkdir()
    one = Evaluation([[[0, 1], [2, 0]], [[0, 0], [1, 0]]], 0.5, 1.5, {"a": 0.4, "b": 1})
    state = {"search": {"seed": 0}, "generation": 1, "kept": [0, 1]}
    state["evaluations"] = [one.as_dict(), one.as_dict()]
    (place / "search.json").write_text(json.dumps(state))


def _read_state(place: Path) -> None:
    load_state(place / "search.json", {"seed": 0}, _Space())


CASES = {
    "model": Case(_didi, _read_model),
    "router": Case(_routed, _read_model),
    "modules": Case(_recombined, _read_model),
    "individuals": Case(_individuals, _read_model),
    "static": Case(_static, _read_model),
    "smile": Case(_smile, _read_model),
    "wemoe": Case(_wemoe, _read_model),
    "adapter": Case(_write_adapter, _read_adapter),
    "state": Case(_write_state, _read_state),
    "shards": Case(more.write_shards, more.read_weights),
    "pickles": Case(more.write_pickles, more.read_weights),
    "float8": Case(more.write_float8, more.read_weights),
    "rows": Case(more.write_rows, more.read_rows),
    "old": Case(more.write_old, more.read_old),
}
