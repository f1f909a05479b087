"""Lets these tests import the reference libraries through tests/models/timm_reference.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
