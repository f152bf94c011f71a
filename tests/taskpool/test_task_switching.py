"""Stock task pools of the host evaluate the right expert: as good as each task's own plain model.

Losses are compared too: on pictures of noise they tell models apart where accuracies may not.
"""

import gc
import json
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fusion_bench.method.emr_merging.emr_merging import EMRMerging
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool
from fusion_bench.programs import FabricModelFusionProgram
from fusion_bench.taskpool import (
    CLIPVisionModelTaskPool,
    GPT2TextClassificationTaskPool,
)
from helpers import BASE, QUICK, REPOSITORY, OpenClipLike, didi, family, pictures
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

from fusion_bench_didi.errors import DiDiError, UnknownTaskError
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.method.routed import RoutedMethod
from fusion_bench_didi.pools.task_names import pool_tasks
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.routers.features import OracleRouter
from fusion_bench_didi.taskpool import attach
from fusion_bench_didi.taskpool.clip_vision import TaskAwareCLIPVisionModelTaskPool
from fusion_bench_didi.taskpool.lm_eval_harness import is_harness, lm_eval_pool
from fusion_bench_didi.taskpool.openclip_vision import (
    TaskAwareOpenCLIPVisionModelTaskPool,
)
from fusion_bench_didi.taskpool.task_switching import HOOKS

TASKS = ("mnist", "svhn", "eurosat")
#: Of hosts whose pools have no signal of their own, as those released.
needs_us = pytest.mark.skipif(
    getattr(CLIPVisionModelTaskPool, "switches_tasks", False),
    reason="this host tells models their task",
)


@pytest.fixture
def clip_pool(clip_dir):
    """Makes a task pool of the host's CLIP family."""

    def make(tasks=TASKS, kind=CLIPVisionModelTaskPool, **kwargs):
        return kind(
            test_datasets={t: pictures(i) for i, t in enumerate(tasks)},
            processor=str(clip_dir),
            clip_model=str(clip_dir),
            dataloader_kwargs={"batch_size": 6},
            **kwargs,
        )

    return make


def through_program(models, taskpool, **settings):
    """Merge as the host's program does: the task pool is there before the method runs."""
    method = DiDiMerging(**{**QUICK, "budget": 0.7, **settings})
    method._program = SimpleNamespace(taskpool=taskpool)
    return method.run(BaseModelPool(models))


def assert_each_task_by_its_own_model(report, model, evaluate, tasks=TASKS):
    """``evaluate`` takes a plain model and gives the report of a pool without our help."""
    for task in tasks:
        assert report[task] == pytest.approx(evaluate(model.materialize(task))[task])
    losses = {report[task]["loss"] for task in tasks}
    wrong = evaluate(model.materialize(tasks[0]))[tasks[1]]["loss"]
    assert wrong not in losses, "the experts cannot be told apart by these pictures"


def test_stock_clip_pool_evaluates_each_task_with_its_expert(tiny_clip, clip_pool):
    pool = clip_pool()
    model = through_program(tiny_clip.pool_models(), pool)
    report = pool.evaluate(model)
    assert type(pool) is CLIPVisionModelTaskPool
    assert_each_task_by_its_own_model(report, model, clip_pool().evaluate)
    assert report["didi"]["storage"] == model.storage.as_dict()
    assert report["didi"]["ranks"] == model.info["ranks"]
    mean = sum(report[task]["accuracy"] for task in TASKS) / 3
    assert report["average"]["accuracy"] == pytest.approx(mean)


class SwitchingPool(CLIPVisionModelTaskPool):
    """A pool of a host that tells models their task itself, as ``upstream/task_aware_evaluation`` makes all of them."""

    switches_tasks = True

    def set_task(self, model, task_name):
        told = getattr(model, "set_task", None)
        if told is not None:
            told(task_name)
        return told is not None

    def on_task_evaluation_begin(self, classifier, task_name):
        self.set_task(classifier.clip_model.vision_model, task_name)
        super().on_task_evaluation_begin(classifier, task_name)


