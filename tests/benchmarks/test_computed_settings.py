"""Settings that move outputs are found by changing them, and are those by which models are refused."""

import pytest
import transformers

from benchmarks.computed_settings import ELSEWHERE, moving
from fusion_bench_didi.pools.configurations import COMPUTED


@pytest.mark.parametrize(
    "name, some",
    [
        ("LlamaForCausalLM", {"hidden_act", "rms_norm_eps"}),
        ("ModernBertForSequenceClassification", {"classifier_pooling", "local_attention"}),  # fmt: skip
        ("BertModel", {"hidden_act", "layer_norm_eps"}),
    ],
)
def test_settings_that_move_outputs_are_known(name, some):
    found = set(moving(getattr(transformers, name)))
    assert some <= found
    assert found <= COMPUTED | ELSEWHERE
    assert not found & {"attention_dropout", "initializer_range", "bos_token_id"}
