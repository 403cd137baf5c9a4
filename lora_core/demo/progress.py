"""Progress of the training: a bar on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Told = Callable[[int, float], None]
"""Told after each step its number, from 1, and its loss."""

_LINES = 10
_MEMORY = 0.95


class RunningMean:
    """A mean of noisy losses that forgets slowly, corrected for its short past at the start.

    Example:
        >>> mean = RunningMean()
        >>> mean(2.0), mean(2.0)
        (2.0, 2.0)
    """

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def __call__(self, loss: float) -> float:
        """The mean so far, this loss included."""
        self._total = _MEMORY * self._total + (1 - _MEMORY) * loss
        self._weight = _MEMORY * self._weight + (1 - _MEMORY)
        return self._total / self._weight


@contextmanager
def progress(title: str, steps: int) -> Iterator[Told]:
    """Shows how far `steps` have come, with the loss and the time left."""
    shown = _bar if sys.stdout.isatty() else _lines
    mean = RunningMean()
    with shown(title, steps) as show:
        yield lambda step, loss: show(step, mean(loss))


@contextmanager
def _lines(title: str, steps: int) -> Iterator[Told]:
    start = time.monotonic()
    every = max(1, steps // _LINES)

    def show(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            left = (time.monotonic() - start) / step * (steps - step)
            print(f"{title}: step {step}/{steps}  loss {loss:.4f}  {left:.0f} s left", flush=True)

    yield show


@contextmanager
def _bar(title: str, steps: int) -> Iterator[Told]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeLeft(),
        TextColumn("left"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=steps, loss="-")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.4f}")
