"""Settings of the rows of the tables are such that the method takes: a command of hours does not end in an error at one of them."""

import pytest
from helpers import REPOSITORY
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks import ablation, coded, few_bit_rows, real_suite
from fusion_bench_didi.method.didi import DiDiMerging

ROWS = {
    **{f"ablation: {name}": settings for name, settings in ablation.CHOICES},
    **{f"coded: {name}": settings for name, (settings, _) in coded.WAYS.items()},
    **{
        f"real8 at {settings['budget']}: {name}": settings
        for name, settings in real_suite.configurations()
    },
}


@pytest.mark.parametrize("row", ROWS)
def test_settings_are_taken(row):
    DiDiMerging(**{"budget": 0.5, **ROWS[row]})


RIVALS = few_bit_rows.rivals(text=True)


@pytest.mark.parametrize(
    "row",
    [r for r in RIVALS if r.method != few_bit_rows.NNCODEC],
    ids=lambda row: row.key,
)
def test_settings_of_rivals_are_taken(row):
    stock = OmegaConf.load(REPOSITORY / "config" / "method" / f"{row.method}.yaml")
    instantiate(OmegaConf.merge(stock, dict(row.overrides)))


def test_candidates_of_a_place_are_neighbors_and_differ():
    """Validation chooses among rows that follow one another; a place that came twice would be measured by halves."""
    found = RIVALS
    places = [row.place for row in found]
    runs = [p for i, p in enumerate(places) if i == 0 or places[i - 1] != p]
    assert len(runs) == len(set(places))
    assert len({row.key for row in found}) == len(found)
