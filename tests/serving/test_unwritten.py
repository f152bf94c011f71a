"""Models whose forwards write to their own weights: run otherwise where that is known to do, refused from the first such forward on."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from exact_models import exact_model, pool_of, seeded, state_of, tokens, unchanged
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM, RwkvModel

from fusion_bench_didi import DiDiModel
from fusion_bench_didi.errors import CheckpointMismatchError, DiDiError
from fusion_bench_didi.models.dynamic import DynamicModel
from fusion_bench_didi.serving.unwritten import Unwritten

WRITES = "wrote to its own weights"
TOKENS = tokens(4, 6)


# --- RWKV of transformers divides weights of its later layers ---------------------


def rwkv(kind: type = RwkvForCausalLM, **options: Any) -> nn.Module:
    """Eight layers, the last two of which are divided where nothing else is said; nothing is added to variances, which are small
    where activations are halved."""
    sides = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 8}
    model = seeded(lambda: kind(RwkvConfig(**{**sides, **options})))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-9
    return model


def merged(models: dict, budget: float = 20) -> DynamicModel:
    return didi(models, budget=budget, factor_dtype="float32").eval()


MAKERS = {"exact": exact_model, "merged": merged}


@pytest.fixture(scope="module", params=[6, 2])
def models(request) -> dict[str, nn.Module]:
    return pool_of(rwkv(rescale_every=request.param))


@pytest.fixture(scope="module", params=MAKERS)
def made(request, models) -> DynamicModel:
    return MAKERS[request.param](models)


@pytest.fixture
def model(made) -> DynamicModel:
    return copy.deepcopy(made)


@torch.no_grad()
def logits(model: nn.Module, **task: Any) -> Tensor:
    return model(TOKENS, **task).logits


def plain(models: dict[str, nn.Module], task: str | None) -> Tensor:
    """As a model answers that was just loaded."""
    return logits(copy.deepcopy(models[task or BASE]))


def near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_rwkv_forward_after_forward(models, model):
    for task in ("a", "b", "b", "a"):
        model.set_task(task)
        near(logits(model), plain(models, task))
        near(logits(model.backbone), plain(models, task))
        near(logits(model), plain(models, task))
    model.unset_task()
    near(logits(model.backbone), plain(models, None))


@pytest.mark.parametrize("before", [None, "a"])
def test_rwkv_mixed_batches(models, model, before):
    tasks = ["b", "a", "b", "a"]
    if before is not None:
        model.set_task(before)
        logits(model)
    first = state_of(model.backbone)
    for _ in range(2):
        found = logits(model, task_ids=tasks)
        for i, task in enumerate(tasks):
            near(found[i], plain(models, task)[i])
    assert unchanged(first, model.backbone)
    model.set_task("b")
    near(logits(model), plain(models, "b"))


def test_rwkv_is_the_same_as_one_that_is_told_not_to_divide(models):
    model = exact_model(models)
    for task in ("a", "b", "a"):
        told = copy.deepcopy(models[task])
        told.config.rescale_every = 0
        model.set_task(task)
        torch.testing.assert_close(logits(model), logits(told), rtol=1e-6, atol=1e-6)


def test_rwkv_in_which_some_layers_are_no_tasks(models):
    """What all tasks share is divided no more than what they change."""
    some = {name: copy.deepcopy(model) for name, model in models.items()}
    for model in some.values():
        shared = models[BASE].rwkv.blocks[6:].state_dict()
        model.rwkv.blocks[6:].load_state_dict(shared)
    model, tasks = exact_model(some), ["b", "a", "a", "b"]
    assert not any(".blocks.7." in name for name in model.touched)
    for _ in range(2):
        found = logits(model, task_ids=tasks)
        for i, task in enumerate(tasks):
            near(found[i], plain(some, task)[i])
    for task in "ab":
        model.set_task(task)
        near(logits(model), plain(some, task))


def test_rwkv_as_plain_models(models, model):
    for ran in (None, "a", "b"):
        if ran:
            model.set_task(ran)
            logits(model)
        for task in "ab":
            one = model.materialize(task)
            near(logits(one), plain(models, task))
            near(logits(one), plain(models, task))


def test_rwkv_saved_after_a_forward(models, tmp_path):
    for name, model in models.items():
        copy.deepcopy(model).save_pretrained(tmp_path / name)
    target = "transformers.RwkvForCausalLM.from_pretrained"
    pool = {
        name: {"_target_": target, "pretrained_model_name_or_path": f"{tmp_path / name}"}
        for name in models
    }  # fmt: skip
    model = merged(BaseModelPool(pool))
    model.set_task("a")
    logits(model)
    logits(model, task_ids=["a", "b", "a", "b"])
    model.save_pretrained(tmp_path / "merged")
    again = DiDiModel.from_pretrained(tmp_path / "merged").eval()
    for task in "ab":
        again.set_task(task)
        near(logits(again), plain(models, task))


def test_rwkv_says_that_it_runs_otherwise_and_a_model_that_does_not_is_left(caplog):
    exact_model(pool_of(rwkv(rescale_every=0)))
    assert not caplog.messages
    pool = pool_of(rwkv(RwkvModel))
    model = exact_model(pool)
    assert "RwkvModel runs with rescale_every=0 in place of 6" in caplog.text
    assert model.backbone.config.rescale_every == 0
    assert pool[BASE].config.rescale_every == 6


@pytest.mark.parametrize("name", [BASE, "b"])
def test_rwkv_that_ran_before_the_merge(models, name):
    ran = {task: copy.deepcopy(model) for task, model in models.items()}
    logits(ran[name])
    with pytest.raises(
        CheckpointMismatchError, match=f"'{name}' .RwkvModel. has divided"
    ):
        didi(ran)
    if name == BASE:
        with pytest.raises(CheckpointMismatchError, match="base model .* has divided"):
            exact_model(ran)
    ran[name].train()
    logits(ran[name])  # multiplies again
    didi(ran)


def test_rwkv_that_ran_without_dividing_is_merged():
    models = pool_of(rwkv(rescale_every=0))
    for model in models.values():
        logits(model)
    model = merged(models)
    model.set_task("b")
    near(logits(model), plain(models, "b"))


# --- others are refused ------------------------------------------------------------


class Writer(nn.Module):
    """Divides what it is given once, as RWKV does; what it writes to is another's."""

    divided = False

    def __init__(self, layers: nn.ModuleList, write: Callable[[nn.Parameter], Any]):
        super().__init__()
        self.layers, self.write = layers, write

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.divided:
            self.write(self.layers[1].weight)
            self.divided = True
        return self.layers[1](self.layers[0](x).relu()) * 2


