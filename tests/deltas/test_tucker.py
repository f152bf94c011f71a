"""Cores and bases on disk and as factors."""

import pytest
import torch

from fusion_bench_didi.checkpoint.deltas import read_deltas
from fusion_bench_didi.checkpoint.stream import write_deltas
from fusion_bench_didi.deltas.tucker import (
    BasesDelta,
    CoreDelta,
    RoundedBasesDelta,
    RoundedCoreDelta,
)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_form_is_written_and_read_back(tmp_path, bits):
    up, down, core = torch.rand(6, 3), torch.rand(2, 5), torch.rand(3, 2)
    pairs = {
        "float": (BasesDelta.of((6, 5), up, down), CoreDelta((6, 5), core)),
        "left": (
            BasesDelta.of((6, 5), 2 * up, torch.eye(5)),
            CoreDelta((6, 5), torch.rand(3, 5)),
        ),
        "rounded": (
            RoundedBasesDelta.of((6, 5), up, down, bits),
            RoundedCoreDelta.of((6, 5), core, bits),
        ),
        "right": (
            RoundedBasesDelta.of((6, 1, 5), torch.eye(6), down, bits),
            RoundedCoreDelta.of((6, 1, 5), torch.rand(6, 2), bits),
        ),
    }
    shared = {name: pair[0] for name, pair in pairs.items()}
    own = {"task": {name: pair[1] for name, pair in pairs.items()}}
    manifest = write_deltas(tmp_path, shared, own)
    shared_again, experts_again = read_deltas(tmp_path, manifest)
    for name, (bases, core) in pairs.items():
        again = experts_again["task"][name].change(shared_again[name])
        assert torch.equal(again, core.change(bases))
        assert again.shape == core.shape
        assert not shared_again[name].change().any()


@pytest.mark.parametrize("sizes", [(3, 2), (2, 4), (6, 2), (3, 5)])
def test_factors_are_the_change(sizes):
    (p, q), g = sizes, torch.Generator().manual_seed(0)
    up = torch.eye(6) if p == 6 else torch.randn(6, p, generator=g)
    down = torch.eye(5) if q == 5 else torch.randn(q, 5, generator=g)
    core = CoreDelta((6, 5), torch.randn(p, q, generator=g))
    bases = BasesDelta.of((6, 5), up, down)
    factors = core.beyond_product(bases)
    first, last = factors.up, factors.down
    torch.testing.assert_close(first @ last, up @ core.core() @ down)
    torch.testing.assert_close(core.change(bases), first @ last)
    assert first.shape[1] == min(p, q)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bases_change_nothing_where_they_are(device):
    shape, parts = (6, 1, 5), (torch.rand(6, 3), torch.rand(2, 5))
    for bases in (BasesDelta.of(shape, *parts), RoundedBasesDelta.of(shape, *parts, 4)):
        bases = bases.to(device)
        product = bases.own_product()
        assert product.rank == 0 and product.device.type == device
        assert bases.own().shape == shape and bases.own().device.type == device
        assert device == "meta" or not bases.own().any()


def test_a_core_needs_its_bases():
    with pytest.raises(ValueError, match="needs the common bases"):
        CoreDelta((2, 2), torch.eye(2)).change(None)
