"""Runs the Python blocks of the Markdown pages as tests, and sets Hypothesis up."""

import hypothesis
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# shared machines stall: a slow example is no failure
hypothesis.settings.register_profile("lora_core", deadline=None, max_examples=50)
hypothesis.settings.load_profile("lora_core")

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md", "docs/**/*.md"]
).pytest()
