"""The demo suite: its layout, its seed, its locks, the host's pools on it, and the command that merges it."""

import io
import json
import math
import multiprocessing
import os
from pathlib import Path

import datasets
import pytest
import torch
from fusion_bench.programs import FabricModelFusionProgram
from fusion_bench.tasks.clip_classification import (
    CLIPTemplateFactory,
    get_classnames_and_templates,
)
from helpers import REPOSITORY, demo_pools
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from fusion_bench_didi import demo
from fusion_bench_didi.demo import __main__ as command
from fusion_bench_didi.demo import suite as suite_module
from fusion_bench_didi.demo.drawing import SIDE
from fusion_bench_didi.demo.mixed_pools import MixedDemoTaskPool
from fusion_bench_didi.demo.pools import (
    DemoCLIPVisionModelPool,
    DemoCLIPVisionModelTaskPool,
)
from fusion_bench_didi.demo.tasks import EXTRAS, TASKS, task_pictures
from fusion_bench_didi.demo.towers import pixel_values
from fusion_bench_didi.errors import SettingsError
from fusion_bench_didi.programs.entries import declared, read_entries
from fusion_bench_didi.report.terminal import table

TINY = ["digits", "shapes", "textures"]
CONFIG = REPOSITORY / "config"


@pytest.fixture(autouse=True, scope="module")
def datasets_cache(tmp_path_factory):
    """The host's pools let ``datasets`` cache what it reads; not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf")
        )
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def suite(cache) -> Path:
    return demo.build_suite(cache, seed=0, size="tiny")


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_layout(suite):
    facts = json.loads((suite / "suite.json").read_text())
    assert list(facts["tasks"]) == TINY
    assert {path.name for path in (suite / "vision").iterdir()} == {
        "_pretrained_",
        *TINY,
    }
    for task, fact in facts["tasks"].items():
        assert 0 <= fact["zero_shot"] <= 1 and 0 <= fact["fine_tuned"] <= 1
        for split, count in fact["pictures"].items():
            rows = datasets.load_dataset(str(suite / "data" / task), split=split)
            assert rows.column_names == ["image", "label"] and len(rows) == count
            assert rows[0]["image"].size == (SIDE, SIDE)
            assert max(rows["label"]) < len(fact["classnames"])


def test_same_bytes_from_the_same_seed(suite, tmp_path):
    again = demo.build_suite(tmp_path, seed=0, size="tiny", workers=2)
    assert contents(again) == contents(suite)


def test_another_seed_is_another_suite(suite, cache):
    other = demo.build_suite(cache, seed=1, size="tiny")
    ours, theirs = contents(suite), contents(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith((".parquet", "model.safetensors")):
            assert ours[name] != theirs[name], name


def test_vision_towers_are_read_whole(suite):
    """Prefixed keys, as on the hub, and none missing, unexpected or left at random."""
    states = {}
    for folder in (suite / "vision").iterdir():
        stored = load_file(folder / "model.safetensors")
        assert all(key.startswith("vision_model.") for key in stored)
        model, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        states[folder.name] = model.state_dict()
        assert all(tensor.isfinite().all() for tensor in stored.values())
    for task in TINY:
        assert any(
            not torch.equal(states[task][key], states["_pretrained_"][key])
            for key in states[task]
        )


def test_text_tower_is_exact_in_any_sentence(suite):
    clip = CLIPModel.from_pretrained(suite / "clip")
    processor = CLIPProcessor.from_pretrained(suite / "clip")

    def embed(texts):
        inputs = processor(text=texts, return_tensors="pt", padding=True)
        embeddings = clip.text_projection(clip.text_model(**inputs)[1])
        return torch.nn.functional.normalize(embeddings, dim=-1)

    names = [name for task in TASKS if task.name in TINY for name in task.classnames]
    alone = embed(names)
    similarity = alone @ alone.T - torch.eye(len(names))
    assert similarity.max() < 0.99
    inside = embed([f"a photo of a {name} , perhaps" for name in names])
    torch.testing.assert_close(inside, alone)


def test_training_sees_what_the_processor_makes(suite):
    processor = CLIPProcessor.from_pretrained(suite / "clip")
    rows = datasets.load_dataset(str(suite / "data" / "shapes"), split="test")
    seen = processor(images=rows[0]["image"], return_tensors="pt")["pixel_values"]
    ours = torch.stack(
        [torch.tensor(list(rows[0]["image"].tobytes()), dtype=torch.uint8)]
    )
    torch.testing.assert_close(seen, pixel_values(ours.view(1, SIDE, SIDE, 3)))


def test_host_pools(suite, cache):
    modelpool = DemoCLIPVisionModelPool(seed=0, cache_dir=cache, size="tiny")
    assert modelpool.model_names == TINY
    assert modelpool.load_processor().tokenizer is not None
    assert len(modelpool.load_train_dataset("digits")) == 64
    assert len(modelpool.load_val_dataset("shapes")) == 32
    assert len(modelpool.load_test_dataset("shapes")) == 32
    assert isinstance(modelpool.load_clip_model("_pretrained_"), CLIPModel)
    model = modelpool.load_pretrained_model()
    report = DemoCLIPVisionModelTaskPool(
        cache_dir=cache,
        size="tiny",
        split="validation",
        dataloader_kwargs={"batch_size": 16},
    ).evaluate(model)
    facts = json.loads((suite / "suite.json").read_text())["tasks"]
    for task in TINY:
        assert math.isfinite(report[task]["loss"])
        assert report[task]["accuracy"] == pytest.approx(
            facts[task]["zero_shot"], abs=1e-3
        )


def test_pools_from_their_yaml(cache):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose(
            overrides=[
                *("+modelpool=didi/demo", "+taskpool=didi/demo"),
                *(f"modelpool.cache_dir={cache}", "modelpool.size=tiny"),
                *(f"taskpool.cache_dir={cache}", "taskpool.size=tiny"),
                *("modelpool.tasks=[shapes]", "taskpool.tasks=[shapes]"),
            ]
        )
    modelpool, taskpool = instantiate(config.modelpool), instantiate(config.taskpool)
    assert modelpool.model_names == ["shapes"]
    assert modelpool.config.seed == 0 and modelpool.config.size == "tiny"
    report = taskpool.evaluate(modelpool.load_model("shapes"))
    assert 0 <= report["shapes"]["accuracy"] <= 1


def program(cache: Path, **of_taskpool: object) -> FabricModelFusionProgram:
    """The host's, with a method of its own; settings of the task pool beside those of the model pool."""
    pools = demo_pools(cache)
    pools["taskpool"] |= of_taskpool
    method = {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}
    made = {k: OmegaConf.create(v) for k, v in {"method": method, **pools}.items()}
    return FabricModelFusionProgram(**made, print_config=False)