class Net(nn.Module):
    def __init__(self, write: Callable[[nn.Parameter], Any]):
        super().__init__()
        layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
        self.body = Writer(layers, write)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x)


def divide(weight: nn.Parameter) -> None:
    weight.div_(2)


def put(weight: nn.Parameter) -> None:
    weight.copy_(weight / 2)


def part(weight: nn.Parameter) -> None:
    weight[1:].mul_(0.5)


def through_a_view(weight: nn.Parameter) -> None:
    weight.detach().mT[::2] = 1


KINDS = (divide, put, part, through_a_view)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def net_pool(write: Callable, *, touched: bool) -> dict[str, nn.Module]:
    base = seeded(lambda: Net(write))
    pool = pool_of(base)
    if not touched:  # what is written to is then common to all tasks
        for model in pool.values():
            model.body.layers[1].load_state_dict(base.body.layers[1].state_dict())
    return pool


def alone(model: DynamicModel) -> None:
    model.set_task("a")
    model(X)


def by_a_method(model: DynamicModel) -> None:
    model.set_task("a")
    model.encode(X)


def in_inference_mode(model: DynamicModel) -> None:
    with torch.inference_mode():
        alone(model)


def mixed(model: DynamicModel) -> None:
    model(X, task_ids=["a", "b", "a", "b"])


def one_group(model: DynamicModel) -> None:
    model(X, task_ids=["b"] * 4)


RUNS = (alone, by_a_method, in_inference_mode, mixed, one_group)


@pytest.mark.parametrize("touched", [True, False])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("write", KINDS)
def test_a_forward_that_writes_is_refused(write, run, touched):
    model = exact_model(net_pool(write, touched=touched))
    message = f"{WRITES} .body.layers.1.weight of Linear.*backbone="
    with pytest.raises(DiDiError, match=message):
        run(model)
    for later in (*RUNS, lambda m: m.set_task("b"), lambda m: m.materialize("b")):
        with pytest.raises(DiDiError, match=WRITES):
            later(model)


