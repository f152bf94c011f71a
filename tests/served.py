"""Merged models to be served, small and beside their base, and what asks them."""

import base64
import io
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from helpers import normal
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_bench_didi.deltas.plain import LowRankDelta
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.routers.base import Router
from fusion_bench_didi.service.limits import Limits

WORDS = [f"w{i}" for i in range(60)]
TASKS = ("one", "two", "three")


def saved(
    backbone: torch.nn.Module, processor, place: Path, own=MappingProxyType({}), **info
) -> Path:
    """A merged model of three tasks beside its base.

    Args:
        own: deltas by task that take the place of drawn ones.
        info: facts beside where the base model lies.
    """
    base = place / "base"
    backbone.save_pretrained(base)
    processor.save_pretrained(base)
    backbone = type(backbone).from_pretrained(base)
    experts = {
        task: {
            n: LowRankDelta(tuple(p.shape), normal(len(p), 2, seed=t), normal(2, p[0].numel(), seed=9 + t) / 9)  # fmt: skip
            for n, p in backbone.named_parameters()
            if p.ndim == 2 and "embed" not in n
        }
        for t, task in enumerate(TASKS)
    }
    for task, deltas in own.items():
        experts[task] |= deltas
    known = {"backbone": {"source": str(base)}, **info}
    model = DynamicModel(backbone, {}, experts, unit_bits=10**6, info=known)
    model.save_pretrained(place / "merged")
    return place / "merged"


def words(names=("[PAD]", "[UNK]", "[EOS]", *WORDS)) -> PreTrainedTokenizerFast:
    """A tokenizer of words.

    Args:
        names: of its tokens, in their order.
    """
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)  # fmt: skip


class Second(Router):
    """Every sample is of the second task."""

    name = "second"

    def route(self, model, *args, input_ids, **kwargs) -> torch.Tensor:
        return torch.eye(3)[1].expand(len(input_ids), -1)

    def bind(self, model) -> None: ...


LIMITS = Limits(body_kb=2, batch=4, queue=6, tokens=8, prompt_tokens=12, pixels=10_000)


def client(runner, limits=LIMITS):
    pytest.importorskip("fastapi", reason="needs the extra fusion-bench-didi[serve]")
    testing = pytest.importorskip("starlette.testclient", reason="needs httpx")
    from fusion_bench_didi.service.app import make_app

    return testing.TestClient(make_app(runner, limits), raise_server_exceptions=False)


def prompts(count: int) -> list[str]:
    return [" ".join(WORDS[i : i + 2 + i % 5]) for i in range(count)]


def alone(runner, task: str, prompt: str, tokens: int, tokenizer=None) -> str:
    """What the task's plain model says by itself, of texts that a tokenizer makes; the runner's if None."""
    tokenizer = tokenizer or runner.tokenizers[task]
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    model = runner.model.materialize(task).eval()
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def png(width: int, height: int | None = None) -> str:
    data, size = io.BytesIO(), (width, height or width)
    Image.new("RGB", size, (9, 99, 199)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
