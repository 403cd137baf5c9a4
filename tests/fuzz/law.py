"""The law: a file loads to finite numbers and comes off again, or is refused by an error of ours.

Either way the model is as it was, bit for bit, within a second of computing and 256 MiB.
"""

import math
import os
import random
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lora_core
from lora_core._reports import Report
from tests.fuzz.corpus import Specimen, models
from tests.fuzz.mutations import JSON, PICKLES, SAFETENSORS, mutate

SECONDS = 1.0  # of the processor's time: others may be using the machine
BYTES = 256 * 2**20
_NO_MEMORY = ("allocate", "not enough memory", "bad alloc", "bad_alloc")


class LawError(Exception):
    """The law is broken."""


class _SlowError(BaseException):
    """Raised inside whatever takes too long."""


def portrait(parts: Mapping[str, nn.Module]) -> tuple[list[object], list[Tensor]]:
    """What a refused file must leave alone: objects and flags, and numbers."""
    seen: list[object] = []
    bits = []
    for part, model in parts.items():
        for name, module in model.named_modules():
            kept = [
                (k, id(p), p.requires_grad) for k, p in module._parameters.items() if p is not None
            ]
            hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
            seen.append((part, name, id(module), type(module), sorted(vars(module)), kept, hooks))
        for key, t in model.state_dict().items():
            seen.append((part, key, t.dtype, t.shape))
            bits.append(t.detach().clone())
    return seen, bits


def same(a: tuple[list[object], list[Tensor]], b: tuple[list[object], list[Tensor]]) -> bool:
    """Whether two portraits are alike, bit for bit."""
    return a[0] == b[0] and all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a[1], b[1], strict=True)
    )


