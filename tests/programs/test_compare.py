"""The side-by-side comparison: rows, resume, refusal, and a kill in the middle."""

import copy
import json
import math
import multiprocessing
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from fusion_bench.constants import RuntimeConstants
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from helpers import demo_pools
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from fusion_bench_didi.checkpoint.fields import sealed
from fusion_bench_didi.deltas.base import Delta
from fusion_bench_didi.demo import pools
from fusion_bench_didi.programs import entry_run
from fusion_bench_didi.programs.compare import ComparisonProgram, FailedRowsError
from fusion_bench_didi.programs.entries import (
    ComparisonError,
    Entry,
    completed,
    composed,
    fitted,
    read_entries,
    searched,
)
from fusion_bench_didi.programs.results import retention
from fusion_bench_didi.programs.rows import RowStore, differences
from fusion_bench_didi.programs.scoring import Scorer
from fusion_bench_didi.programs.sizes import Size

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:CLIPDataset:DeprecationWarning"
)

TASKS = 3
QUICK = {"refine_sweeps": 2}
ENTRIES = {
    "pretrained": {"name": "Base", "method": "pretrained", "group": "reference"},
    "individuals": {"method": "individuals", "group": "reference"},
    "averaging": {"method": "simple_average", "group": "static", "notes": "plain"},
    "broken": {
        "method": "didi/free",
        "overrides": {"patterns": ["nothing*"]},
        "group": "dynamic",
    },
    "emr": {"method": "didi/emr", "group": "dynamic", "routing": "oracle"},
    "didi": {
        "method": "didi",
        "overrides": {**QUICK, "budget": 1.2},
        "group": "dynamic",
        "family": "DiDi",
    },
    "as_emr": {
        "method": "didi",
        "overrides": QUICK,
        "budget_of": "emr",
        "group": "dynamic",
    },
    "routed": {
        "method": "didi/routed",
        "choose": {"base_method": "didi/s"},
        "overrides": {
            "base_method": QUICK,
            "router": "projection",
            "router_options": {"directions": 4},
        },
        "group": "routed",
        "routing": "projection",
    },
}


@pytest.fixture(scope="module")
def cache(demo_suite) -> Path:
    return Path(demo_suite["cache_dir"])


def configuration(cache: Path, directory: Path, **changes) -> dict:
    sides = demo_pools(cache)
    return {
        "entries": copy.deepcopy(ENTRIES),
        **sides,
        "path": {"log_dir": str(directory)},
        "seed": 0,
        "report": False,
        **changes,
    }


