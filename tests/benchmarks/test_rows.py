"""Settings of the rows of the tables are such that the method takes: a command of hours does not end in an error at one of them."""

import pytest

from benchmarks import ablation, coded, real_suite
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
