"""Names of tasks that differ by case and dashes meet."""

import pytest

from fusion_bench_didi.errors import UnknownTaskError
from fusion_bench_didi.pools.task_names import check_tasks, normalized, resolve_task


@pytest.mark.parametrize(
    "asked, known", [("a-b", "A_B"), ("glue-cola", "cola"), ("x/y", "x-y"), ("q", "q")]
)
def test_rule_of_names(asked, known):
    assert normalized(asked) == normalized(known)
    assert resolve_task(asked, ["other", known]) == known
    assert resolve_task(known, ["other", asked]) == asked


def test_exact_name_comes_first_and_the_map_reaches_the_rest():
    assert resolve_task("cola", ["glue-cola", "cola"]) == "cola"
    assert resolve_task("cars196", ["stanford-cars"], {"cars196": "stanford_cars"}) == (
        "stanford-cars"
    )
    with pytest.raises(
        UnknownTaskError, match=r"'cars196' .* holds \['dtd'\].*aliases"
    ):
        resolve_task("cars196", ["dtd"])
    with pytest.raises(UnknownTaskError, match="'dtdd' "):  # what the map says
        resolve_task("textures", ["dtd"], {"textures": "dtdd"})
    with pytest.raises(UnknownTaskError, match=r"\['b', 'c'\]. Task pool: \['a', 'b'"):
        check_tasks(["a", "b", "c"], ["a"])