MIXED = {"_target_": "fusion_bench_didi.demo.mixed_pools.MixedDemoTaskPool"}


@pytest.mark.parametrize("kind", [{}, MIXED], ids=["task by task", "mixed"])
@pytest.mark.parametrize("key", ["seed", "cache_dir"])
def test_pools_of_two_suites_are_refused_before_a_merge(
    suite, cache, tmp_path, monkeypatch, kind, key
):
    """By whatever method, the host's too."""
    merge = "fusion_bench.method.SimpleAverageAlgorithm.run"
    monkeypatch.setattr(merge, lambda *_: pytest.fail("It was merged."))
    there, here = {"seed": (0, 1), "cache_dir": (cache, tmp_path)}[key]
    message = f"modelpool.{key}={there} with taskpool.{key}={here}: "
    with pytest.raises(SettingsError, match=message):
        program(cache, **kind, **{key: str(here) if key == "cache_dir" else here}).run()


@pytest.mark.parametrize("kind", [{}, MIXED], ids=["task by task", "mixed"])
def test_one_suite_by_two_paths_is_one(suite, cache, tmp_path, kind):
    (tmp_path / "link").symlink_to(cache)
    report = program(cache, **kind, cache_dir=str(tmp_path / "link")).run()["report"]
    assert {*TINY} < {*report}


def test_the_seed_of_a_mixed_stream_is_its_suites(suite, cache):
    other = MixedDemoTaskPool(cache_dir=cache, size="tiny", seed=1)
    assert other.seed == 1 and Path(other.root) == demo.build_suite(cache, 1, size="tiny")  # fmt: skip
    same = MixedDemoTaskPool(cache_dir=cache, size="tiny", stream_batch_size=7)
    assert Path(same.root) == suite and same.stream_batch_size == 7


def test_unknown_task_is_refused(suite, cache):
    with pytest.raises(ValueError, match="no numerals. Choose from digits, shapes"):
        DemoCLIPVisionModelPool(cache_dir=cache, size="tiny", tasks=["numerals"])


def test_unknown_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'huge' is not one of full, tiny"):
        demo.build_suite(tmp_path, size="huge")


