"""Methods of the backbone, called on the merged model: as a task, for a task per sample, as the router says, or not at all."""

import copy
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from exact_models import (
    GROUPED,
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
from helpers import BASE, pairwise
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    EncoderRepetitionPenaltyLogitsProcessor,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from fusion_bench_didi.errors import DiDiError, UnknownTaskError
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.serving.banks import Serving

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def gemma() -> Gemma2ForCausalLM:
    """A head that is tied, norms that add one, windows and softcaps."""
    config = Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, vocab_size=64)
    return seeded(lambda: Gemma2ForCausalLM(config))


def qwen3() -> Qwen3ForCausalLM:
    """Norms on queries and keys, which are four-dimensional there."""
    config = Qwen3Config(**GROUPED, head_dim=8, vocab_size=64, pad_token_id=0)
    return seeded(lambda: Qwen3ForCausalLM(config))


def tied_llama():
    return llama(tie_word_embeddings=True)


MAKES = {f.__name__: f for f in (llama, tied_llama, qwen, qwen3, gemma, gpt2, t5)}
TASKS = ["c", "a", None, "b", "a", "c"]


def merged_of(make: str, how: str = "layered"):
    base = MAKES[make]()
    base.generation_config.pad_token_id = 0
    models = pool_of(base, ("a", "b", "c"))
    for model in models.values():
        model.generation_config = copy.deepcopy(base.generation_config)
    model = exact_model(models, how)
    plain = type(base.get_input_embeddings()) is nn.Embedding
    if plain and how == "layered" and make != "t5":
        assert model.mixed.network is not None
    return models, model


