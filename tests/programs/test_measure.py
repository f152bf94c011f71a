"""What is measured, and what a program sets aside meanwhile."""

import gc

import pytest

from fusion_bench_didi.programs.measure import standing


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The calls that set aside and bring back, neither of which is made: the tests have something set aside themselves."""
    found: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: found.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: found.append("unfreeze"))
    return found


def test_what_is_set_aside_comes_back_whatever_happens(calls, monkeypatch):
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    with pytest.raises(KeyError), standing():
        assert calls == ["freeze"]
        raise KeyError
    assert calls == ["freeze", "unfreeze"]


def test_what_others_set_aside_stays(calls, monkeypatch):
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 7)
    with standing():
        pass
    assert calls == []