def test_a_host_that_switches_tasks_is_not_wrapped(tiny_clip, clip_pool):
    pool = clip_pool(kind=SwitchingPool)
    model = through_program(tiny_clip.pool_models(), pool)
    assert not {*HOOKS} & {*vars(pool)}, "the host's own signal is enough"
    report = pool.evaluate(model)
    assert_each_task_by_its_own_model(report, model, clip_pool().evaluate)
    assert report["didi"]["storage"] == model.storage.as_dict()


def test_aliases_hold_where_the_host_switches(tiny_clip, clip_pool):
    pool = clip_pool(("cifar10", "svhn"), SwitchingPool)
    models, aliases = tiny_clip.pool_models(), {"cifar10": "mnist"}
    model = through_program(models, pool, task_aliases=aliases)
    report = pool.evaluate(model)
    plain = clip_pool(("cifar10", "svhn")).evaluate(model.materialize("mnist"))
    assert report["cifar10"] == pytest.approx(plain["cifar10"])
    other = torch.nn.Linear(2, 2)
    other.set_task = lambda name: setattr(other, "told", name)
    assert pool.set_task(other, "svhn") and other.told == "svhn"


def test_order_of_evaluation_does_not_matter(tiny_clip, clip_pool):
    pool = clip_pool()
    model = through_program(tiny_clip.pool_models(), pool)
    first = pool.evaluate(model)
    model.set_task("svhn")
    assert pool.evaluate(model) == first


def test_plain_models_are_evaluated_as_before(tiny_clip, clip_pool):
    pool = clip_pool()
    through_program(tiny_clip.pool_models(), pool)
    report = pool.evaluate(tiny_clip.tuned["mnist"])
    assert report == clip_pool().evaluate(tiny_clip.tuned["mnist"])
    assert "didi" not in report


def test_task_aware_clip_pool_needs_no_program(tiny_clip, clip_pool):
    model = didi(tiny_clip.pool_models(), budget=0.7)
    report = clip_pool(kind=TaskAwareCLIPVisionModelTaskPool).evaluate(model)
    assert_each_task_by_its_own_model(report, model, clip_pool().evaluate)


@needs_us
def test_stock_clip_pool_without_help_fails_loudly(tiny_clip, clip_pool):
    """Never a silent evaluation on whatever expert was on last."""
    model = didi(tiny_clip.pool_models(), budget=0.7)
    with pytest.raises(UnknownTaskError, match="No task is set"):
        clip_pool().evaluate(model)


def test_merged_model_may_know_more_tasks_than_the_pool_asks(tiny_clip, clip_pool):
    pool = clip_pool(("svhn", "mnist"))
    model = through_program(tiny_clip.pool_models(), pool)
    report = pool.evaluate(model)
    plain = clip_pool(("svhn", "mnist")).evaluate
    assert_each_task_by_its_own_model(report, model, plain, ("svhn", "mnist"))


def test_unknown_task_is_refused_before_anything_is_merged(
    tiny_clip, clip_pool, monkeypatch
):
    monkeypatch.setattr("fusion_bench_didi.method.didi.merge", lambda *_, **__: 1 / 0)
    expected = r"covers: \['cifar10'\].*'mnist', 'cifar10'.*'svhn', 'eurosat'"
    with pytest.raises(UnknownTaskError, match=expected):
        through_program(tiny_clip.pool_models(), clip_pool(("mnist", "cifar10")))


def test_unknown_task_is_refused_by_a_task_aware_pool(tiny_clip, clip_pool):
    model = didi(tiny_clip.pool_models())
    pool = clip_pool(("mnist", "cifar10"), TaskAwareCLIPVisionModelTaskPool)
    expected = r"covers: \['cifar10'\].*'mnist', 'cifar10'.*'svhn', 'eurosat'"
    with pytest.raises(UnknownTaskError, match=expected):
        pool.evaluate(model)