def prompts(left: bool, lengths=(3, 7, 5, 2, 6, 4)) -> dict[str, torch.Tensor]:
    """Texts of several lengths, padded."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        where = slice(longest - length, None) if left else slice(length)
        ids[i, where] = tokens(length, seed=i)
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: nn.Module, given: dict, i: int, **options) -> torch.Tensor:
    """A prompt by itself, without its padding."""
    ids = given["input_ids"][i][given["attention_mask"][i] == 1][None]
    found = model.generate(ids, **options)
    return found if model.config.is_encoder_decoder else found[:, ids.shape[1] :]


def continued(found: torch.Tensor, given: dict, model: nn.Module) -> torch.Tensor:
    start = 0 if model.config.is_encoder_decoder else given["input_ids"].shape[1]
    return found[:, start:]


@pytest.mark.parametrize("how", ["layered", "grouped"])
@pytest.mark.parametrize("make", MAKES)
def test_mixed_greedy_decoding_is_one_by_one_token_for_token(make, how):
    models, model = merged_of(make, how)
    given = prompts(left=make != "t5")
    before = state_of(model.backbone)
    found = model.generate(**given, task_ids=TASKS, **GREEDY)
    assert unchanged(before, model.backbone)
    differ = set()
    for i, task in enumerate(TASKS):
        own = alone(models[task or BASE], given, i, **GREEDY)[0]
        row = continued(found, given, models[BASE])[i]
        assert row[: len(own)].equal(own) and not row[len(own) :].any()
        other = alone(models["b" if task == "a" else "a"], given, i, **GREEDY)[0]
        differ.add(other.equal(own))
    assert False in differ, "the tasks must answer differently for this to be a test"


@pytest.mark.parametrize("make", ["llama", "qwen", "gpt2", "t5"])
def test_beams_and_several_answers_per_prompt(make):
    models, model = merged_of(make)
    given = prompts(left=make != "t5")
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    found = model.generate(**given, task_ids=TASKS, **options)
    for i, task in enumerate(TASKS):
        own = alone(models[task or BASE], given, i, **options)
        rows = continued(found, given, models[BASE])[2 * i : 2 * i + 2]
        assert rows[:, : own.shape[1]].equal(own)


@pytest.mark.parametrize("make", ["llama", "t5"])
def test_prompts_that_end_early_are_padded(make):
    models, model = merged_of(make)
    given = prompts(left=make != "t5")
    tokens_of = [
        alone(models[t or BASE], given, i, **GREEDY)[0] for i, t in enumerate(TASKS)
    ]
    ends = [int(own[-3]) for own in tokens_of[:3]]
    for how in ("layered", "grouped"):
        if how == "grouped":
            model.mixed.network = None
        options = {**GREEDY, "eos_token_id": ends, "pad_token_id": 1}
        found = continued(
            model.generate(**given, task_ids=TASKS, **options), given, models[BASE]
        )
        for i, task in enumerate(TASKS):
            own = alone(models[task or BASE], given, i, **options)[0]
            assert found[i, : len(own)].equal(own)
            assert (found[i, len(own) :] == 1).all()


def test_scores_and_caches_come_back_in_the_order_of_the_prompts():
    models, model = merged_of("llama")
    given = prompts(left=True, lengths=(4,) * 6)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**given, task_ids=TASKS, **options)
    for i, task in enumerate(TASKS):
        own = models[task or BASE].generate(given["input_ids"][i : i + 1], **options)
        assert found.sequences[i : i + 1].equal(own.sequences)
        for score, other in zip(found.scores, own.scores):
            torch.testing.assert_close(score[i : i + 1], other, atol=1e-3, rtol=1e-3)
        keys = found.past_key_values.layers[1].keys[i : i + 1]
        torch.testing.assert_close(
            keys, own.past_key_values.layers[1].keys, atol=1e-3, rtol=1e-3
        )
    beams = {**options, "num_beams": 2}
    with pytest.raises(DiDiError, match="sort them before"):
        model.generate(**given, task_ids=TASKS, **beams)
    tasks = sorted(filter(None, TASKS))
    five = {k: v[:5] for k, v in given.items()}
    assert model.generate(**five, task_ids=tasks, **beams).beam_indices is not None
    model.mixed.network = None
    with pytest.raises(DiDiError, match="leave return_dict_in_generate out"):
        model.generate(**given, task_ids=TASKS, **options)


def test_sampling_draws_for_every_sample_from_its_own_model():
    """Of a model that is sure of its next token, every draw is that token."""
    models, model = merged_of("llama")
    given = prompts(left=True)
    options = {"max_new_tokens": 4, "do_sample": True, "temperature": 1e-4}
    found = continued(
        model.generate(**given, task_ids=TASKS, **options), given, models[BASE]
    )
    for i, task in enumerate(TASKS):
        own = alone(models[task or BASE], given, i, max_new_tokens=4, do_sample=False)
        assert found[i].equal(own[0])


def test_weights_over_tasks_generate_too():
    models, model = merged_of("qwen")
    given = prompts(left=True)
    one_hot = torch.eye(3)[[2, 0, 1, 1, 0, 2]]
    found = model.generate(**given, task_weights=one_hot, **GREEDY)
    ids = model.generate(**given, task_ids=[2, 0, 1, 1, 0, 2], **GREEDY)
    assert found.equal(ids)
    soft = torch.softmax(one_hot, 1)
    layered = model.generate(**given, task_weights=soft, **GREEDY)
    model.mixed.network = None
    assert model.generate(**given, task_weights=soft, **GREEDY).equal(layered)


def test_settings_and_lists_are_not_taken_for_samples():
    models, model = merged_of("llama")
    given = prompts(left=True, lengths=(4, 4))
    tasks = ["b", "a"]
    options = {
        **GREEDY,
        "bad_words_ids": [[5], [6]],
        "suppress_tokens": [7, 8],
        "eos_token_id": torch.tensor([1, 2]),
        "stopping_criteria": StoppingCriteriaList(),
    }
    found = model.generate(**given, task_ids=tasks, **options)
    for i, task in enumerate(tasks):
        own = alone(models[task], given, i, **options)[0]
        assert continued(found, given, models[BASE])[i][: len(own)].equal(own)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = model.generate(given["input_ids"], generation_config=config, task_ids=tasks)
    assert found.shape == (2, 7)


@pytest.mark.parametrize("how", ["layered", "grouped"])
def test_what_is_asked_row_by_row_is_refused_for_several_tasks(how):
    _, model = merged_of("llama", how)
    given = prompts(left=True, lengths=(4, 4))
    options = {**GREEDY, "prefix_allowed_tokens_fn": lambda row, ids: [5, 6]}
    with pytest.raises(DiDiError, match="prefix_allowed_tokens_fn"):
        model.generate(**given, task_ids=["b", "a"], **options)
    model.generate(**given, task_ids=["b", "b"], **options)
    with pytest.raises(DiDiError, match="3 task_ids for a batch of 2 samples"):
        model.generate(**given, task_ids=["b", "a", "a"], **GREEDY)


class ByPlace:
    """A processor, or a criterion, that does another thing to every row."""

    def __init__(self, *, ends: bool, beams: int = 1):
        self.ends, self.beams = ends, beams

    def __call__(self, ids, scores):
        places = torch.arange(len(ids)) // self.beams
        if self.ends:
            return ids.shape[1] >= 5 + places
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, 20 + places[:, None], 0.0)


@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_asked_in_every_step_sees_prompts_as_they_were_given(beams):
    """It saw them sorted by task, and texts were another request's."""
    _, model = merged_of("llama")
    given, tasks = prompts(left=True, lengths=(4,) * 4), ["b", "a", "b", "a"]
    options = {**GREEDY, "num_beams": beams, "eos_token_id": 63, "pad_token_id": 0}
    own = LogitsProcessorList([ByPlace(ends=False, beams=beams)])
    found = model.generate(**given, task_ids=tasks, logits_processor=own, **options)
    assert found[:, -1].tolist() == [20, 21, 22, 23]
    if beams > 1:
        return
    ends = StoppingCriteriaList([ByPlace(ends=True)])
    found = model.generate(**given, task_ids=tasks, stopping_criteria=ends, **options)
    assert (found[:, 4:] != 0).sum(1).tolist() == [1, 2, 3, 4]
    penalty = LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1e6, given["input_ids"])])  # fmt: skip
    found = model.generate(given["input_ids"], None, penalty, task_ids=tasks, attention_mask=given["attention_mask"], **options)  # fmt: skip
    for row, task in enumerate(tasks):
        model.set_task(task)
        alone = {name: value[[row]] for name, value in given.items()}
        penalty = LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1e6, alone["input_ids"])])  # fmt: skip
        right = model.generate(**alone, logits_processor=penalty, **options)
        assert found[row].tolist() == right[0].tolist()


