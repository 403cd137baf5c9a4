"""Forks, in a process of their own: prints as JSON what became of each kind under each law."""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

import lora_core
from tests.laws.zoo import ZOO, Kind, loss_of


def child(work: Callable[[], None]) -> str:
    """What became of a forked child that does this: "fine", an error, or stuck."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # the end of one that is stuck
        try:
            work()
            said = "fine"
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return said if status == 0 else f"ended by signal {os.WTERMSIG(status)}, said {said!r}"


def every_verb(kind: Kind, model: torch.nn.Module) -> Callable[[], None]:
    """A child's work: the forward of its parent, and every verb that needs no file."""
    x = kind.sample()
    model.eval()
    with torch.no_grad():
        adapted = model(x)
        with lora_core.disabled(model):
            plain = model(x)

    def work() -> None:
        with torch.no_grad():
            lora_core.scales(model, default=1.0)
            assert torch.equal(model(x), adapted), "another output"
            with lora_core.disabled(model):
                assert torch.equal(model(x), plain), "another base"
            with lora_core.scales(model, default=0.5):
                assert not torch.equal(model(x), adapted), "no switch"
        kind.inject(model, "second")
        loss_of(model(x)).backward()
        assert all(p.grad.abs().max() > 0 for p in lora_core.parameters(model, "second"))
        lora_core.eject(model)
        with torch.no_grad():
            # other kernels may run for parameters that train again
            assert torch.allclose(model(x), plain, atol=1e-6), "not ejected"

    return work


@contextlib.contextmanager
def inside(holding: Callable[[threading.Event, threading.Event], None]) -> Iterator[None]:
    """Has another thread be where it says, meanwhile."""
    there, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=holding, args=(there, done))
    thread.start()
    assert there.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join(60)


def locks() -> dict[int, contextlib.AbstractContextManager[bool]]:
    """Every lock that a module of the library has."""
    kinds = type(threading.Lock()), type(threading.RLock())
    rooms = [m for name, m in sys.modules.items() if name.startswith("lora_core")]
    return {id(v): v for room in rooms for v in vars(room).values() if isinstance(v, kinds)}


def a_child_works(kind: Kind) -> str:
    return child(every_verb(kind, kind.adapted()))


def a_child_works_though_a_thread_held_every_lock(kind: Kind) -> str:
    def hold(there: threading.Event, done: threading.Event) -> None:
        with contextlib.ExitStack() as held:
            for lock in locks().values():
                held.enter_context(lock)
            there.set()
            done.wait(60)

    work = every_verb(kind, kind.adapted())
    with inside(hold):
        return child(work)


def a_child_works_though_a_thread_was_switching_adapters(kind: Kind) -> str:
    model = kind.adapted()

    def switch(there: threading.Event, done: threading.Event) -> None:
        while not done.is_set():
            with lora_core.scales(model, default=0.25), lora_core.disabled(model):
                there.set()

    work = every_verb(kind, model)
    with inside(switch):
        said = {child(work) for _ in range(2)}
    return said.pop() if len(said) == 1 else repr(said)


class Outputs(Dataset[torch.Tensor]):
    """What a model makes of its inputs."""

    def __init__(self, model: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        with lora_core.scales(self.model, default=0.5):
            return self.model(self.inputs[index])


def workers_compute_what_their_parent_does(kind: Kind) -> str:
    data = Outputs(kind.adapted().eval(), [kind.sample(seed=seed) for seed in range(4)])
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    same = [torch.equal(a, b) for a, b in zip(loader, data, strict=True)]
    return "fine" if same == [True] * 4 else f"equal: {same}"


LAWS = (
    a_child_works,
    a_child_works_though_a_thread_held_every_lock,
    a_child_works_though_a_thread_was_switching_adapters,
    workers_compute_what_their_parent_does,
)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {law.__name__: {} for law in LAWS}
    for law in LAWS:
        mine = found[law.__name__]
        for name, kind in ZOO.items():
            # one that is stuck takes its time, and so would the others
            stuck = any("ended by signal" in said for said in mine.values())
            mine[name] = "not tried: another is stuck" if stuck else law(kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
