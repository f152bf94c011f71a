"""Batches of several tasks leave the backbone as it is; losses are of all samples."""

import copy

import pytest
import torch
from exact_models import (
    bert,
    exact_model,
    gpt2,
    llama,
    pool_of,
    qwen,
    seeded,
    state_of,
    t5,
    tokens,
    unchanged,
)
from helpers import BASE
from mixed_net import close
from torch import nn
from torch.nn import functional as F

from fusion_bench_didi.errors import DiDiError

# --- the backbone stays as it is ----------------------------------------------------


@pytest.mark.parametrize(
    "make", [t5, gpt2, qwen, llama], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_a_mixed_batch_leaves_tied_tensors_as_they_are(make, how):
    models = pool_of(make())
    model = exact_model(models, how)
    if how == "layered" and make is not t5:
        assert model.mixed.network is not None
    ids = tokens(4, 5)
    given = {"input_ids": ids}
    if make is t5:
        given["decoder_input_ids"] = ids[:, :3]
    for current in (None, "b"):
        if current:
            model.set_task(current)
        before = state_of(model.backbone)
        for tasks in (["a", "b", "a", "b"], ["b"] * 4, ["b", None, "a", "a"]):
            found = model(**given, task_ids=tasks).logits
            for i, task in enumerate(tasks):
                own = {k: v[i : i + 1] for k, v in given.items()}
                close(found[i : i + 1], models[task or BASE](**own).logits)
        model(**given, task_weights=torch.full((4, 2), 0.5))
        assert unchanged(before, model.backbone)
    close(model(**given).logits, models["b"](**given).logits)
    close(model.materialize("a")(**given).logits, models["a"](**given).logits)


class Writes(nn.Module):
    """Writes to its buffers, tied ones and its attributes whenever it runs, and stops where it is told to."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(2))
        self.other = nn.Module()
        self.other.register_buffer("table", self.table)
        self.noted, self.stop = 0, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        self.calls += 1
        self.table.fill_(x.detach().sum())
        self.register_buffer("made", torch.ones(1), persistent=False)
        self.noted += 1
        if self.stop:
            raise RuntimeError("stop here")
        return self.last(x)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("only", ["", "last"])
def test_a_forward_that_writes_leaves_the_backbone_as_it_is(only, training, stop):
    """With statistics that are the tasks' own, in groups, and with layers that take a task per sample."""
    models = pool_of(seeded(Writes))
    for i, task in enumerate("ab"):
        if only:
            models[task].norm.load_state_dict(models[BASE].norm.state_dict())
        else:
            models[task].norm.running_var.fill_(2.0 + i)
    model = exact_model(models).train(training)
    model.backbone.stop = stop
    before, attributes = state_of(model.backbone), dict(vars(model.backbone))
    x, tasks = torch.randn(6, 6), ["a", "b", "b", "a", "a", "b"]
    for _ in range(2):
        if stop:
            with pytest.raises(RuntimeError, match="stop here"):
                model(x, task_ids=tasks)
        else:
            found = model(x, task_ids=tasks)
        assert unchanged(before, model.backbone)
        assert vars(model.backbone).keys() == attributes.keys()
        assert model.backbone.noted == 0 and not hasattr(model.backbone, "made")
        assert model.backbone.other.table is model.backbone.table
    if not stop:
        for task in "ab":
            rows = [i for i, other in enumerate(tasks) if other == task]
            plain = copy.deepcopy(models[task]).train(training)
            close(found[rows], plain(x[rows]))
    model.backbone.stop = False
    model.eval().set_task("b")
    close(model(x), models["b"](x))


def test_rotary_tables_that_grow_with_the_text_are_forgotten():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    models = pool_of(llama(rope_scaling=scaling, max_position_embeddings=4))
    for how in ("layered", "grouped"):
        model = exact_model(models, how)
        short, long = tokens(2, 3), tokens(2, 9)
        plain = {t: copy.deepcopy(models[t]) for t in "ab"}
        before = state_of(model.backbone)
        for ids in (short, long, short, long):
            found = model(ids, task_ids=["a", "b"], use_cache=False).logits
            for i, task in enumerate("ab"):
                close(found[i : i + 1], plain[task](ids[i : i + 1]).logits)
        assert unchanged(before, model.backbone)
        model.set_task("a")
        close(model(long).logits, plain["a"](long).logits)


def test_an_error_inside_of_a_group_leaves_the_backbone_as_it_is():
    models = pool_of(t5())
    model = exact_model(models)
    before = state_of(model.backbone)

    def stop(*_):
        raise RuntimeError("stop here")

    handle = model.backbone.decoder.block[1].register_forward_hook(stop)
    ids = tokens(2, 4)
    with pytest.raises(RuntimeError, match="stop here"):
        model(input_ids=ids, decoder_input_ids=ids, task_ids=["a", "b"])
    handle.remove()
    assert unchanged(before, model.backbone)
    found = model(input_ids=ids, decoder_input_ids=ids, task_ids=["b", "a"]).logits
    own = models["b"](input_ids=ids[:1], decoder_input_ids=ids[:1]).logits
    close(found[:1], own)


# --- losses -------------------------------------------------------------------------


def _loss_of(models, tasks, given) -> torch.Tensor:
    """The mean over all samples, or tokens that count, with every sample under its own model."""
    labels = given["labels"]
    own = [
        models[task](**{k: v[i : i + 1] for k, v in given.items()}).logits
        for i, task in enumerate(tasks)
    ]
    logits = torch.cat(own)
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(), labels.squeeze())
    if labels.ndim == 2 and hasattr(models[BASE], "lm_head"):
        if not models[BASE].config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _with_labels(kind: str) -> tuple[nn.Module, dict]:
    ids = tokens(5, 6)
    labels = tokens(5, 6, seed=1)
    labels[0, 1:5] = labels[1, 3:] = -100  # not all samples count alike
    if kind == "next token":
        return llama(), {"input_ids": ids, "labels": labels}
    if kind == "next token, tied":
        return gpt2(), {"input_ids": ids, "labels": labels}
    if kind == "given the text":
        return t5(), {"input_ids": ids, "labels": labels}
    if kind == "classes":
        return bert(3), {"input_ids": ids, "labels": torch.tensor([0, 2, -100, 1, 1])}
    return bert(1), {"input_ids": ids, "labels": torch.randn(5)}


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize(
    "kind", ["next token", "next token, tied", "given the text", "classes", "a number"]
)
def test_a_loss_is_the_mean_over_all_samples(kind, how):
    base, given = _with_labels(kind)
    models = pool_of(base)
    model = exact_model(models, how)
    for tasks in (["b", "a", "a", "b", "a"], ["a", "b", "b", "b", "b"], ["b"] * 5):
        expected = _loss_of(models, tasks, given)
        close(model(**given, task_ids=tasks).loss, expected)
        found = model(**given, task_ids=tasks, return_dict=False)
        close(found[0], expected)