def test_what_is_asked_in_every_step_is_refused_task_by_task_where_it_may_go_by_place():
    """A row of some of the prompts has another place there; what does the same to every row stays."""
    _, model = merged_of("t5")
    given, tasks = prompts(left=False, lengths=(4, 4, 4)), ["b", "a", "b"]
    for name, kind, ends in (
        ("logits_processor", LogitsProcessorList, False),
        ("stopping_criteria", StoppingCriteriaList, True),
    ):
        own = {name: kind([ByPlace(ends=ends)])}
        with pytest.raises(DiDiError, match="task by task with this model, and ByPlace"):  # fmt: skip
            model.generate(**given, task_ids=tasks, **own, **GREEDY)
        model.generate(**given, task_ids=["b"] * 3, **own, **GREEDY)
    usual = LogitsProcessorList([SuppressTokensLogitsProcessor([7])])
    found = model.generate(**given, task_ids=tasks, logits_processor=usual, **GREEDY)
    assert not (found == 7).any()


def test_generating_of_few_factors_and_in_threads():
    models, model = merged_of("llama")
    model.serving = Serving(dense_above=float("inf"), small=0)
    given = prompts(left=True)
    turns = [TASKS, TASKS[::-1], ["a"] * 6, ["b", "c"] * 3]

    def run(tasks):
        return model.generate(**given, task_ids=tasks, **GREEDY)

    expected = [run(tasks) for tasks in turns]
    with ThreadPoolExecutor(4) as threads:
        for found, own in zip(threads.map(run, turns), expected):
            assert found.equal(own)
    assert model.mixed.running.current is None


