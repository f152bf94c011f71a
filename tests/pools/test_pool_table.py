"""Every pool of the host can do, cell by cell, what the table of docs/models.md says, or refuses in the words that it gives."""

import json

import pytest
from helpers import REPOSITORY
from host_pools import HOST_POOLS
from pool_cells import CELLS, Bench, outcome

from benchmarks import pool_table

pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = json.loads((REPOSITORY / "docs" / "models.json").read_text())


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """A pool per row, made once."""
    made: dict[str, Bench] = {}

    def of(name: str) -> Bench:
        if name not in made:
            made[name] = Bench(HOST_POOLS[name], tmp_path_factory.mktemp("pool"))
        return made[name]

    return of


def test_table_has_every_pool_and_every_cell():
    assert list(TABLE) == list(HOST_POOLS)
    assert all(list(row) == list(CELLS) for row in TABLE.values())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", HOST_POOLS)
def test_cell(name, cell, benches):
    if cell == "evaluate" and "lm_eval" in HOST_POOLS[name].needs:
        pytest.importorskip("lm_eval", reason="pip install 'fusion-bench-didi[lm-eval]'")  # fmt: skip
    assert outcome(benches(name), cell) == TABLE[name][cell]


def test_page_shows_the_table(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    written = (REPOSITORY / "docs" / "models.md").read_text()
    assert written == pool_table.page(TABLE), "run python -m benchmarks.pool_table"
