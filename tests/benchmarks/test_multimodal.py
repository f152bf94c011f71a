"""Experts of three modalities on one language model: encoders and projectors are their own, through every kind of merge."""

import copy
import json
from pathlib import Path

import pytest
import torch
from exact_models import seeded
from helpers import BASE, REPOSITORY

from benchmarks import multimodal_suite
from benchmarks.multimodal import (
    MODALITIES,
    PAD,
    MultimodalModel,
    draw,
    sentences,
    words_right,
)


@pytest.fixture(scope="module")
def models():
    base = seeded(MultimodalModel).eval()
    found = {BASE: base}
    for seed, name in enumerate(MODALITIES):
        found[name] = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        parts = ("language_model.", f"encoders.{name}.", f"projectors.{name}.")
        for key, value in found[name].named_parameters():
            if key.startswith(parts):
                noise = torch.randn(value.shape, generator=generator)
                value.data += 0.1 * value.std().nan_to_num(1.0) * noise
    return found


@pytest.mark.parametrize("modality", MODALITIES)
def test_what_is_drawn_is_what_is_said(modality):
    inputs, picks = draw(modality, 6, torch.Generator().manual_seed(0))
    again, same = draw(modality, 6, torch.Generator().manual_seed(0))
    assert inputs.equal(again) and picks.equal(same) and inputs.isfinite().all()
    said = sentences(modality, picks)[:, 1:]
    assert words_right(said, picks, modality) == 1
    assert words_right(said[:, :1], picks, modality) < 1
    assert words_right(torch.full_like(said, PAD), picks, modality) == 0
    wrong = picks.clone()
    wrong[:, 0] = 1 - picks[:, 0]
    expected = 1 - 1 / len(MODALITIES[modality].choices)
    assert words_right(said, wrong, modality) == pytest.approx(expected)


def test_whole_experts_come_back_through_a_directory(models):
    """With room for everything, what is saved and loaded says what the fine-tuned model says; own tensors to the bit."""
    model, size = multimodal_suite.didi(models, 40.0)(models)
    unit = multimodal_suite.language_bytes(models[BASE])
    own = sum(multimodal_suite.own_bytes(models[m], m) for m in MODALITIES)
    assert own < size <= 40 * unit + own
    for name in MODALITIES:
        inputs, picks = draw(name, 3, torch.Generator().manual_seed(1))
        ids = sentences(name, picks)
        found = model(name)(ids, name, inputs)
        torch.testing.assert_close(found, models[name](ids, name, inputs), atol=1e-3, rtol=1e-3)  # fmt: skip
        assert model(name).generate(name, inputs).equal(models[name].generate(name, inputs))  # fmt: skip


@pytest.mark.parametrize("name", ["TSV-C"])
def test_own_parts_are_counted_beside_what_is_merged(models, name):
    """``dynamic`` itself holds every task's encoder against the expert's."""
    _, size = multimodal_suite.DYNAMIC[name](models)
    assert size > sum(multimodal_suite.own_bytes(models[m], m) for m in MODALITIES)


def test_static_merges_leave_every_task_its_encoder(models):
    model, size = multimodal_suite.STATIC["Averaging"](models)
    mean = sum(models[m].language_model.lm_head.weight for m in MODALITIES) / 3
    for name in MODALITIES:
        one = model(name)
        torch.testing.assert_close(one.language_model.lm_head.weight, mean)
        inputs, _ = draw(name, 2, torch.Generator().manual_seed(1))
        assert one.seen(name, inputs).equal(models[name].seen(name, inputs))
    own = sum(multimodal_suite.own_bytes(models[m], m) for m in MODALITIES)
    assert size == multimodal_suite.language_bytes(models[BASE]) + own


def test_page_shows_the_figures_beside_it(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    record = json.loads(Path("docs/multimodal.json").read_text())
    assert Path("docs/multimodal.md").read_text() == multimodal_suite.page(record)