# --- with a task, a router, or neither ----------------------------------------------


@pytest.mark.parametrize("make", MAKES)
def test_generate_runs_as_the_task_that_is_set(make):
    models, model = merged_of(make)
    given = prompts(left=make != "t5")
    with pytest.raises(UnknownTaskError, match=r"No task is set.*'a', 'b', 'c'"):
        model.generate(**given, **GREEDY)
    generate = model.generate
    for task in ("b", "a"):
        model.set_task(task)
        expected = models[task].generate(**given, **GREEDY)
        assert model.generate(**given, **GREEDY).equal(expected)
        assert generate(**given, **GREEDY).equal(expected)
    model.unset_task()
    with pytest.raises(UnknownTaskError, match="No task is set"):
        generate(**given, **GREEDY)


@pytest.mark.parametrize(
    "make, hard, how",
    pairwise(
        itertools.product(
            ["llama", "gpt2", "t5"], [True, False], ["layered", "grouped"]
        )
    ),
)
def test_a_router_decides_on_the_prompt(make, hard, how):
    models, model = merged_of(make, how)
    given = prompts(left=make != "t5")
    model.attach_router(make_router("projection", model.tasks, hard=hard))
    found = model.generate(**given, **GREEDY)
    weights = model.router.last
    assert weights.shape == (6, 3) and model.router.samples == 6
    assert found.equal(model.generate(**given, task_weights=weights, **GREEDY))
    positional = model.generate(given["input_ids"], **GREEDY)
    assert len(positional) == 6
    model.set_task("b")
    assert model.generate(**given, **GREEDY).equal(
        models["b"].generate(**given, **GREEDY)
    )


