"""Progress for long work: one rich bar on a terminal, a plain line now and then elsewhere, nothing in the library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Silent progress: what the library uses when nobody watches."""

    def log(self, message: str) -> None:
        """Say one thing."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[None]:
        """Open a task of `total` steps."""
        yield

    def step(self, advance: int = 1, **values: Any) -> None:
        """Advance the open task and show values, such as the loss."""

    def silent(self) -> Progress:
        """A progress that shows nothing, for work inside one step of a task."""
        return Progress()


class PlainProgress(Progress):
    """Lines on stderr, at most one every `interval` seconds for a running task."""

    def __init__(self, console: Any, interval: float = 10.0) -> None:
        self.console, self.interval = console, interval
        self._name, self._total, self._done, self._started, self._printed = "", 0, 0, 0.0, 0.0

    def log(self, message: str) -> None:
        """Print a line."""
        self.console.print(message, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[None]:
        """Open a task and print when it ends."""
        outer = (self._name, self._total, self._done, self._started, self._printed)
        now = time.monotonic()
        self._name, self._total, self._done, self._started, self._printed = name, total, 0, now, now
        try:
            yield
            self.log(f"{name}: done in {time.monotonic() - self._started:.1f} s")
        finally:
            self._name, self._total, self._done, self._started, self._printed = outer

    def step(self, advance: int = 1, **values: Any) -> None:
        """Print a line if the last one is old."""
        self._done += advance
        now = time.monotonic()
        if now - self._printed >= self.interval:
            self._printed = now
            left = (now - self._started) / max(self._done, 1) * (self._total - self._done)
            self.log(f"{self._name}: {self._done}/{self._total}, {_shown(values)} left {left:.0f} s")


class BarProgress(Progress):
    """One rich bar with values, memory and the time left; nested tasks take over the bar's text."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: list[Any] = []

    def log(self, message: str) -> None:
        """Print above the bar."""
        self._bar.console.print(message, highlight=False)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[None]:
        """Show a bar while the task is open."""
        if not self._tasks:
            self._bar.start()
        self._tasks.append(self._bar.add_task(name, total=total, values=""))
        try:
            yield
        finally:
            self._bar.remove_task(self._tasks.pop())
            if not self._tasks:
                self._bar.stop()

    def step(self, advance: int = 1, **values: Any) -> None:
        """Advance the innermost bar."""
        from kit.convert.measure import peak_memory

        if self._tasks:
            shown = f"{_shown(values)} {peak_memory() / 2**30:.1f} GiB"
            self._bar.update(self._tasks[-1], advance=advance, values=shown)


def make_progress(console: Any, quiet: bool = False) -> Progress:
    """Pick the progress display for a rich console on stderr."""
    if quiet:
        return Progress()
    return BarProgress(console) if console.is_terminal else PlainProgress(console)


def _shown(values: dict[str, Any]) -> str:
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
