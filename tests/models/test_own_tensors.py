"""Tensors that each task keeps as its own: heads of any number of classes, statistics, counters, and what a base model lacks."""

import copy

import pytest
import torch
from exact_models import (
    bert,
    exact_model,
    gpt2,
    llama,
    pool_of,
    seeded,
    state_of,
    tokens,
    unchanged,
)
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, fine_tuned, floats, same_bits
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fusion_bench_didi.deltas.plain import DenseDelta, OwnDelta
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.method.se_merging import SEMerging
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.serving.banks import OwnBank, Serving, ValueBank
from fusion_bench_didi.serving.held import Held
from fusion_bench_didi.serving.making import bank_of

COUNTS = {"two": 2, "six": 6, "four": 4, "again": 2}


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# --- heads --------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"hidden_size": 16, "pad_token_id": 0}


def _bert(labels):
    config = BertConfig(**SMALL, vocab_size=64, num_labels=labels)
    return BertForSequenceClassification(config)


def _roberta(labels):
    config = RobertaConfig(**SMALL, vocab_size=64, num_labels=labels)
    return RobertaForSequenceClassification(config)


def _llama(labels):
    config = LlamaConfig(**SMALL, vocab_size=64, num_labels=labels)
    return LlamaForSequenceClassification(config)


def _gpt2(labels):
    sides = {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
    config = GPT2Config(**sides, vocab_size=64, num_labels=labels)
    return GPT2ForSequenceClassification(config)


def _vit(labels):
    config = ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=labels)
    return ViTForImageClassification(config)


HEADED = {
    "bert": _bert,
    "roberta": _roberta,
    "llama": _llama,
    "gpt2": _gpt2,
    "vit": _vit,
}


def headed(make) -> dict[str, PreTrainedModel]:
    """A base model of three classes and tasks of their own numbers, fine-tuned everywhere else."""
    base = seeded(lambda: make(3))
    models = {BASE: base}
    for seed, (task, count) in enumerate(COUNTS.items(), 1):
        tuned = seeded(lambda: make(count))
        inner = fine_tuned(base.base_model, seed, scale=0.1).state_dict()
        tuned.base_model.load_state_dict(inner)
        for value in tuned.parameters():
            value.data += 0.01 * seed
        models[task] = tuned
    return models


def inputs_for(name: str, count: int = 4) -> dict:
    if name == "vit":
        pixels = torch.randn(
            count, 3, 16, 16, generator=torch.Generator().manual_seed(0)
        )
        return {"pixel_values": pixels}
    return {"input_ids": tokens(count, 5)}


@pytest.mark.parametrize("name", HEADED)
def test_heads_of_any_number_of_classes(name, tmp_path):
    models = headed(HEADED[name])
    merged = didi(models, budget=40.0).eval()
    base = floats(merged.backbone)
    names = dict(merged.config.id2label)
    given, labels = inputs_for(name), torch.tensor([1, 0, 1, 0])
    merged.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(
        tmp_path / "merged", copy.deepcopy(models[BASE])
    ).eval()
    for task in ("two", "six", "four", "six", "again"):
        expected = models[task](**given, labels=labels)
        for model in (merged, again):
            model.set_task(task)
            found = model(**given, labels=labels)
            close(found.logits, expected.logits)
            close(found.loss, expected.loss)
            assert model.config.num_labels == len(model.config.id2label) == COUNTS[task]
        plain = merged.materialize(task)
        assert plain.config.num_labels == plain.num_labels == COUNTS[task]
        assert same_shapes(plain, models[task])
        plain.save_pretrained(tmp_path / task)
        loaded = type(plain).from_pretrained(tmp_path / task).eval()
        assert same_bits(floats(loaded), floats(plain))
        assert loaded.config.num_labels == COUNTS[task]
        close(loaded(**given, labels=labels).loss, expected.loss)
    merged.unset_task()
    assert same_bits(base, floats(merged.backbone))
    assert merged.config.id2label == names and merged.config.num_labels == 3
    assert same_shapes(merged.backbone, models[BASE])


