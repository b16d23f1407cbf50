"""How a training run is going: counted, shown, written down and saved, while the loop only trains."""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric

from ..records.store import Store
from ..runtime.processes import together
from ..runtime.progress import Progress
from .batches import images_used
from .checkpoint import Checkpoint, Start
from .counts import EpochCounts, Unseen
from .curves import Curves
from .masking import Masking


class Course:
    """The counts of the epoch under way, and everywhere that they go.

    Only process 0 has the ``store``. ``epochs`` are those of the run, ``steps`` those of an epoch.

    Attributes:
        unseen: the steps that were made since the last :meth:`look`.
        counts: what the steps of this epoch have done, as far as they were looked at.
    """

    def __init__(
        self,
        store: Store | None,
        checkpoint: Checkpoint,
        masking: Masking,
        fabric: Fabric,
        *,
        epochs: int,
        steps: int,
        progress: Progress,
        curves: Curves,
    ) -> None:
        self.store, self.checkpoint, self.masking, self.fabric = store, checkpoint, masking, fabric
        self.epochs, self.steps, self.progress, self.curves = epochs, steps, progress, curves
        self.unseen, self.counts = Unseen(fabric), EpochCounts()

    def begin(self, epoch: int, start: Start, batches: list[list[int]]) -> int:
        """Begin an epoch; the number of its steps that an earlier attempt has made."""
        self.counts = EpochCounts()
        if epoch != start.epoch:
            return 0
        self.counts = start.counts
        before, here = images_used(batches, self.fabric), images_used(batches[: start.step], self.fabric)
        self.progress.resume(epoch * before + here)
        self.curves.begin(epoch * self.steps + start.step)
        return start.step

    def look(self, epoch: int, step: int, *, stop: bool) -> None:
        """Wait for the device, and show what was computed; save it where that is due.

        Raises SoundnessError for a loss that is not finite, before anything of it is saved, and
        KeyboardInterrupt after it is saved if any process wants to ``stop``.
        """
        done, asked = self.unseen.look(stop=stop, save=self.checkpoint.due)
        self.counts.add(done, epoch)
        note = self.counts.note(epoch, self.epochs, self.store.lines if self.store else [])
        self.progress.advance(int(sum(one.images for one in done)), note)
        self.curves.add_steps(epoch * self.steps, done)
        if asked["stop"] or asked["save"]:
            with together(self.fabric):
                self.curves.flush()
                self.checkpoint.save(epoch, step, self.counts, self.masking.found)
        if asked["stop"]:
            raise KeyboardInterrupt

    def write(self, epoch: int, lr: float, judged: dict[str, Any], passes: int) -> None:
        """Write the line of an epoch, whose weights were ``judged`` in so many passes."""
        self.counts.passes += passes
        with together(self.fabric):
            if self.store:
                self.store.append([{**self.counts.line(epoch, lr), **judged}])

    def end(self, epoch: int) -> None:
        """Save what the next epoch begins with."""
        with together(self.fabric):
            if self.store:
                self.checkpoint.kept.compare(self.store.lines)
                self.curves.add_epoch((epoch + 1) * self.steps, self.store.lines[epoch])
            self.curves.flush()
            self.checkpoint.save(epoch + 1, 0, EpochCounts(), self.masking.found)
