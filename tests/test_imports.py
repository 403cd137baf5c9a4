"""What importing the library costs, and what it brings along."""

import json
import subprocess
import sys

import pytest

import lora_core

OTHER_DOORS = {"models", "testing"}
CORE = [name for name in lora_core.__all__ if name not in OTHER_DOORS]
ALLOWED = {"lora_core", "safetensors"}


def python(code: str) -> list[str]:
    """Runs `code` in a fresh interpreter and reads the list it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def arrivals(touch: str) -> set[str]:
    """Top-level packages outside the standard library that `touch` adds to what torch imports."""
    code = f"""
import json, sys, torch
before = set(sys.modules)
import lora_core
{touch}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
"""
    return set(python(code))


def test_importing_the_library_imports_no_torch():
    code = """
import json, sys
before = set(sys.modules)
import lora_core
dir(lora_core), lora_core.__version__
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    found = python(code)
    assert "lora_core" in found
    outside = {name.partition(".")[0] for name in found} - {"lora_core"}
    assert outside <= set(sys.stdlib_module_names)


def test_every_core_name_brings_only_safetensors_along():
    touch = f"for name in {CORE!r}: getattr(lora_core, name)"
    # parts of torch that it loads on first use are its own affair
    assert arrivals(touch) - {"torch"} <= ALLOWED


def test_first_use_of_a_name_draws_no_random_number():
    code = """
import json, torch
torch.manual_seed(0)
before = torch.get_rng_state()
import lora_core
names = [name for name in lora_core.__all__ if getattr(lora_core, name) is not None]
print(json.dumps([len(names) > 20, torch.equal(before, torch.get_rng_state())]))
"""
    assert python(code) == [True, True]


def test_the_models_bring_only_einops_along_besides():
    assert arrivals("lora_core.models") - {"torch"} <= {*ALLOWED, "einops"}


def test_the_core_works_when_the_models_are_gone():
    code = f"""
import json, sys
sys.modules["lora_core.models"] = None
sys.modules["einops"] = None
import lora_core
print(json.dumps([name for name in {CORE!r} if getattr(lora_core, name, None) is None]))
"""
    assert python(code) == []


@pytest.mark.parametrize("name", CORE)
def test_every_public_name_is_there_and_found_by_dir(name):
    assert getattr(lora_core, name) is not None
    assert name in dir(lora_core)


def test_public_names_are_unique_and_sorted_within_the_rooms():
    assert len(lora_core.__all__) == len(set(lora_core.__all__))
    assert {"LoRALinear", "inject", "eject", "plan", "merge", "unmerge", "save", "load"} <= set(
        CORE
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="^module 'lora_core' has no attribute 'nothing'$"):
        lora_core.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        ("ConfigError", ValueError),
        ("TargetError", LookupError),
        ("UnsupportedLayerError", TypeError),
        ("AdapterError", LookupError),
        ("MergeError", RuntimeError),
        ("MismatchError", ValueError),
        ("CorruptFileError", ValueError),
    ],
)
def test_every_error_is_ours_and_the_fitting_built_in(error, builtin):
    kind = getattr(lora_core, error)
    assert issubclass(kind, lora_core.LoRAError)
    assert issubclass(kind, builtin)