def test_aliases_map_names_of_the_task_pool(tiny_clip, clip_pool):
    tasks = ("cifar10", "svhn")
    aliases = {"cifar10": "mnist"}
    pool = clip_pool(tasks)
    model = through_program(tiny_clip.pool_models(), pool, task_aliases=aliases)
    report = pool.evaluate(model)
    aware = clip_pool(tasks, TaskAwareCLIPVisionModelTaskPool, task_aliases=aliases)
    assert aware.evaluate(model) == report
    plain = clip_pool(tasks).evaluate(model.materialize("mnist"))
    assert report["cifar10"] == pytest.approx(plain["cifar10"])


def test_names_that_differ_by_case_and_dashes_meet(tiny_clip, clip_pool):
    tuned = tiny_clip.tuned
    models = {
        BASE: tiny_clip.base,
        "Fashion-MNIST": tuned["mnist"],
        "dtd": tuned["svhn"],
    }
    pool = clip_pool(("fashion_mnist", "dtd"))
    model = through_program(models, pool)
    report = pool.evaluate(model)
    plain = clip_pool(("fashion_mnist", "dtd"))
    expected = plain.evaluate(model.materialize("Fashion-MNIST"))["fashion_mnist"]
    assert report["fashion_mnist"] == pytest.approx(expected)


@needs_us
def test_emr_of_the_host_is_evaluated_task_by_task(tiny_clip, clip_pool):
    pool = CLIPVisionModelPool(tiny_clip.pool_models())
    model = EMRMerging().run(pool)
    report = clip_pool(kind=TaskAwareCLIPVisionModelTaskPool).evaluate(model)
    assert "didi" not in report
    losses = []
    for task in TASKS:
        model.set_task(task)
        alone = clip_pool().evaluate(model)[task]
        # its switching adds and subtracts: the last bits move
        assert report[task] == pytest.approx(alone, abs=1e-4)
        losses.append(clip_pool().evaluate(model)["mnist"]["loss"])
    assert len({round(loss, 3) for loss in losses}) == 3


@needs_us
def test_attaching_twice_changes_nothing(tiny_clip, clip_pool):
    pool = clip_pool()
    through_program(tiny_clip.pool_models(), pool)
    hook = pool.on_task_evaluation_begin
    model = through_program(tiny_clip.pool_models(), pool)
    attach(pool)
    assert pool.on_task_evaluation_begin is hook
    assert_each_task_by_its_own_model(pool.evaluate(model), model, clip_pool().evaluate)


def openclip_pool(kind=None):
    from fusion_bench.models.open_clip import ClassificationHead
    from fusion_bench.taskpool import OpenCLIPVisionModelTaskPool

    generator = torch.Generator().manual_seed(0)
    items = [
        (torch.randn(3, 32, 32, generator=generator), int(i % 5)) for i in range(12)
    ]
    heads = {
        task: ClassificationHead(True, torch.randn(5, 12, generator=generator))
        for task in ("mnist", "svhn")
    }
    pool = (kind or OpenCLIPVisionModelTaskPool)(
        test_datasets=dict.fromkeys(heads, items),
        classification_heads=heads,
        dataloader_kwargs={"batch_size": 4},
    )
    modelpool = SimpleNamespace(test_processor=None)
    pool._program = SimpleNamespace(modelpool=modelpool, taskpool=pool)
    return pool


def plain_encoder(model: torch.nn.Module) -> torch.nn.Module:
    """The host hands the model to Fabric, which wants something to train."""
    return model.requires_grad_(True)


@pytest.mark.parametrize("kind", [None, TaskAwareOpenCLIPVisionModelTaskPool])
def test_openclip_pool_evaluates_each_task_with_its_expert(kind):
    pool = openclip_pool(kind)
    models = family(OpenClipLike())
    if kind is None:
        model = through_program(models, pool)
    else:
        model = didi(models, budget=0.7)
    report = pool.evaluate(model)
    assert report["didi"]["storage"]["x_excl"] <= 0.7
    assert_each_task_by_its_own_model(
        report,
        model,
        lambda plain: openclip_pool().evaluate(plain_encoder(plain)),
        ("mnist", "svhn"),
    )


