"""Files as torch writes and loads them, and a mark for tests of both its formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def saved(path: Path, value: Any, *, is_zip: bool = True) -> Path:
    """A file that torch writes."""
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def load(path: Path) -> Any:
    """What torch makes of it."""
    return torch.load(path, weights_only=False)


FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
