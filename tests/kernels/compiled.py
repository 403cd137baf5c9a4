"""Compiles every configuration of every Triton kernel for real GPUs, without one; prints JSON rows.

A program rather than a test: it needs a process in which triton has not been told to interpret.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_core.kernels.triton import gemm, narrow
from lora_core.kernels.triton.configs import TABLE, Choice, Config

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MNEMONICS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDL", "STL", "ATOM", "ATOMG", "RED")
# more accumulators than its threads have registers: what the gate must refuse
SPILLING = Config(rows=128, columns=256, depth=32, warps=4, stages=3)

# the strides that are one in the forward pass, and in the backward pass with its transposed factors
FORWARD = {
    "gemm_lora": ("x_k", "w_k", "bias_n", "a_k", "b_r", "gain_r", "y_n", "h_r"),
    "gemm_expand": ("x_k", "w_k", "bias_n", "b_r", "gain_r", "y_n", "h_r"),
    "shrink": ("x_k", "a_k", "h_r"),
    "dab": ("x_k", "dy_n", "h_r", "q_r", "gain_r", "da_k", "db_r"),
    "add_splits": ("gain_r", "da_k", "db_r"),
}
BACKWARD = {
    "gemm_lora": ("x_k", "w_n", "a_r", "b_n", "gain_r", "y_n", "h_r"),
    "gemm_expand": ("x_k", "w_n", "b_n", "gain_r", "y_n", "h_r"),
    "shrink": ("x_k", "a_r", "h_r"),
    "dab": ("x_k", "dy_n", "h_r", "q_r", "gain_r", "da_r", "db_r"),  # here, of the split form
}
UNALIGNED = {"M", "R", "S"}  # the integers that no multiple of sixteen is promised for


class Job(NamedTuple):
    """One kernel as one launch would specialise it."""

    kernel: str
    arch: int
    config: Config
    width: int
    dtype: str
    backward: bool = False
    dropped: bool = False

    @property
    def tile(self) -> dict[str, int]:
        c = self.config
        return {
            "BLOCK_M": c.depth if self.kernel == "dab" else c.rows,
            "BLOCK_N": c.columns,
            "BLOCK_C": c.columns,
            "BLOCK_K": c.depth,
            "BLOCK_R": self.width,
            "GROUP_M": 8,
            "INTERP": False,
        }

    def source(self) -> ASTSource:
        """The kernel with its signature: what is constant, what is aligned."""
        function = getattr(narrow, self.kernel, None) or getattr(gemm, self.kernel)
        places = {parameter.name: i for i, parameter in enumerate(function.params)}
        ones = (BACKWARD if self.backward else FORWARD)[self.kernel]
        constants = dict.fromkeys(ones, 1) | self.tile
        if not self.dropped:
            constants["seed"] = None
        if self.backward:
            constants["bias"] = None
            if self.kernel == "dab":
                constants["gain"] = None
        pointers = dict.fromkeys(("x", "w", "bias", "a", "b", "y", "h", "dy", "q"), self.dtype)
        pointers |= dict.fromkeys(("gain", "da", "db", "da_parts", "db_parts"), "*fp32")
        pointers["seed"] = "*i64"
        signature, aligned = {}, {}
        for name, place in places.items():
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = pointers.get(name) or ("fp32" if name == "dropout" else "i32")
            if name != "dropout" and name not in UNALIGNED:
                aligned[place,] = [["tt.divisibility", 16]]
        values = {(places[name],): v for name, v in constants.items() if name in places}
        return ASTSource(fn=function, signature=signature, constexprs=values, attrs=aligned)


def jobs(everything: bool) -> list[Job]:
    """Every configuration on every architecture, at widths and layouts that cover each other.

    With `everything` that is each width in each layout, and the newest architecture of the table
    too, which shares its configurations with older ones.
    """
    found = [Job("gemm_lora", 80, SPILLING, 64, "*bf16")]
    for (major, minor), kernels in TABLE.items():
        arch = 10 * major + minor
        if arch == 120 and not everything:
            continue
        for name, choice in kernels.items():
            found += _of_kernel(name, arch, choice, everything)
        found.append(Job("add_splits", arch, kernels["dab"].large, 64, "*bf16"))
    return found


def _of_kernel(name: str, arch: int, choice: Choice, everything: bool) -> list[Job]:
    kernel = name.removesuffix("_dropped")
    # the width of the rank, whether backward, whether under dropout
    variants = {
        "gemm_lora": [(16, False, False), (32, False, False), (64, True, False)],
        "gemm_expand": [(16, False, False), (32, True, False), (64, False, False)],
        "gemm_expand_dropped": [(64, True, True)],
        "shrink": [(16, False, False), (64, True, False), (32, False, True)],
        "dab": [(16, False, False), (32, True, False), (64, True, True)],
    }[name]
    if everything:
        modes = dict.fromkeys(variant[1:] for variant in variants)
        variants = [(width, *mode) for mode in modes for width in (16, 32, 64)]
    found = [
        Job(kernel, arch, config, width, "*bf16", backward, dropped)
        for config in dict.fromkeys([choice.large, choice.small])
        for width, backward, dropped in variants
    ]
    widest, backward, dropped = max(variants)
    return [*found, Job(kernel, arch, choice.single, widest, "*fp32", backward, dropped)]


def compiled(job: Job) -> dict[str, object]:
    """What the compiler made of it; an error's text if it made nothing."""
    row: dict[str, object] = job._asdict() | {"config": job.config._asdict()}
    try:
        built = triton.compile(
            job.source(),
            target=GPUTarget("cuda", job.arch, 32),
            options={"num_warps": job.config.warps, "num_stages": job.config.stages},
        )
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _tool("--dump-resource-usage", cubin)
        listing = _tool("-sass", cubin)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    names = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", listing)
    return row | {
        "registers": int(numbers[1]),
        "stack": int(numbers[2]),
        "shared": built.metadata.shared,
        "instructions": len(names),
        "counts": {name: names.count(name) for name in MNEMONICS if name in names},
    }


def _tool(option: str, cubin: Path) -> str:
    command = [TOOLS / "cuobjdump", option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compiles them in two processes; with ``--all``, every variant."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(compiled, jobs("--all" in sys.argv), chunksize=2)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