def obeys(
    parts: Mapping[str, nn.Module], path: Path, *, replaced: bool = False, **keywords: Any
) -> str:
    """Loads a file under the law; "loaded", or the name of the error that refused it.

    Args:
        parts: One model under "", or several by part.
        path: The file or folder.
        replaced: Whether the file is to take the place of an adapter of every linear layer.
        keywords: What `load` is told beside.

    Raises:
        LawError: If it is broken.
    """
    bare = portrait(parts)
    # together: a model for which the file has nothing stopped training all the same
    host = parts[""] if "" in parts else nn.ModuleDict(parts)
    if replaced:
        lora_core.inject(host, rank=1, targets=nn.Linear, name="held")
        keywords |= {"name": "held", "replace": True}
    before = portrait(parts)
    outcome = "loaded"
    target: Any = parts.get("", parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited():
                report = lora_core.load(target, path, **{"strict": False, **keywords})
        except (lora_core.LoRAError, OSError) as error:
            outcome = type(error).__name__
            _check_cause(error)
            said = str(error)
            if len(said) > 20_000 or not said.isprintable():
                raise LawError(f"a message of {len(said):,} characters: {said[:300]}") from error
        except _SlowError as error:
            raise LawError(f"slower than {SECONDS} s") from error
        except BaseException as error:
            raise LawError(
                f"{type(error).__name__} is no error of ours: {str(error)[:500]}"
            ) from error
    if outcome == "loaded":
        _check_finite(parts, report)
    elif not same(portrait(parts), before):
        raise LawError(f"the model is another after {outcome}")
    if replaced or outcome == "loaded":
        lora_core.eject(host)
    if not same(portrait(parts), bare):
        raise LawError(f"the model is another once the adapter of {outcome} is off")
    return outcome


def _check_cause(error: BaseException) -> None:
    """A refusal for want of memory is luck: with more of it, it would have been taken."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, MemoryError) or any(said in str(at).lower() for said in _NO_MEMORY):
            raise LawError(f"needs much memory: {at}") from error
        at = at.__cause__ or at.__context__


def _check_finite(parts: Mapping[str, nn.Module], report: Report) -> None:
    for model in parts.values():
        for name, p in model.named_parameters():
            if "lora_" in name and not bool(p.isfinite().all()):
                raise LawError(f"{name} is not finite")
    odd = [x.name for x in report.layers if not (math.isfinite(x.alpha) and math.isfinite(x.scale))]
    if odd or not all(type(layer.rank) is int for layer in report.layers):
        raise LawError(f"an alpha, scale or rank is no number: {report.layers}")


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """A block with so much time, and so much memory beyond what the process has."""
    _reset_peak()
    before = _memory("VmRSS")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if before:  # else this system doesn't tell
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + BYTES, limits[1]))
    old = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = _memory("VmHWM") - before
    if grown > BYTES:
        raise LawError(f"took {grown >> 20} MiB")


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise _SlowError


def _memory(what: str) -> int:
    """Bytes of this process; 0 where the system doesn't tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> None:
    with suppress(OSError):  # some systems forbid it: the limit on addresses still holds
        Path("/proc/self/clear_refs").write_text("5")


class Fuzzer:
    """Damaged files by number, and what became of each.

    Args:
        specimens: What is damaged.
        folder: Where damaged files are put.
    """

    def __init__(self, specimens: list[Specimen], folder: Path) -> None:
        self._specimens = specimens
        self._weights = [s.often for s in specimens]
        self._others = [data for s in specimens for data in s.files.values()]
        self._models: dict[str, dict[str, nn.Module]] = {}
        self._folder = folder

    def damaged(self, number: int) -> tuple[Specimen, dict[str, bytes], dict[str, Any]]:
        """The specimen of this number, its damaged files, and what `load` is told."""
        rng = random.Random(number)
        (specimen,) = rng.choices(self._specimens, self._weights)
        files, hit = dict(specimen.files), rng.choice(list(specimen.files))
        ways = JSON if hit.endswith(".json") else PICKLES if hit.endswith(".pt") else SAFETENSORS
        files[hit] = mutate(rng, files[hit], ways, self._others)
        keywords = dict(specimen.keywords)
        if hit.endswith(".pt") or rng.random() < 0.05:
            keywords["allow_pickle"] = True
        if rng.random() < 0.2:
            keywords["alpha"] = 2.0
        if rng.random() < 0.2:
            keywords["strict"] = True
        if rng.random() < 0.1:
            keywords["replaced"] = True
        return specimen, files, keywords

    def try_one(self, number: int) -> tuple[str, str]:
        """The specimen's name, and the outcome.

        Raises:
            LawError: If the law is broken.
        """
        specimen, files, keywords = self.damaged(number)
        if specimen.base not in self._models:
            self._models[specimen.base] = models(specimen.base)
        place = self._folder / str(os.getpid())
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            old.unlink()
        for name, data in files.items():
            (place / name).write_bytes(data)
        path = place if len(files) > 1 else place / next(iter(files))
        try:
            return specimen.name, obeys(self._models[specimen.base], path, **keywords)
        except LawError:
            del self._models[specimen.base]
            raise


def in_processes(
    numbers: range, jobs: int, work: Callable[[int], str], patience: float
) -> Iterator[tuple[int, str]]:
    """What `work` answers for each number, from processes of its own; "died" where one ended it.

    A process that says nothing for `patience` seconds is ended, too.
    """
    waiting = [numbers[k::jobs] for k in range(jobs)]
    pipes: dict[int, tuple[int, range, int, bytes, float]] = {}

    def start(mine: range) -> None:
        if not mine:
            return
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(read)
                for number in mine:
                    os.write(write, f"{number}\t{work(number)}\n".encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(write)
        pipes[read] = (pid, mine, 0, b"", time.monotonic())

    try:
        for mine in waiting:
            start(mine)
        yield from _heard(pipes, start, patience)
    finally:
        for read, (pid, *_) in pipes.items():
            os.close(read)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _heard(
    pipes: dict[int, tuple[int, range, int, bytes, float]],
    start: Callable[[range], None],
    patience: float,
) -> Iterator[tuple[int, str]]:
    """The answers as they come; one that ends or hangs is replaced by another for the rest."""
    while pipes:
        ready, _, _ = select.select(list(pipes), [], [], 1.0)
        for read in list(pipes):
            pid, mine, done, text, heard = pipes[read]
            if read in ready:
                new = os.read(read, 2**16)
                *lines, text = (text + new).split(b"\n")
                for line in lines:
                    number, _, answer = line.decode().partition("\t")
                    yield int(number), answer
                done += len(lines)
                pipes[read] = (pid, mine, done, text, time.monotonic())
                over = not new
            else:
                over = time.monotonic() - heard > patience
            if over:
                del pipes[read]
                os.close(read)
                if read not in ready:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                if done < len(mine):
                    yield mine[done], "died"
                    start(mine[done + 1 :])