def compare(cache: Path, directory: Path, **changes) -> dict:
    config = OmegaConf.create(configuration(cache, directory, **changes))
    try:
        return ComparisonProgram(**config).run()
    except FailedRowsError as error:
        return error.comparison


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> tuple[Path, dict]:
    """One whole comparison; tests that write into its directory work on a copy of the rows."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, compare(cache, directory)


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """The tasks that were evaluated, in order."""
    calls: list[str] = []
    stock = Scorer.scores

    def scores(self, model, task):
        calls.append(task)
        return stock(self, model, task)

    monkeypatch.setattr(Scorer, "scores", scores)
    return calls


def method_config(entry: Entry, **given) -> dict:
    return completed(entry, composed(entry), **given)


def by_method(comparison: dict) -> dict[str, dict]:
    return {row["method"]: row for row in comparison["rows"]}


def timeless(comparison: dict) -> dict:
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "peak_gb", "added_gb")}
        for row in comparison["rows"]
    ]
    return {**comparison, "rows": rows, "made": None}


def test_rows_hold_what_is_promised(finished):
    directory, comparison = finished
    assert json.loads((directory / "comparison.json").read_text()) == comparison
    rows = by_method(comparison)
    assert list(rows) == ["Base", *list(ENTRIES)[1:]]
    for name, row in rows.items():
        if name == "broken":
            continue
        assert row["error"] is None
        assert len(row["accuracy"]) == len(row["loss"]) == TASKS
        assert row["average"] == pytest.approx(sum(row["accuracy"].values()) / TASKS)
    assert rows["individuals"]["retention"] == pytest.approx(
        {"mean_of_ratios": 1.0, "ratio_of_averages": 1.0}
    )
    assert rows["averaging"]["seconds"] > 0 and rows["averaging"]["peak_gb"] > 0
    assert comparison["made"].keys() == {"command", "date"}
    assert comparison["versions"]["torch"] and comparison["config"]["seed"] == 0


def test_storage_of_each_kind(finished):
    rows = by_method(finished[1])
    sizes = {name: (row["x_excl"], row["x_incl"]) for name, row in rows.items()}
    assert sizes["Base"] == (0, 1)
    assert sizes["individuals"] == (TASKS, TASKS)
    assert sizes["averaging"] == (1, 1)
    assert "folded" in rows["averaging"]["notes"]
    assert sizes["emr"][0] == pytest.approx(1 + TASKS / 32, rel=0.03)
    assert sizes["emr"][1] - sizes["emr"][0] == pytest.approx(1)
    # what is left does not take another whole matrix to the next finer type
    assert 1.0 < sizes["didi"][0] <= 1.2
    assert sizes["as_emr"][0] <= sizes["emr"][0] < 1.05 * sizes["as_emr"][0]
    unit = finished[1]["unit_bytes"]
    assert rows["emr"]["bytes_excl"] == pytest.approx(sizes["emr"][0] * unit, abs=1)


@pytest.mark.parametrize(
    "overrides, note",
    [
        ({"budget": 2.3}, "stores {x:.2f} of 2.30: what is left buys no matrix's"),
        ({"budget": 9.0}, "stores {x:.2f} of 9.00: nothing is left to store"),
        ({"budget": 0.5}, None),
        ({"budget": 3.3, "budget_includes_backbone": True}, "stores {x:.2f} of 2.30"),
    ],
)
def test_a_row_says_why_it_leaves_some_of_its_budget(cache, tmp_path, overrides, note):
    entry = {**ENTRIES["didi"], "overrides": {**QUICK, **overrides}}
    (row,) = compare(cache, tmp_path, entries={"didi": entry})["rows"]
    assert row["error"] is None
    if note is None:
        assert "stores" not in row["notes"]
    else:
        assert note.format(x=row["x_excl"]) in row["notes"]


def test_budget_of_another_entry_is_beyond_the_backbone():
    includes = {"budget_includes_backbone": True}
    entry = Entry("x", "x", "didi", "dynamic", overrides=includes, budget_of="y")
    assert method_config(entry, smallest_side=8, budget=1.5)["budget"] == 2.5


def test_a_routed_row_needs_no_task(finished):
    row = by_method(finished[1])["routed"]
    assert (row["group"], row["routing"]) == ("routed", "projection")
    assert row["config"]["base_method"]["budget"] == 1.24
    assert row["config"]["router_options"] == {"directions": 4}
    assert row["x_excl"] <= 1.24, "a projection router stores nothing"


def test_routing_is_by_image_not_by_batch(cache, tmp_path):
    """A pool of one task per batch gives the same accuracy whatever the size of its batches."""
    found = []
    for size in (1, 7):
        changes = {"only": ["routed"]}
        changes["taskpool"] = configuration(cache, tmp_path)["taskpool"]
        changes["taskpool"]["dataloader_kwargs"] = {"batch_size": size}
        (row,) = compare(cache, tmp_path / str(size), **changes)["rows"]
        assert row["error"] is None
        found.append(row["accuracy"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_one_store_reads_the_rows(cache, tmp_path, monkeypatch):
    made, construct = [], RowStore.__init__
    monkeypatch.setattr(
        RowStore, "__init__", lambda *a, **k: made.append(a) or construct(*a, **k)
    )
    compare(cache, tmp_path, only=["averaging"])
    assert len(made) == 1


def test_artifacts_are_held_against_the_account(cache, tmp_path, monkeypatch, scored):
    options = {"only": ["averaging", "emr"], "save_artifacts": True}
    rows = by_method(compare(cache, tmp_path, **options))
    for row in rows.values():
        assert row["error"] is None
        wrote = row["bytes_written"] - row["bytes_of_headers"]
        assert wrote == row["bytes_excl"] > 0
    assert {p.name for p in (tmp_path / "artifacts").iterdir()} == set(rows)
    compare(cache, tmp_path, only=["pretrained"], restart=True)
    assert not (tmp_path / "artifacts").exists(), "they were of the rows forgotten"

    monkeypatch.setattr(entry_run, "model_size", lambda *_: Size(1.5, 2.5))
    scored.clear()
    rows = by_method(compare(cache, tmp_path / "wrong", **options))
    for key, row in rows.items():
        assert f"The account of {key} is wrong" in row["error"]
    assert scored == []


def test_models_of_rows_that_are_there_are_written_when_asked_for(
    cache, tmp_path, monkeypatch, scored
):
    options = {"only": ["pretrained", "averaging"]}
    before = compare(cache, tmp_path, **options)["rows"]
    scored.clear()
    with monkeypatch.context() as patch:
        patch.setattr(entry_run, "model_size", lambda *_: Size(1.5, 2.5))
        rows = compare(cache, tmp_path, **options, save_artifacts=True)["rows"]
    assert "The account of averaging is wrong" in rows[1]["error"]
    left = json.loads((tmp_path / "rows" / "averaging.json").read_text())
    assert left["complete"] is False, "so that it is tried again"
    rows = compare(cache, tmp_path, **options, save_artifacts=True)["rows"]
    assert {p.name for p in (tmp_path / "artifacts").iterdir()} == {*options["only"]}
    for row, first in zip(rows, before):
        assert row["bytes_written"] is not None and row["error"] is None
        assert row["accuracy"] == first["accuracy"]
    assert scored == []


SHARING = {
    "twin": {"method": "didi/twin", "group": "dynamic"},
    "free": {"method": "didi/free", "overrides": {"keep": 0.1}, "group": "dynamic"},
    "emr": ENTRIES["emr"],
    "didi": ENTRIES["didi"],
}


def test_a_shared_part_counts_beside_the_backbone(cache, tmp_path):
    """It is stored as a change, so that the base model is needed too; nothing is counted that is not written."""
    comparison = compare(cache, tmp_path, entries=SHARING, save_artifacts=True)
    for row in comparison["rows"]:
        assert row["error"] is None
        assert row["bytes_incl"] - row["bytes_excl"] == comparison["unit_bytes"]


@pytest.mark.parametrize(
    "key, part, wrong",
    [
        ("twin", "backbone_bits", lambda model: 0),
        ("free", "backbone_bits", lambda model: model.unit_bits // 2),
        ("didi", "unit_bits", lambda model: 2 * model.unit_bits),
    ],
)
def test_a_wrong_account_of_a_backbone_is_found(
    cache, tmp_path, monkeypatch, key, part, wrong
):
    """As if base and shared part were stored as one, say, which no file does."""
    stock = entry_run._merged

    def merged(*args):
        model = stock(*args)
        setattr(model, part, wrong(model))
        return model

    monkeypatch.setattr(entry_run, "_merged", merged)
    options = {"entries": {key: SHARING[key]}, "save_artifacts": True}
    (row,) = compare(cache, tmp_path, **options)["rows"]
    assert row["error"].startswith("ComparisonError: The account of")
    assert "bytes of the backbone" in row["error"]


@pytest.mark.parametrize("key", SHARING)
def test_a_wrong_account_of_deltas_is_found(cache, tmp_path, monkeypatch, key):
    """One byte too many in every stored tensor."""
    bits = Delta.bits.fget
    monkeypatch.setattr(Delta, "bits", property(lambda delta: bits(delta) + 8))
    options = {"entries": {key: SHARING[key]}, "save_artifacts": True}
    (row,) = compare(cache, tmp_path, **options)["rows"]
    assert "bytes beyond the backbone" in row["error"]


def test_what_a_method_leaves_alone_is_the_backbones(cache, tmp_path):
    """Tensors that are excluded are in the unit of the table, and in the backbone that is counted."""
    entry = {**SHARING["twin"], "overrides": {"exclude": ["*embeddings*"]}}
    options = {"entries": {"twin": entry, "emr": ENTRIES["emr"]}}
    rows = compare(cache, tmp_path, save_artifacts=True, **options)["rows"]
    for row in rows:
        assert row["error"] is None
        assert row["x_incl"] == pytest.approx(row["x_excl"] + 1)


class Renamed(pools.DemoCLIPVisionModelPool):
    """Models under names that no rule connects with those of the tasks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        models = dict(self._models)
        self._models = {n if n[0] == "_" else f"{n}-v1": m for n, m in models.items()}