def same_shapes(left: nn.Module, right: nn.Module) -> bool:
    """Of tensors, and of what modules say of them."""
    said = ("in_features", "out_features", "num_labels", "nf", "nx")
    return all(
        vars(a).get(key) == vars(b).get(key)
        for a, b in zip(left.modules(), right.modules(), strict=True)
        for key in said
    ) and {n: v.shape for n, v in left.state_dict().items()} == {
        n: v.shape for n, v in right.state_dict().items()
    }


def test_a_batch_of_tasks_whose_heads_differ_is_refused_by_name():
    models = headed(_bert)
    model = exact_model(models)
    ids = tokens(4, 5)
    with pytest.raises(DiDiError, match=r"logits is \(2, 2\) for 'two' and .* 'six'"):
        model(ids, task_ids=["two", "six", "two", "again"])
    with pytest.raises(
        DiDiError, match=r"classifier.* no weighted mean .*'two': .*'six': "
    ):
        model(ids, task_weights=torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4))
    before = state_of(model.backbone)
    tasks = ["two", "again", "again", "two"]
    for labels in (None, torch.tensor([1, 0, 0, 1])):
        found = model(ids, task_ids=tasks, labels=labels)
        rows = [models[t](ids[i : i + 1]).logits for i, t in enumerate(tasks)]
        close(found.logits, torch.cat(rows))
        if labels is not None:
            expected = nn.functional.cross_entropy(torch.cat(rows), labels)
            close(found.loss, expected)
    labels = torch.tensor([5, 0, 3, 1])
    found = model(ids, task_ids=["six"] * 4, labels=labels)
    close(found.loss, models["six"](ids, labels=labels).loss)
    assert unchanged(before, model.backbone) and model.config.num_labels == 3
    weights = torch.tensor([[0.25, 0.0, 0.0, 0.75]] * 4)
    soft = model(ids, task_weights=weights).logits
    mean = copy.deepcopy(models["two"])
    with torch.no_grad():
        for value, other in zip(mean.parameters(), models["again"].parameters()):
            value.copy_(0.25 * value + 0.75 * other)
    close(soft, mean(ids).logits)


def test_heads_run_while_another_task_is_set():
    models = headed(_bert)
    model = exact_model(models)
    model.set_task("six")
    ids, labels = tokens(4, 5), torch.tensor([1, 3, 0, 2])
    found = model(ids, task_ids=["four"] * 4, labels=labels)
    close(found.loss, models["four"](ids, labels=labels).loss)
    assert model.config.num_labels == 6 and model.backbone.classifier.out_features == 6
    close(model(ids, labels=labels).loss, models["six"](ids, labels=labels).loss)


def test_numbers_and_classes_are_not_taken_for_one_another():
    """transformers notes down in the configuration what the first labels looked like."""
    models = {BASE: bert(3), "score": bert(1), "class": bert(4)}
    for seed, task in enumerate(("score", "class")):
        models[task].bert = fine_tuned(models[BASE].bert, seed)
    model = exact_model(models)
    ids, numbers, classes = tokens(4, 5), torch.randn(4), torch.tensor([3, 1, 0, 2])
    plain = {task: copy.deepcopy(models[task]) for task in ("score", "class")}
    for _ in range(2):
        for task, labels in (("score", numbers), ("class", classes)):
            expected = plain[task](ids, labels=labels).loss
            close(model(ids, task_ids=[task] * 4, labels=labels).loss, expected)
            model.set_task(task)
            close(model(ids, labels=labels).loss, expected)
            close(model.materialize(task)(ids, labels=labels).loss, expected)
    model.unset_task()
    assert model.config.problem_type is None


