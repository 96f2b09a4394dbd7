"""The budget of one scan: a limit on opcodes, objects and bytes that all of its pickles and files share."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from ckpt_cli import limits


@dataclass(slots=True)
class ScanBudget:
    """The limits and counts of one scan, over all files, zips and pickles that it reads."""

    opcodes: int = limits.SCAN_OPCODES
    """Pickle opcodes that may still be read; negative once they are spent."""
    blocks: int = field(default_factory=lambda: sys.getallocatedblocks() + 2 * limits.PICKLE_BLOCKS)
    """Blocks of memory that the interpreter may have allocated while a pickle is traced."""
    tries: int = limits.SCAN_TRIES
    """Places that may still be tried for a hidden pickle."""
    searched: int = 0
    """Bytes searched for hidden pickles."""
    inflated: int = 0
    """Bytes inflated."""
    files: int = 0
    """Files, zips and members opened."""
