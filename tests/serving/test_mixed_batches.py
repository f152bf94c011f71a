"""Batches of several tasks: what is taken for a task and a sample, outputs that are no logits, and a backbone that stays as it is."""

import copy
from types import SimpleNamespace

import numpy as np
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
from torch import nn
from torch.nn import functional as F
from transformers import (
    BatchEncoding,
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    MixtralConfig,
    MixtralModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusion_bench_didi.errors import DiDiError, UnknownTaskError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.serving.banks import Serving

IDS = [1, 0, 1, 0, 2]
NAMES = ["b", "a", "b", "a", None]


class Net(nn.Module):
    """Two layers, one answer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


@pytest.fixture
def net() -> SimpleNamespace:
    models = pool_of(seeded(Net))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    plain = [models["a"], models["b"], models[BASE]]
    rows = [plain[t](x[i : i + 1]) for i, t in enumerate(IDS)]
    return SimpleNamespace(model=exact_model(models), x=x, expected=torch.cat(rows))


# --- tasks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        torch.tensor(IDS, dtype=torch.uint8),
        np.array(IDS),
        IDS,
        tuple(IDS),
        NAMES,
        tuple(NAMES),
        np.array(NAMES, dtype=object),
        ["b", 0, torch.tensor(1), np.int64(0), None],
        [1, 0, "b", "a", 2],
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_tasks_may_be_given_by_position_or_name_in_any_sequence(net, ids):
    close(net.model(net.x, task_ids=ids), net.expected)


def test_an_array_of_names_is_a_list_of_names(net):
    found = net.model(net.x, task_ids=np.array(["b", "a", "b", "a", "a"]))
    close(found[:4], net.expected[:4])


@pytest.mark.parametrize("weights", [torch.eye(2)[[1, 0, 1, 0]], [[0, 1], [1, 0]] * 2])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, lambda rows: rows])
def test_weights_may_be_a_tensor_an_array_or_rows(net, weights, kind):
    found = net.model(net.x[:4], task_weights=kind(weights))
    close(found, net.expected[:4])


@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 10])
def test_another_number_of_tasks_is_refused_with_both_numbers(net, size):
    ids = torch.arange(size) % 2
    with pytest.raises(DiDiError, match=rf"{size} task_ids for a batch of 5 samples"):
        net.model(net.x, task_ids=ids)
    with pytest.raises(DiDiError, match=rf"{size} task_ids for a batch of 5 samples"):
        net.model(net.x, task_ids=["a"] * size)
    with pytest.raises(DiDiError, match=rf"{size} rows of task_weights .* 5 samples"):
        net.model(net.x, task_weights=torch.eye(2)[ids])
    with pytest.raises(DiDiError, match=rf"{size} rows of task_weights .* 5 samples"):
        net.model(net.x, task_weights=torch.full((size, 2), 0.5))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([True, False, True, False, False]),
        [True, False, True, False, False],
        torch.tensor(IDS, dtype=torch.float32),
        [1.0, 0.0, 1.0, 0.0, 2.0],
        np.array(IDS, dtype=np.float64),
        torch.tensor([IDS]),
        torch.tensor([IDS]).T,
        torch.tensor(1),
        1,
        "b",
        b"babab",
    ],
)
def test_what_is_no_position_and_no_name_is_refused(net, ids):
    with pytest.raises(DiDiError, match="task_ids"):
        net.model(net.x, task_ids=ids)


@pytest.mark.parametrize("wrong", [-1, 3, 99, "c", "A", ""])
def test_tasks_that_are_not_there_are_named(net, wrong):
    for ids in ([0, 1, 0, 1, wrong], np.array([0, 1, 0, 1, wrong], dtype=object)):
        with pytest.raises(UnknownTaskError, match=r"\['a', 'b'\]"):
            net.model(net.x, task_ids=ids)


@pytest.mark.parametrize(
    "weights, what",
    [
        (torch.eye(3)[[0, 1, 2, 0, 1]], "3"),
        (torch.ones(5, 1), "1"),
        (torch.ones(5), "expected one row per sample"),
        (torch.ones(5, 2, 1), "expected one row per sample"),
        (torch.tensor([[1.0, float("nan")]] * 5), "NaN"),
        (torch.tensor([[1.0, float("inf")]] * 5), "infinity"),
        ([["a", "b"]] * 5, "no matrix of numbers"),
        ([[1, 2], [3]], "no matrix of numbers"),
    ],
)
def test_weights_that_are_none_are_refused(net, weights, what):
    with pytest.raises(DiDiError, match=what):
        net.model(net.x, task_weights=weights)


def test_tasks_and_weights_at_once_are_refused(net):
    with pytest.raises(DiDiError, match="not both"):
        net.model(net.x, task_ids=IDS, task_weights=torch.ones(5, 2))


# --- samples ------------------------------------------------------------------------


class Takes(nn.Module):
    """Adds up rows of whatever it is given, where only ``x`` is sure to hold one per sample."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x, scale=None, table=None, *, more=None, cache_position=None):
        if isinstance(x, (dict, BatchEncoding)):
            x = x["x"]
        if isinstance(x, (tuple, list)):
            x = sum(x)
        y = self.last(x)
        for other in (scale, *(more or {}).values()):
            y = y if other is None else y * other.view(-1, 1)
        if table is not None:
            y = y @ table
        return y if cache_position is None else y + cache_position.sum()


def _given(size: int) -> dict:
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(1.0, size + 1)
    return {
        "positional": ((x,), {}),
        "by name": ((), {"x": x}),
        "rows after it": ((x, rows), {}),
        "named the other way round": ((), {"scale": rows, "x": x}),
        "a mapping": (({"x": x},), {}),
        "transformers' mapping": ((BatchEncoding({"x": x}),), {}),
        "a tuple": (((x, x),), {}),
        "a list": (([x, 2 * x],), {}),
        "a table for all": ((x,), {"table": torch.eye(3)[:, :2] + 1}),
        "rows inside": ((x,), {"more": {"one": rows, "other": rows.flip(0)}}),
        "rows as an array": ((x,), {"more": {"one": rows}}),
        "positions for all": ((x,), {"cache_position": torch.arange(size)}),
    }


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("what", _given(1))
@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_samples_are_found_in_what_is_given(what, size, how):
    models = pool_of(seeded(Takes))
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    args, kwargs = _given(size)[what]
    ids = [i % 2 for i in range(size)]
    found = model(*args, **kwargs, task_ids=ids)
    for i, task in enumerate(ids):
        close(found[i], models["ab"[task]](*args, **kwargs)[i])
    with pytest.raises(DiDiError, match=rf"{size + 1} task_ids .* {size} samples"):
        model(*args, **kwargs, task_ids=[0] * (size + 1))


def test_a_call_that_tells_no_samples_is_refused(net):
    with pytest.raises(DiDiError, match="no sample"):
        net.model(net.x[:0], task_ids=[])
    with pytest.raises(DiDiError, match="tells how many samples"):
        net.model(task_ids=[0, 1])


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_masks_positions_and_numbers_of_logits_of_language_models(how, length):
    """Also where a batch is as long as its texts."""
    models = pool_of(llama())
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    ids, tasks = tokens(3, length), ["b", "a", "b"]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    options = {
        "attention_mask": mask,
        "position_ids": torch.arange(length)[None] + 1,
        "cache_position": torch.arange(length),
        "logits_to_keep": 2,
    }
    for key in ("input_ids", "inputs_embeds"):
        given = ids if key == "input_ids" else models[BASE].get_input_embeddings()(ids)
        found = model(**{**options, key: given}, task_ids=tasks).logits
        for i, task in enumerate(tasks):
            own = {**options, key: given[i : i + 1], "attention_mask": mask[i : i + 1]}
            close(found[i : i + 1], models[task](**own).logits)


def qwen_vl() -> Qwen2VLForConditionalGeneration:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=60,
        vision_start_token_id=61,
    )
    return seeded(lambda: Qwen2VLForConditionalGeneration(config))


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("size", [2, 3])
def test_positions_of_three_kinds_are_not_taken_for_samples(how, size):
    models = pool_of(qwen_vl())
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    ids, tasks = tokens(size, 4) % 50 + 3, ["b", "a", "b"][:size]
    positions = torch.arange(3 * size * 4).view(3, size, 4) % 7
    found = model(input_ids=ids, position_ids=positions, task_ids=tasks).logits
    for i, task in enumerate(tasks):
        own = models[task](
            input_ids=ids[i : i + 1], position_ids=positions[:, i : i + 1]
        )
        close(found[i : i + 1], own.logits)


