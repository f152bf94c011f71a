"""Rows of several requests collected into one batch, by one thread that owns the model."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .limits import Limits, Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One input of a request, on its way into a batch.

    Args:
        task: None for the one that the router finds.
        content: of the kind that the model is given.
        tokens: that it is continued by.
    """

    task: str | None
    content: Any
    tokens: int = 1
    answer: Future = field(default_factory=Future, compare=False)


class Batcher:
    """Runs what was asked for at about the same time together.

    Args:
        run: an answer per row.
        limits: of batches and of what waits.
    """

    def __init__(self, run: Callable[[Sequence[Row]], Sequence[Any]], limits: Limits):
        self._run, self._limits = run, limits
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> list[Future]:
        """All rows of a request, or none.

        Raises:
            Refused: 429 if too many wait, 503 once closed.
        """
        with self._changed:
            if not self._open:
                raise Refused(503, "The service is shutting down.")
            if len(self._waiting) + len(rows) > self._limits.queue:
                raise Refused(
                    429,
                    f"{len(self._waiting)} inputs wait and at most {self._limits.queue} may. Ask again later.",
                )
            self._waiting.extend(rows)
            self._changed.notify_all()
        return [row.answer for row in rows]

    def close(self) -> None:
        """Finish what runs, refuse what waits."""
        with self._changed:
            self._open = False
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for row in left:
            if row.answer.set_running_or_notify_cancel():
                row.answer.set_exception(Refused(503, "The service is shutting down."))
        self._thread.join()

    def _work(self) -> None:
        while rows := self._next():
            try:
                self._answer(rows)
            except Exception:
                for row in rows:  # those that others made fail are answered
                    self._answer_alone(row)

    def _answer(self, rows: Sequence[Row]) -> None:
        for row, answer in zip(rows, list(self._run(rows)), strict=True):
            row.answer.set_result(answer)

    def _answer_alone(self, row: Row) -> None:
        try:
            self._answer([row])
        except Exception as error:  # the caller's answer; the next batch goes on
            if not isinstance(error, Refused):
                log.exception("A batch failed.")
            row.answer.set_exception(error)

    def _next(self) -> list[Row]:
        """The rows of the next batch; none once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                until = time.monotonic() + self._limits.wait_ms / 1000
                while self._open and len(self._waiting) < self._limits.batch:
                    left = until - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                rows = self._taken()
                if rows or not self._open:
                    return rows

    def _taken(self) -> list[Row]:
        """Rows that a batch has room for, without those that nobody waits for any more."""
        rows: list[Row] = []
        while self._waiting and len(rows) < self._limits.batch:
            row = self._waiting.popleft()
            if row.answer.set_running_or_notify_cancel():
                rows.append(row)
        return rows
