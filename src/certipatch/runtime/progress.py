"""How far a run is, how fast, and when it will be done: a bar or plain lines on stderr.

Between two images that are done a run also shows that it lives: whoever looks at views says so by
:func:`seen`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .console import said, say, stderr

LINE_SECONDS = 60  # without a terminal, the longest time between two lines while images are being done
FIRST_SECONDS = 4  # and the longest time before the first
BAR_SECONDS = 0.5  # on a terminal, the time between two changes of what views are looked at


class Progress:
    """How many images are done, how fast, and when the rest will be.

    Images of an earlier attempt count as done, but say nothing of the rate.
    """

    def __init__(self, total: int, what: str, show: Callable[[Progress, str], None]) -> None:
        self.total, self.what, self._show = total, what, show
        self.done = self.before = 0
        self.started = self._began = time.monotonic()
        self._views = self._decided = 0

    def resume(self, n: int) -> None:
        """Start to count, ``n`` images having been done by an earlier attempt."""
        self.done = self.before = n
        self.started = time.monotonic()
        if n:
            self._show(self, "done before")

    def advance(self, n: int, note: str) -> None:
        """``n`` more images are done; ``note`` is shown beside the pace."""
        self.done += n
        self._views = self._decided = 0
        self._began = time.monotonic()
        self._show(self, note)

    def look(self, views: int, decided: int) -> str:
        """Count views and decided images of those that are under way; what there is to say of them."""
        self._views += views
        self._decided += decided
        pace = self._views / max(time.monotonic() - self._began, 1e-6)
        # An attack decides more patched images than there are images; these are no progress of it.
        decided_here = 0 < self._decided <= self.total - self.done
        some = f"{self._decided} more decided, " if decided_here else ""
        return f"{some}{self._views:,} views looked at for the next, {pace:,.0f} views/s"

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
        self.silent = True

    def inside(self, progress: Progress, note: str) -> None:
        """The views between two images that are done."""
        if time.monotonic() - self.at >= (FIRST_SECONDS if self.silent else LINE_SECONDS):
            self._print(progress, note)

    def __call__(self, progress: Progress, note: str) -> None:
        now = time.monotonic()
        at_an_end = progress.done == progress.before or progress.done >= progress.total
        a_tenth_more = progress.done - self.done >= max(1, progress.total // 10)
        if at_an_end or a_tenth_more or now - self.at >= LINE_SECONDS:
            self.done = progress.done
            self._print(progress, note)

    def _print(self, progress: Progress, note: str) -> None:
        self.at, self.silent = time.monotonic(), False
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
        lines = _Lines()
        progress = Progress(total, what, lines)
        with _heard(progress, lines.inside):
            yield progress
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with _Bar(*columns, console=stderr) as bar:
        task = bar.add_task(what, total=total)

        def show(progress: Progress, note: str) -> None:
            bar.note = _joined(progress.pace, note)
            bar.update(task, completed=progress.done)

        changed = time.monotonic()

        def inside(progress: Progress, note: str) -> None:
            nonlocal changed
            if time.monotonic() - changed >= BAR_SECONDS:
                changed = time.monotonic()
                show(progress, note)

        progress = Progress(total, what, show)
        with _heard(progress, inside):
            yield progress


# The run under way, and how it shows what happens between two of its images.
_under_way: list[tuple[Progress, Callable[[Progress, str], None]]] = []


@contextmanager
def _heard(progress: Progress, inside: Callable[[Progress, str], None]) -> Iterator[None]:
    _under_way.append((progress, inside))
    try:
        yield
    finally:
        _under_way.pop()


def seen(views: int = 0, decided: int = 0) -> None:
    """So many views were looked at, or images decided, on the way to the next that are done."""
    if _under_way:
        progress, inside = _under_way[-1]
        inside(progress, progress.look(views, decided))


@contextmanager
def sign_of_life(what: str) -> Iterator[None]:
    """A block that says within :data:`FIRST_SECONDS` that it is at work, if nothing else was said by then."""
    before = said()

    def speak() -> None:
        if said() == before:
            say(f"{what}: at work (reading images, loading the model)")

    timer = threading.Timer(FIRST_SECONDS, speak)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def percent(count: int, of: int) -> str:
    """A share with its fraction: ``61.2 % (196/320)``."""
    return f"{100 * count / of:.1f} % ({count}/{of})"