def gpt2_pool(modelpool) -> GPT2TextClassificationTaskPool:
    pool = GPT2TextClassificationTaskPool(
        test_datasets={"cola": None, "sst2": None},
        tokenizer=OmegaConf.create({"_target_": "builtins.dict"}),
        dataloader_kwargs={},
        fast_dev_run=False,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (8, 6), generator=generator)
    rows = [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[0] % 2}
        for t in tokens
    ]
    pool.get_test_dataloader = lambda task: DataLoader(rows, batch_size=1)
    pool._program = SimpleNamespace(modelpool=modelpool, taskpool=pool)
    return pool


def test_gpt2_pool_evaluates_each_task_with_its_expert():
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, num_labels=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = {t: GPT2ForSequenceClassification(config) for t in ("cola", "sst2")}
        base = GPT2Model(config)
    # the flan pools of the host write glue-cola where their task pool writes cola
    models = family(base, ("glue-cola", "sst2"))
    modelpool = SimpleNamespace(load_classifier=heads.get)
    pool = gpt2_pool(modelpool)
    model = through_program(models, pool)
    report = pool.evaluate(model)
    for task, name in (("cola", "glue-cola"), ("sst2", "sst2")):
        plain = gpt2_pool(modelpool).evaluate(model.materialize(name))
        assert report[task] == pytest.approx(plain[task])
        other = "sst2" if name == "glue-cola" else "glue-cola"
        wrong = gpt2_pool(modelpool).evaluate(model.materialize(other))
        assert wrong[task]["loss"] != pytest.approx(report[task]["loss"], abs=1e-6)


class Forgetful:
    """A pool that keeps no model itself, and may fail."""

    _test_datasets = {"mnist": None, "svhn": None}

    def __init__(self):
        self.seen, self.fails = [], False

    def load_task(self, task_name):
        if self.fails:
            raise RuntimeError("no such images")
        return task_name

    def evaluate(self, model):
        for task in self._test_datasets:
            self.load_task(task)
            self.seen.append(model.current_task)
        return {}


@pytest.mark.parametrize("fails", [False, True])
def test_a_pool_lets_go_of_the_model_it_has_evaluated(fails):
    pool = Forgetful()
    attach(pool)
    model = didi(family(OpenClipLike()), budget=0.7)
    pool.evaluate(model)
    assert pool.seen == ["mnist", "svhn"]
    if fails:
        pool.fails = True
        with pytest.raises(RuntimeError, match="no such images"):
            pool.evaluate(model)
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


def test_attaching_again_adds_aliases():
    class Pool:
        _test_datasets = {"a": None}

        def load_task(self, task_name):
            return task_name

    pool = Pool()
    attach(pool)
    hooked = pool.load_task
    attach(pool, known=["b"], aliases={"a": "b"})
    assert pool.load_task is hooked
    assert pool._didi_aliases == {"a": "b"}


def test_a_pool_that_never_says_its_task_is_refused_before_the_merge(monkeypatch):
    from fusion_bench.taskpool import DummyTaskPool, LlamaTestGenerationTaskPool

    taskpool = LlamaTestGenerationTaskPool(test_prompts=["x"])
    models = family(OpenClipLike())
    with monkeypatch.context() as patched:
        patched.setattr("fusion_bench_didi.method.didi.merge", lambda *_, **__: 1 / 0)
        with pytest.raises(DiDiError, match="LlamaTestGenerationTaskPool runs a model without saying"):  # fmt: skip
            through_program(models, taskpool)
    assert through_program(models, DummyTaskPool()).tasks == ["mnist", "svhn"]
    routed = RoutedMethod(DiDiMerging(budget=0.7, **QUICK), router="projection")
    routed._program = SimpleNamespace(taskpool=taskpool)
    with pytest.raises(ValueError, match="blocks"):  # its own fault, and the only one
        routed.run(BaseModelPool(models))


