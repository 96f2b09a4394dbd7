"""Memory that long parts are received into, and that is used again: to get it takes longer than to fill it."""

from __future__ import annotations

Block = bytearray

_SPARE = 4
"""Blocks that are kept to be used again, at most."""


class Blocks:
    """Blocks of memory of one size, those that nobody uses any more among them."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        """Bytes of each block."""
        self._spare: list[Block] = []

    def take(self, nbytes: int) -> Block:
        """Return memory of at least some bytes, at most those of a block, that nobody uses."""
        if nbytes <= self._nbytes // 2:
            return bytearray(nbytes)
        for number, block in enumerate(self._spare):
            if _is_free(block):
                return self._spare.pop(number)
        return bytearray(self._nbytes)

    def give(self, block: Block) -> None:
        """Take memory back, which may still be read for a while."""
        if len(block) == self._nbytes:
            self._spare = [*self._spare[1 - _SPARE :], block]


def _is_free(block: Block) -> bool:
    """True if nobody has a view of a block: Python changes the length of no other one."""
    try:
        block.append(block.pop())
    except BufferError:
        return False
    return True
