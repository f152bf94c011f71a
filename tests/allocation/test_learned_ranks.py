"""What the learned allocation does that the paper does not say: the shift of Eq. 8, and the way back to the start."""

import logging
from dataclasses import replace

import pytest
import torch
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from helpers import didi

from fusion_bench_didi.allocation.learned import (
    LearningSettings,
    gate,
    hard_gate,
    learn_ranks,
    objective,
)
from fusion_bench_didi.allocation.spectra import MatrixSpectra, Rate
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.method.didi import DiDiMerging

FULL = {"residual": "full", "shared": "mean", "allocation": "learned"}


def test_without_a_shift_it_is_eq_8():
    """``T_k(sigma_i) = sigma_i (0.5 tanh(beta (k - i)) + 0.5)``, i from 1."""
    k = torch.tensor([0.0, 1.3, 4.0])
    i = torch.arange(1.0, 7.0)
    expected = 0.5 * torch.tanh(2.0 * (k[:, None] - i)) + 0.5
    torch.testing.assert_close(gate(k, 6, beta=2.0, shift=0.0), expected)
    assert gate(torch.tensor(4.0), 6, beta=99.0, shift=0.0)[3] == 0.5, "half is lost"


@pytest.mark.parametrize("shift, cut", [(0.5, 0.0), (0.0, 0.5), (0.25, 0.0)])
def test_what_a_steep_truncation_loses_of_the_last_component(shift, cut):
    k = torch.tensor([1.0, 3.0])
    lost = hard_gate(k, 5) - gate(k, 5, beta=1e3, shift=shift)
    assert lost.sum(1).tolist() == pytest.approx([cut, cut])


@pytest.fixture
def table() -> list[MatrixSpectra]:
    """One matrix whose spectra fall, another of many equal singular values."""
    falling = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    rows = []
    for name, sigma in (("falling", falling), ("flat", torch.full((6,), 0.5))):
        rows.append(
            MatrixSpectra(
                name,
                (12, 6),
                sigma=torch.stack([0 * sigma, sigma, sigma]),
                tail_energy=torch.zeros(3),
                weights=torch.ones(2),
                rate=Rate(per_rank=18 * 32, dense=72 * 32),
            )
        )
    return rows


START = [torch.tensor([0, 3, 3]), torch.tensor([0, 0, 0])]


def learned(table, **settings):
    budget = 6 * table[0].rate.per_rank
    wild = LearningSettings(steps=1, lr=5.0, coupled=False, **settings)
    return learn_ranks(table, budget, start=START, settings=wild)


def test_the_start_is_returned_where_it_is_better_unless_told_otherwise(table, caplog):
    """One enormous step from the best ranks there are."""
    with caplog.at_level(logging.INFO):
        back = learned(table)
        assert "the start's ranks are taken" in caplog.text
        caplog.clear()
        gone = learned(table, fallback=False)
        assert "the learned ranks are taken" in caplog.text
    assert objective(table, back) == objective(table, START)
    assert objective(table, gone) > objective(table, START)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_ranks_are_learned_where_gradients_are_off(table, without):
    expected = learned(table, fallback=False)
    with without():
        told = [
            replace(row, sigma=row.sigma.clone(), weights=row.weights.clone())
            for row in table
        ]
        found = learned(told, fallback=False)
    assert [k.tolist() for k in found] == [k.tolist() for k in expected]


def test_what_is_better_than_the_start_is_kept_either_way(caplog, tiny_clip):
    models = tiny_clip.pool_models()
    options = {**FULL, "warm_start": False, "budget": 0.5, "rank_steps": 60}
    with caplog.at_level(logging.INFO):
        one = didi(models, **options)
        other = didi(models, **options, rank_fallback=False)
    assert caplog.text.count("the learned ranks are taken") == 2
    assert one.info["ranks"] == other.info["ranks"]


def test_the_shift_reaches_the_ranks(tiny_clip):
    options = {**FULL, "warm_start": False, "budget": 0.5, "rank_fallback": False}
    options |= {"rank_steps": 100, "rank_lr": 0.05}
    found = [
        didi(tiny_clip.pool_models(), **options, rank_shift=s).info["ranks"]
        for s in (0.0, 0.5)
    ]
    assert found[0] != found[1]


def test_the_papers_preset_is_eq_8_and_what_was_learned():
    config = initialize_hydra_config("fabric_model_fusion", ["method=didi/paper"])
    given = {k: v for k, v in config.method.items() if k != "_target_"}
    settings = DiDiMerging(**given).settings()
    assert (settings.learning.shift, settings.learning.fallback) == (0.0, False)
    assert (settings.warm_start, settings.normalization) == (False, "none")
    assert (settings.shared, settings.residual) == ("mean", "full")
    assert DiDiMerging().settings().learning == LearningSettings()


@pytest.mark.parametrize("setting", [{"rank_shift": 0.0}, {"rank_fallback": False}])
def test_settings_of_learning_are_refused_elsewhere(setting):
    (key,) = setting
    with pytest.raises(SettingsError, match=f"{key} is of allocation=learned"):
        DiDiMerging(**setting)
