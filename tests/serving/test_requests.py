"""What names no task per sample, and networks of modules that torch does not copy."""

import copy

import numpy as np
import pytest
import torch
from exact_models import exact_model, pool_of, seeded, state_of, unchanged
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from fusion_bench_didi.errors import DiDiError, UnknownTaskError

IDS = torch.tensor([1, 0, 1, 0])


@pytest.fixture(scope="module")
def model():
    return exact_model(pool_of(seeded(lambda: nn.Linear(3, 2)), ("a", "b")))


@pytest.mark.parametrize(
    "ids",
    [
        {"b", "a"},
        frozenset({0, 1}),
        {"b": 1, "a": 0},
        {"b": 1, "a": 0}.keys(),
        IDS[:2].to_sparse(),
        IDS[:2].to("meta"),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_tasks_without_an_order_or_without_values_are_refused(model, ids):
    """A set of two names was taken for the tasks of two samples, in any order."""
    with pytest.raises(DiDiError, match="task_ids"):
        model(torch.ones(2, 3), task_ids=ids)


@pytest.mark.parametrize("weights", [torch.eye(2).to_sparse(), torch.eye(2).to("meta")])
def test_weights_without_values_are_refused(model, weights):
    with pytest.raises(DiDiError, match="task_weights .* expected plain numbers"):
        model(torch.ones(2, 3), task_weights=weights)


@pytest.mark.parametrize("wrong", [2**70, -(2**70), np.uint64(2**64 - 1), 2**63])
def test_positions_beyond_every_integer_type_are_no_tasks(model, wrong):
    for ids in ([0, wrong], (wrong, 1)):
        with pytest.raises(UnknownTaskError, match=f"{wrong}.* not all in 0 ... 2"):
            model(torch.ones(2, 3), task_ids=ids)


@pytest.mark.parametrize("kind", [weight_norm, spectral_norm])
@pytest.mark.parametrize("changed", ["2.", ""])
def test_parametrized_modules_serve_mixed_batches(kind, changed):
    """torch refuses to copy them as they are, which was its error in the middle of a forward."""
    parts = (lambda: kind(nn.Linear(4, 6)), nn.ReLU, lambda: nn.Linear(6, 3))
    models = pool_of(seeded(lambda: nn.Sequential(*(make() for make in parts))))
    base, *tasks = models.values()
    for task in tasks:
        kept = {n: v for n, v in base.state_dict().items() if not n.startswith(changed)}
        task.load_state_dict(kept, strict=False)
    model, x = exact_model(models), torch.randn(4, 4)
    before = state_of(model.backbone)
    found = model(x, task_ids=["b", "a", None, "b"])
    plain = [model.materialize(task) for task in "ab"]
    expected = [plain[1](x)[0], plain[0](x)[1], base(x)[2], plain[1](x)[3]]
    torch.testing.assert_close(found, torch.stack(expected))
    assert unchanged(before, model.backbone)
    assert (model.mixed.network is not None) == (changed == "2.")
    copy.deepcopy(model)


COMPLEX = {
    "tensor": torch.eye(2, dtype=torch.complex64),
    "array": np.eye(2) * (1 + 1j),
    "rows": [[1 + 1j, 0], [0, 1]],
}


@pytest.mark.parametrize("kind", COMPLEX)
def test_weights_of_complex_numbers_are_refused(model, kind):
    """Of arrays the real part was taken."""
    with pytest.raises(DiDiError, match="task_weights are torch.complex.*real"):
        model(torch.ones(2, 3), task_weights=COMPLEX[kind])


@pytest.mark.parametrize("ids", [{"b", "a"}, {"b": 1, "a": 0}, {0: "a"}.keys()])
def test_what_has_no_order_is_called_so(model, ids):
    with pytest.raises(DiDiError, match=f"a {type(ids).__name__}, which has no order"):
        model(torch.ones(2, 3), task_ids=ids)
