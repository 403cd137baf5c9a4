"""``python -m lora_core``: the command line."""

import os
import sys

from lora_core._cli import main
from lora_core._cli.answers import INTERRUPTED

if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        # one that came amid `exec` would make Python end by the signal, though it was caught
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
