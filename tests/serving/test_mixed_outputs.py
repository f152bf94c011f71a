"""Batches of several tasks: caches, states and all that a model gives beside logits."""

from types import SimpleNamespace

import pytest
import torch
from exact_models import exact_model, gpt2, llama, pool_of, qwen, seeded, t5, tokens
from helpers import BASE, TRANSFORMERS
from mixed_net import IDS, Net, close, net
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    MixtralConfig,
    MixtralModel,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.serving.banks import Serving

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
        # that other families take no longer, nor any under transformers 5
        *([("gpt2", "legacy")] if TRANSFORMERS < 5 else []),
    ],
)
def test_decoding_with_a_cache_is_every_samples_own(make, kind, how):
    models = pool_of(CACHED[make]())
    model = exact_model(models, how)
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
    model = exact_model(models, how)
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
            "a loss": lambda: (y.mean(), y),
            "a sum": lambda: y.sum(0),
            "a weight": lambda: self.last.weight.norm(),
            "its words": lambda: self.words,
            "similarities": lambda: y @ y.mT,
            "a list": lambda: list(y),
            "a list of lengths": lambda: [{"over": row[row > 0]} for row in y],
            "a ragged list": lambda: [row[: 1 + i] for i, row in enumerate(y)],
            "a list of several": lambda: [*y] if len(y) > 1 else [],
            "some rows": lambda: y[y[:, 0] > -9][1:],
            "an object": lambda: SimpleNamespace(y=y),
        }
        return y, beside[self.what]()


def _beside(what: str, how: str):
    models = pool_of(seeded(lambda: Gives(what)))
    model = exact_model(models, how)
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


class Flat(nn.Module):
    """Gives the parts of all samples in one row."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.reshape(-1, 2))


@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_samples_have_as_many_rows_as_they_are_given(how):
    """Whatever ran before."""
    models, tasks = pool_of(seeded(Flat)), ["b", "a", "a", "b"]
    model = exact_model(models, how)
    for parts in (2, 3, 1, 2):
        x = torch.randn(4, 2 * parts)
        rows = [models[t](x[i : i + 1]) for i, t in enumerate(tasks)]
        close(model(x, task_ids=tasks), torch.cat(rows))


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("what", ["a list", "a list of lengths"])
def test_lists_of_one_item_for_each_sample_are_sorted_back(what, how):
    model, run, own, _ = _beside(what, how)
    found = run()
    assert len(found) == len(own)
    for value, (expected,) in zip(found, own):
        close(*((v if what == "a list" else v["over"]) for v in (value, expected)))
    assert model.mixed.trusted == (how == "layered")


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize(
    "what",
    [
        "the size",
        "a sum",
        "a weight",
        "its words",
        "a ragged list",
        "a list of several",
        "some rows",
        "an object",
    ],
)
def test_what_is_of_no_sample_is_refused(what, how):
    model, run, *_ = _beside(what, how)
    with pytest.raises(DiDiError, match="by themselves"):
        run()
    x = torch.randn(4, 4)  # one task by itself is its own model
    model.materialize("b")(x)
    assert model(x, task_ids=["b"] * 4)[0].shape == (4, 3)


class Towers(nn.Module):
    """Two towers and the scale of what they are compared by, as OpenCLIP gives them."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.full(shape, 2.0))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.image(image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.text(text)

    def forward(self, image: torch.Tensor, text=None) -> tuple:
        texts = None if text is None else self.encode_text(text)
        return self.encode_image(image), texts, self.scale.exp()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("both", [False, True])
def test_a_weight_of_each_task_is_told_as_such_with_what_gives_each_samples(
    shape, both
):
    models, tasks = pool_of(seeded(lambda: Towers(shape))), ["b", "a", "b"]
    model, given = exact_model(models), [torch.randn(3, 4)] * (1 + both)
    a, b = (f"{models[task].scale.exp().item():.6g}" for task in "ab")
    with pytest.raises(DiDiError, match=rf"^output\[2\] is one for each task \({a} for 'a' and {b} for 'b'\).*call encode_image or encode_text"):  # fmt: skip
        model(*given, task_ids=tasks)
    found = model.encode_text(given[0], task_ids=tasks)
    for i, task in enumerate(tasks):
        close(found[i], models[task].text(given[0][i]))


def test_a_weight_that_tasks_have_alike_is_given_as_it_is():
    models = pool_of(seeded(Towers))
    for model in models.values():
        model.scale.data.fill_(2.0)
    given, model = torch.randn(3, 4), exact_model(models)
    images, texts, scale = model(given, given, task_ids=["b", "a", "b"])
    assert scale.equal(models[BASE].scale.exp())
    close(images[1], models["a"].image(given[1]))
    close(texts[2], models["b"].text(given[2]))


def test_outputs_without_names_go_by_their_numbers():
    """As under return_dict=False."""
    _, run, *_ = _beside("a loss", "grouped")
    with pytest.raises(DiDiError, match=r"^output\[1\]\[0\] is one for each task"):
        run()


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
    with pytest.raises(DiDiError, match="logits_per_.* call get_image_features"):
        model.mixed.network = None
        model(**given, task_ids=tasks)
    features = model.get_image_features(given["pixel_values"], task_ids=tasks)
    for i, task in enumerate(tasks):
        own = models[task].get_image_features(given["pixel_values"][i : i + 1])
        if TRANSFORMERS < 5:
            close(features[i : i + 1], own)
        else:
            assert features.keys() == own.keys()
            for key in own:
                close(features[key][i : i + 1], own[key])


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


class Lengthwise(nn.Module):
    """Samples on the second side of what comes out, as of recurrent networks."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x)[None], self.last(x).mT


@pytest.mark.parametrize("make", [Lengthwise, lambda: Gives("a list")])
@pytest.mark.parametrize("first", [True, False], ids=["at once", "later"])
def test_compiled_outputs_whose_samples_lie_on_another_side_equal_eager(make, first):
    """Also where nothing was run before that told where they lie."""
    models = pool_of(seeded(make))
    model, x = exact_model(models), torch.randn(4, 4)
    other = exact_model(models) if first else model
    for ids in ([1, 0, 1, 0], [0, 1, 1, 0]):
        expected = other(x, task_ids=ids)
        found = torch.compile(model, backend="eager")(x, task_ids=ids)
        for one, value in zip(found, expected, strict=True):
            assert all(map(torch.equal, one, value))


class Spread(nn.Module):
    """Adds to every sample what a table says of its place in the batch, which is right only for one task at a time."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        places = torch.arange(len(x))[:, None] % 2 + torch.arange(3)
        return self.last(x) + self.table(places).mean((0, 1))


def test_rows_that_are_mixed_up_are_found_out_with_a_single_task():
    """By the shared model beside it."""
    models = pool_of(seeded(Spread), ("a",))
    model, x = exact_model(models), torch.randn(4, 4)
    found = model(x, task_ids=[0, None, None, 0])
    plain = [models["a"](x[[0, 3]]), models[BASE](x[[1, 2]])]
    torch.testing.assert_close(found[[0, 3]], plain[0])
    torch.testing.assert_close(found[[1, 2]], plain[1])
