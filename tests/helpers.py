"""What several test files need beside the fixtures: merging in one call, and small models of other families."""

import copy
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.merging.settings import Budget, MergeSettings
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.pools.opening import open_pool
from fusion_bench_didi.programs.sizes import PoolFacts, facts_of
from fusion_bench_didi.task_vectors.reader import TaskVectors
from fusion_bench_didi.task_vectors.sources import ModuleSource

#: Its generation: 5 names and returns some things otherwise.
TRANSFORMERS = int(version("transformers").partition(".")[0])
#: What stands in front of the names of a CLIP tower in memory.
TOWER = "vision_model." if TRANSFORMERS < 5 else ""
REPOSITORY = Path(__file__).resolve().parents[1]
BASE = "_pretrained_"
# Named, so that these tests do not depend on what is the default today.
PLAIN = {
    "allocation": "greedy",
    "factor_dtype": "checkpoint",
    "normalization": "root",
}

#: Settings that make the default quick.
QUICK = {"refine_sweeps": 2}


def quick(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are enough for tests that are not about learning or refining well."""
    few = {}
    if settings.get("allocation") == "learned":
        few["rank_steps"] = 20
        if settings.get("residual") != "full":
            few["warm_start"] = False  # greedy ranks leave nothing to learn then
    how = settings.get("refinement", "alternating")
    if how == "adam":
        few["refine_steps"] = 10
    elif how == "alternating" and settings.get("shared") != "none":
        few["refine_sweeps"] = 2
    return {**few, **settings}


def pairwise(rows: Iterable[tuple]) -> list[tuple]:
    """Some of the rows, in which every two values that any row has together are met together."""
    pairs = {row: {*itertools.combinations(enumerate(row), 2)} for row in rows}
    left, found = set().union(*pairs.values()), []
    while left:
        found.append(max(pairs, key=lambda row: len(pairs[row] & left)))
        left -= pairs[found[-1]]
    return found


def accepted(settings: Mapping[str, Any]) -> bool:
    """Whether the method takes these settings together: it refuses those of which some would do nothing."""
    try:
        DiDiMerging(**quick({**PLAIN, **settings}))
    except SettingsError:
        return False
    return True


def combinations(**values: Sequence[Any]) -> list[Any]:
    """Parameters for combinations of settings that the method takes, every two values together in one of them."""
    rows = itertools.product(*values.values())
    found = pairwise(row for row in rows if accepted(dict(zip(values, row))))
    return [pytest.param(dict(zip(values, row)), id="-".join(map(str, row))) for row in found]  # fmt: skip


def didi(models: Mapping[str, nn.Module] | BaseModelPool, **settings: Any) -> DiDiModel:
    """Merge live models, or a pool, by the method that the YAML names."""
    pool = models if isinstance(models, BaseModelPool) else BaseModelPool(models)
    return DiDiMerging(**quick({**PLAIN, **settings})).run(pool)


def merge_settings(budget: float | Budget, **choice: Any) -> MergeSettings:
    """The same choices for the pipeline below the method."""
    include = isinstance(budget, Budget) and budget.include_backbone
    ratio = budget.ratio if isinstance(budget, Budget) else budget
    given = {k: choice.pop(k) for k in ("learning", "refining") if k in choice}
    settings = {**PLAIN, **choice}
    if "refining" not in given:
        settings = quick(settings)
    method = DiDiMerging(budget=ratio, budget_includes_backbone=include, **settings)
    return replace(method.settings(), **given)


def task_vectors(models: Mapping[str, nn.Module], **choice: Any) -> TaskVectors:
    sources = {name: ModuleSource(model, name) for name, model in models.items()}
    return TaskVectors(sources.pop(BASE), sources, **choice)


def pool_facts(pool: BaseModelPool, backbone: nn.Module) -> PoolFacts:
    """What a comparison finds out about a pool."""
    return facts_of(open_pool(pool, backbone), backbone)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floats(module: nn.Module) -> dict[str, Tensor]:
    """Independent copies of all floating-point tensors of the state dict."""
    state = module.state_dict().items()
    return {n: v.detach().clone() for n, v in state if v.is_floating_point()}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@torch.no_grad()
def fine_tuned(base: nn.Module, seed: int, *, scale: float = 0.05) -> nn.Module:
    """The base model with every parameter changed."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    for value in model.parameters():
        value += scale * torch.randn(value.shape, generator=generator)
    return model


def family(base: nn.Module, tasks: tuple[str, ...] = ("mnist", "svhn")) -> dict:
    """A pool's ``models`` around a base model."""
    tuned = {task: fine_tuned(base, seed) for seed, task in enumerate(tasks, 1)}
    return {BASE: base.eval(), **tuned}


class Payload:
    """What a pickle could run."""

    def __reduce__(self):
        return (print, ("this must not run",))


class OpenClipLike(nn.Module):
    """What OpenCLIP's image encoder is made of: a convolution, fused attention, a scalar, a projection by hand."""

    def __init__(self, width: int = 16, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
            self.ln = nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
            self.proj = nn.Parameter(torch.randn(width, 12))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        # What the host's ImageClassifier asks of an encoder.
        self.train_preprocess = self.val_preprocess = None

    def forward(self, images: Tensor) -> Tensor:
        x = self.ln(self.conv1(images).flatten(2).mT)  # (batch, patches, width)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.logit_scale * x.mean(1) @ self.proj


class Oddities(nn.Module):
    """Tied weights, an integer buffer, running statistics, and a tensor that no task changes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(20, 8)
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def tower_of(model: nn.Module) -> nn.Module:
    """The module that holds embeddings and layers of a ``CLIPVisionModel``."""
    return getattr(model, "vision_model", model)


def write_clip(directory: Path, vision: CLIPVisionModel) -> Path:
    """A CLIP with a small text tower and a processor of bytes, as the host's task pool loads them."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True)
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges))
    side = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision.config.to_dict(), projection_dim=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(config)
    clip.vision_model.load_state_dict(tower_of(vision).state_dict())
    clip.save_pretrained(directory)
    return directory