SEARCH = {
    "population": 4,
    "evaluations": 6,
    "surrogate_generations": 1,
    "trees": 2,
    "validation_samples": 4,
    "operators": ["average"],
}
UNDER_OTHER_NAMES = {
    "pretrained": ENTRIES["pretrained"],
    "individuals": ENTRIES["individuals"],
    "averaging": ENTRIES["averaging"],
    "twin": {"method": "didi/twin", "group": "dynamic"},
    "didi": ENTRIES["didi"],
    "without_the_key": {
        "method": {"_target_": "fusion_bench_didi.method.TallMaskMerging"},
        "group": "dynamic",
    },
    "cat": {"method": "didi/cat", "group": "static", "uses_data": "unlabelled"},
    "routed": ENTRIES["routed"],
    "routed_mlp": {
        "method": "didi/routed",
        "choose": {"base_method": "didi/tsv_c"},
        "overrides": {"router": "mlp", "images": 6},
        "group": "routed",
    },
    "se_didi": {
        "method": "didi/se_merging",
        "choose": {"base_method": "simple_average"},
        "overrides": {"experts": "didi", "didi": QUICK, "head": "mlp", "images": 6},
        "group": "routed",
    },
    "merge": {"method": "didi/merge", "overrides": SEARCH, "group": "dynamic"},
    "merge_routed": {
        "method": "didi/routed",
        "choose": {"base_method": "didi/merge"},
        "overrides": {"router": "mlp", "images": 6, "base_method": SEARCH},
        "group": "routed",
    },
    "wemoe": {
        "method": "didi/wemoe",
        "overrides": {"max_steps": 1, "batch_size": 2},
        "group": "dynamic",
    },
}


