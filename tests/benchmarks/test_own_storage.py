"""Rivals at their own storage: validation chooses, the default never stores more, and whoever keeps more is shown ahead."""

import pytest

from benchmarks import figures, own_storage, own_storage_page, pool_table
from benchmarks.few_bit_rows import Row

#: gain -> what validation and test keep
KEPT = {1.0: {"validation": 90.0, "test": 99.0}, 0.7: {"validation": 95.0, "test": 91.0}}  # fmt: skip


class Bench:
    """Merges are gains; every split that is looked at is written down."""

    def __init__(self):
        self.looked: list[tuple[float, str]] = []

    def merged(self, row):
        return row.overrides["gain"], 0.1

    def kept(self, model, split):
        self.looked.append((model, split))
        return KEPT[model][split]


def candidates(*gains):
    return [Row("DARE", "90%", "didi/dare", {"gain": gain}) for gain in gains]


def test_validation_chooses_and_test_is_looked_at_once():
    bench = Bench()
    found = own_storage.best_of(bench, candidates(1.0, 0.7))
    assert found["overrides"] == {"gain": 0.7} and found["retention"] == 91.0
    assert [look for look in bench.looked if look[1] == "test"] == [(0.7, "test")]


def test_a_single_candidate_is_not_validated():
    bench = Bench()
    assert own_storage.best_of(bench, candidates(1.0))["retention"] == 99.0
    assert bench.looked == [(1.0, "test")]


class Drawing:
    """Keeps as many per cent as the seed, and 90 more."""

    def merged(self, row):
        return row.overrides.get("seed", 0), 0.1

    def kept(self, model, split):
        return 90.0 + model


def test_a_method_that_draws_is_the_mean_of_its_draws():
    known = {"DARE, 4 bits 50%": {"x": 0.5, "retention": 90.0, "overrides": {}, "candidates": 1}}  # fmt: skip
    places = {r.place for r in own_storage.rivals() if own_storage.draws(r)}
    assert {place.split()[0].strip(",") for place in places} == {"DARE", "UltraDelta"}
    found = {r.place: {} for r in own_storage.rivals() if r.place not in places}
    rows = known | {place: {"x": 0.1, "draws": [1.0]} for place in found}
    measured = list(own_storage.measure_rivals(Drawing(), rows, text=False))
    assert set(measured) == places
    assert rows["DARE, 4 bits 50%"]["draws"] == [90.0, 91.0, 92.0, 93.0, 94.0]
    for place in places:
        assert rows[place]["retention"] == 92.0
    assert not list(own_storage.measure_rivals(Drawing(), rows, text=False))


def test_the_spread_of_draws_is_told():
    rows = record(94.0)
    rows["suites"]["text"]["rivals"]["DARE 90%"]["draws"] = [93.0, 95.0]
    (row,) = own_storage_page.held(rows)["text"]
    assert "| 94.0 ± 1.4 |" in own_storage_page.table([row])


def record(kept: float, stored: float = 0.1):
    rival = {"family": "DARE", "dial": "90%", "x": stored, "retention": kept, "candidates": 1, "overrides": {}}  # fmt: skip
    ours = {str(x): {"x": x, "retention": r} for x, r in ((0.05, 90.0), (0.099, 95.0), (0.101, 99.0))}  # fmt: skip
    return {"suites": {"text": {"rivals": {"DARE 90%": rival}, "ours": ours}}}


@pytest.mark.parametrize(
    ("kept", "told"), [(94.0, "DiDi"), (95.2, "even"), (97.0, "**rival**")]
)
def test_the_default_stores_no_more_and_the_winner_is_shown(kept, told):
    (row,) = own_storage_page.held(record(kept))["text"]
    assert row["ours"]["x"] == 0.099
    assert own_storage_page.verdict(row["gap"]) == told
    assert own_storage_page.table([row]).endswith(f"| {told} |")
    assert ("DARE" in own_storage_page.counts([row])) == (kept > 95.0)


def test_a_rival_that_stores_less_than_the_default_ever_did_is_no_row():
    assert not own_storage_page.held(record(90.0, stored=0.04))


@pytest.mark.parametrize(
    "module, line, package",
    [(own_storage, ["real8", "--anew"], "nncodec"), (pool_table, [], "lm_eval")],
)
def test_a_page_without_a_package_it_needs_is_refused_before_anything_is_measured(
    monkeypatch, capsys, module, line, package
):
    monkeypatch.setattr(figures, "find_spec", lambda package: None)
    monkeypatch.setattr("sys.argv", ["page", *line])
    with pytest.raises(SystemExit):
        module.main()
    told = capsys.readouterr().err
    assert f"{package} not installed" in told
    assert "pip install -e '.[test,figures]'" in told


def test_figures_ask_for_the_packages_of_their_pages_first(monkeypatch, capsys):
    monkeypatch.setattr(figures, "find_spec", lambda package: None)
    assert figures.missing(["exact"]) == set()
    monkeypatch.setattr("sys.argv", ["figures", "exact", "own_storage", "models"])
    with pytest.raises(SystemExit):
        figures.main()
    assert "lm_eval, nncodec not installed" in capsys.readouterr().err
