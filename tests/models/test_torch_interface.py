"""What torch and transformers do with any module does no harm to a merged one: states saved and loaded, functions applied to all
modules, tensors given other shapes."""

import copy

import pytest
import torch
from dynamic_methods import DYNAMIC
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, family, fine_tuned, floats, same_bits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel

IDS = torch.arange(20).view(4, 5)


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def merged(*, tied: bool = False):
    return didi(family(llama(tied=tied)), budget=1e6).eval()


def logits(model, **tasks) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **tasks).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("there", [None, "mnist", "svhn"])
@pytest.mark.parametrize("here", [None, "mnist"])
def test_a_state_is_of_the_base_whatever_task_is_on(there, here, tied):
    model = merged(tied=tied)
    want = {task: floats(model.materialize(task)) for task in model.tasks}
    other = copy.deepcopy(model)
    if there:
        model.set_task(there)
    if here:
        other.set_task(here)
    before = floats(model.backbone)
    other.load_state_dict(model.state_dict())
    assert other.current_task == here and model.current_task == there
    assert same_bits(before, floats(model.backbone))
    for task in model.tasks:
        other.set_task(task)
        assert same_bits(want[task], floats(other.backbone))
    live = other.state_dict(keep_vars=True)["backbone.lm_head.weight"]
    assert live is other.backbone.lm_head.weight


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_that_is_loaded_is_the_base_of_mixed_batches_too(inside):
    model, tasks = merged(), ["mnist", "svhn", "svhn", "mnist"]
    state = {
        name: 2 * value if name.endswith("lm_head.weight") else value
        for name, value in model.state_dict().items()
    }
    logits(model, task_ids=tasks)
    whole = nn.ModuleDict({"merged": model}) if inside else model
    prefix = "merged." if inside else ""
    whole.load_state_dict({prefix + name: value for name, value in state.items()})
    found = logits(model, task_ids=tasks)
    for row, task in enumerate(tasks):
        model.set_task(task)
        torch.testing.assert_close(found[row], logits(model)[row])


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.float16),
    "type": lambda model: model.type(torch.float16),
    "inside": lambda model: nn.ModuleList([model]).half()[0],
    "back": lambda model: model.double().float(),
}
MADE = {
    **DYNAMIC,
    "coded": lambda: DiDiMerging(budget=0.1),
    "whole": lambda: DiDiMerging(budget=0.5),
    "int8": lambda: DiDiMerging(budget=0.5, factor_dtype="int8", refinement="none"),
    "bases": lambda: DiDiMerging(budget=0.5, factor_dtype="int4", shared="subspaces"),
}
#: Two casts of every form, so that every cast is tried on several.
SOME = [
    (name, cast)
    for i, name in enumerate(MADE)
    for cast in (2 * [*CASTS])[i % len(CASTS) :][:2]
]
ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def made(request):
    # of 1e-5: scales of products of codes are below the smallest number of float16
    base = llama()
    tuned = {task: fine_tuned(base, i, scale=1e-5) for i, task in enumerate("ab", 1)}
    return MADE[request.param]().run(BaseModelPool({BASE: base, **tuned}))


@pytest.mark.parametrize("made, cast", SOME, indirect=["made"])
def test_what_is_stored_keeps_its_types_when_a_model_is_cast(made, cast):
    model = copy.deepcopy(made)
    before, stored = model.storage, model.state_dict()
    want = {task: logits(model.materialize(task)).double() for task in "ab"}
    shown = CASTS[cast](copy.deepcopy(model))
    for name, value in shown.state_dict().items():
        if not name.startswith("backbone."):
            assert value.dtype == stored[name].dtype and value.equal(stored[name]), name
    assert shown.storage == before
    dtype = next(shown.backbone.parameters()).dtype
    near = {"rtol": 0, "atol": ROUNDED.get(dtype, 1e-6)}
    for task in "ab":
        shown.set_task(task)
        assert logits(shown).dtype == dtype
        torch.testing.assert_close(logits(shown).double(), want[task], **near)
    shown.unset_task()
    mixed = logits(shown, task_ids=["a", "b", "b", "a"]).double()
    for row, task in enumerate("abba"):
        torch.testing.assert_close(mixed[row], want[task][row], **near)


def test_a_function_is_applied_to_every_module():
    model, seen = merged(), []
    model.set_task("mnist")
    before = floats(model)
    assert model.apply(seen.append) is model
    assert set(map(id, seen)) == {id(module) for module in model.modules()}
    assert same_bits(before, floats(model))