def test_names_of_tasks_are_found_in_lists_and_texts():
    kinds = ({"tasks": "a,b"}, {"tasks": ["a", "b"]}, {"_all_task_names": ("a", "b")})
    for kind in kinds:
        assert pool_tasks(SimpleNamespace(**kind)) == ["a", "b"]
    assert pool_tasks(SimpleNamespace(tasks=None)) == []


def test_a_comparison_goes_task_by_task_through_lists():
    class Listed:
        _all_task_names = ["a", "b"]

        def load_task(self, name):
            return name

        def evaluate(self, model):
            return {self.load_task(t): {"accuracy": 0.5} for t in self._all_task_names}

    pool = Listed()
    assert Scorer(pool).score(torch.nn.Identity(), "b") == 0.5
    assert pool._all_task_names == ["a", "b"]


class OwnPool:
    """A task pool of somebody's own: figures are of each task's own model, and nothing says which task is evaluated."""

    def __init__(self, models, tasks=("mnist", "svhn")):
        self.models, self.tasks = models, list(tasks)

    def figures(self, model, task):
        entries = torch.linspace(-1, 1, 8).expand(1, 8)
        found, own = (m.eval()(entries) for m in (model, self.models[task]))
        return {"accuracy": 1 - ((found - own).norm() / own.norm()).item()}

    def evaluate(self, model):
        found = {task: self.figures(model, task) for task in self.tasks}
        mean = sum(one["accuracy"] for one in found.values()) / len(found)
        return {**found, "average": {"accuracy": mean}, "batch": 1}


class FixedTasks(OwnPool):
    """Its tasks cannot be made fewer, so that each report has all of them."""

    def __init__(self, models):
        self.models = models

    tasks = property(lambda self: ["mnist", "svhn"])


class FlatFigures(OwnPool):
    def figures(self, model, task):
        return super().figures(model, task)["accuracy"]

    def evaluate(self, model):
        found = {task: self.figures(model, task) for task in self.tasks}
        return {**found, "average": sum(found.values()) / len(found)}


class HookPool(OwnPool):
    """Its method per task is called with a split first."""

    def evaluate(self, model):
        tell = self.evaluate_single_task
        return {task: tell("test", model, task) for task in self.tasks}

    def evaluate_single_task(self, split, model, task):
        return self.figures(model, task)


class OtherArguments(HookPool):
    def evaluate_single_task(self, split, model, dataset):
        return self.figures(model, dataset)


class NamedArguments(HookPool):
    def evaluate(self, model):
        return {
            task: self.evaluate_single_task(split="svhn", model=model, task_name=task)
            for task in self.tasks
        }

    def evaluate_single_task(self, **kwargs):
        return self.figures(kwargs["model"], kwargs["task_name"])


class WithoutNames(HookPool):
    """Its method per task is told no task; where only one is asked for it is that."""

    def evaluate(self, model):
        (task,) = self.tasks
        return {task: self.evaluate_single_task(model)}

    def evaluate_single_task(self, model):
        return self.figures(model, self.tasks[0])


EVERY = [OwnPool, FixedTasks, FlatFigures, HookPool, OtherArguments, NamedArguments]


def vectors_in() -> dict[str, torch.nn.Module]:
    return family(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)))


@pytest.mark.parametrize("kind", EVERY)
def test_pools_of_ones_own_evaluate_each_task_with_its_expert(kind):
    models = vectors_in()
    pool = kind(models)
    model = through_program(models, pool, budget=3)
    report = pool.evaluate(model)
    assert report["didi"]["storage"] == model.storage.as_dict()
    for task in ("mnist", "svhn"):
        alone = kind(models).evaluate(model.materialize(task))[task]
        assert report[task] == pytest.approx(alone)
    plain = kind(models).evaluate(models["mnist"])
    assert pool.evaluate(models["mnist"]) == plain, "others are evaluated as before"


@pytest.mark.parametrize("kind", [*EVERY, WithoutNames])
def test_one_task_of_a_pool_of_ones_own(kind):
    models = vectors_in()
    model, scorer = didi(models, budget=3), Scorer(kind(models))
    for task in ("svhn", "mnist"):
        assert scorer.score(model, task) == pytest.approx(1, abs=0.01)