@pytest.fixture(scope="module")
def under_other_names(cache, tmp_path_factory) -> tuple[dict, dict]:
    """The same entries: models named as the tasks are, and under names that only the program's aliases tell."""
    own = {key: {**e, "name": key} for key, e in UNDER_OTHER_NAMES.items()}
    names = pools.DemoCLIPVisionModelPool(cache_dir=str(cache), size="tiny").model_names
    found = []
    for renamed in (False, True):
        directory = tmp_path_factory.mktemp("names")
        changes = configuration(cache, directory, entries=copy.deepcopy(own))
        for key in ("merge", "merge_routed"):
            merge = changes["entries"][key]["overrides"]
            merge = merge.get("base_method", merge)
            merge["directory"] = str(directory / key)
        if renamed:
            changes["modelpool"]["_target_"] = f"{__name__}.Renamed"
            changes["task_aliases"] = {name: f"{name}-v1" for name in names}
        rows = ComparisonProgram(**OmegaConf.create(changes)).run()["rows"]
        found.append({row["key"]: row for row in rows})
    return tuple(found)


@pytest.mark.parametrize("key", UNDER_OTHER_NAMES)
def test_aliases_of_the_program_reach_every_method(under_other_names, key):
    """Methods, the methods within them, their images, searches, heads and evaluation: the same row under any names."""
    plain, renamed = (rows[key] for rows in under_other_names)
    assert plain["error"] is None
    assert renamed["error"] is None
    assert renamed["accuracy"] == pytest.approx(plain["accuracy"], abs=1e-6)
    assert renamed["x_excl"] == plain["x_excl"]


def test_aliases_of_an_entry_come_first():
    entry = Entry(
        key="x",
        name="x",
        method="didi/emr",
        group="dynamic",
        overrides={"task_aliases": {"a": "own"}},
    )
    options = {"smallest_side": 8, "budget": None}
    found = method_config(entry, aliases={"a": "all", "b": "all"}, **options)
    assert found["task_aliases"] == {"a": "own", "b": "all"}
    assert method_config(entry, **options)["task_aliases"] == {"a": "own"}
    averaging = Entry("x", "x", "simple_average", "static")
    assert "task_aliases" not in method_config(averaging, aliases={"a": "b"}, **options)


def test_a_failing_method_is_a_row(finished):
    row = by_method(finished[1])["broken"]
    assert row["error"].startswith("ModelPoolError")
    assert row["traceback"] and row["average"] is None
    assert row["retention"]["mean_of_ratios"] is None


@pytest.mark.parametrize(
    "method, overrides, told",
    [
        (
            "didi",
            {"budgt": 1},
            "entries.x.overrides has no setting budgt. Did you mean",
        ),
        ("didi/routed", {"base_method": {"budgt": 1}}, "overrides.base_method has no"),
    ],
)
def test_a_setting_that_there_is_not_is_told_at_the_start(
    cache, tmp_path, method, overrides, told
):
    entry = {"method": method, "overrides": overrides, "group": "dynamic"}
    place = tmp_path / "run"
    with pytest.raises(ComparisonError, match=told):
        compare(cache, place, entries={**copy.deepcopy(ENTRIES), "x": entry})
    assert not (place / "settings.json").exists()


DIDI = {"_target_": "fusion_bench_didi.method.DiDiMerging"}


#: Faults that are known before anything is read, each of an entry of its own, and what is told of them.
KNOWN_TO_FAIL = [
    ({"method": "simple_averag"}, "no method simple_averag. Did you mean simple_av"),
    ({"method": "didi/emrr"}, "no method didi/emrr. Did you mean didi/emr?"),
    ({"method": "nothing_like_it"}, r"no method nothing_like_it. There are .* more"),
    ({"method": "mine.Signs"}, r"method: {_target_: mine.Signs}"),
    ({"method": "didi/routed", "choose": {"base_method": "didi/mm"}}, "method didi/mm"),
    (
        {"overrides": {"budgt": 1}},
        "overrides has no setting budgt. Did you mean budget",
    ),
    ({"overrides": {"budget": "lots"}}, "budget='lots': Input should be a valid n"),
    ({"overrides": {"budget": -1}}, "budget"),
    (
        {
            "method": "didi/routed",
            "choose": {"base_method": "didi/m"},
            "overrides": {"base_method": {"budget": "lots"}},
        },
        "budget='lots'",
    ),
    ({"overrides": {"dry_run": True}}, "dry_run=true makes no model"),
    ({"overrides": {"output_dir": "."}}, "[.] exists"),
    ({"method": {**DIDI, "output_dir": "."}}, "[.] exists"),
    ({"method": {"budget": 1}}, "no _target_"),
    ({"method": {"_target_": "nowhere.Method"}}, "nowhere.Method"),
    ({"method": "simple_average", "budget_of": "emr"}, "budget_of sets budget"),
    ({"fit_to_side": {"budget": 1}}, "fit_to_side has no at"),
    ({"fit_to_side": {"at": 8, "k": 1}}, "fit_to_side sets k"),
]


@pytest.fixture
def own_place(tmp_path) -> str:
    """A place of configurations that holds a method ``halved``."""
    file = tmp_path / 'it\'s "mine"' / "method" / "halved.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("_target_: fusion_bench_didi.method.DiDiMerging\nbudget: 0.5\n")
    return f"file://{file.parents[1]}"