@pytest.mark.parametrize("touched", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_it_is_not_saved_and_what_was_saved_is_loaded_with_another_base(
    run, touched, tmp_path
):
    models = net_pool(divide, touched=touched)
    model = didi(models, budget=20)
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(DiDiError, match=WRITES):
        run(model)
    with pytest.raises(DiDiError, match=WRITES):
        model.save_pretrained(tmp_path / "later")
    assert not (tmp_path / "later").exists()
    base = models[BASE]
    base.body.write = nn.Identity()
    again = DiDiModel.from_pretrained(tmp_path / "merged", backbone=base)
    for task in "ab":
        again.set_task(task)
        models[task].body.write = nn.Identity()
        torch.testing.assert_close(again(X), models[task](X), atol=1e-3, rtol=1e-3)


def test_a_forward_that_writes_and_fails_is_seen():
    model = exact_model(net_pool(divide, touched=True))
    model.set_task("a")
    with pytest.raises(DiDiError, match=WRITES):
        model(X[:, :3])
    with pytest.raises(DiDiError, match=WRITES):
        model.set_task("b")


def test_copies_and_pickles_know_of_it_too():
    model = exact_model(net_pool(divide, touched=False))
    with pytest.raises(DiDiError, match=WRITES):
        alone(model)
    with pytest.raises(DiDiError, match=WRITES):
        copy.deepcopy(model).set_task("b")


# --- what changes beside a forward, or does no harm --------------------------------


def test_training_between_forwards_is_the_users():
    model = exact_model(pool_of(seeded(lambda: Net(lambda _: None))))
    model.set_task("a")
    weight = model.backbone.body.layers[0].weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(2):
        before = weight.detach().clone()
        with torch.enable_grad():
            found = model.backbone.body.layers[0](X) + model(X).sum()
            found.sum().backward()
        optimizer.step()
        assert not weight.equal(before)
    model.set_task("b")


def test_a_task_that_another_thread_switches_meanwhile_spoils_nothing():
    model = exact_model(pool_of(seeded(lambda: Net(lambda _: None))))
    expected = model.materialize("b")(X)
    model.set_task("a")
    body = model.backbone.body
    body.write = lambda _: in_a_thread(lambda: model.set_task("b"))
    with pytest.raises(DiDiError, match="set by another thread while Net .*task_ids"):
        model(X)
    assert model.current_task == "b"
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize(
    ("begin", "end"), [(i, j) for j in range(4) for i in range(j + 1)]
)
def test_a_forward_beside_a_switch_is_no_writer_whenever_it_begins_and_ends(begin, end):
    """Threads that met between a write and the note of it spoiled the model for good."""
    net = nn.Linear(2, 2)
    unwritten, turn = Unwritten(net, {}), ExitStack()
    switch = [
        lambda: turn.enter_context(unwritten.switching()),
        lambda: net.weight.detach().mul_(2),
        turn.close,
    ]

    def go_on(steps):
        for step in steps:
            step()

    go_on(switch[:begin])
    told = begin <= 1 < end  # the values changed while it ran
    message = "set by another thread while Linear ran.*task_ids"
    with pytest.raises(DiDiError, match=message) if told else nullcontext():
        unwritten.run(net, lambda: go_on(switch[begin:end]))
    go_on(switch[end:])
    unwritten.check()
    other = nn.ModuleList([net])  # a network of mixed batches, whose tasks are its own
    unwritten.run(other, lambda: go_on(switch))


def test_switches_of_several_threads_take_turns():
    model = exact_model(pool_of(seeded(lambda: Net(lambda _: None))))
    expected = {task: model.materialize(task)(X) for task in "ab"}
    write, others = model._weights.write, []
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(*args):
            write(*args)
            if not others:
                others.append(pool.submit(model.set_task, "a"))
                wait(others, 0.2)

        model._weights.write = meanwhile
        model.set_task("b")
    torch.testing.assert_close(model(X), expected[model.current_task])


def in_a_thread(function: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def test_statistics_of_batch_norms_in_training():
    base = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    model = exact_model(pool_of(base))
    model.set_task("a")
    model.train()
    model(X)
    model(X, task_ids=["a", "b", "a", "b"])
    model.set_task("b")


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(64, 8, max_norm=0.5), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids)).mean(1)


def test_embeddings_with_a_largest_norm_are_right_under_every_task():
    models = pool_of(seeded(Bounded))
    model, tasks = exact_model(models), ["a", "b", "b", "a"]
    with torch.no_grad():
        expected = {t: copy.deepcopy(m)(TOKENS) for t, m in models.items()}
        for _ in range(2):
            found = model(TOKENS, task_ids=tasks)
            for i, task in enumerate(tasks):
                torch.testing.assert_close(found[i], expected[task][i])
            for task in "ba":
                model.set_task(task)
                torch.testing.assert_close(model(TOKENS), expected[task])


def test_weights_made_in_inference_mode_are_run():
    with torch.inference_mode():
        model = exact_model(pool_of(seeded(lambda: Net(lambda _: None))))
        model.set_task("a")
        one = model(X)
        model.set_task("b")
        assert not model(X).equal(one)
