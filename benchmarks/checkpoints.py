"""Checkpoints of real shapes with realistic spectra, made on the spot: what speed and memory are measured on.

    python -m benchmarks.checkpoints vit-b-32 --tasks 8     # prints the directory

A task vector is ``s H diag(p) G`` with G Gaussian, ``p_i ~ i^(-1/2)`` and H a random rotation: 8 % of the components then
hold about 65 % of the energy, as in the fine-tuned towers of the real suite, and singular vectors are as spread out as
theirs. Tasks are independent but for a common part.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

#: Share of the energy that all tasks have in common.
COMMON = 0.05
#: Norm of a task vector over norm of the base matrix.
SIZE = 0.05


@dataclass(frozen=True)
class Shape:
    """An architecture: how to build it without weights, in what type it is stored, and which tensors no task changes."""

    build: Callable[[], nn.Module]
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()


def _clip(**config) -> Shape:
    return Shape(lambda: CLIPVisionModel(CLIPVisionConfig(**config)))


def _llama(frozen: tuple[str, ...] = (), **config) -> Shape:
    made = dict(vocab_size=32000, tie_word_embeddings=False) | config
    build = lambda: LlamaForCausalLM(LlamaConfig(**made))
    return Shape(build, torch.bfloat16, frozen)


_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
SHAPES = {
    "vit-b-32": _clip(),
    "vit-l-14": _clip(**_LARGE, num_attention_heads=16, patch_size=14),
    # the shapes of TinyLlama 1.1B
    "llama-1b": _llama(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    # the shapes of SmolLM2-135M; embeddings stay, as in short fine-tunes of small models
    "smollm2-135m": _llama(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        frozen=("model.embed_tokens.weight",),
    ),
}


def root() -> Path:
    """Where checkpoints are kept; ``FUSION_BENCH_DIDI_CACHE`` says otherwise."""
    given = os.environ.get("FUSION_BENCH_DIDI_CACHE")
    cache = Path(given) if given else Path.home() / ".cache" / "fusion_bench_didi"
    return cache / "bench"


def pool_of(shape: str, tasks: int) -> dict[str, str]:
    """Directories by model name, ``_pretrained_`` first; made where missing."""
    return {name: make(shape, tasks, i) for i, name in enumerate(_names(tasks))}


def make(shape: str, tasks: int, index: int) -> str:
    """The directory of one model, made where missing; index 0 is the base."""
    name = _names(tasks)[index]
    directory = root() / shape / name
    if not (directory / "config.json").is_file():
        print(f"making {shape} {name}", file=sys.stderr, flush=True)
        with torch.device("meta"):
            model = SHAPES[shape].build()
        kinds = {n: p.shape for n, p in model.named_parameters()}
        _write(directory, model, kinds, SHAPES[shape], index)
    return str(directory)


def _names(tasks: int) -> list[str]:
    return ["_pretrained_", *(f"task{t:02d}" for t in range(tasks))]


def _write(
    target: Path,
    model: nn.Module,
    kinds: Mapping[str, torch.Size],
    made: Shape,
    task: int,
    shard_bytes: int = 2**30,
) -> None:
    """One checkpoint, in shards, tensor by tensor; task 0 is the base."""
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    written: dict[str, int] = {}
    size = 0
    for index, (name, shape) in enumerate(kinds.items()):
        own = 0 if name in made.frozen else task
        value = _tensor(index, shape, own).to(made.dtype).contiguous()
        if size + value.nbytes > shard_bytes:
            save_file(shards[-1], beside / f"part-{len(shards)}.safetensors")
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = value
        written[name] = len(shards)
        size += value.nbytes
    meta = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], beside / "model.safetensors", metadata=meta)
    else:
        save_file(shards[-1], beside / f"part-{len(shards)}.safetensors", meta)
        files = {n: f"part-{i}.safetensors" for n, i in written.items()}
        index_file = beside / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    model.config.torch_dtype = made.dtype
    model.config.save_pretrained(beside)
    beside.rename(target)


def _tensor(index: int, shape: torch.Size, task: int) -> Tensor:
    """Tensor ``index`` of the base (task 0) or of a fine-tuned model."""
    base = _gaussian(index, 0, shape)
    if len(shape) < 2:
        base = 1 + 0.1 * base
    else:
        base = base / shape[1:].numel() ** 0.5
    if task == 0:
        return base
    own, common = _task_vector(index, task, shape), _task_vector(index, 10**6, shape)
    tau = (1 - COMMON) ** 0.5 * own + COMMON**0.5 * common
    return base + tau * (SIZE * base.norm() / tau.norm())


def _task_vector(index: int, task: int, shape: torch.Size) -> Tensor:
    gaussian = _gaussian(index, task, shape)
    if len(shape) < 2:
        return gaussian
    seed = torch.Generator().manual_seed(7919 * index + task)
    order = torch.randperm(shape[0], generator=seed) + 1
    signs = torch.randint(2, order.shape, generator=seed) * 2 - 1
    decaying = gaussian * (signs * order.rsqrt()).view(-1, *[1] * (len(shape) - 1))
    waves = torch.fft.fft(decaying, dim=0, norm="ortho")
    return waves.real - waves.imag  # Hartley's transform, which is orthogonal


def _gaussian(index: int, task: int, shape: torch.Size) -> Tensor:
    seed = torch.Generator().manual_seed(1_000_003 * task + index)
    return torch.randn(shape, generator=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--tasks", type=int, default=8)
    arguments = parser.parse_args()
    print(Path(pool_of(arguments.shape, arguments.tasks)["_pretrained_"]).parent)


if __name__ == "__main__":
    main()