HALVED = Entry("halved", "halved", "halved", "dynamic")


def test_methods_are_found_where_the_run_searches(own_place, monkeypatch):
    """That of Hydra's own program, as of ``fusion_bench``."""
    path = [f"hydra.searchpath={json.dumps([own_place])}"]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # our own configurations are where they are said to be
        run = initialize_hydra_config("didi_compare", path, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", run)
    assert composed(HALVED)["budget"] == 0.5


def test_methods_are_found_where_the_caller_searches(cache, own_place, tmp_path):
    entry = {"method": "halvd", "group": "dynamic"}
    with searched([own_place]):
        assert composed(HALVED)["budget"] == 0.5
        with pytest.raises(ComparisonError, match="halvd. Did you mean halved?"):
            compare(cache, tmp_path / "run", entries={"x": entry}, dry_run=True)
    with pytest.raises(ComparisonError, match="no method halved. There are"):
        entry = {"method": "halved", "group": "dynamic"}
        compare(cache, tmp_path / "run", entries={"x": entry}, dry_run=True)


def test_what_is_known_to_fail_is_told_together_before_anything_is_read(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(ComparisonProgram, "_bench", lambda *_, **__: 1 / 0)
    entries = {"emr": ENTRIES["emr"]}
    for number, (change, _) in enumerate(KNOWN_TO_FAIL):
        entries[f"x{number}"] = {"method": "didi", "group": "dynamic", **change}
    with pytest.raises(ComparisonError) as found:
        compare(cache, tmp_path / "run", entries=entries)
    first, *faults = str(found.value).splitlines()
    assert first == "The comparison cannot start:"
    assert len(faults) == len(KNOWN_TO_FAIL)
    for number, (fault, (_, told)) in enumerate(zip(faults, KNOWN_TO_FAIL)):
        assert re.match(rf"  entries\.x{number}[:.].*{told}", fault)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_every_model_has_a_directory_of_its_own(cache, tmp_path):
    method = {**DIDI, "output_dir": str(tmp_path / "model")}
    both = {key: {"method": method, "group": "dynamic"} for key in "xy"}
    with pytest.raises(ComparisonError, match="entries.y: .* that of entries.x too"):
        compare(cache, tmp_path / "run", entries=both)


def test_a_row_that_is_there_has_taken_its_directory(cache, tmp_path, scored):
    method = {"_target_": "fusion_bench_didi.method.EMRMerging"}
    method["output_dir"] = str(tmp_path / "model")
    entries = {"x": {"method": method, "group": "dynamic"}}
    first, again = (
        {**compare(cache, tmp_path / "run", entries=entries), "made": None}
        for _ in range(2)
    )
    assert again == first
    with pytest.raises(ComparisonError, match="entries.x: .*model exists"):
        compare(cache, tmp_path / "run", entries=entries, restart=True)
    assert len(scored) == TASKS
    assert (tmp_path / "run" / "rows" / "x.json").exists(), "nothing is forgotten"


def test_a_dry_run_checks_and_writes_nothing(cache, tmp_path, capsys):
    place = tmp_path / "run"
    assert compare(cache, place, dry_run=True, skip="routed") == {"rows": []}
    assert "Nothing is known to fail of pretrained, indiv" in capsys.readouterr().out
    entries = {"x": {"method": "simple_averag", "group": "static"}}
    with pytest.raises(ComparisonError, match="entries.x"):
        compare(cache, place, dry_run=True, entries=entries)
    assert not place.exists()


def test_what_is_of_one_merge_is_refused(cache, tmp_path):
    given = {"merged_model_save_path": "there", "report_save_path": "x.json"}
    with pytest.raises(
        ComparisonError,
        match="merged_model_save_path, report_save_path would do nothing",
    ):
        compare(cache, tmp_path, **given)


def test_keys_of_the_hosts_program_are_there(cache, tmp_path, capsys, monkeypatch):
    """As on its own command line: print_config=true."""
    given = ["print_config=true", "print_function_call=false", "dry_run=true"]
    config = initialize_hydra_config("didi_compare", given)
    assert config.print_config and config.dry_run and not config.print_function_call
    monkeypatch.setenv("TERM_COLOR_SCHEME", "dark")  # else it asks the terminal
    compare(cache, tmp_path, print_config=True, dry_run=True, only="emr")
    assert "modelpool" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [1, 3])
def test_a_failed_row_says_all_of_its_error_in_a_line(lines):
    error = "\n  ".join(["SettingsError: Settings:", *["budget='lots'"] * lines])
    told = entry_run.summary({"error": error})
    assert told.startswith("FAILED SettingsError: Settings: budget='lots'")
    assert told.count("lots") == lines and "\n" not in told
    assert len(entry_run.summary({"error": "long " * 9999})) < 1000


def test_each_task_is_evaluated_once_per_method(cache, tmp_path, scored):
    compare(cache, tmp_path, only=["individuals", "averaging"])
    assert len(scored) == 2 * TASKS
    assert len(set(scored)) == TASKS


def test_continuing_evaluates_nothing_again(cache, tmp_path, scored):
    method = {"_target_": "fusion_bench_didi.method.TallMaskMerging"}
    entries = {**ENTRIES, "by_class": {"method": method, "group": "dynamic"}}
    few = {"only": ["individuals", "averaging", "by_class"], "entries": entries}
    first = compare(cache, tmp_path, **few)
    scored.clear()
    again = compare(cache, tmp_path, **few)
    assert {**again, "made": None} == {**first, "made": None}
    assert scored == []
    more = compare(cache, tmp_path, **{**few, "only": [*few["only"], "pretrained"]})
    assert len(scored) == TASKS
    assert len(more["rows"]) == 4


def test_continuing_starts_at_the_task_that_is_missing(cache, tmp_path, scored):
    few = {"only": ["individuals"]}
    first = compare(cache, tmp_path, **few)
    file = tmp_path / "rows" / "individuals.json"
    row = json.loads(file.read_text())
    lost = list(row["accuracy"])[-1]
    del row["accuracy"][lost]
    row["complete"] = False
    file.write_text(json.dumps(sealed(row)))
    scored.clear()
    assert timeless(compare(cache, tmp_path, **few)) == timeless(first)
    assert scored == [lost]


def test_another_configuration_is_refused(cache, tmp_path, scored):
    few = {"only": ["averaging"]}
    compare(cache, tmp_path, **few)
    scored.clear()
    with pytest.raises(ComparisonError, match=r"seed: 0 -> 1(.|\n)*restart=true"):
        compare(cache, tmp_path, **few, seed=1)
    entries = copy.deepcopy(ENTRIES)
    entries["averaging"]["method"] = "task_arithmetic"
    with pytest.raises(ComparisonError, match="entries.averaging.config._target_"):
        compare(cache, tmp_path, **few, entries=entries)
    assert scored == []
    compare(cache, tmp_path, **few, seed=1, restart=True)
    assert len(scored) == TASKS


@pytest.mark.parametrize("first", [True, False])
def test_rows_of_a_rehearsal_are_of_another_configuration(
    cache, tmp_path, scored, monkeypatch, first
):
    monkeypatch.setattr(RuntimeConstants, "debug", False)  # what programs set
    compare(cache, tmp_path, only=["averaging"], fast_dev_run=first)
    scored.clear()
    with pytest.raises(ComparisonError, match=f"fast_dev_run: {first} -> {not first}"):
        compare(cache, tmp_path, only=["averaging"], fast_dev_run=not first)
    assert scored == []


def test_labels_and_notes_may_change(cache, tmp_path, scored):
    compare(cache, tmp_path, only=["averaging"])
    scored.clear()
    entries = copy.deepcopy(ENTRIES)
    entries["averaging"] |= {"name": "Mean", "notes": "of weights"}
    (row,) = compare(cache, tmp_path, only=["averaging"], entries=entries)["rows"]
    assert row["method"] == "Mean" and row["notes"].startswith("of weights")
    assert scored == []


def test_kill_in_the_middle(cache, finished, tmp_path):
    """kill -9 while the third method is evaluated; run again; compare with the unbroken run."""

    def stops() -> None:
        stock, calls = Scorer.scores, []

        def scores(self, model, task):
            calls.append(task)
            if len(calls) == 2 * TASKS + 2:
                time.sleep(600)
            return stock(self, model, task)

        Scorer.scores = scores  # of that process alone
        compare(cache, tmp_path / "run")

    child = multiprocessing.get_context("fork").Process(target=stops, daemon=True)
    child.start()
    row = tmp_path / "run" / "rows" / "averaging.json"
    deadline = time.monotonic() + 300
    while not row.exists():
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    child.join()
    broken = json.loads(row.read_text())
    assert not broken["complete"] and len(broken["accuracy"]) == 1
    assert timeless(compare(cache, tmp_path / "run")) == timeless(finished[1])


def test_rows_that_failed_are_an_error_once_all_is_written(cache, tmp_path):
    config = configuration(cache, tmp_path, only=["averaging", "broken"], report=True)
    with pytest.raises(FailedRowsError, match="1 of 2 methods failed: broken .Model"):
        ComparisonProgram(**OmegaConf.create(config)).run()
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert [bool(row["error"]) for row in told["rows"]] == [False, True]
    assert (tmp_path / "comparison.html").is_file()


def test_a_comparison_of_nothing_is_refused(cache, tmp_path):
    with pytest.raises(ComparisonError, match="leave no method"):
        compare(cache, tmp_path, only=["averaging"], skip=["averaging"])


class Reports:
    """A task pool that reports what it is told to."""

    def __init__(self, report):
        self.tasks, self.report = ["a", "b"], report

    def evaluate(self, model):
        return self.report


@pytest.mark.parametrize(
    "report, told",
    [
        ({"a": {"accuracy": 1.0}}, "no number for 'b'"),
        ({"b/accuracy": 1.0}, "no number for 'b'"),
        ({"b": {"accuracy": "0.5"}}, "no number for 'b'"),
        ([0.5], "no number for 'b': .0.5"),
        (None, "no number for 'b': None"),
        ({"b": {"loss": 0.1}}, "loss 0.1 for 'b', of which less is better"),
        ({"b": {"eval_mse": 0.1}}, "eval_mse 0.1 for 'b', of which less"),
        ({"b": {"perplexity": 3.0}}, "perplexity 3 for 'b', of which less"),
        ({"b": {"accuracy": 93.75}}, "accuracy 93.75 for 'b', which is not within 0"),
        ({"b": {"score": -0.5}}, "score -0.5 for 'b', which is not within 0"),
        ({"b": {"accuracy": float("nan")}}, "accuracy nan for 'b', which is no number"),
        ({"b": float("inf")}, "figure inf for 'b', which is no number"),
    ],
)
def test_what_is_no_accuracy_is_refused_by_name(report, told):
    with pytest.raises(ComparisonError, match=f"Reports gives {told}"):
        Scorer(Reports(report)).score(torch.nn.Identity(), "b")


def test_tasks_may_have_shares_of_their_own_but_rows_the_same():
    pool = Reports({"a": {"accuracy": 0.5}, "b": {"spearman_rho": -0.25}})
    scorer = Scorer(pool)
    found = [scorer.score(torch.nn.Identity(), task) for task in ("a", "b")]
    assert found == [0.5, -0.25]
    assert scorer.metrics == {"a": "accuracy", "b": "spearman_rho"}
    pool.report = {"b": {"f1": 0.5}}
    with pytest.raises(ComparisonError, match="f1 0.5 for 'b', and .* spearman_rho"):
        scorer.score(torch.nn.Identity(), "b")


def test_a_row_tells_what_its_figures_are(cache, tmp_path, monkeypatch, scored):
    stock = pools.DemoCLIPVisionModelTaskPool.evaluate

    def evaluate(self, model, *args, **kwargs):
        found = stock(self, model, *args, **kwargs)
        return {t: {"f1": v.get("accuracy")} for t, v in found.items()}

    few = {"only": ["averaging"], "report": True}
    before = by_method(compare(cache, tmp_path / "before", **few))
    monkeypatch.setattr(pools.DemoCLIPVisionModelTaskPool, "evaluate", evaluate)
    row = by_method(compare(cache, tmp_path / "f1", **few))["averaging"]
    assert row["accuracy"] == before["averaging"]["accuracy"]
    assert row["metrics"] == dict.fromkeys(row["accuracy"], "f1")
    assert "metrics" not in before["averaging"]
    assert "F1 in %" in (tmp_path / "f1" / "comparison.md").read_text()
    more = {**few, "only": ["averaging", "pretrained"]}  # rows of accuracies are there
    odd = by_method(compare(cache, tmp_path / "before", **more))["Base"]
    assert "rows with accuracy" in odd["error"]


def test_rows_of_before_with_no_share_are_made_anew(cache, tmp_path, scored):
    odd = {"individuals": math.nan, "averaging": math.inf, "emr": 93.75}
    few = {"only": [*odd]}
    first = compare(cache, tmp_path, **few)
    for key, value in odd.items():
        file = tmp_path / "rows" / f"{key}.json"
        row = json.loads(file.read_text())
        task = list(row["accuracy"])[1]
        row["accuracy"][task] = value
        file.write_text(json.dumps(sealed(row, finite=False)))
    scored.clear()
    again = timeless(compare(cache, tmp_path, **few))
    assert scored == [task] * len(odd)
    assert [r["average"] for r in again["rows"]] == [r["average"] for r in first["rows"]]  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group": "clever"}, "entries.x.group='clever'"),
        ({"uses_data": "all"}, "entries.x.uses_data='all'"),
        ({"color": "red"}, r"unknown \['color'\]"),
        ({"method": None, "group": None, "budget_of": "y"}, "group=None"),
        ({"budget_of": "y"}, "budget_of='y' is not among"),
    ],
)
def test_faulty_entries_are_named(change, message):
    entry = {"method": "simple_average", "group": "static", **change}
    with pytest.raises(ComparisonError, match=message):
        read_entries({"x": entry})


