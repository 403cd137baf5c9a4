"""Leaves out the program that cannot be imported where triton is not."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["compiled.py"]
