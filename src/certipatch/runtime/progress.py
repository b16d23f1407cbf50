"""What is seen of a run under way: a bar or plain lines on stderr, and the curves of a training run in
TensorBoard."""

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

LINE_SECONDS = 60  # without a terminal at least this often, if there is news


class Progress:
    """How many images are done, how fast, and when the rest will be. What an earlier attempt did is done, but
    says nothing of the rate."""

    def __init__(self, total: int, what: str, show: Callable[[Progress, str], None]) -> None:
        self.total, self.what, self._show = total, what, show
        self.done = self.before = 0
        self.started = time.monotonic()

    def resume(self, n: int) -> None:
        """``n`` images were done before."""
        self.done = self.before = n
        self.started = time.monotonic()
        if n:
            self._show(self, "done before")

    def advance(self, n: int, note: str) -> None:
        self.done += n
        self._show(self, note)

    @property
    def pace(self) -> str:
        """``12.3 images/s, ETA 0:05:00``, over the whole of this attempt: images differ, and so do epochs
        with and without a search."""
        new, seconds = self.done - self.before, max(time.monotonic() - self.started, 1e-6)
        if not new:
            return ""
        rate = (
            f"{new / seconds:.{0 if new >= 100 * seconds else 1}f} images/s"
            if new >= seconds
            else f"{seconds / new:.1f} s/image"
        )
        return f"{rate}, ETA {timedelta(seconds=round(seconds / new * (self.total - self.done)))}"


class _Lines:
    """Without a terminal: a line at each tenth of the work, and once a minute where that takes longer."""

    def __init__(self) -> None:
        self.done, self.at = 0, time.monotonic()

    def __call__(self, progress: Progress, note: str) -> None:
        new, now = progress.done - self.done, time.monotonic()
        if (
            progress.done == progress.before
            or progress.done >= progress.total
            or new >= max(1, progress.total // 10)
            or now - self.at >= LINE_SECONDS
        ):
            self.done, self.at = progress.done, now
            text = ", ".join(
                filter(None, (f"{progress.what} {progress.done}/{progress.total}", progress.pace, note))
            )
            stderr.print(text, markup=False, soft_wrap=True)


class _Bar(RichProgress):
    """The bar, and pace and note on a line of their own."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.note)


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """Progress on stderr: a bar, or now and then a plain line if stderr is no terminal."""
    if not stderr.is_terminal:
        yield Progress(total, what, _Lines())
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with _Bar(*columns, console=stderr) as bar:
        task = bar.add_task(what, total=total)

        def show(progress: Progress, note: str) -> None:
            bar.note = ", ".join(filter(None, (progress.pace, note)))
            bar.update(task, completed=progress.done)

        yield Progress(total, what, show)


def percent(count: int, of: int) -> str:
    """``61.2 % (196/320)``."""
    return f"{100 * count / of:.1f} % ({count}/{of})"