@pytest.mark.parametrize("key", ["a/b", "../evil", "..", ".", "", "a\0", 300 * "x"])
def test_a_key_that_no_file_could_have_is_refused(key):
    with pytest.raises(ComparisonError, match="names the files of its row"):
        read_entries({key: {"method": "simple_average", "group": "static"}})


@pytest.mark.parametrize("key", ["ü x", "con.dot", "a.json", "a b\\c", 3, 1.5])
def test_other_keys_may_be_anything(key):
    config = {key: {"method": "simple_average", "group": "static"}}
    for only in ((), [key], key):
        assert [entry.key for entry in read_entries(config, only)] == [str(key)]


def test_every_fault_of_every_entry_is_told_at_once():
    sound = {"method": "simple_average", "group": "static"}
    config = {
        "a": {**sound, "group": "A", "routing": "R", "uses_data": "D"},
        "b": {**sound, "group": "B", "overrides": [1], "name": 2},
        "c": 5,
        "d/e": sound,
        "f": {**sound, "budget_of": "a"},  # which is told of already
        "g": {**sound, "color": 1},
    }
    with pytest.raises(ComparisonError) as found:
        read_entries(config, only=["f", 4])
    told = str(found.value)
    assert told.count("\n") == 10
    for fault in (
        *("a.group='A'", "a.routing='R'", "a.uses_data='D'", "b.group='B'"),
        *("overrides=[1]", "name=2", "entries.c=5", "'d/e'", "g: unknown", "'4'"),
    ):
        assert fault in told


