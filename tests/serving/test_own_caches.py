"""Batches of several tasks through architectures that have caches of their own, such as the states of a recurrence."""

import pytest
import torch
from exact_models import GROUPED, SIDES, exact_model, pool_of, seeded, tokens
from helpers import TRANSFORMERS
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.serving.trees import leaves

RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **SIDES}
MAKE = {
    "a list by layer": lambda: MambaForCausalLM(MambaConfig(**RECURRENT)),
    "layers stacked": lambda: Mamba2ForCausalLM(
        Mamba2Config(**RECURRENT, num_heads=8, head_dim=8, n_groups=1, chunk_size=16)
    ),
    "with attention": lambda: Lfm2ForCausalLM(
        Lfm2Config(**GROUPED, **SIDES, layer_types=["conv", "full_attention"])
    ),
}
TASKS = ["b", "a", "b", "b", "a"]


@pytest.mark.parametrize("kind", MAKE)
def test_states_come_back_of_every_sample_under_its_own_task(kind):
    models = pool_of(seeded(MAKE[kind]), scale=0.1)
    ids = tokens(5, 6)
    with torch.no_grad():
        out = exact_model(models)(ids, task_ids=TASKS, use_cache=True)
        rows = [models[t](ids[i : i + 1], use_cache=True) for i, t in enumerate(TASKS)]
    name = "cache_params" if "cache_params" in out else "past_key_values"
    found, alone = leaves(out[name]), [leaves(row[name]) for row in rows]
    compared = 0
    for path, value in found.items():
        if not isinstance(value, torch.Tensor) or not value.numel():
            continue
        side = next(s for s, n in enumerate(value.shape) if n != alone[0][path].shape[s])  # fmt: skip
        expected = torch.cat([one[path] for one in alone], side)
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
        compared += 1
    assert compared >= 2
    assert getattr(out[name], "max_batch_size", 5) == 5


@pytest.mark.parametrize("kind", MAKE)
def test_states_that_are_given_are_every_samples_own_or_refused(kind):
    """Which side of them is the samples nobody says before transformers 5; as many layers as samples would be taken for them."""
    models = pool_of(seeded(MAKE[kind]), scale=0.1)
    ids, tasks = tokens(2, 7), ["b", "a"]

    @torch.no_grad()
    def second(forward, ids, **task) -> torch.Tensor:
        out = forward(ids[:, :6], use_cache=True, **task)
        name = "cache_params" if "cache_params" in out else "past_key_values"
        more = {name: out[name], "cache_position": torch.tensor([6])}
        return forward(ids[:, 6:], use_cache=True, **more, **task).logits

    model = exact_model(models)
    if TRANSFORMERS < 5:
        with pytest.raises(DiDiError, match="cache_params|past_key_values"):
            second(model, ids, task_ids=tasks)
        return
    found = second(model, ids, task_ids=tasks)
    for i, task in enumerate(tasks):
        alone = second(models[task], ids[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-4, rtol=1e-4)
