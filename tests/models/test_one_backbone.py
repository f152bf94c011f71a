"""Several merged models on one backbone in memory: while one has a task set, the others are refused, and never take it for the base."""

import copy
import gc
import pickle

import pytest
import torch
from exact_models import llama
from helpers import didi, family, floats, same_bits

from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel

IDS = torch.arange(20).view(4, 5)
TASKS = ["mnist", "svhn", "svhn", "mnist"]
REFUSED = "Another merged model has set a task"


def beside(model: DynamicModel) -> DiDiModel:
    """A second model of the same tasks on the same backbone."""
    experts = {t: dict(e.deltas.items()) for t, e in model.modulators.items()}
    shared = dict(model.shared.items())
    return DiDiModel(model.backbone, shared, experts, unit_bits=model.unit_bits)


@pytest.fixture(scope="module")
def made():
    return didi(family(llama()), budget=2.0).eval()


@pytest.fixture
def pair(made):
    one = copy.deepcopy(made)
    return one, beside(one)


USES = {
    "set_task": lambda model: (model.set_task("svhn"), model.unset_task()),
    "materialize": lambda model: model.materialize("svhn"),
    "mixed": lambda model: model(input_ids=IDS, task_ids=TASKS),
    "generate": lambda model: model.generate(IDS, task_ids=TASKS, max_new_tokens=1),
    "base": lambda model: model.base_tensors(),
    "state": lambda model: model.state_dict(),
    "load": lambda model: model.load_state_dict(torch.load(model.state)),
    "save": lambda model: model.save_pretrained(model.state.parent / "saved", overwrite=True),  # fmt: skip
    "make": beside,
}


@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_a_backbone_under_anothers_task_is_refused(pair, use, tmp_path):
    one, other = pair
    other.__dict__["state"] = tmp_path / "state"
    torch.save(other.state_dict(), other.state)
    before = floats(other.materialize("svhn"))
    USES[use](other)
    one.set_task("mnist")
    with pytest.raises(DiDiError, match=REFUSED):
        USES[use](other)
    one.unset_task()
    USES[use](other)
    assert same_bits(before, floats(other.materialize("svhn")))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_has_a_backbone_of_its_own_and_guards_it(pair, again):
    one, other = pair
    before = {task: floats(other.materialize(task)) for task in other.tasks}
    one.set_task("mnist")
    twin = again(one)
    one.unset_task()
    assert twin.current_task == "mnist"
    for model in (other, twin):
        for task, expected in before.items():
            assert same_bits(expected, floats(model.materialize(task)))
    with pytest.raises(DiDiError, match=REFUSED):
        beside(twin)
    twin.unset_task()
    assert same_bits(before["svhn"], floats(beside(twin).materialize("svhn")))


def test_models_that_are_gone_without_a_task_do_not_count(pair):
    one, other = pair
    one.set_task("mnist")
    one.unset_task()
    del one
    gc.collect()
    other.set_task("svhn")


def test_a_task_that_a_model_left_behind_is_not_taken_for_the_base(pair):
    one, other = pair
    one.set_task("mnist")
    del one
    gc.collect()
    with pytest.raises(DiDiError, match=REFUSED):
        other.materialize("svhn")
