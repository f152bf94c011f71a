"""What is used stays in the cache; what was used longest ago makes room."""

from fusion_bench_didi.recombination.recent import Recent


def test_the_values_used_last_are_kept_within_the_room():
    made: list[str] = []
    cache: Recent[str] = Recent(4, len)

    def use(key: str) -> None:
        assert cache.get(key, lambda: made.append(key) or key) == key

    for key in ("aa", "bb", "aa", "c"):  # "bb" was used longest ago, and goes
        use(key)
    assert made == ["aa", "bb", "c"]
    for key in ("aa", "c", "bb"):  # then "aa" goes
        use(key)
    assert made == ["aa", "bb", "c", "bb"]
    for key in ("larger than the room", "larger than the room", "c"):
        use(key)
    assert made == ["aa", "bb", "c", "bb", "larger than the room", "c"]
