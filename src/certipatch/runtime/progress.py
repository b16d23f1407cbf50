"""How far a run is, how fast, and when it will be done: a bar or plain lines on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .console import stderr

LINE_SECONDS = 60  # without a terminal, the longest time between two lines while images are being done


class Progress:
    """How many images are done, how fast, and when the rest will be.

    Images of an earlier attempt count as done, but say nothing of the rate.
    """

    def __init__(self, total: int, what: str, show: Callable[[Progress, str], None]) -> None:
        self.total, self.what, self._show = total, what, show
        self.done = self.before = 0
        self.started = time.monotonic()

    def resume(self, n: int) -> None:
        """Start to count, ``n`` images having been done by an earlier attempt."""
        self.done = self.before = n
        self.started = time.monotonic()
        if n:
            self._show(self, "done before")

    def advance(self, n: int, note: str) -> None:
        """``n`` more images are done; ``note`` is shown beside the pace."""
        self.done += n
        self._show(self, note)

    @property
    def pace(self) -> str:
        """``12.3 images/s, ETA 0:05:00``, or nothing before the first image is done.

        It is the mean over the whole of this attempt, for images differ, and so do epochs with and without a
        search.
        """
        new, seconds = self.done - self.before, max(time.monotonic() - self.started, 1e-6)
        if not new:
            return ""
        left = timedelta(seconds=round(seconds / new * (self.total - self.done)))
        return f"{rate(new, seconds)}, ETA {left}"


def rate(images: int, seconds: float) -> str:
    """``512 images/s``, ``12.3 images/s`` or ``2.0 s/image``."""
    if images < seconds:
        return f"{seconds / images:.1f} s/image"
    digits = 0 if images >= 100 * seconds else 1
    return f"{images / seconds:.{digits}f} images/s"


class _Lines:
    """Progress without a terminal: a line at each tenth of the work, or once a minute where that is longer.

    The first and the last news are always shown.
    """

    def __init__(self) -> None:
        self.done, self.at = 0, time.monotonic()

    def __call__(self, progress: Progress, note: str) -> None:
        now = time.monotonic()
        at_an_end = progress.done == progress.before or progress.done >= progress.total
        a_tenth_more = progress.done - self.done >= max(1, progress.total // 10)
        if at_an_end or a_tenth_more or now - self.at >= LINE_SECONDS:
            self.done, self.at = progress.done, now
            count = f"{progress.what} {progress.done}/{progress.total}"
            stderr.print(_joined(count, progress.pace, note), markup=False, soft_wrap=True)


class _Bar(RichProgress):
    """rich's progress bar with the pace and the note on a line of their own below it."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.note)


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """Show the progress of ``total`` images on stderr: a bar, or plain lines if stderr is no terminal."""
    if not stderr.is_terminal:
        yield Progress(total, what, _Lines())
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with _Bar(*columns, console=stderr) as bar:
        task = bar.add_task(what, total=total)

        def show(progress: Progress, note: str) -> None:
            bar.note = _joined(progress.pace, note)
            bar.update(task, completed=progress.done)

        yield Progress(total, what, show)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def percent(count: int, of: int) -> str:
    """A share with its fraction: ``61.2 % (196/320)``."""
    return f"{100 * count / of:.1f} % ({count}/{of})"
