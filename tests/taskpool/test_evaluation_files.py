"""The local files of a task pool: what it reads is told apart by content, and nothing else matters."""

import os
import shutil
from types import SimpleNamespace

import pytest
from exact_models import bert
from host_pools import tokenizer
from omegaconf import OmegaConf
from pandas import DataFrame

from fusion_bench_didi.taskpool import PerplexityTaskPool, TextClassificationTaskPool
from fusion_bench_didi.taskpool import evaluation_files as module
from fusion_bench_didi.taskpool.evaluation_files import evaluation_files


def with_tokenizer(place):
    tokenizer().save_pretrained(place / "base")
    (place / "base" / "model.safetensors").write_bytes(b"weights")
    return str(place / "base")


def perplexity(place):
    (place / "held").mkdir()
    (place / "held" / "one.txt").write_text("ab")
    (place / "law.txt").write_text("cd")
    files = {"code": f"{place}/held/*.txt", "law": str(place / "law.txt")}
    given = with_tokenizer(place)
    changes = ["held/one.txt", "law.txt", "base/tokenizer.json", "+held/two.txt"]
    ignored = ["base/model.safetensors", "+other.txt"]
    return lambda: PerplexityTaskPool(files, given), changes, ignored


def text(place):
    for split in ("test", "train"):
        (place / "data" / "a").mkdir(parents=True, exist_ok=True)
        rows = DataFrame({"text": ["ab"], "label": [0]})
        rows.to_parquet(place / "data" / "a" / f"{split}-0.parquet")
    bert(2).save_pretrained(place / "head")
    given = {"tokenizer": with_tokenizer(place), "heads": {"a": f"{place}/head"}}
    changes = ["data/a/test-0.parquet", "head/model.safetensors", "head/config.json"]
    make = lambda: TextClassificationTaskPool(f"{place}/data", **given)  # noqa: E731
    return make, changes, ["data/a/train-0.parquet", "+head/README.md"]


#: What datasets and Python leave beside what they read.
LEFT = ["+m/cache-0a1b-test.arrow", "+m/__pycache__/test.cpython-311.pyc", "+m/test.lock"]  # fmt: skip


def host(place):
    """As the host's pools keep what YAML files say: datasets of a directory, of files, and of the hub."""
    for name in ("m/test-0.parquet", "m/train-0.parquet", "s.csv", "clip/config.json"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(name)
    load = {"_target_": "datasets.load_dataset"}
    pool = SimpleNamespace(
        _test_datasets=OmegaConf.create(
            {
                "m": {**load, "path": f"{place}/m", "split": "test[:10%]"},
                "s": {**load, "path": "csv", "data_files": [f"{place}/s.csv"]},
                "hub": {**load, "path": "owner/name", "split": "test"},
            }
        ),
        _clip_model=OmegaConf.create(
            {"pretrained": "${base}", "base": f"{place}/clip"}
        ),
        _processor="openai/clip",
        root=str(place),
    )
    changes = ["m/test-0.parquet", "s.csv", "clip/config.json", "+suite.json"]
    return (
        lambda: pool,
        changes,
        ["m/train-0.parquet", "+m/.cache/test", "+x.json", *LEFT],
    )


@pytest.mark.parametrize("make", [perplexity, text, host])
def test_what_a_pool_reads_and_nothing_else_changes_it(make, tmp_path):
    pool, changes, ignored = make(tmp_path)
    before = evaluation_files(pool())
    for name in (*ignored, *changes):
        file = tmp_path / name.lstrip("+")
        file.parent.mkdir(exist_ok=True)
        content = None if name.startswith("+") else file.read_bytes()
        file.write_bytes(b"other")
        after = evaluation_files(pool())
        assert (after == before) == (name in ignored), name
        if name in changes:
            (label,) = (n for n in after if after[n] != before.get(n))
            assert file.name in after[label]
        file.unlink() if content is None else file.write_bytes(content)
    os.utime(tmp_path / changes[0])
    assert evaluation_files(pool()) == before


def test_files_may_be_moved(tmp_path):
    (tmp_path / "here").mkdir()
    found = []
    for name in ("here", "there"):
        if name == "there":
            shutil.copytree(tmp_path / "here", tmp_path / name)
        else:
            (tmp_path / name / "m" / "deep").mkdir(parents=True)
            (tmp_path / name / "m" / "deep" / "1.png").write_bytes(b"1")
            (tmp_path / name / "m" / "2.png").write_bytes(b"2")
        data = {"path": "imagefolder", "data_dir": str(tmp_path / name / "m")}
        found.append(evaluation_files(SimpleNamespace(_test_datasets={"a": data})))
    assert found[0] == found[1] and set(found[0]["a"]) == {"2.png", "deep/1.png"}


def test_much_is_told_by_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MANY", 2)
    monkeypatch.setattr(module, "_WHOLE", 2)
    pool = SimpleNamespace(_test_datasets={"a": {"root": str(tmp_path)}})
    found = []
    for name, content in (("1", "x"), ("2", "longer"), ("2", "larger"), ("3", "x"), ("3", "xy")):  # fmt: skip
        (tmp_path / name).write_text(content)
        found.append(evaluation_files(pool)["a"])
    assert set(found[1]) == {"1", "2"} and set(found[3]) == {"*"}
    assert len({str(one) for one in found}) == 5


@pytest.mark.parametrize("kept", [None, [("ab", 0), ("law.txt", 1)], {"a": ["."] and 3}, "mnist"])  # fmt: skip
def test_what_is_in_memory_has_no_files(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law.txt").write_text("x")
    pool = SimpleNamespace(_test_datasets={"a": kept}, tokenizer=tokenizer())
    assert evaluation_files(pool) == evaluation_files(SimpleNamespace()) == {}