def clip() -> CLIPModel:
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sides["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**sides, "vocab_size": 64, "eos_token_id": 63},
        vision_config={**sides, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return seeded(lambda: CLIPModel(config))


class Encoder(nn.Module):
    """Methods that run the network, one without calling any module, and functions that were put on it."""

    def __init__(self):
        super().__init__()
        self.inner, self.note = nn.Linear(6, 4), "a note"
        self.table = nn.Parameter(torch.randn(6, 4))
        self.made = lambda x: self.inner(x) * 2
        self.kept = self.encode

    def forward(self, x):
        return self.inner(x)

    def encode(self, x):
        return self.inner(x).relu()

    def embed(self, x):
        return x @ self.table

    def prepare_inputs(self, x):
        return self.inner(x)

    def _encode(self, x):
        return self.inner(x).sum(1)

    @property
    def width(self):
        return 4

    @staticmethod
    def helper(x):
        return x + 1


@pytest.mark.parametrize(
    "name", ["encode", "embed", "prepare_inputs", "_encode", "made", "kept"]
)
def test_every_method_that_may_run_the_network_needs_a_task(name):
    models = pool_of(seeded(Encoder))
    model = exact_model(models)
    x = torch.randn(4, 6)
    with pytest.raises(UnknownTaskError, match="No task is set"):
        getattr(model, name)(x)
    model.set_task("b")
    expected = {t: getattr(model.materialize(t), name)(x) for t in "ab"}
    torch.testing.assert_close(getattr(model, name)(x), expected["b"])
    assert not torch.allclose(expected["a"], expected["b"])
    tasks = ["a", "b", "b", "a"]
    found = getattr(model, name)(x, task_ids=tasks)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(found[i], expected[task][i])
    model.unset_task()
    found = getattr(model, name)(x, task_weights=torch.eye(2)[[0, 1, 1, 0]])
    torch.testing.assert_close(found[0], expected["a"][0])
    model.attach_router(make_router("projection", model.tasks, layers=["inner"]))
    with pytest.raises(DiDiError, match="no forward that a router could look at"):
        getattr(model, name)(x)


def test_what_only_looks_at_the_backbone_needs_no_task():
    model = exact_model(pool_of(seeded(Encoder)))
    assert model.note == "a note" and model.width == 4
    assert model.helper(1) == 2
    assert model.table is model.backbone.table
    language = exact_model(pool_of(llama()))
    assert language.config is language.backbone.config
    assert language.dtype == torch.float32 and language.device.type == "cpu"
    assert language.generation_config is language.backbone.generation_config
    assert language.can_generate() and language.main_input_name == "input_ids"
    assert language.get_input_embeddings() is language.backbone.model.embed_tokens
    assert language.num_parameters() == language.backbone.num_parameters()
    assert callable(language.loss_function)
    assert language.name_or_path == ""
    inner = language.model  # looked at, but not run
    assert isinstance(inner, type(language.backbone.model))
    assert inner.embed_tokens is language.backbone.model.embed_tokens
    with pytest.raises(AttributeError, match="no_such_thing"):
        language.no_such_thing
    assert not hasattr(language, "no_such_thing") and hasattr(language, "generate")
    signature = inspect.signature(language.generate)
    assert "generation_config" in signature.parameters
    assert language.generate.__name__ == "generate"


def test_parts_of_the_backbone_do_not_run_as_the_base_model():
    models = pool_of(llama())
    model = exact_model(models)
    ids = tokens(2, 4)
    part = model.model
    with pytest.raises(UnknownTaskError, match="No task is set"):
        part(ids)
    with pytest.raises(UnknownTaskError):
        model.get_decoder()(ids)
    model.set_task("b")
    expected = models["b"].model(ids).last_hidden_state
    runs = [part, model.model]
    if models["b"].get_decoder() is not None:  # as before transformers 4.57
        runs.append(model.get_decoder())
    for run in runs:
        torch.testing.assert_close(run(ids).last_hidden_state, expected)
    model.unset_task()
    with pytest.raises(UnknownTaskError):
        part(ids)
    assert model.backbone.model(ids).last_hidden_state.shape == expected.shape
    assert not model.backbone.model._forward_pre_hooks


def test_features_of_images_and_texts_are_the_tasks():
    models = pool_of(clip(), scale=0.1)
    model = exact_model(models)
    pixels, ids = torch.randn(4, 3, 16, 16), tokens(4, 5)
    for name, value in (("get_image_features", pixels), ("get_text_features", ids)):
        with pytest.raises(UnknownTaskError):
            getattr(model, name)(value)
        tasks = ["b", "a", "a", "b"]
        found = getattr(model, name)(value, task_ids=tasks)
        found = getattr(found, "pooler_output", found)  # transformers 5
        for i, task in enumerate(tasks):
            own = getattr(models[task], name)(value[i : i + 1])
            own = getattr(own, "pooler_output", own)
            torch.testing.assert_close(found[i : i + 1], own, atol=1e-5, rtol=1e-4)


def test_masked_language_models_and_prepared_inputs():
    config = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    models = pool_of(seeded(lambda: BertForMaskedLM(config)))
    model = exact_model(models)
    assert model.get_output_embeddings() is model.backbone.cls.predictions.decoder
    language = exact_model(pool_of(llama()))
    with pytest.raises(UnknownTaskError):
        language.prepare_inputs_for_generation(tokens(1, 3))
    ids, tasks = tokens(4, 5), ["b", "a", "a", "b"]
    found = model(ids, task_ids=tasks).logits
    for i, task in enumerate(tasks):
        own = models[task](ids[i : i + 1]).logits
        torch.testing.assert_close(found[i : i + 1], own, atol=1e-4, rtol=1e-4)


def test_a_model_from_a_directory_generates_as_its_tasks(tmp_path):
    """What a whole lm-eval run does: the task is set, then generate and forward are called."""
    models, model = merged_of("llama")
    model.set_task("c")
    single = model.materialize("c")
    single.save_pretrained(tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    given = prompts(left=True)
    assert loaded.generate(**given, **GREEDY).equal(model.generate(**given, **GREEDY))
