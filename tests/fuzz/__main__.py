"""Runs the fuzzer: ``python -m tests.fuzz --files 20000``, one number again with ``--only``."""

import argparse
import collections
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.fuzz.corpus import specimens
from tests.fuzz.law import Fuzzer, LawError, in_processes

_PATIENCE = 60.0  # seconds of silence, after which a process hangs


def main() -> int:
    """Damages files and loads them; the exit status is 1 where one broke the law."""
    parser = argparse.ArgumentParser(description="Load damaged files.")
    parser.add_argument("--files", type=int, default=20_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    parser.add_argument("--only", type=int, help="one number, with its traceback")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=30.0, help="after which to stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(specimens(), Path(folder))
        if given.only is not None:
            print(*fuzzer.try_one(given.only))
            return 0

        def work(number: int) -> str:
            try:
                return "\t".join(fuzzer.try_one(number))
            except LawError as error:
                where = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
                said = f"{error!a}"[:400]
                return f"BROKEN\t{said} ({Path(where.filename).name}:{where.lineno})"

        return _tell(given, work)


def _tell(given: argparse.Namespace, work: Callable[[int], str]) -> int:
    """Prints what becomes of the files as they are tried; the exit status."""
    start = time.monotonic()
    outcomes, seen = collections.Counter[str](), collections.Counter[str]()
    broken = []
    numbers = range(given.first, given.first + given.files)
    for n, (number, answer) in enumerate(in_processes(numbers, given.jobs, work, _PATIENCE), 1):
        first, _, second = answer.partition("\t")
        if first in ("BROKEN", "died"):
            broken.append(number)
            print(f"broken: --only {number}  {second or 'the process died or hung'}", flush=True)
        else:
            outcomes[second] += 1
            seen[first] += 1
        if n % 500 == 0:
            print(
                f"{n:,} files, {time.monotonic() - start:.0f} s, {len(broken)} broken", flush=True
            )
        if time.monotonic() - start > given.minutes * 60:
            print(f"stopped after {given.minutes:g} minutes")
            break
    told = ", ".join(f"{count:,} {what}" for what, count in outcomes.most_common())
    print(
        f"{sum(outcomes.values()):,} files of {len(seen)} specimens: {told}; {len(broken)} broken"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
