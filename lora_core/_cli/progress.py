"""How far long work has come, on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lora_core._reports import LayerResult

_WIDTH = 30  # characters of a full bar
_PATIENCE = 2.0  # seconds before the first line where there is no terminal
_PAUSE = {True: 0.1, False: 10.0}  # seconds between two signs of life, on a terminal and elsewhere


class Step(Protocol):
    """Told how many of how many are done."""

    def __call__(self, done: int, total: int) -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Step]:
    """Shows the steps of the work inside; the bar is wiped off at its end.

    `rich`, which the demo draws its bar with, is no dependency of the library itself.
    """
    terminal = sys.stderr.isatty()
    start = time.monotonic()
    next_at = start + (0 if terminal else _PATIENCE)
    shown = False

    def step(done: int, total: int) -> None:
        nonlocal next_at, shown
        now = time.monotonic()
        if now < next_at:
            return
        next_at, shown = now + _PAUSE[terminal], True
        left = (now - start) / max(done, 1) * (total - done)
        words = f"{title}: {done}/{total}, {left:.0f} s left"
        if terminal:
            full = _WIDTH * done // max(total, 1)
            bar = f"[{'#' * full}{'.' * (_WIDTH - full)}]"
            print(f"\r\033[K{bar} {words}", end="", file=sys.stderr, flush=True)
        else:
            print(words, file=sys.stderr, flush=True)

    try:
        yield step
    finally:
        if terminal and shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Results(list["LayerResult"]):
    """What a verb of the algebra tells of its layers, kept and passed on to a bar."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def __call__(self, result: "LayerResult") -> None:
        """One more layer is done."""
        self.append(result)
        self._step(result.done, result.total)
