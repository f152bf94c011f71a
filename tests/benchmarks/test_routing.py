"""The page of routers."""

import pytest

from benchmarks import routing


@pytest.mark.parametrize("blocks", [3, 4])
def test_routers_are_asked_for_blocks_that_there_are(blocks):
    for _, options in routing.ROUTERS.values():
        layers = routing.counted(options, blocks).get("layers", [])
        numbers = [layer for layer in layers if isinstance(layer, int)]
        assert numbers in ([], list(range(blocks)))
        assert all(layer == "*embedding" for layer in layers if layer not in numbers)