def test_the_mean_of_tasks_evaluated_by_themselves():
    models = vectors_in()
    pool = OwnPool(models)
    model = through_program(models, pool, budget=3)
    report = pool.evaluate(model)
    firsts = [report[task]["accuracy"] for task in pool.tasks]
    assert report["average"]["accuracy"] == pytest.approx(sum(firsts) / 2)
    assert list(report) == ["batch", "mnist", "svhn", "average", "didi"]


def test_a_pool_that_reports_no_task_by_itself_is_named():
    models = vectors_in()
    pool = OwnPool(models)
    pool.evaluate = lambda model: {"accuracy": 0.5}
    with pytest.raises(DiDiError, match="asked for 'mnist' alone it does not report"):
        attach(pool)
        pool.evaluate(didi(models, budget=3))


@needs_us
def test_a_refused_evaluation_leaves_a_routed_model_as_it_was():
    """Its task was unset and its counts forgotten before the names were checked."""
    model = didi(family(OpenClipLike(), ("a", "b")), budget=0.5)
    model.attach_router(OracleRouter(model.tasks)).set_task("b")
    model.router.samples = 7
    asked = SimpleNamespace(_test_datasets={"a": 1, "zzz": 2})
    asked.evaluate_single_task = lambda task_name, model: {"accuracy": 1.0}
    asked.evaluate = lambda model: {}
    attach(asked)
    with pytest.raises(UnknownTaskError, match="zzz"):
        asked.evaluate(model)
    assert (model.current_task, model.router.samples) == ("b", 7)


@pytest.mark.parametrize("version", [None, "0.4.10"])
def test_lm_evals_pool_says_what_to_install(version, monkeypatch):
    """Absent, or another than the host's pool imports."""
    module = "fusion_bench.taskpool.lm_eval_harness"
    for name in [n for n in sys.modules if n.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    stub = ModuleType("lm_eval") if version else None  # without what it imports
    monkeypatch.setitem(sys.modules, "lm_eval", stub)
    config = OmegaConf.load(REPOSITORY / "config" / "taskpool" / "didi" / "lm_eval.yaml")  # fmt: skip
    program = FabricModelFusionProgram(None, None, print_config=False)
    config.tasks = ["gsm8k"]
    with pytest.raises(Exception, match=r"pip install 'fusion-bench-didi\[lm-eval\]'"):
        program._instantiate_and_setup(config)


def test_lm_eval_writes_where_the_run_does_without_a_logger(tmp_path):
    class LMEvalHarnessTaskPool:
        tasks, output_path, log_dir = ["a"], None, None
        _program = SimpleNamespace(log_dir=None, path={"log_dir": str(tmp_path)})

        def evaluate(self, model):
            place = Path(self.output_path)
            place.mkdir(parents=True)
            results = {"results": {"a": {"acc,none": 0.5}}}
            (place / "results_1.json").write_text(json.dumps(results))

    pool = LMEvalHarnessTaskPool()
    attach(pool)
    assert pool.evaluate(torch.nn.Identity())["a"] == {"acc": 0.5}
    assert (tmp_path / "lm_eval_results" / "a").is_dir()
    pool._program = None
    with pytest.raises(DiDiError, match="taskpool.output_path"):
        pool.evaluate(torch.nn.Identity())


def test_lm_evals_pool_is_the_hosts(monkeypatch):
    pool = type("LMEvalHarnessTaskPool", (), {"__init__": lambda s, **k: vars(s).update(k)})  # fmt: skip
    stub = SimpleNamespace(LMEvalHarnessTaskPool=pool)
    monkeypatch.setitem(sys.modules, "fusion_bench.taskpool.lm_eval_harness", stub)
    made = lm_eval_pool(tasks=["a"], batch_size=2)
    assert is_harness(made) and (made.tasks, made.batch_size) == (["a"], 2)
