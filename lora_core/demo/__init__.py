"""The story of style fine-tuning, told on the shipped digit model: `lora-core demo`."""

from lora_core.demo.story import DemoError, Settings, tell

__all__ = ["DemoError", "Settings", "tell"]