def test_names_of_labels_of_the_base_model_come_back():
    base = bert(3)
    base.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    base.config.label2id = {"no": 0, "maybe": 1, "yes": 2}
    models = {BASE: base, "same": fine_tuned(base, 1), "more": bert(5)}
    model = exact_model(models)
    for task, names in (("more", 5), ("same", base.config.id2label), ("more", 5)):
        model.set_task(task)
        found = model.materialize(task).config.id2label
        assert found == model.config.id2label
        assert found == names if isinstance(names, dict) else len(found) == names
    model.remove_modulator("more")
    assert model.config.label2id == base.config.label2id


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
def test_vocabularies_that_tasks_made_larger(make, tmp_path):
    base = make()
    models = {BASE: base, "same": fine_tuned(base, 1), "more": fine_tuned(base, 2)}
    models["more"].resize_token_embeddings(70, mean_resizing=False)
    model = exact_model(models)
    for task, size in (("more", 70), ("same", 64), ("more", 70)):
        ids = tokens(2, 5) + size - 64
        expected = models[task](ids, labels=ids)
        model.set_task(task)
        found = model(ids, labels=ids)
        close(found.loss, expected.loss)
        plain = model.materialize(task)
        assert (
            plain.config.vocab_size
            == size
            == plain.get_input_embeddings().num_embeddings
        )
        plain.save_pretrained(tmp_path / task)
        loaded = type(plain).from_pretrained(tmp_path / task).eval()
        close(loaded(ids).logits, expected.logits)
        close(model(ids, task_ids=[task] * 2, labels=ids).loss, expected.loss)
    with pytest.raises(DiDiError, match="'same' and .*'more'|'more' and .*'same'"):
        model(tokens(2, 5), task_ids=["more", "same"])
    if make is gpt2:  # head and embedding are still one
        assert model.backbone.lm_head.weight is model.backbone.transformer.wte.weight


@pytest.mark.parametrize("tied", [False, True])
def test_vocabularies_of_any_size_are_stated_by_both_ends(tied, tmp_path):
    """Also where the token that pads is in larger ones only."""
    config = llama().config
    config.update({"tie_word_embeddings": tied, "pad_token_id": 63})
    base = seeded(lambda: type(llama())(config))
    models = {BASE: base, "less": fine_tuned(base, 1), "more": fine_tuned(base, 2)}
    for task, size in (("less", 60), ("more", 70)):
        models[task].resize_token_embeddings(size, mean_resizing=False)
    model = exact_model(models)
    for task, size, padding in (("more", 70, 63), ("less", 60, None), ("more", 70, 63)):
        model.set_task(task)
        for found in (model.backbone, model.materialize(task)):
            first, last = found.get_input_embeddings(), found.get_output_embeddings()
            assert first.num_embeddings == last.out_features == size
            assert found.config.vocab_size == size and first.padding_idx == padding
            assert (last.weight is first.weight) == tied
            close(found(tokens(2, 5) % 60).logits, models[task](tokens(2, 5) % 60).logits)  # fmt: skip
        found.save_pretrained(tmp_path / task)
        type(found).from_pretrained(tmp_path / task)
    model.unset_task()
    first, last = (getattr(model, f"get_{e}_embeddings")() for e in ("input", "output"))
    assert first.num_embeddings == last.out_features == 64 and first.padding_idx == 63
    assert model.config.pad_token_id == 63


def enlarged() -> dict[str, LlamaModel]:
    """Two tasks with three tokens more than the base model and the first one."""
    config = LlamaConfig(**SMALL, vocab_size=64)
    models = pool_of(seeded(lambda: LlamaModel(config)), ("same", "more", "else"))
    for task in ("more", "else"):
        models[task].resize_token_embeddings(67, mean_resizing=False).eval()
    return models


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "tasks",
    [
        ["more", "same"],
        ["same", "more"],
        ["else", "same", "more", "more"],
        [None, "more", "same"],
    ],
)
def test_tokens_of_a_task_are_looked_up_in_its_own_vocabulary(tasks, first):
    """Whatever ran before."""
    models = enlarged()
    model, ids = exact_model(models), tokens(len(tasks), 5)
    if first:
        model(ids, task_ids=tasks)
    own = torch.tensor([[task in ("more", "else")] for task in tasks])
    ids = torch.where(own, ids % 3 + 64, ids)
    found = model(ids, task_ids=tasks).last_hidden_state
    for i, task in enumerate(tasks):
        close(found[i : i + 1], models[task or BASE](ids[i : i + 1]).last_hidden_state)


