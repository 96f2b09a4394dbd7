"""The budget of work and memory for the names of one pickle."""

from __future__ import annotations

import sys

from ckpt_cli import limits
from ckpt_cli.errors import LimitError


class Budget:
    """What is left to spend while a graph is walked: nodes that are shared can be met more often than there are bytes.

    Every method raises LimitError when it is spent.
    """

    __slots__ = ("_blocks", "_characters", "_entries", "_steps")

    def __init__(self, nbytes: int) -> None:
        """For a pickle of `nbytes` bytes."""
        self._entries = limits.ENTRIES_FLOOR + nbytes // 3
        self._blocks = sys.getallocatedblocks() + limits.ENTRY_BLOCKS
        self._characters = limits.NAME_BYTES
        self._steps = limits.WALK_STEPS + nbytes * limits.WALK_STEPS_PER_BYTE

    def steps(self, count: int) -> None:
        """Pay for work; a step is what it takes to look at one item, some 100 ns."""
        self._steps -= count
        if self._steps < 0:
            raise LimitError("it refers to the same containers over and over, which no checkpoint does")

    def name(self, name: str) -> None:
        """Pay for a name; one wide character makes every other one take four bytes."""
        self._characters -= len(name) if name.isascii() else 4 * len(name)
        if self._characters < 0:
            raise LimitError(f"its names take more than {limits.NAME_BYTES} bytes")

    def check(self, entries: int) -> None:
        """Compare what was made with what a file of that size needs."""
        if entries > self._entries:
            raise LimitError(f"it opens up to more than {self._entries} names, far more than a file of its size needs")
        if sys.getallocatedblocks() > self._blocks:
            raise LimitError("its names take far more memory than those of a checkpoint of its size need")