def test_images_whose_patches_lie_in_one_row_are_refused():
    model = exact_model(pool_of(qwen_vl()))
    ids = tokens(2, 4) % 50
    ids[:, 1] = 60
    images = {
        "pixel_values": torch.randn(8, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    }
    assert len(model(input_ids=ids, **images, task_ids=["b", "b"]).logits) == 2
    with pytest.raises(DiDiError, match="image_grid_thw .* one row for each of the 2"):
        model(input_ids=ids, **images, task_ids=["b", "a"])


# --- the backbone stays as it is ----------------------------------------------------


@pytest.mark.parametrize(
    "make", [t5, gpt2, qwen, llama], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_a_mixed_batch_leaves_tied_tensors_as_they_are(make, how):
    models = pool_of(make())
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    elif make is not t5:
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
        model = exact_model(models)
        if how == "grouped":
            model.mixed.network = None
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
    "kind",
    ["next token", "next token, tied", "given the text", "classes", "a number"],
)
def test_a_loss_is_the_mean_over_all_samples(kind, how):
    base, given = _with_labels(kind)
    models = pool_of(base)
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
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
    x, labels, tasks = (
        torch.randn(4, 4),
        torch.tensor([0, 1, 2, 0]),
        ["a", "b", "b", "a"],
    )
    logits = torch.stack([models[t].last(x[i]) for i, t in enumerate(tasks)])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    close(model(x, labels=labels, task_ids=tasks)["loss"], expected)
    model.mixed.network = None
    with pytest.raises(DiDiError, match="loss is of the samples of one task each"):
        model(x, labels=labels, task_ids=tasks)
    found = model(x, labels=labels, task_ids=["b"] * 4)["loss"]
    close(found, models["b"](x, labels)["loss"])


# --- caches -------------------------------------------------------------------------

TASKS = ["b", "a", None, "b", "a"]
CACHED = {"llama": llama, "qwen": qwen, "gpt2": gpt2, "t5": t5}


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize(
    "make, kind",
    [
        *((make, "made") for make in CACHED),
        *((make, "given") for make in ("llama", "qwen", "gpt2")),
        *((make, "static") for make in ("llama", "qwen")),
        ("gpt2", "legacy"),  # that other families take no longer
    ],
)
def test_decoding_with_a_cache_is_every_samples_own(make, kind, how):
    models = pool_of(CACHED[make]())
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    ids, steps = tokens(5, 4), [tokens(5, 1, seed=s) for s in (1, 2, 3)]

    def run(forward, rows: slice) -> list[torch.Tensor]:
        given, key = {"input_ids": ids[rows]}, "input_ids"
        if make == "t5":
            key, given["decoder_input_ids"] = "decoder_input_ids", ids[rows, :2]
        if kind == "given":
            given["past_key_values"] = DynamicCache()
        if kind == "static":
            given["past_key_values"] = StaticCache(models[BASE].config, max_cache_len=8)
            given["cache_position"] = torch.arange(4)
        out = forward(**given, use_cache=True)
        found = [out.logits]
        for i, step in enumerate(steps):
            cache = out.past_key_values
            assert cache is given.get("past_key_values", cache)
            if kind == "legacy":
                cache = cache.to_legacy_cache()
            more = {key: step[rows], "past_key_values": cache}
            if make == "t5":
                more["encoder_outputs"] = (out.encoder_last_hidden_state,)
            if kind == "static":
                more["cache_position"] = torch.tensor([4 + i])
            out = forward(**more, use_cache=True)
            found.append(out.logits)
        return found

    found = run(lambda **given: model(**given, task_ids=TASKS), slice(None))
    for i, task in enumerate(TASKS):
        alone = run(models[task or BASE], slice(i, i + 1))
        for step, own in zip(found, alone):
            close(step[i : i + 1], own, 1e-4)


def test_a_cache_is_split_where_its_batch_is_and_left_where_it_is_not(net):
    """A cache of another number of samples is refused, and so is an object that holds tensors and says nothing of them."""
    model = exact_model(pool_of(llama()))
    cache = model(tokens(3, 4), task_ids=["a", "b", "a"]).past_key_values
    with pytest.raises(DiDiError, match="past_key_values.* one row for each of the 2"):
        model(tokens(2, 1), past_key_values=cache, task_ids=["b", "a"])
    batch = SimpleNamespace(x=torch.randn(5, 6))
    with pytest.raises(DiDiError, match="SimpleNamespace"):
        net.model(net.x, batch, task_ids=IDS)


# --- other outputs ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_states_and_attentions_of_all_layers_are_every_samples_own(how):
    models = pool_of(llama(attn_implementation="eager"))
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    ids, tasks = tokens(4, 3), ["b", "a", "a", "b"]
    options = {"output_hidden_states": True, "output_attentions": True}
    found = model(ids, task_ids=tasks, **options)
    assert type(found) is CausalLMOutputWithPast
    assert type(found.hidden_states) is tuple
    for i, task in enumerate(tasks):
        own = models[task](ids[i : i + 1], **options)
        assert found.keys() == own.keys()
        for key in ("hidden_states", "attentions"):
            assert len(found[key]) == len(own[key])
            for whole, part in zip(found[key], own[key]):
                close(whole[i : i + 1], part)


class Gives(nn.Module):
    """Gives one thing beside its answer."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.last = what, nn.Linear(4, 3)
        if what == "its words":
            self.words = nn.Parameter(torch.randn(2, 3))
        if what == "batch second":
            self.lstm = nn.LSTM(3, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple:
        y = self.last(x)
        beside = {
            "a constant": lambda: torch.arange(3),
            "an equal number": lambda: 7,
            "nothing": lambda: None,
            "a flag": lambda: True,
            "flat rows": lambda: y.flatten(),
            "batch second": lambda: self.lstm(y[:, None])[1],
            "the size": lambda: len(x),
            "a sum": lambda: y.sum(0),
            "its words": lambda: self.words,
            "similarities": lambda: y @ y.mT,
            "a ragged list": lambda: [row[: 1 + i] for i, row in enumerate(y)],
            "some rows": lambda: y[y[:, 0] > -9][1:],
            "an object": lambda: SimpleNamespace(y=y),
        }
        return y, beside[self.what]()


def _beside(what: str, how: str):
    models = pool_of(seeded(lambda: Gives(what)))
    model = exact_model(models)
    if how == "grouped":
        model.mixed.network = None
    x, tasks = torch.randn(4, 4), ["b", "a", "b", "b"]
    own = [models[t](x[i : i + 1])[1] for i, t in enumerate(tasks)]
    rows = torch.stack([models[t].last(x[i]) for i, t in enumerate(tasks)])
    return model, lambda: model(x, task_ids=tasks)[1], own, rows


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize(
    "what", ["a constant", "an equal number", "nothing", "a flag", "flat rows"]
)
def test_what_is_equal_stays_and_rows_are_sorted_back(what, how):
    _, run, own, rows = _beside(what, how)
    if what == "flat rows":
        close(run(), rows.flatten())
    elif isinstance(own[0], torch.Tensor):
        assert run().equal(own[0])
    else:
        assert run() is own[0]


@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_samples_that_are_the_second_side_are_found(how):
    _, run, own, _ = _beside("batch second", how)
    for found, *parts in zip(run(), *own):
        close(found, torch.cat(parts, 1))


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize(
    "what",
    ["the size", "a sum", "its words", "a ragged list", "some rows", "an object"],
)
def test_what_is_of_no_sample_is_refused(what, how):
    model, run, *_ = _beside(what, how)
    with pytest.raises(DiDiError, match="by themselves"):
        run()
    x = torch.randn(4, 4)  # one task by itself is its own model
    model.materialize("b")(x)
    assert model(x, task_ids=["b"] * 4)[0].shape == (4, 3)


def test_similarities_of_samples_are_those_of_the_batch_or_refused():
    _, run, _, rows = _beside("similarities", "layered")
    close(run(), rows @ rows.mT)
    _, run, _, _ = _beside("similarities", "grouped")
    with pytest.raises(DiDiError, match="together"):
        run()


def test_images_and_texts_of_several_tasks_are_compared_by_no_group():
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sides["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**sides, "vocab_size": 64, "eos_token_id": 63},
        vision_config={**sides, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    models = pool_of(seeded(lambda: CLIPModel(config)), scale=0.1)
    model = exact_model(models)
    given = {"input_ids": tokens(4, 5), "pixel_values": torch.randn(4, 3, 16, 16)}
    tasks = ["b", "a", "a", "b"]
    with pytest.raises(DiDiError, match="logits_per_image|logits_per_text"):
        model.mixed.network = None
        model(**given, task_ids=tasks)
    features = model.get_image_features(given["pixel_values"], task_ids=tasks)
    for i, task in enumerate(tasks):
        own = models[task].get_image_features(given["pixel_values"][i : i + 1])
        close(features[i : i + 1], own)


def test_router_logits_of_experts_are_sorted_back():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=64,
    )
    models = pool_of(seeded(lambda: MixtralModel(config)), scale=0.1)
    model = exact_model(models)
    ids, tasks = tokens(4, 3), ["b", "a", "a", "b"]
    found = model(ids, task_ids=tasks, output_router_logits=True, use_cache=False)
    for i, task in enumerate(tasks):
        own = models[task](ids[i : i + 1], output_router_logits=True)
        close(found.last_hidden_state[i : i + 1], own.last_hidden_state)
        close(found.router_logits[0].view(4, 3, -1)[i], own.router_logits[0])


def test_every_kind_of_call_is_compared_with_single_tasks(caplog):
    """A layer that is used otherwise only where labels are given is found out then."""

    class Branch(Net):
        def forward(self, x, other=None):
            if other is not None:
                x = x @ self.first.weight
            return super().forward(x)

    models = pool_of(seeded(Branch))
    model = exact_model(models)
    x, tasks = torch.randn(4, 6), ["b", "a", "a", "b"]
    model(x, task_ids=tasks)
    assert model.mixed.trusted
    found = model(x, torch.ones(4), task_ids=tasks)
    assert "group by group" in caplog.text
    for i, task in enumerate(tasks):
        close(found[i : i + 1], models[task](x[i : i + 1], torch.ones(1)))


def test_rows_of_a_sample_side_by_side_are_of_its_task():
    """Windows, beams and experts give layers several rows per sample."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            windows = x.reshape(-1, 2, 3)  # (B w, 2, 3)
            return self.last(self.inner(windows).reshape(len(x), -1, 3))

    models = pool_of(seeded(Windows))
    for budget in (0.0, float("inf")):
        model = exact_model(models)
        model.serving = Serving(dense_above=budget, small=0)
        x, tasks = torch.randn(4, 6, 3), ["b", "a", "a", "b"]
        found = model(x, task_ids=tasks)
        assert model.mixed.network is not None
        soft = model(x, task_weights=torch.tensor([[0.3, 0.7], [1, 0]] * 2))
        for i, task in enumerate(tasks):
            close(found[i : i + 1], models[task](x[i : i + 1]))
        close(soft[1:2], models["a"](x[1:2]))


@pytest.mark.parametrize("make", [llama, qwen, gpt2], ids=lambda make: make.__name__)
def test_language_models_run_in_one_pass(make):
    """Norms of any name, tied heads, biases, and the layers of GPT-2."""
    models = pool_of(make())
    for serving in (Serving(), Serving(small=0, dense_above=float("inf"))):
        model = exact_model(models)
        model.serving = serving
        ids, tasks = tokens(6, 5), ["b", "a", None, "b", "a", "a"]
        found = model(ids, task_ids=tasks).logits
        assert model.mixed.network is not None and model.mixed.trusted
        for i, task in enumerate(tasks):
            close(found[i : i + 1], models[task or BASE](ids[i : i + 1]).logits, 1e-4)
        weights = torch.rand(6, 2)
        soft = model(ids, task_weights=weights).logits
        model.mixed.network = None
        close(model(ids, task_weights=weights).logits, soft, 1e-4)


def test_dynamic_models_of_one_task_run_too():
    models = pool_of(seeded(Net), ("only",))
    model = exact_model(models)
    x = torch.randn(3, 6)
    close(model(x, task_ids=["only", None, "only"])[0], models["only"](x)[0])
    assert isinstance(model, DynamicModel)