def pictures(seed: int, count: int = 12, classes: int = 10) -> list[dict]:
    """Noise with labels, as a list of what the host calls items."""
    draw = random.Random(seed)
    return [
        {
            "image": Image.frombytes("RGB", (32, 32), draw.randbytes(32 * 32 * 3)),
            "label": draw.randrange(classes),
        }
        for _ in range(count)
    ]


def ideal_bits(symbols: Tensor, alphabet: int) -> float:
    """Entropy of the symbols under their own frequencies: what a static code of them takes at least."""
    counts = torch.bincount(symbols.flatten().cpu(), minlength=alphabet).double()
    shares = counts / counts.sum().clamp(min=1)
    return float(-torch.special.xlogy(counts, shares).sum() / torch.tensor(2.0).log())


def without_codes(monkeypatch) -> None:
    """Entropy-coded experts do not compete: for what is to be told of fixed widths."""
    from fusion_bench_didi.merging.forms import choice, early_decision

    others = tuple(form for form in choice.FORMS if form.name != "coded")
    monkeypatch.setattr(choice, "FORMS", others)
    monkeypatch.setattr(early_decision, "_codes_compete", lambda *_: False)


def demo_pools(cache: Path) -> dict[str, dict[str, Any]]:
    """Configurations of the demo's model pool and task pool, whose suite lies in a directory."""
    sides = {
        side: {
            "_target_": f"fusion_bench_didi.demo.pools.DemoCLIPVision{name}",
            "cache_dir": str(cache),
            "size": "tiny",
        }
        for side, name in (("modelpool", "ModelPool"), ("taskpool", "ModelTaskPool"))
    }
    sides["taskpool"]["dataloader_kwargs"] = {"batch_size": 32}
    return sides
