"""Pools of headers: they are planned as pools of weights are, and take no room."""

import json
from pathlib import Path

import torch
from helpers import REPOSITORY
from transformers import AutoModelForCausalLM

from benchmarks import large_models
from fusion_bench_didi import DiDiMerging

SIDES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL = {**SIDES, "num_attention_heads": 8, "vocab_size": 64}


def test_hollow_pools_are_planned_as_whole_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(large_models, "SHARD", 60_000)
    names = ["_pretrained_", "a", "b"]
    hollow = large_models.hollow(tmp_path / "hollow", SMALL, names)
    files = [f for d in hollow.values() for f in Path(d).glob("*.safetensors")]
    assert len(files) > len(names)
    for file in files:  # what is missing reads as zeros, and was never written
        assert file.stat().st_blocks * 512 < max(file.stat().st_size, 16384)
    whole = {}
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(hollow[name], dtype="auto")
        assert model.dtype == torch.bfloat16
        assert not any(p.any() for n, p in model.named_parameters())
        whole[name] = str(tmp_path / "whole" / name)
        model.save_pretrained(whole[name])
    plans = []
    for directories in (hollow, whole):
        DiDiMerging(budget=2.0, dry_run=True).run(large_models.pool(directories))
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1] and "2 tasks: a, b" in plans[0]


def test_page_shows_the_figures_beside_it(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    record, limited = (json.loads(Path("docs", name).read_text()) for name in ("large_models.json", "memory.json"))  # fmt: skip
    assert Path("docs/large_models.md").read_text() == large_models.page(record, limited)  # fmt: skip
