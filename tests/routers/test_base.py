"""What every router refuses: scores and features that are no numbers, labels of no task, and options that there are not."""

import math

import pytest
import torch
from exact_models import exact_model, llama, pool_of, tokens
from helpers import normal

from fusion_bench_didi.errors import DiDiError, NonFiniteError, SettingsError
from fusion_bench_didi.routers.base import weights_from
from fusion_bench_didi.routers.files import make_router

TASKS = ["a", "b", "c"]
LABELS = torch.arange(9) % 3


def fitted(kind: str, head: str, features=None, labels=LABELS, **options):
    features = normal(9, 6) if features is None else features
    return make_router(kind, TASKS, head=head).fit(features, labels, **options)


HEADS = [("mlp", "mlp"), ("mlp", "discriminant"), ("representation", "mlp")]


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused(value, hard):
    scores = torch.zeros(4, 3)
    scores[2, 1] = value
    with pytest.raises(NonFiniteError, match="1 of 4 samples.* in row 2"):
        weights_from(scores, hard=hard)


@pytest.mark.parametrize("kind", ["projection", "representation"])
def test_samples_that_are_no_numbers_are_not_of_the_first_task(kind):
    model = exact_model(pool_of(llama()))
    model.attach_router(kind)
    states = normal(3, 4, 32)
    states[1, 2, 5] = math.nan
    with pytest.raises(NonFiniteError, match="row 1"):
        model(inputs_embeds=states)


@pytest.mark.parametrize("kind", ["projection", "representation", "mlp"])
def test_squares_of_large_states_are_numbers_in_float16_too(kind):
    base = llama()
    base.model.embed_tokens.weight.data *= 1e4
    base.model.layers[0].input_layernorm.weight.data *= 1e3
    model = exact_model(pool_of(base, scale=0.01)).half()
    model.attach_router(router := make_router(kind, model.tasks))
    ids = tokens(3, 4)
    assert router.features(model, ids, torch.ones_like(ids)).isfinite().all()


@pytest.mark.parametrize("kind, head", HEADS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(kind, head, value):
    features = normal(9, 6)
    features[4, 2] = value
    with pytest.raises(NonFiniteError, match="features of 1 of 9 samples.* in row 4"):
        fitted(kind, head, features)


@pytest.mark.parametrize("kind, head", HEADS)
@pytest.mark.parametrize(
    "labels, told",
    [
        (LABELS + 1, r"Labels \[3\] are no positions among the 3 tasks"),
        (LABELS - 1, r"Labels \[-1\] are no positions"),
        (LABELS.float(), "torch.float32"),
        (LABELS[:8], "one per row"),
        (LABELS[:, None], "one per row"),
        (LABELS % 2, "no sample of .'c'"),
    ],
)
def test_labels_of_no_task_are_refused(kind, head, labels, told):
    with pytest.raises(DiDiError, match=told):
        fitted(kind, head, labels=labels)


@pytest.mark.parametrize("kind, head", HEADS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_are_whole_numbers_of_any_type(kind, head, dtype):
    found, expected = fitted(kind, head, labels=LABELS.to(dtype)), fitted(kind, head)
    features = normal(5, 6, seed=1)
    assert found.scores(features).equal(expected.scores(features))


@pytest.mark.parametrize(
    "head, options, told",
    [
        ("mlp", {"widht": 3}, "no setting widht.*width"),
        ("mlp", {"shrinkage": 0.1}, "no setting shrinkage"),
        ("mlp", {"width": 0}, "width=0"),
        ("mlp", {"epochs": "many"}, "epochs='many'"),
        ("discriminant", {"width": 3}, "no setting width.*shrinkage"),
        ("discriminant", {"shrinkage": 2}, "shrinkage=2"),
    ],
)
def test_options_of_a_head_are_its_own(head, options, told):
    with pytest.raises(SettingsError, match=told):
        fitted("mlp", head, **options)


def test_one_sample_does_not_spread():
    router = make_router("mlp", ["a"], head="discriminant")
    router.fit(normal(1, 6), torch.zeros(1, dtype=torch.long))
    assert router.scores(normal(3, 6)).isfinite().all()


def test_a_head_may_be_fitted_after_another():
    router = fitted("mlp", "mlp", epochs=1)
    router.head = "discriminant"
    router.fit(normal(9, 6), LABELS)
    expected, features = fitted("mlp", "discriminant"), normal(5, 6, seed=1)
    assert router.scores(features).equal(expected.scores(features))


def test_a_head_is_for_the_features_it_was_fitted_to():
    with pytest.raises(DiDiError, match="fitted to 6 features, and 7 are given"):
        fitted("mlp", "mlp", epochs=1)(normal(2, 7))


@pytest.mark.parametrize("kind", ["subspace", "representation", "mlp", "oracle", "none"])  # fmt: skip
@pytest.mark.parametrize("options", [{"tasks": ["a"]}, {"kind": "mlp"}, {"widht": 3}])
def test_options_that_no_router_has_are_named(kind, options):
    model = exact_model(pool_of(llama()))
    with pytest.raises(SettingsError, match=f"{next(iter(options))}"):
        model.attach_router(kind, **options)
    assert model.router is None


def test_a_prompt_of_one_token_is_routed():
    model = exact_model(pool_of(llama()))
    model.attach_router(router := make_router("mlp", model.tasks))
    features = router.features(model, tokens(8, 1))
    router.fit(features, torch.arange(8) % 2, epochs=1)
    ids = tokens(3, 1)
    alone = router.features(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(alone, router.features(model, ids))
    assert router.route(model, ids).sum(1).tolist() == [1, 1, 1]