def test_tasks_of_other_vocabularies_are_refused_by_the_shapes_of_what_they_give():
    base = llama()
    models = {BASE: base, "same": fine_tuned(base, 1), "more": fine_tuned(base, 2)}
    models["more"].resize_token_embeddings(67, mean_resizing=False)
    with pytest.raises(DiDiError, match=r"logits is \(1, 2, 64\) for 'same' and .* 67"):
        ids = torch.tensor([[65, 66], [1, 2]])
        exact_model(models)(ids, task_ids=["more", "same"])


@pytest.mark.parametrize("kind", ["projection", "representation"])
def test_routers_name_what_only_some_tasks_can_run(kind):
    options = {} if kind == "projection" else {"layers": [0]}
    model = exact_model(enlarged()).attach_router(kind, **options)
    with pytest.raises(DiDiError, match="embed_tokens.weight in several .* task_ids"):
        model(torch.tensor([[65, 66], [1, 2]]))


# --- other shapes -------------------------------------------------------------------


class Parts(nn.Module):
    """Layers of every kind that states the shape of its tensors."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, width, 3), nn.BatchNorm2d(width)
        self.layer_norm, self.first = nn.LayerNorm(width), nn.Linear(width, width + 1)
        self.embed, self.last = nn.Embedding(width, 3), nn.Linear(width + 1, 3)
        self.table = nn.Linear(3, width, bias=False)
        self.table.weight = self.embed.weight
        self.up, self.prelu = nn.ConvTranspose2d(width, width, 1), nn.PReLU(width)
        self.groups, self.bag = nn.GroupNorm(1, width), nn.EmbeddingBag(width, 3)
        self.pairs = nn.Bilinear(width, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.groups(self.prelu(self.up(self.norm(self.conv(x)))))
        y = self.layer_norm(y.mean((2, 3)))
        first = torch.tensor([0, 1])
        both = self.embed(first).sum(0) + self.bag(first[None])
        z = self.last(self.first(y)) + self.pairs(y, y)
        return z + both + self.table(z).sum(1, keepdim=True)


def test_modules_state_the_shapes_of_a_tasks_tensors():
    models = {BASE: seeded(Parts)}
    models |= {f"{width}": seeded(lambda: Parts(width)) for width in (4, 6, 3)}
    for task in ("4", "6", "3"):
        models[task] = fine_tuned(models[task], int(task), scale=0.3).eval()
        models[task].norm.running_var.fill_(float(task))
        models[task].norm.num_batches_tracked.fill_(int(task) * 10**12 + 1)
    model = exact_model(models)
    x, before = torch.randn(4, 2, 5, 5), floats(model.backbone)
    said = ("out_channels", "in_channels", "num_features", "normalized_shape")
    said += ("num_embeddings", "embedding_dim", "out_features", "in_features")
    said += ("num_channels", "num_parameters", "in1_features", "in2_features")

    def alike(left, right):
        pairs = zip(left.modules(), right.modules(), strict=True)
        return all(vars(a).get(k) == vars(b).get(k) for a, b in pairs for k in said)

    for task in ("6", "4", "3", "6"):
        model.set_task(task)
        plain = model.materialize(task)
        assert alike(model.backbone, models[task]) and alike(plain, models[task])
        close(model(x), models[task](x))
        assert plain.norm.num_batches_tracked.equal(
            models[task].norm.num_batches_tracked
        )
    # outputs are of one shape, so that all tasks make one batch
    tasks = ["3", "6", "4", None]
    found = model(x, task_ids=tasks)
    for i, task in enumerate(tasks):
        close(found[i : i + 1], models[task or BASE](x[i : i + 1]))
    model.unset_task()
    assert alike(model.backbone, models[BASE])
    assert same_bits(before, floats(model.backbone))


# --- statistics ---------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3)))


def with_statistics(tasks=("a", "b", "c")) -> dict[str, nn.Module]:
    models = {BASE: seeded(Normed)}
    models[BASE].norm.running_var.uniform_(0.5, 2)
    for seed, task in enumerate(tasks, 1):
        models[task] = fine_tuned(models[BASE], seed).eval()
        generator = torch.Generator().manual_seed(seed)
        norm = models[task].norm
        norm.running_var.copy_(10.0 ** -(3 * seed) * torch.rand(8, generator=generator))
        norm.running_mean.normal_(generator=generator)
        norm.num_batches_tracked.fill_(2**40 + seed)  # no float32 holds it
    return models


@pytest.mark.parametrize("precision", ["auto", "int4", "bfloat16", "checkpoint"])
def test_statistics_and_counters_come_out_to_the_bit(precision, tmp_path):
    models = with_statistics()
    model = didi(models, budget=1.4, factor_dtype=precision)
    base = {k: v.clone() for k, v in model.backbone.norm.state_dict().items()}
    model.save_pretrained(tmp_path / "saved")
    again = DiDiModel.from_pretrained(tmp_path / "saved", copy.deepcopy(models[BASE]))
    for task in ("a", "b", "c", "a"):
        for one in (model, again):
            one.set_task(task)
            for norm in (one.backbone.norm, one.materialize(task).norm):
                for name, own in models[task].norm.named_buffers():
                    found = norm.get_buffer(name)
                    assert found.dtype == own.dtype and found.equal(own)
    model.unset_task()
    for name, value in base.items():
        assert model.backbone.norm.state_dict()[name].equal(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_own_tensors_are_written_into_the_models_type(dtype):
    models = with_statistics()
    model = exact_model(models)
    model.backbone.to(dtype)
    for task in ("a", "b"):
        model.set_task(task)
        norm = model.backbone.norm
        assert norm.running_mean.equal(models[task].norm.running_mean.to(dtype))
        assert norm.num_batches_tracked.equal(models[task].norm.num_batches_tracked)
        assert norm.running_mean.dtype == dtype
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    assert model(x, task_ids=["b", "a"]).dtype == dtype


def test_samples_are_normalized_by_their_own_tasks_statistics():
    models = with_statistics()
    model = exact_model(models)
    x, tasks = torch.randn(6, 3, 8, 8), ["c", "a", None, "b", "a", "c"]
    found = model(x, task_ids=tasks)
    for i, task in enumerate(tasks):
        close(found[i : i + 1], models[task or BASE](x[i : i + 1]))
    weights = torch.tensor([[0.2, 0.3, 0.5]] * 6)
    assert model(x, task_weights=weights).isfinite().all()
    counters = model.mixed.banks["norm.num_batches_tracked"]
    assert counters.mixed(weights[0]).equal(models["c"].norm.num_batches_tracked)


# --- banks, accounts and fingerprints -----------------------------------------------


@pytest.mark.parametrize(
    "shape, turned", [((6,), None), ((6, 5), True), ((6, 5), False)]
)
def test_own_tensors_of_one_shape_have_per_sample_forms(shape, turned):
    base, own, other = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    deltas = [OwnDelta(shape, own), None, DenseDelta(shape, other)]
    for serving in (Serving(), Serving(memory_limit_gb=0), Serving(0.0, 0)):
        options = {"turned": turned, "serving": serving, "held": Held(0)}
        bank = bank_of(lambda: base, None, deltas, **options)
        assert not isinstance(bank, OwnBank)
        assert bank.value(0).equal(own)
        torch.testing.assert_close(bank.value(2), base + other)
        assert bank.value(1).equal(base) and bank.value(3).equal(base)
        mean = bank.mixed(torch.tensor([0.5, 0.5, 0.0]))
        torch.testing.assert_close(mean, (own + base) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_what_is_shared_is_there_beside_own_tensors_of_another_shape(dtype, scale):
    base, own = torch.randn(6, 5).to(dtype), torch.randn(4, 5)
    shared, other = (DenseDelta((6, 5), torch.randn(6, 5)) for _ in range(2))
    deltas = [OwnDelta((4, 5), own), None, other]
    options = {"turned": False, "serving": Serving(), "shared_scale": scale}
    bank = bank_of(lambda: base, shared, deltas, **options)
    assert isinstance(bank, OwnBank)
    assert bank.value(0).equal(own.to(dtype))
    start = (base + scale * shared.change()).to(dtype)
    assert bank.value(1).equal(start) and bank.value(3).equal(start)
    assert bank.value(2).equal(other.applied(base, shared).to(dtype))


def test_own_heads_of_one_shape_run_in_one_pass():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.inner(x).tanh())

    base = seeded(Headed)
    models = {
        BASE: base,
        **{t: fine_tuned(base, i, scale=0.4) for i, t in enumerate("ab", 1)},
    }
    model = didi(models, budget=9.0, own=["head.*"]).eval()
    x, tasks = torch.randn(5, 4), ["b", "a", None, "b", "a"]
    found = model(x, task_ids=tasks)
    assert model.mixed.network is not None
    assert isinstance(model.mixed.banks["head.bias"], ValueBank)
    for i, task in enumerate(tasks):
        close(found[i], models[task or BASE](x)[i])
    model.set_task("b")
    assert model.backbone.head.weight.equal(models["b"].head.weight)


def test_a_bank_of_shapes_mixes_what_has_a_mean_only():
    values = [torch.ones(2), torch.zeros(2), torch.ones(3), torch.zeros(4)]
    bank = OwnBank("head.bias", values, ["a", "b", "c"])
    assert bank.mixed(torch.tensor([0.0, 0.0, 0.7])).equal(values[2])
    assert bank.mixed(torch.zeros(3)).equal(values[3])
    torch.testing.assert_close(
        bank.mixed(torch.tensor([0.25, 0.75, 0.0])), torch.full((2,), 0.25)
    )
    with pytest.raises(DiDiError, match=r"head.bias .*'a': \(2,\), 'c': \(3,\)"):
        bank.mixed(torch.tensor([0.5, 0.0, 0.5]))


def test_own_tensors_are_counted_in_full():
    models = with_statistics()
    model = didi(models, budget=1.4)
    bits = {name: 8 * own.nbytes for name, own in models["a"].norm.named_buffers()}
    assert bits["num_batches_tracked"] == 64
    for name, size in bits.items():
        assert model.storage.layer_bits[f"norm.{name}"] == 3 * size
    stored = sum(d.bits for e in model.modulators.values() for d in e.deltas.values())
    assert sum(model.storage.expert_bits.values()) == stored
    assert sum(model.storage.layer_bits.values()) == model.storage.excl_bits


def test_what_every_task_replaces_is_no_part_of_the_base_model(tmp_path):
    """A classifier that the base model's file lacks is another one at every load."""
    config = BertConfig(**SMALL, vocab_size=64)
    seeded(lambda: BertModel(config)).save_pretrained(tmp_path / "base")

    def load():
        return BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()

    first, second = load(), load()
    assert not first.classifier.weight.equal(second.classifier.weight)
    models = {BASE: first, **{t: fine_tuned(first, i) for i, t in enumerate("ab", 1)}}
    model = exact_model(models)
    for task in "ab":
        for name in ("classifier.weight", "classifier.bias"):
            own = models[task].get_parameter(name)
            model.modulators[task].deltas[name] = OwnDelta(tuple(own.shape), own)
    assert "classifier.weight" in model.touched
    assert not [name for name in model.base_tensors() if "classifier" in name]
    model.save_pretrained(tmp_path / "merged")
    again = DynamicModel.from_pretrained(tmp_path / "merged", second).eval()
    ids = tokens(2, 5)
    for task in "ab":
        again.set_task(task)
        close(again(ids).logits, models[task](ids).logits)
    # one task has the base model's: then it is needed
    del model.modulators["b"].deltas["classifier.bias"]
    assert "classifier.bias" in model.base_tensors()
    with pytest.raises(DiDiError, match="not the one"):
        other = fine_tuned(first, 9)
        DynamicModel.from_pretrained(tmp_path / "merged", other)
    with pytest.raises(DiDiError, match="has no tensor"):
        DynamicModel.from_pretrained(tmp_path / "merged", first.bert)


