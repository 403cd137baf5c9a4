"""Keeps the peers off the network."""

import os

# read by huggingface_hub when it is first imported, which is later than this
os.environ["HF_HUB_OFFLINE"] = "1"
