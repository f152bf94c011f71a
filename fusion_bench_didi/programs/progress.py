"""What whoever waits for a comparison sees: which method of how many, which stage, time left."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def terminal() -> Console:
    """Standard error as it is now, whatever :func:`quiet` does to it later."""
    return Console(file=sys.stderr, soft_wrap=True)


@contextlib.contextmanager
def quiet(chatter: Path) -> Iterator[None]:
    """Send what the host prints and logs to a file: thirty methods write some thousand lines."""
    chatter.parent.mkdir(parents=True, exist_ok=True)
    with chatter.open("a") as file:
        known = logging.root.manager.loggerDict.values()
        loggers = [log for log in known if isinstance(log, logging.Logger)]
        handlers = [
            h
            for log in (logging.root, *loggers)  # transformers' has its own
            for h in log.handlers
            if isinstance(h, logging.StreamHandler)
            and vars(h).get("stream") in (sys.stdout, sys.stderr)
        ]
        before = [h.setStream(file) for h in handlers]
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for handler, stream in zip(handlers, before):
                handler.setStream(stream)


class Watch:
    """A bar over all stages of all methods, and one line per finished method.

    Args:
        console: from :func:`terminal`.
        methods: how many there are.
        had: how many of them need not run, because an earlier run finished them.
        stages: how many each has (the merge, and each task).
    """

    def __init__(self, console: Console, methods: int, stages: int, *, had: int = 0):
        self.methods, self.stages, self.console = methods, stages, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
            # The last half hour, not the last few seconds: stages differ a lot in length.
            speed_estimate_period=1800,
        )
        self._task = self._bar.add_task("", total=(methods - had) * stages)
        self._method, self._behind = 0, 0
        self._name = ""

    def __enter__(self) -> "Watch":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def method(self, name: str) -> None:
        """Tell that the next method begins."""
        self._method += 1
        self._name = name
        self.stage("starting")

    def stage(self, what: str, done: int = 0) -> None:
        """Within the method: ``done`` of its stages are behind us."""
        self._bar.update(
            self._task,
            completed=self._behind + done,
            description=f"[bold]{self._method}/{self.methods} {self._name}[/bold] · {what}",
        )

    def done(self, line: str) -> None:
        """The method is finished; says so in one line that stays."""
        self._behind += self.stages
        self._bar.update(self._task, completed=self._behind)
        left = self._bar.tasks[0].time_remaining
        self._say(line, f"  about {_clock(left)} left" if left else "")

    def had(self, name: str, line: str) -> None:
        """The method need not run."""
        self._method += 1
        self._name = name
        self._say(line, "  (from the earlier run)")

    def _say(self, line: str, ending: str) -> None:
        count = f"[{self._method}/{self.methods}]"
        text = f"{count:>7} {self._name:<22} {line}{ending}"
        self.console.print(text, markup=False, highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
