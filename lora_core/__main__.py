"""``python -m lora_core``: the command line."""

import sys

from lora_core._cli import main

if __name__ == "__main__":
    sys.exit(main())