def test_interrupted_build_leaves_nothing_whole(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(suite_module.training, "fine_tune", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.build_suite(tmp_path, size="tiny")
    final = demo.suite_path(tmp_path, size="tiny")
    assert not final.exists()
    assert not list(tmp_path.glob("*unfinished*")), "nor anything to clean up"


def test_killed_build_is_swept_away(tmp_path, monkeypatch):
    final = demo.suite_path(tmp_path, size="tiny")
    corpse = tmp_path / f".{final.name}.unfinished-1"
    (corpse / "clip").mkdir(parents=True)
    (final / "vision").mkdir(parents=True)  # as if someone had deleted half of a suite
    monkeypatch.setattr(
        suite_module, "_make", lambda folder, *_: _finish(folder, "made anew")
    )
    assert demo.build_suite(tmp_path, size="tiny") == final
    assert (final / "suite.json").read_text() == "made anew"
    assert not corpse.exists() and not (final / "vision").exists()


def _finish(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "suite.json").write_text(text)


def _build_and_report(cache: str, queue) -> None:
    made = []

    def make(folder: Path, *_) -> None:
        made.append(folder.name)
        _finish(folder, str(os.getpid()))

    suite_module._make = make
    folder = demo.build_suite(cache, size="tiny")
    queue.put((len(made), (folder / "suite.json").read_text()))


def test_of_two_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    builders = [
        context.Process(target=_build_and_report, args=(str(tmp_path), queue))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    answers = [queue.get(timeout=120) for _ in builders]
    for builder in builders:
        builder.join()
    assert sorted(made for made, _ in answers) == [0, 1]
    assert len({text for _, text in answers}) == 1


def test_registration(recwarn):
    mapping = {"didi_test_task": ["didi_test_task/a", "didi_test_task/b"]}
    try:
        demo.register_tasks(mapping)
        demo.register_tasks(mapping)
        names, templates = get_classnames_and_templates("didi_test_task")
        assert names == mapping["didi_test_task"]
        assert [template("x") for template in templates] == ["x"]
        assert not [w for w in recwarn if "already registered" in str(w.message)]
    finally:
        CLIPTemplateFactory._dataset_mapping.pop("didi_test_task", None)


def test_tasks_json_of_another_suite(tmp_path):
    described = {"didi_other": {"classnames": ["didi_other/a"], "zero_shot": 0.5}}
    (tmp_path / "tasks.json").write_text(json.dumps(described))
    try:
        assert demo.register_suite_tasks(tmp_path) == {"didi_other": ["didi_other/a"]}
        assert get_classnames_and_templates("didi_other")[0] == ["didi_other/a"]
    finally:
        CLIPTemplateFactory._dataset_mapping.pop("didi_other", None)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_pictures_vary_within_a_class(task):
    splits = task_pictures(task, {"train": 64, "test": 32}, seed=3)
    pictures = [image.tobytes() for split in splits.values() for image in split.images]
    assert len(set(pictures)) == len(pictures), "no picture twice, nor in two splits"
    assert set(splits["train"].labels) <= set(range(len(task.classes)))


def test_names_are_plain_and_unique():
    names = [task.name for task in (*TASKS, *EXTRAS)]
    assert len(set(names)) == len(names) and len(TASKS) == 8
    assert all(name.isalpha() and name.islower() for name in names)
    host = set(CLIPTemplateFactory.get_available_datasets()) - set(names)
    assert not host & set(names)
    classnames = [name for task in (*TASKS, *EXTRAS) for name in task.classnames]
    assert len(set(classnames)) == len(classnames)


def test_methods_of_the_command_are_those_of_the_configuration():
    entries = read_entries(command.ENTRIES)
    budgets = {}
    for entry in entries:
        config = declared(entry)["config"]
        assert entry.method == config or "_target_" in config, config
        if "DiDi" in entry.name:
            budgets[entry.name] = config["budget"]
    assert list(budgets.values()) == [1.24, 1.4, 1.4, 0.25]


def test_table_of_the_command_fits_150_columns():
    """With every task of the full suite, and figures as wide as they get; a gap is a dash."""
    tasks = [task.name for task in TASKS]
    whole = {
        "average": 1.0,
        "retention": {"mean_of_ratios": 1.0},
        "x_excl": 8.0,
        "x_incl": 9.0,
        "bytes_excl": 123_456_789,
        "error": None,
        "seconds": 1234.5,
        "accuracy": dict.fromkeys(tasks, 1.0),
    }
    rows = [{"method": name, **whole} for name in command.ENTRIES]
    rows[0] |= {"seconds": None}
    console = Console(width=150, file=io.StringIO())
    console.print(table({"tasks": tasks, "rows": rows}))
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 150
    for shown in (*command.ENTRIES, *tasks, "100.0", "8.00", "1234.5"):
        assert shown in text
    first = next(line for line in text.splitlines() if rows[0]["method"] in line)
    assert "–" in first and "1234.5" not in first


CELLS = json.loads((REPOSITORY / "examples" / "first_merge.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_every_cell_of_the_notebook_runs(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_BENCH_DIDI_CACHE", str(suite.parent))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["rows"].keys() == set(TINY)
    for own, merged in names["rows"].values():
        assert merged >= own - 0.1
    assert (names["place"] / "models").is_dir()


def test_the_notebook_is_kept_without_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CODE)