class OddLoss(nn.Module):
    """A loss that is no mean over samples."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        logits = self.last(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return {"loss": loss, "logits": logits}


def test_a_loss_that_is_not_known_is_refused_where_groups_are_run():
    models = pool_of(seeded(OddLoss))
    model = exact_model(models)
    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    tasks = ["a", "b", "b", "a"]
    logits = torch.stack([models[t].last(x[i]) for i, t in enumerate(tasks)])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    close(model(x, labels=labels, task_ids=tasks)["loss"], expected)
    model.mixed.network = None
    with pytest.raises(DiDiError, match="^loss is of .* one task each.*asks.*labels"):
        model(x, labels=labels, task_ids=tasks)
    found = model(x, labels=labels, task_ids=["b"] * 4)["loss"]
    close(found, models["b"](x, labels)["loss"])


class Balancing(nn.Module):
    """A loss beside the labels' own, as of experts that are to be used alike."""

    def __init__(self, always=False):
        super().__init__()
        self.last, self.always = nn.Linear(4, 3), always

    def forward(self, x, labels=None, output_router_logits=False):
        logits = self.last(x)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits, labels)
        if output_router_logits or self.always:
            found["aux_loss"] = logits.softmax(1).mean(0).square().sum()
        return found


@pytest.mark.parametrize(
    "always, asked, told",
    [
        (False, ["output_router_logits"], r"aux_loss is .*\(output_router_logits=True\)"),  # fmt: skip
        (False, ["labels", "output_router_logits"], r"loss and aux_loss are .*\(labels, output_router_logits=True\)"),  # fmt: skip
        (True, [], r"aux_loss is one for each task \(.* mean or sum .*configuration"),
        (True, ["labels"], r"loss and aux_loss are .*\(labels\)"),
    ],
)
def test_what_asked_for_a_loss_that_is_not_known_is_named(always, asked, told):
    model = exact_model(pool_of(seeded(lambda: Balancing(always))))
    model.mixed.network = None
    options = {"labels": torch.tensor([0, 1, 2, 0]), "output_router_logits": True}
    given = {name: options[name] for name in asked}
    with pytest.raises(DiDiError, match=f"^{told}"):
        model(torch.randn(4, 4), task_ids=["a", "b", "b", "a"], **given)