def test_unknown_keys_in_only():
    with pytest.raises(ComparisonError, match="no entry 'z'"):
        read_entries({"x": {"method": "simple_average", "group": "static"}}, ["z"])


def test_shipped_entries_are_sound():
    config = initialize_hydra_config("didi_compare", ["path.log_dir=here"])
    entries = read_entries(config.entries)
    assert all(isinstance(e, Entry) for e in entries)
    budgets = [e.overrides.get("budget") for e in entries if e.family == "DiDi"]
    assert budgets == [0.06, 0.12, 0.24, 0.5, 1.0, 1.24, 1.4, 2.0, None]
    assert len({e.name for e in entries}) == len(entries)


def test_notes_say_what_is_not_as_published():
    """Reconstructions are called so, and what a row does otherwise than its authors' code is named."""
    config = initialize_hydra_config("didi_compare", ["path.log_dir=here"])
    entries = {entry.key: entry for entry in read_entries(config.entries)}
    for entry in entries.values():
        methods = [entry.method, *entry.choose.values()]
        if any(m in ("didi/se_merging", "didi/merge") for m in methods):
            assert "as published" not in entry.notes
            assert "reconstruction" in entry.notes or entry.notes.startswith("as SE")
    assert "filter=paper" in entries["free"].notes
    assert "scores differently" in entries["free"].notes
    assert "leaves embeddings" in entries["wudi"].notes
    assert "training=published" in entries["wemoe"].notes


