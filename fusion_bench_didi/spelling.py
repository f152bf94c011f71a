"""How a setting is written by whoever is told of it: as a keyword, as a key of the host's command line, as an option of ``didi``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Key and value (as YAML, or empty) -> what to type.
Spelling = Callable[[str, str], str]


def spelled(key: str, value: str = "") -> str:
    """A setting as it is typed in the program that runs; without a value its name alone."""
    return _spellings[-1](key, value)


@contextmanager
def spelled_as(spelling: Spelling) -> Iterator[None]:
    """While the block runs, settings are spelled so."""
    _spellings.append(spelling)
    try:
        yield
    finally:
        _spellings.remove(spelling)


def as_key(key: str, value: str) -> str:
    """``key=value``, as in YAML."""
    return f"{key}={value}" if value else key


def _as_keyword_or_key_of_a_method(key: str, value: str) -> str:
    """Of Python, or below ``method`` where Hydra runs."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        return f"method.{as_key(key, value)}"
    if value in ("true", "false"):
        value = value.capitalize()
    elif value.isidentifier():
        value = f'"{value}"'
    return as_key(key, value)


_spellings: list[Spelling] = [_as_keyword_or_key_of_a_method]
