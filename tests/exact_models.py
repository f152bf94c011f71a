"""Merged models that hold their tasks exactly, made without a merge, and small models of other families."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from helpers import BASE, fine_tuned
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fusion_bench_didi.deltas.plain import DenseDelta, OwnDelta
from fusion_bench_didi.models.dynamic import DynamicModel

#: the sides of all language models here
SIDES = {"vocab_size": 64, "pad_token_id": 0}
#: two layers of attention in which two heads share keys and values
GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def exact_model(models: Mapping[str, nn.Module], how: str = "layered") -> DynamicModel:
    """A pool's models as one: differences of parameters, and what else differs as tasks' own.

    Args:
        how: mixed batches are run; ``grouped`` by task, whatever the layers are.
    """
    base = models[BASE]
    state = _tensors(base)
    experts: dict[str, dict[str, Any]] = {}
    for task, model in models.items():
        if task == BASE:
            continue
        experts[task] = deltas = {}
        for name, value in _tensors(model).items():
            own, shape = state[name], tuple(value.shape)
            plain = isinstance(own, nn.Parameter) and own.shape == value.shape
            if plain and not value.equal(own):
                deltas[name] = DenseDelta(shape, value.double() - own.double())
            elif not plain and not (own.shape == value.shape and value.equal(own)):
                deltas[name] = OwnDelta(shape, value.detach().clone())
    merged = DynamicModel(copy.deepcopy(base), {}, experts, unit_bits=1).eval()
    if how == "grouped":
        merged.mixed.network = None
    return merged


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Of the state dict, tied ones once."""
    found, seen = {}, set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def pool_of(
    base: nn.Module, tasks: tuple[str, ...] = ("a", "b"), scale: float = 0.3
) -> dict[str, nn.Module]:
    """Well apart, so that a sample under the wrong task is seen."""
    tuned = {t: fine_tuned(base, i, scale=scale) for i, t in enumerate(tasks, 1)}
    return {BASE: base.eval(), **{t: m.eval() for t, m in tuned.items()}}


def state_of(module: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    """Every tensor, by which object it is, where it lies, and its values."""
    pairs = (*module.named_parameters(), *module.named_buffers())
    return {n: (id(t), t.data_ptr(), t.detach().clone()) for n, t in pairs}


def unchanged(before: Mapping[str, tuple[int, int, Tensor]], module: nn.Module) -> bool:
    after = state_of(module)
    return before.keys() == after.keys() and all(
        one[:2] == after[name][:2] and torch.equal(one[2], after[name][2])
        for name, one in before.items()
    )


class Classifier(nn.Module):
    """A layer, running statistics, and a head that tasks may have with other classes."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.mlp, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mlp(x)))


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def clip_tower() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return seeded(lambda: CLIPVisionModel(config))


def llama(**options: Any) -> LlamaForCausalLM:
    return seeded(
        lambda: LlamaForCausalLM(
            LlamaConfig(
                **GROUPED,
                **{**SIDES, **options},
            )
        )
    )


def qwen(**options: Any) -> Qwen2ForCausalLM:
    """Biases on queries, keys and values, and a head that is tied to the embedding."""
    return seeded(
        lambda: Qwen2ForCausalLM(
            Qwen2Config(
                **GROUPED,
                tie_word_embeddings=True,
                **{**SIDES, **options},
            )
        )
    )


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2, **SIDES
    )
    return seeded(lambda: GPT2LMHeadModel(config))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **SIDES,
    )
    return seeded(lambda: T5ForConditionalGeneration(config))


def bert(labels: int = 3, **options: Any) -> BertForSequenceClassification:
    return seeded(
        lambda: BertForSequenceClassification(
            BertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=32,
                num_labels=labels,
                **{**SIDES, **options},
            )
        )
    )


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIDES["vocab_size"], shape, generator=generator)