def test_a_task_that_alone_has_a_tensor_of_its_own_can_be_removed():
    models = headed(_bert)
    model = exact_model({k: models[k] for k in (BASE, "two", "six")})
    for current in (None, "two", "six"):
        twin = copy.deepcopy(model)
        if current:
            twin.set_task(current)
        twin.remove_modulator("two")
        twin.remove_modulator("six") if current == "two" else twin.set_task("six")
        expected = models[BASE if current == "two" else "six"]
        assert same_shapes(twin.backbone, expected)


def test_copies_while_a_task_of_another_shape_is_set():
    models = headed(_bert)
    model = exact_model(models)
    model.set_task("six")
    twin, ids = copy.deepcopy(model), tokens(4, 5)
    twin.set_task("two")
    close(twin(ids).logits, models["two"](ids).logits)
    close(model(ids).logits, models["six"](ids).logits)
    twin.unset_task()
    assert same_bits(floats(twin.backbone), floats(models[BASE]))
    twin.bfloat16().set_task("four")
    assert {p.dtype for p in twin.backbone.parameters()} == {torch.bfloat16}
    assert twin(ids).logits.shape == (4, 4)


def test_a_thousand_switches_between_shapes_change_no_bit():
    models = headed(_bert)
    model = exact_model(models)
    base = floats(model.backbone)
    picks = torch.randint(4, (300,), generator=torch.Generator().manual_seed(0))
    for pick in picks.tolist():
        model.set_task(model.tasks[pick])
    for task in COUNTS:
        model.set_task(task)
        expected = floats(models[task])
        for name, value in floats(model.backbone).items():
            close(value, expected[name], atol=1e-6)
        assert model.backbone.classifier.weight.equal(models[task].classifier.weight)
    model.unset_task()
    assert same_bits(base, floats(model.backbone))


