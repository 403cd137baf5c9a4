"""Whatever happens around a file: kills, full disks, odd paths, hostile names, other processes."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lora_core
from lora_core import ConfigError, CorruptFileError, LoRAError
from lora_core._formats import read, replacing
from lora_core._layers import factors_of
from lora_core.testing.laws import train_pretend
from tests.golden import GOLDEN, TinyMix

ROOT = Path(__file__).parents[1]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)]).eval()


def adapted(rank: int = 4) -> nn.Sequential:
    model = net()
    lora_core.inject(model, rank=rank, targets=nn.Linear, name="style")
    train_pretend(model, "style")
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a small adapter, alone in its folder."""
    file = tmp_path / "style.safetensors"
    lora_core.save(adapted(), file)
    return file


@pytest.fixture(params=["nameless", "named"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether what is being written has a name: not every system can do without."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


@contextmanager
def promptly(seconds: float = 10.0) -> Iterator[None]:
    """A block that must not wait for anything."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def script(text: str, *arguments: object) -> str:
    """What a program says, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- kills

KILLS = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    import lora_core
    from lora_core._formats import read, write
    from tests.test_safety import adapted

    folder, kind, temporary, kills = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    if temporary == "named" and hasattr(os, "O_TMPFILE"):
        del os.O_TMPFILE
    rng = random.Random(0)
    if kind == "file":
        models = [adapted(4), adapted(16)]
        puts = [lambda p, m=m: lora_core.save(m, p) for m in models]
    else:
        cases = [Path("tests/data/golden/peft") / name for name in ("linear", "patterns_rslora")]
        puts = [lambda p, a=read(c): write(a, p, "peft") for c in cases]
    target = folder / "there" / "style"
    target.parent.mkdir()
    (folder / "apart").mkdir()

    def content(path):
        if path.is_file():
            return path.read_bytes()
        # what a reader takes: a folder without settings is no adapter
        names = ("adapter_config.json", "adapter_model.safetensors")
        return [(path / n).read_bytes() for n in names] if (path / names[0]).exists() else None

    wanted = []
    for n, put in enumerate(puts):
        put(folder / "apart" / str(n))
        wanted.append(content(folder / "apart" / str(n)))
    puts[0](target)
    seen, bad, left = [], [], 0
    for _ in range(kills):
        child = os.fork()
        if not child:
            while True:
                for put in puts[::-1]:
                    put(target)
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = content(target)
        (seen if found in wanted or (found is None and kind != "file") else bad).append(
            wanted.index(found) if found in wanted else found
        )
        where = target.parent if kind == "file" else target
        left += sum(p.name.endswith(".tmp") for p in where.iterdir())
        puts[0](target)
    files = [p for p in sorted(target.parent.rglob("*")) if p.is_file()]
    files = [str(p.relative_to(target.parent)) for p in files]
    final = content(target) == wanted[0]
    print(json.dumps({"seen": seen, "bad": len(bad), "left": left, "files": files, "last": final}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("temporary", ["nameless", "named"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_while_saving_leaves_the_old_the_new_or_nothing_that_reads(
    tmp_path: Path, kind: str, temporary: str
) -> None:
    told = json.loads(script(KILLS, tmp_path, kind, temporary, 40))
    assert told["bad"] == 0
    assert {0, 1} <= set(told["seen"])  # else the kills came at no time that tests anything
    assert told["last"]
    # what a kill left, the next save has swept
    names = ["adapter_config.json", "adapter_model.safetensors"]
    whole = [f"style/{name}" for name in names]
    assert told["files"] == (["style"] if kind == "file" else whole)
    if temporary == "nameless" and hasattr(os, "O_TMPFILE"):
        assert told["left"] <= 12  # only in the instant between naming and renaming


# -- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a disk needs rights that this process has not")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_there(small_disk: Path, temporary: str) -> None:
    file = small_disk / "style.safetensors"
    lora_core.save(adapted(), file)
    old = file.read_bytes()
    with pytest.raises(OSError, match=r"No space left on device \(\d+ bytes\): '.*style") as error:
        lora_core.save(adapted(), file, metadata={"note": "x" * 200_000})
    assert error.value.errno == errno.ENOSPC
    assert file.read_bytes() == old
    assert list(small_disk.iterdir()) == [file]
    lora_core.save(adapted(), file)  # nothing holds on to the space


def test_a_read_only_disk_is_an_error_that_names_the_path(small_disk: Path, temporary: str) -> None:
    file = small_disk / "style.safetensors"
    lora_core.save(adapted(), file)
    old = file.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="style") as error:
        lora_core.save(adapted(rank=2), file)
    assert error.value.errno == errno.EROFS
    assert file.read_bytes() == old
    assert len(lora_core.load(net(), file).layers) == 3


def test_a_file_beyond_the_limit_keeps_what_was_there(path: Path, temporary: str) -> None:
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large \(\d+ bytes\): '.*style") as error:
            lora_core.save(adapted(rank=32), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_device_is_not_written_to() -> None:
    with pytest.raises(OSError, match=r"but a device or pipe is there: '/dev/null'"):
        lora_core.save(adapted(), "/dev/null")


# -- rights


def as_nobody(act: Callable[[], object]) -> str:
    """What `act` raises, where this process has no more rights than others have."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child has no use for
        child = os.fork()
    if not child:
        said = "nothing"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all may look into, unlike those that tests have."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for p in [folder, *folder.rglob("*")]:
        p.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_the_right_to_write_is_an_error_that_names_the_path(
    open_folder: Path, temporary: str, there: bool
) -> None:
    file, model = open_folder / "style.safetensors", adapted()
    lora_core.save(model, file)
    old = file.read_bytes()
    if not there:
        file.unlink()
    open_folder.chmod(0o555)
    said = as_nobody(lambda: lora_core.save(model, file))
    assert said.startswith("PermissionError: [Errno 13] Permission denied")
    assert said.endswith(repr(str(file)))
    assert [p.read_bytes() for p in open_folder.iterdir()] == [old] * there


def test_a_file_without_the_right_to_read_is_an_error_that_names_the_path(
    open_folder: Path,
) -> None:
    file = open_folder / "style.safetensors"
    lora_core.save(adapted(), file)
    lora_core.load(net(), file)  # what it imports is imported
    file.chmod(0o000)
    said = as_nobody(lambda: lora_core.load(net(), file))
    assert said == f"PermissionError: [Errno 13] Permission denied: {str(file)!r}"


# -- paths


@pytest.mark.parametrize("loading", [True, False])
def test_links_that_lead_round_are_an_error_and_stay(tmp_path: Path, loading: bool) -> None:
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=r"loop\.safetensors") as error:
        lora_core.load(net(), loop) if loading else lora_core.save(adapted(), loop)
    assert error.value.errno == errno.ELOOP
    assert loop.is_symlink()
    assert list(tmp_path.iterdir()) == [loop]


def test_a_link_to_nothing_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    link, target = tmp_path / "link.safetensors", tmp_path / "folder" / "real.safetensors"
    link.symlink_to(target)
    with pytest.raises(FileNotFoundError, match=r"link\.safetensors"):
        lora_core.load(net(), link)
    with pytest.raises(FileNotFoundError, match=r"link\.safetensors"):
        lora_core.save(adapted(), link)
    target.parent.mkdir()
    lora_core.save(adapted(), link)
    assert link.is_symlink()
    assert len(lora_core.load(net(), target).layers) == 3


@pytest.mark.parametrize("where", ["missing/style", "file/style", "x" * 300])
def test_a_path_that_can_not_be_is_an_error_that_names_it(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    file = tmp_path / f"{where}.safetensors"
    with pytest.raises(OSError, match=r"\.safetensors"):
        lora_core.save(adapted(), file)
    with pytest.raises(OSError, match=r"\.safetensors"):
        lora_core.load(net(), file)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["字" * 80, "x" * 255, "é" * 100, "a b\n%s{}*?[]", "-rf", ".hidden"]
)
def test_any_name_that_the_system_takes_will_do(tmp_path: Path, temporary: str, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"old")
    lora_core.save(adapted(), file)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(lora_core.load(net(), file).layers) == 3


def test_what_a_process_left_of_a_long_name_is_swept(tmp_path: Path) -> None:
    file, gone = tmp_path / ("字" * 80), subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    start = os.fsdecode(os.fsencode(file.name)[:200])
    (tmp_path / f".{start}.{replacing._host()}.{gone.pid}.aa.tmp").write_bytes(b"")
    lora_core.save(adapted(), file)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "pipes",
    [
        ["adapter_config.json"],
        ["adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.bin"],
        ["pytorch_lora_weights.safetensors"],
    ],
)
def test_a_pipe_in_a_folder_is_refused_without_waiting(tmp_path: Path, pipes: list[str]) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "peft" / "linear", folder)
    folder.chmod(0o755)
    if pipes[-1] not in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_model.safetensors").unlink()
    for name in pipes:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    with promptly(), pytest.raises(OSError, match="this is a device or pipe"):
        lora_core.load(TinyMix(), folder, allow_pickle=True)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ""])
def test_a_link_to_a_pipe_is_refused_without_waiting(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    link = tmp_path / f"x{suffix}"
    link.symlink_to(tmp_path / "pipe")
    with promptly(), pytest.raises(OSError, match="device or pipe"):
        lora_core.load(net(), link, allow_pickle=True)
    with promptly(), pytest.raises(OSError, match="device or pipe"):
        lora_core.save(adapted(), link)
    assert link.is_symlink()


def test_a_folder_of_links_is_read_through_them(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(GOLDEN / "peft" / "linear" / name)
    (tmp_path / "link").symlink_to(folder)
    for there in (folder, tmp_path / "link"):
        assert lora_core.load(TinyMix(), there, name="x").layers


# -- others who use the same file


def _save_often(model: nn.Module, file: Path) -> None:
    for _ in range(25):
        lora_core.save(model, file)


def test_a_reader_beside_two_savers_always_has_one_of_both(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    models = {rank: adapted(rank) for rank in (4, 32)}
    lora_core.save(models[4], file)
    context = multiprocessing.get_context("fork")
    savers = [context.Process(target=_save_often, args=(m, file)) for m in models.values()]
    for saver in savers:
        saver.start()
    reads = 0
    while any(saver.is_alive() for saver in savers) or not reads:
        found = read(file)
        model = models[next(iter(found.layers.values())).settings.rank]
        for name, layer in found.layers.items():
            own = factors_of(model.get_submodule(name), "style")
            held = (layer.parts["lora_A"], layer.parts["lora_B"])
            assert all(torch.equal(a, b) for a, b in zip(own, held, strict=True))
        reads += 1
    for saver in savers:
        saver.join()
        assert saver.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["style.safetensors", "style.pt"])
def test_a_file_that_is_cut_while_it_is_read_is_whole_or_refused(tmp_path: Path, name: str) -> None:
    file, stop = tmp_path / name, threading.Event()
    if name.endswith(".pt"):
        tensors = {f"{n}.lora_{half}": torch.randn(32, 32) for n in range(3) for half in "AB"}
        torch.save(tensors, file)
    else:
        lora_core.save(adapted(), file)
    data = file.read_bytes()

    def disturb() -> None:
        while not stop.is_set():
            for size in (len(data) // 2, 0, len(data)):
                with file.open("r+b") as there:
                    there.truncate(size)
                    if size == len(data):
                        there.write(data)

    thread = threading.Thread(target=disturb)
    thread.start()
    outcomes = set()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until and len(outcomes) < 2:
            model = net()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    alpha = 1.0 if name.endswith(".pt") else None
                    lora_core.load(model, file, allow_pickle=True, alpha=alpha)
                outcomes.add("loaded")
                assert all(bool(p.isfinite().all()) for p in model.parameters())
            except LoRAError:
                outcomes.add("refused")
    finally:
        stop.set()
        thread.join()
    assert outcomes


@pytest.mark.parametrize("kind", ["peft", "pickle"])
def test_loaded_numbers_are_the_models_own(tmp_path: Path, kind: str) -> None:
    model, copied = (nn.Sequential(nn.Linear(4, 4)), tmp_path / "x.pt")
    if kind == "peft":
        model, copied = TinyMix(), tmp_path / "folder"  # type: ignore[assignment]
        shutil.copytree(GOLDEN / "peft" / "linear", copied)
        copied.chmod(0o755)
        lora_core.load(model, copied)
    else:
        torch.save({"0.lora_A": torch.ones(2, 4), "0.lora_B": torch.ones(4, 2)}, copied)
        lora_core.load(model, copied, allow_pickle=True, alpha=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for file in [copied] if copied.is_file() else list(copied.iterdir()):
        file.chmod(0o644)
        with file.open("r+b") as there:
            there.write(b"\xff" * 64)
            there.truncate(0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- names never lead anywhere

ESCAPES = [
    "../x",
    "/tmp/x",
    "a/b",
    "a\\b",
    "..",
    ".",
    "",
    "a\nb",
    "a\0b",
    "~",
    "C:x",
    "x" * 65,
    "é",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_path_is_no_name_of_an_adapter(path: Path, name: str) -> None:
    said = "^`name` must be 1 to 64 letters"
    with pytest.raises(ConfigError, match=said):
        lora_core.load(net(), path, name=name)
    with pytest.raises(ConfigError, match=said):
        lora_core.inject(net(), rank=1, targets="0", name=name)
    with pytest.raises(LoRAError):
        lora_core.save(adapted(), path.parent / "other", name=name)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["..safetensors", "a b.safetensors", "%n{}.pt", "字.safetensors"])
def test_an_adapter_named_by_its_file_has_a_plain_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    shutil.copy(GOLDEN / "peft" / "linear" / "adapter_model.safetensors", file)
    found = read(file, alpha=1.0)
    lora_core.inject(net(), rank=1, targets="0", name=found.name)


def test_paths_and_addresses_in_settings_are_never_followed(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "peft" / "linear", folder)
    folder.chmod(0o755)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": "/etc/passwd",
        "revision": "https://example.com/x",
        "auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"},
    }
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert deeds(folder) == []


DEEDS = """
    import os, sys, warnings
    from pathlib import Path
    import torch
    import lora_core
    from lora_core._formats import read

    def every(roots):
        for root in map(Path, roots):
            for path in [root, *root.rglob("*")]:
                if path.suffix in (".safetensors", ".pt", ".bin") or path.is_dir():
                    for alpha in (None, 1.0):
                        try:
                            read(path, allow_pickle=True, alpha=alpha)
                        except (lora_core.LoRAError, OSError):
                            continue

    every(["tests/data/golden"])  # what torch imports at its first use is imported
    roots, deeds, watching = sys.argv[1:], [], True
    WATCHED = ("socket.", "subprocess.", "os.", "shutil.", "import", "exec", "compile", "ctypes.",
               "marshal.", "pickle.", "urllib.", "http.", "ftplib.", "smtplib.", "open",
               "tempfile.", "webbrowser.", "code.", "sqlite3.")

    def watch(event, arguments):
        if not watching or not event.startswith(WATCHED):
            return
        if event == "open":
            path, mode, flags = arguments
            inside = any(os.path.realpath(path).startswith(os.path.realpath(r)) for r in roots)
            if inside and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.listdir", "os.scandir"):
            return
        deeds.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(watch)
    every(roots)
    watching = False
    print(os.linesep.join(dict.fromkeys(deeds)), end="")
"""


def deeds(*roots: Path) -> list[str]:
    """What reading these files does beside reading them."""
    return script(DEEDS, *roots).splitlines()


@pytest.mark.slow
def test_reading_opens_nothing_else_and_calls_nobody(tmp_path: Path) -> None:
    assert deeds(GOLDEN) == []
    # and would be seen
    acts = "import socket; socket.socket(); open('/dev/null'); eval('1')"
    seen = script(DEEDS.replace("watching = False", acts), tmp_path)
    assert "socket.__new__" in seen
    assert "open ('/dev/null'" in seen
    assert "exec (" in seen


# -- code


class Gadget:
    """Calls what it is told to when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["archive", "old", "plain", "nested", "folder"])
@pytest.mark.parametrize("allow", [True, False])
def test_no_code_in_a_file_ever_runs(tmp_path: Path, suffix: str, how: str, allow: bool) -> None:
    marker = tmp_path / "marker"
    for gadget in (
        Gadget(os.system, f"touch {marker}"),
        Gadget(exec, f"open({str(marker)!r}, 'w')"),
        Gadget(open, str(marker), "w"),
        Gadget(os.mkdir, str(marker)),
        Gadget(eval, f"open({str(marker)!r}, 'w')"),
    ):
        file = tmp_path / f"adapter_model{suffix}"
        value: Any = {"0.lora_A": gadget, "0.lora_B": torch.ones(4, 2)}
        if how == "plain":
            file.write_bytes(pickle.dumps(value, protocol=2))
        elif how == "nested":
            torch.save({"state_dict": {"a": {"b": [gadget]}}}, file)
        else:
            torch.save(value, file, _use_new_zipfile_serialization=how != "old")
        if how == "folder":
            shutil.copy(GOLDEN / "peft" / "linear" / "adapter_config.json", tmp_path)
        for there in (file, tmp_path) if how == "folder" else (file,):
            with pytest.raises((CorruptFileError, OSError)):
                lora_core.load(net(), there, allow_pickle=allow, alpha=1.0)
        with suppress(OSError):
            (tmp_path / "adapter_config.json").unlink()
        assert not marker.exists()


def test_a_gadget_would_act_if_it_were_let(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Gadget(os.mkdir, str(marker))))
    assert marker.exists()
