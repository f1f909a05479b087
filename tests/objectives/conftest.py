"""Lets these tests import the reference libraries through tests/models/timm_reference.py, and make small shards."""

import sys
from pathlib import Path

for folder in ("models", "data"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
