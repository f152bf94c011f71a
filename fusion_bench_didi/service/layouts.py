"""Conversations laid out as texts, by programs that come with tokenizers: in transformers' sandbox, and for a bounded time."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: A layout takes milliseconds; one that loops would hold its thread, and the service at its end, for ever.
SECONDS = 5.0
#: Letters of a text that is still worth cutting into tokens.
LETTERS = 2**22


def laid_out(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, seconds: float = SECONDS
) -> str:
    """A conversation as the text that the next message follows.

    Args:
        tokenizer: with a ``chat_template``.
        messages: of role and content.
        seconds: that its layout may take.

    Raises:
        TimeoutError: if it takes longer.
        ValueError: if the text is of more than :data:`LETTERS`.
        Exception: whatever the layout raises.
    """
    with _deadline(seconds):
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    if len(text) > LETTERS:
        raise ValueError(f"it makes a text of {len(text)} letters of them")
    return text


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Python code of this thread that is begun within the block ends by an error when the time is over."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes longer than {seconds:g} s")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
