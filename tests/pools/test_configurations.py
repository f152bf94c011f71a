"""Fine-tuned models that compute something else with their weights than the base model does are named."""

import logging

import pytest
from exact_models import llama
from fusion_bench.modelpool import CausalLMPool
from helpers import BASE, didi, fine_tuned

from fusion_bench_didi.errors import ModelPoolError

OTHERS = {
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("key", OTHERS)
def test_another_computation_is_named(tmp_path, caplog, key, live):
    base = llama()
    models = {BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}
    setattr(models["b"].config, key, OTHERS[key])
    entries = dict(models)
    if not live:
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
            entries[name] = str(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        didi(CausalLMPool(entries, tokenizer=None))
    told = [r.getMessage() for r in caplog.records if "fine-tuned with" in r.message]
    assert len(told) == 1 and told[0].startswith("b ") and f"{key}: " in told[0]


def test_what_changes_no_outputs_is_not(tmp_path, caplog):
    base = llama()
    models = {BASE: base, "a": fine_tuned(base, 1), "b": fine_tuned(base, 2)}
    models["a"].config.use_cache = False
    models["a"].config.attention_dropout = 0.5
    with caplog.at_level(logging.WARNING):
        didi(models)
    assert not [r for r in caplog.records if "fine-tuned with" in r.getMessage()]


def test_names_that_are_no_text():
    base = llama()
    with pytest.raises(ModelPoolError, match=r"Names of models are text.*\[1, 2\]"):
        didi({BASE: base, 1: fine_tuned(base, 1), 2: fine_tuned(base, 2)})


def test_models_that_the_host_takes_for_special_are_named(caplog):
    base = llama()
    tuned = {name: fine_tuned(base, i) for i, name in enumerate(("a", "b", "_c_"))}
    with caplog.at_level(logging.WARNING):
        assert didi({BASE: base, **tuned}).tasks == ["a", "b"]
    assert any("_c_" in record.getMessage() for record in caplog.records)
