"""Who works on which tensor."""

from collections import Counter

import pytest

from fusion_bench_didi.distributed.ownership import owners

#: Entries of the tensors of a layer of ViT-B.
LAYER = {
    **{f"self_attn.{name}_proj.weight": 768**2 for name in ("k", "out", "q", "v")},
    **{f"mlp.fc{i}.weight": 4 * 768**2 for i in (1, 2)},
    **{f"mlp.fc{i}.bias": n for i, n in ((1, 3072), (2, 768))},
}
SIZES = {f"layers.{i}.{name}": size for i in range(12) for name, size in LAYER.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_ranks_get_as_much_and_as_many_tensors_of_each_kind(count):
    found = owners(SIZES, count)
    assert found.keys() == SIZES.keys()
    bytes_of, kinds = Counter(), Counter()
    for name, rank in found.items():
        bytes_of[rank] += SIZES[name]
        if name.endswith("weight"):
            kinds[rank, name.split(".", 2)[2]] += 1
    assert max(bytes_of.values()) - min(bytes_of.values()) <= 3072
    assert set(kinds.values()) == {12 // count}


def test_the_order_in_which_tensors_are_named_does_not_matter():
    assert owners(dict(reversed(SIZES.items())), 3) == owners(SIZES, 3)


def test_what_is_large_is_worked_on_alone():
    assert owners({"embedding": 10, "a.0": 3, "a.1": 3, "a.2": 3}, 2) == {
        "embedding": 0,
        "a.0": 1,
        "a.1": 1,
        "a.2": 1,
    }
