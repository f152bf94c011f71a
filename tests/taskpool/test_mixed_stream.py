"""The shuffled stream scores every image by its own task's labels, and says how well tasks were found."""

from types import SimpleNamespace

import pytest
import torch
from fusion_bench.method.emr_merging.emr_merging import EMRMerging as HostEMR
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from helpers import PLAIN, didi, pictures, quick

from fusion_bench_didi.method import DiDiMerging
from fusion_bench_didi.routers.features import OracleRouter
from fusion_bench_didi.routers.files import make_router
from fusion_bench_didi.taskpool.clip_vision import TaskAwareCLIPVisionModelTaskPool
from fusion_bench_didi.taskpool.mixed_stream import MixedStreamCLIPVisionModelTaskPool

TASKS = ("mnist", "svhn", "eurosat")


@pytest.fixture
def pool(clip_dir):
    def make(kind=MixedStreamCLIPVisionModelTaskPool, **kwargs):
        return kind(
            test_datasets={t: pictures(i, 15) for i, t in enumerate(TASKS)},
            processor=str(clip_dir),
            clip_model=str(clip_dir),
            dataloader_kwargs={"batch_size": 6},
            **kwargs,
        )

    return make


def accuracies(report):
    return {task: report[task]["accuracy"] for task in (*TASKS, "average")}


def test_static_model_scores_as_in_the_hosts_pool(tiny_clip, pool):
    expected = pool(CLIPVisionModelTaskPool).evaluate(tiny_clip.base)
    report = pool(stream_batch_size=7).evaluate(tiny_clip.base)
    assert accuracies(report) == pytest.approx(accuracies(expected))
    assert "routing" not in report


def test_given_tasks_equal_task_by_task_evaluation(tiny_clip, pool):
    model = didi(tiny_clip.pool_models(), budget=0.7)
    expected = accuracies(pool(TaskAwareCLIPVisionModelTaskPool).evaluate(model))
    model.unset_task()
    stream = pool(stream_batch_size=7)
    assert accuracies(stream.evaluate(model)) == pytest.approx(expected)
    model.attach_router(OracleRouter(model.tasks))
    report = stream.evaluate(model)
    assert accuracies(report) == pytest.approx(expected)
    assert report["routing"]["accuracy"] == 1.0


def test_routing_is_reported(tiny_clip, pool):
    model = didi(tiny_clip.pool_models(), budget=0.7)
    model.attach_router(make_router("projection", model.tasks))
    report = pool().evaluate(model)
    confusion = torch.tensor(report["routing"]["confusion"])
    assert confusion.shape == (3, 4) and confusion.sum(1).tolist() == [15, 15, 15]
    right = confusion[:, :3].diagonal().sum() / 45
    assert report["routing"]["accuracy"] == pytest.approx(float(right))
    assert pool(seed=5).evaluate(model)["routing"] == report["routing"]


def test_samples_without_a_task_are_counted(tiny_clip, pool):
    model = didi(tiny_clip.pool_models(), budget=0.7)
    options = {"fallback": "shared", "threshold": 1.0}
    model.attach_router(make_router("projection", model.tasks, **options))
    routing = pool(limit=4).evaluate(model)["routing"]
    assert routing["unknown_rate"] == 1.0
    assert [row[-1] for row in routing["confusion"]] == [4, 4, 4]


@pytest.mark.parametrize("place", ["pool", "method", "both"])
@pytest.mark.parametrize("kind", [MixedStreamCLIPVisionModelTaskPool, TaskAwareCLIPVisionModelTaskPool])  # fmt: skip
def test_aliases_of_pool_and_method_add_up(tiny_clip, pool, kind, place):
    models = tiny_clip.pool_models()
    models["numbers"], models["houses"] = models.pop("mnist"), models.pop("svhn")
    aliases = {"mnist": "numbers", "svhn": "houses"}
    first, second = ({"mnist": "numbers"}, {"svhn": "houses"})
    of_pool = {"pool": aliases, "method": None, "both": first}[place]
    of_method = {"pool": None, "method": aliases, "both": second}[place]
    tasks = pool(kind, task_aliases=of_pool)
    settings = quick(PLAIN)  # those of what it is compared with
    method = DiDiMerging(budget=0.7, task_aliases=of_method, **settings)
    method._program = SimpleNamespace(taskpool=tasks)
    model = method.run(BaseModelPool(models))
    expected = didi(tiny_clip.pool_models(), budget=0.7)
    found = accuracies(tasks.evaluate(model))
    assert found == pytest.approx(accuracies(pool(kind).evaluate(expected)))


def test_the_hosts_emr_is_told_its_tasks(tiny_clip, pool):
    model = HostEMR().run(BaseModelPool(tiny_clip.pool_models()))
    assert set(accuracies(pool().evaluate(model))) == {*TASKS, "average"}