def test_inference_mode_and_heads():
    models = headed(_bert)
    model, ids = exact_model(models), tokens(2, 5)
    with torch.inference_mode():
        model.set_task("six")
        inside = model(ids).logits
    model.set_task("two")
    model.set_task("six")
    close(model(ids).logits, inside.clone())
    model.unset_task()
    assert same_bits(floats(model.backbone), floats(models[BASE]))


# --- routers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["projection", "representation"])
@pytest.mark.parametrize("hard", [True, False])
def test_routers_look_past_heads_of_several_shapes(kind, hard):
    models = headed(_bert)
    model = exact_model({k: models[k] for k in (BASE, "two", "six")})
    options = {} if kind == "projection" else {"layers": [0]}
    model.attach_router(make_router(kind, model.tasks, hard=hard, **options))
    ids = tokens(4, 5)
    weights = model.router.route(model, ids)
    assert weights.shape == (4, 2) and weights.isfinite().all()
    if kind == "projection":
        with pytest.raises(ValueError, match="of one shape"):
            layers = ["classifier"]
            model.attach_router(make_router(kind, model.tasks, layers=layers))


def test_se_merging_keeps_own_tensors():
    models = with_statistics(("a", "b"))
    average = SimpleAverageAlgorithm(show_pbar=False)
    method = SEMerging(base_method=average, layers=["conv"], pooling="mean")
    model = method.run(BaseModelPool(models)).eval()
    for task in "ab":
        plain = model.materialize(task)
        assert plain.norm.running_var.equal(models[task].norm.running_var)
    assert model(torch.randn(3, 3, 8, 8)).isfinite().all()