def test_old_name_of_a_setting_still_works(tmp_path):
    """``save_artefacts=true`` on the command line of an earlier release."""
    config = initialize_hydra_config(
        "didi_compare", ["path.log_dir=here", "save_artefacts=true"]
    )
    given = {key: config[key] for key in ("save_artifacts", "save_artefacts")}

    def program(**given) -> ComparisonProgram:
        there = configuration(tmp_path, tmp_path, **given)
        return ComparisonProgram(**OmegaConf.create(there))

    with pytest.warns(
        FutureWarning, match="save_artefacts is now called save_artifacts"
    ):
        assert program(**given).save_artifacts is True
    assert program(save_artifacts=True, save_artefacts=None).save_artifacts is True


def test_ranks_fit_the_smallest_side():
    fit = {"at": 768, "k": 128, "gate_k": 16}
    assert fitted(fit, 1024) == {"k": 128, "gate_k": 16}
    assert fitted(fit, 128) == {"k": 21, "gate_k": 3}
    assert fitted(fit, 16) == {"k": 3, "gate_k": 1}


def test_both_retentions():
    kept = retention({"a": 0.5, "b": 0.9}, {"a": 1.0, "b": 0.9})
    assert kept == pytest.approx(
        {"mean_of_ratios": 0.75, "ratio_of_averages": 1.4 / 1.9}
    )
    assert retention({"a": None}, {"a": 1.0})["mean_of_ratios"] is None
    assert retention({"a": 0.5}, {})["ratio_of_averages"] is None
    for below in (-0.5, 0.5), (0.5, -0.5):  # correlations
        one, own = ({"a": value} for value in below)
        assert retention(one, own) == dict.fromkeys(kept)


def test_differences_are_dotted():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == [
        "a.c: 2 -> 3"
    ]


def test_configuration_is_found_from_anywhere(tmp_path, monkeypatch):
    """As the command line searches: the host's folder first, then ours through the plugin."""
    monkeypatch.chdir(tmp_path)
    config = initialize_hydra_config("didi_compare")
    assert config._target_ == "fusion_bench_didi.programs.ComparisonProgram"
    assert config.modelpool._target_.endswith("DemoCLIPVisionModelPool")
    assert config.fabric._target_ == "lightning.Fabric"
    assert config.fabric.loggers is None
    raw = OmegaConf.to_container(config, resolve=False)["path"]["log_dir"]
    assert raw.startswith("${path.output_dir}/didi_compare/")
