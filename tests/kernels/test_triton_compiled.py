"""What the compiler makes of every configuration, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).parent / "compiled.py"
ROOT = PROGRAM.parents[2]
# bytes of shared memory that one program can have
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ANY_TENSOR_CORE = {"HMMA", "HGMMA", "UTCHMMA"}
GEMMS = {"gemm_lora", "gemm_expand"}


def faults(row: dict) -> list[str]:
    """Why a GPU could not run a compiled kernel well, or at all."""
    if "error" in row:
        return [row["error"]]
    counts = row["counts"]
    found = []
    if row["stack"] or counts.get("LDL") or counts.get("STL"):
        found.append(f"spills: {row['stack']} bytes of stack at {row['registers']} registers")
    if row["shared"] > SHARED[row["arch"]]:
        found.append(f"takes {row['shared']} bytes of shared memory")
    if counts.keys() & {"ATOM", "ATOMG", "RED"}:
        found.append("sums with atomics, in no fixed order")
    if row["dtype"] != "*fp32" and row["kernel"] != "add_splits":
        wanted = {TENSOR_CORE[row["arch"]]} if row["kernel"] in GEMMS else ANY_TENSOR_CORE
        if not counts.keys() & wanted:
            found.append("multiplies without tensor cores")
        if not counts.keys() & {"LDGSTS", "UTMALDG"}:
            found.append("loads without a pipeline")
    return found


def described(row: dict) -> str:
    sizes = "x".join(map(str, row["config"].values()))
    mode = ("backward" if row["backward"] else "forward") + (", dropped" * row["dropped"])
    return f"{row['kernel']} {sizes} rank {row['width']} {row['dtype']} {mode} sm_{row['arch']}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One for each variant that was compiled; the control comes first."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_configuration_fits_and_uses_the_chip(rows):
    found = {described(row): faults(row) for row in rows[1:]}
    assert {name: why for name, why in found.items() if why} == {}


def test_every_kernel_is_compiled_for_every_architecture(rows):
    kernels = {"gemm_lora", "gemm_expand", "shrink", "dab", "add_splits"}
    pairs = {(row["kernel"], row["arch"]) for row in rows[1:]}
    assert pairs == {(kernel, arch) for kernel in kernels for arch in SHARED if arch != 120}
    for kernel in GEMMS:
        widths = {(row["arch"], row["width"]) for row in rows[1:] if row["kernel"] == kernel}
        assert {width for _, width in widths} == {16, 32, 64}


def test_the_gate_refuses_a_configuration_that_spills(rows):
    assert any(why.startswith("spills") for why in faults(rows[0]))


def test_the_gate_refuses_too_much_shared_memory_atomics_and_plain_arithmetic(rows):
    sound = next(row for row in rows if row["kernel"] == "gemm_lora" and row["arch"] == 90)
    assert faults(sound) == []
    assert faults(sound | {"shared": 232_449}) == ["takes 232449 bytes of shared memory"]
    counts = sound["counts"]
    assert faults(sound | {"counts": counts | {"RED": 1}}) == [
        "sums with atomics, in no fixed order"
    ]
    slow = {name: n for name, n in counts.items() if name != "HGMMA"} | {"HMMA": 9}
    assert faults(sound | {"counts": slow}) == ["multiplies without tensor cores"]


def test_the_gate_refuses_what_does_not_compile():
    assert faults({"error": "no"}) == ["no"]