@pytest.mark.parametrize("when", ["before", "with a task", "after a mixed batch"])
@pytest.mark.parametrize("through", [True, False])
def test_tensors_of_other_shapes_are_no_tasks(when, through):
    model = merged()
    if when == "with a task":
        model.set_task("mnist")
    elif when == "after a mixed batch":
        logits(model, task_ids=["mnist", "svhn"] * 2)
    message = r"(embed_tokens|lm_head).weight is \(70, 16\) now, and was \(64, 16\)"
    if through:
        with pytest.raises(DiDiError, match=message):
            model.resize_token_embeddings(70, mean_resizing=False)
    else:
        model.backbone.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(DiDiError, match=message):
        model.set_task("svhn")


def test_what_resizes_nothing_does_no_harm():
    model = merged()
    model.set_task("mnist")
    before = logits(model)
    model.resize_token_embeddings(64)
    assert logits(model).equal(before)
    plain = model.materialize("mnist")
    plain.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(plain(IDS).logits[..., :64], before)


@pytest.mark.parametrize("change", ["checkpointing", "input", "output"])
def test_mixed_batches_follow_what_is_changed_through_the_model(change):
    model, tasks = merged(), ["svhn", "mnist", "svhn", "mnist"]
    before = logits(model, task_ids=tasks)
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
        model.train()
    else:
        other = copy.deepcopy(getattr(model, f"get_{change}_embeddings")())
        with torch.no_grad():
            other.weight.mul_(2)
        getattr(model, f"set_{change}_embeddings")(other)
        assert not logits(model, task_ids=tasks).equal(before)
    found = logits(model, task_ids=tasks)
    for row, task in enumerate(tasks):
        model.set_task(task)
        torch.testing.assert_close(found[row], logits(model)[row])


@pytest.mark.parametrize("task", [None, "mnist"])
def test_a_merged_model_is_no_backbone(tmp_path, task):
    model, other = merged(), merged()
    model.save_pretrained(tmp_path / "m")
    if task:
        other.set_task(task)
    with pytest.raises(DiDiError, match="backbone is a merged model itself"):
        DiDiModel.from_pretrained(tmp_path / "m", backbone=other)
    for odd in (llama().state_dict(), 5, llama):
        with pytest.raises(DiDiError, match="expected a module, or where"):
            DiDiModel.from_pretrained(tmp_path / "m", backbone=odd)
    other.unset_task()
    assert DiDiModel.from_pretrained(tmp_path / "m", backbone=other.backbone).tasks


def test_a_mixed_batch_is_exported_once_one_has_run():
    pytest.importorskip("torch", "2.9", reason="is not traced before")
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    pool, x = family(base), torch.randn(4, 8)
    model = didi(pool, budget=1e6).eval()
    ids, others = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 0])
    with pytest.raises(DiDiError, match="needs one run of such a batch before"):
        torch.export.export(model, (x,), {"task_ids": ids})
    model(x, task_ids=ids)
    program = torch.export.export(model, (x,), {"task_ids": ids}).module()
    want = [pool[model.tasks[i]](x[n]) for n, i in enumerate(others)]
    torch.testing.assert_close(program(x, task_ids=others), torch.stack(want))
    model.set_task("svhn")
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), pool["svhn"](x))


class Expanded(nn.Module):
    """Tensors several entries of which lie in one place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1, 1).expand(4, 4))
        self.register_buffer("shift", torch.ones(1, 4).expand(3, 4))

    def forward(self, x):
        return self.layer(x) @ self.scale + self.shift[1]


def test_tensors_that_repeat_in_memory_are_written(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Expanded()
        pool, x = {BASE: base}, torch.randn(4, 4)
        for task in ("mnist", "svhn"):
            pool[task] = Expanded()
            pool[task].scale = nn.Parameter(torch.randn(4, 4))
            pool[task].shift = torch.randn(3, 4)
    model = didi(pool, budget=1e6)
    for task in ("mnist", "svhn", "mnist"):
        model.set_task(task)
        torch.testing.assert_close(model(x), pool[task](x))
        torch.testing.assert_close(model.materialize(task)(x), pool[task](x))
    tasks = ["svhn", "mnist", "mnist", "svhn"]
    want = torch.stack([pool[task](x[n]) for n, task in enumerate(tasks)])
    torch.testing.assert_close(model(x, task_ids=tasks), want)
    model.unset_task()
    torch.testing.assert_close(model.backbone(x), base(x))
    model.save_pretrained(tmp_path / "m")
    back = DiDiModel.from_pretrained(tmp_path / "m", backbone=copy.deepcopy(base))
    torch.testing.assert_close(back(x, task_ids=tasks), want)
