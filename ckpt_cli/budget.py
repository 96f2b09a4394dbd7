"""Budgets: what one request, the walk of one pickle and one scan may cost.

A small file can ask for work without end: views repeat and share its bytes, compressed records inflate, many names are
at one place. Everything that such a file could multiply is counted here and meets a limit (`limits.py`). A request is
a command or a call of the Python API; each has its own counts, so that an open checkpoint answers any number of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any, Protocol

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.facts import dataclass

_LOCAL = threading.local()


class _Region(Protocol):
    """Elements of a storage (`arrays/indexing.py`)."""

    @property
    def numel(self) -> int: ...
    def span(self) -> tuple[int, int]: ...


class _Opened(Protocol):
    """An open checkpoint, or a new one's source (`model/checkpoint.py`)."""

    @property
    def container(self) -> Any: ...


class Budget:
    """The work that one request may still spend.

    Every method but `allow_pairs` raises LimitError once that is too little.
    """

    def __init__(self, files: Sequence[Any] = (), *, as_text: bool = False) -> None:
        """Of a request for values in files of some `size`; values that become text cost more."""
        self._repeated = limits.REPEATED_AS_TEXT if as_text else limits.REPEATED
        more = limits.READ_AGAIN_AS_TEXT if as_text else limits.READ_AGAIN
        self._bytes = limits.READ_TIMES * sum(file.size for file in files) + more
        self._printed = limits.REPEATED_AS_TEXT + 2 * sum(file.size for file in files)
        self._constituents = limits.CONSTITUENTS
        self._pairs = limits.VIEW_PAIRS
        self._inflated = limits.INFLATED_IN_ALL
        self._spent: dict[tuple[object, str], int] = {}
        """The costs that owners count for purposes of their own."""

    @classmethod
    def of(cls, checkpoint: _Opened, *, as_text: bool = False) -> Budget:
        """Begin a request for values of an open checkpoint in this thread."""
        return cls(checkpoint.container.files, as_text=as_text).begun()

    def begun(self) -> Budget:
        """Make it the budget of what this thread reads from now on, whatever it belongs to."""
        _LOCAL.budget = self
        return self

    def read(self, tensor: Any, region: _Region) -> None:
        """Count every element of a region of a tensor."""
        require_bounded(tensor, region, self._repeated)
        self._bytes -= tensor.dtype.nbytes(region.numel)
        if self._bytes < 0:
            raise LimitError("its tensors, which share bytes or are compressed, add up to far more than the file has")

    def read_parts(self, tensor: Any, whole: Callable[[Any], _Region]) -> None:
        """Count the parts that are read whole before any element is known: scales, and the indices of sparse COO.

        `whole` gives all of a tensor as a region.
        """
        for part in tensor.parts:
            if part.name in _READ_WHOLE.get(tensor.layout, ()) and part.storage is not None:
                self.read(part, whole(part))

    def print(self, numel: int) -> None:
        """Count elements that are laid out as text."""
        self._printed -= numel
        if self._printed < 0:
            raise LimitError("its tensors, which share bytes, come to far more text than the file has bytes")

    def constituents(self, count: int) -> None:
        """Count constituents of nested tensors, each of which is gone through on its own."""
        self._constituents -= count
        if self._constituents < 0:
            raise LimitError("its nested tensors have too many constituents to go through")

    def allow_pairs(self, count: int) -> bool:
        """Count pairs of views that are compared exactly; return False if they are too many, so that spans decide."""
        if count > self._pairs:
            return False
        self._pairs -= count
        return True

    def inflate(self, nbytes: int, path: str = "") -> None:
        """Count bytes of the file `path` that are inflated or decoded."""
        self._inflated -= nbytes
        if self._inflated < 0:
            raise LimitError("it is compressed, and far more would be inflated than it has", path=path)

    def open_item(self, owner: object, cost: int, most: int) -> None:
        """Count the cost of opening an item of an `owner` whose items may cost `most` together."""
        if not self.affords((owner, "items"), cost, most):
            raise LimitError("its items are far more than its files have: many are said to be at one place")

    def affords(self, purpose: tuple[object, str], cost: int, most: int) -> bool:
        """Count a cost of an owner for some purpose; return False, and count nothing, beyond `most` in all."""
        spent = self._spent.get(purpose, 0) + cost
        if spent > most:
            return False
        self._spent[purpose] = spent
        return True


_READ_WHOLE = {"quantized": ("scales", "zero_points"), "sparse_coo": ("indices",)}
"""By layout, the parts that are read whole."""


def current() -> Budget:
    """Return the budget of the request that this thread works for; where it has not begun any, one for this call."""
    return getattr(_LOCAL, "budget", None) or Budget()


@contextmanager
def within_request() -> Iterator[None]:
    """Context manager: begin a request for what is done in it, unless this thread works for one already."""
    if getattr(_LOCAL, "budget", None) is not None:
        yield
        return
    Budget().begun()
    try:
        yield
    finally:
        _LOCAL.budget = None


def require_bounded(tensor: Any, region: _Region, most: int = limits.REPEATED) -> None:
    """Raise LimitError for a region that repeats few stored elements as more than `most`, as expanded views do.

    Everything that goes through the elements of a view one by one, or copies them, asks this first.
    """
    if region.numel <= most:
        return
    low, high = region.span()
    if region.numel > high - low:
        stored = f"{high - low:,} {'element' if high - low == 1 else 'elements'}"
        raise LimitError(f"tensor {tensor.name!r} repeats {stored} as {region.numel:,}, too many to go through")


_FEW = 1_000
"""Entries of a pickle whose memory is not worth a look."""


class WalkBudget:
    """The work and memory that the names of one pickle may take: shared nodes can be met more often than it has bytes.

    Every method raises LimitError when it is spent.
    """

    __slots__ = ("_blocks", "_characters", "_entries", "_steps")

    def __init__(self, nbytes: int) -> None:
        """Begin the walk of a pickle of `nbytes` bytes."""
        self._entries = limits.ENTRIES_FLOOR + nbytes // 3
        self._blocks: int | None = None
        self._characters = limits.NAME_BYTES
        self._steps = limits.WALK_STEPS + nbytes * limits.WALK_STEPS_PER_BYTE

    def steps(self, count: int) -> None:
        """Count work; a step is the time to look at one item, some 100 ns."""
        self._steps -= count
        if self._steps < 0:
            raise LimitError("it refers to the same containers over and over, which no checkpoint does")

    def name(self, name: str) -> None:
        """Count a name; one wide character makes every other one take four bytes."""
        self._characters -= len(name) if name.isascii() else 4 * len(name)
        if self._characters < 0:
            raise LimitError(f"its names take more than {limits.NAME_BYTES} bytes")

    def check(self, entries: int) -> None:
        """Compare what was made with what a file of that size needs; the memory, only where there are many entries.

        A look at that takes 0.2 ms in a process that holds much.
        """
        if entries > self._entries:
            raise LimitError(f"it opens up to more than {self._entries} names, far more than a file of its size needs")
        if entries <= _FEW:
            return
        blocks = sys.getallocatedblocks()
        if self._blocks is None:
            self._blocks = blocks + limits.ENTRY_BLOCKS
        elif blocks > self._blocks:
            raise LimitError("its names take far more memory than those of a checkpoint of its size need")


@dataclass(slots=True)
class ScanBudget:
    """The limits and counts of one scan, over all files, zips and pickles that it reads.

    `opened` makes room for the size of a file: a small one that unfolds to much more is cut short early.
    """

    opcodes: int = field(default_factory=lambda: min(limits.SCAN_OPCODES_FLOOR, limits.SCAN_OPCODES))
    """Pickle opcodes that may still be read; negative once they are spent."""
    blocks: int = field(default_factory=lambda: sys.getallocatedblocks() + limits.SCAN_BLOCKS_FLOOR)
    """Blocks of memory that the interpreter may have allocated while a pickle is traced."""
    records: int = field(default_factory=lambda: limits.SCAN_RECORDS_FLOOR)
    """Records of zip files that may still be looked at."""
    checksums: int = field(default_factory=lambda: limits.SCAN_CHECKSUMS)
    """Bytes of which a checksum may still be computed."""
    stored: int = field(default_factory=lambda: limits.SCAN_STORED_FLOOR)
    """Bytes of records of zip files, as they are stored, that may still be looked at."""
    tries: int = limits.SCAN_TRIES
    """Places that may still be tried for a hidden pickle."""
    searched: int = 0
    """Bytes searched for hidden pickles."""
    inflated: int = 0
    """Bytes inflated."""
    held: int = 0
    """Bytes of these that are in memory now."""
    files: int = 0
    """Files, zips and members opened."""
    _held: int = field(default_factory=lambda: limits.SCAN_HELD)
    _opcodes: int = field(default_factory=lambda: max(limits.SCAN_OPCODES - limits.SCAN_OPCODES_FLOOR, 0))
    _blocks: int = field(default_factory=lambda: max(2 * limits.PICKLE_BLOCKS - limits.SCAN_BLOCKS_FLOOR, 0))

    def opened(self, nbytes: int) -> None:
        """Make room for the pickles and records of a file of `nbytes` bytes."""
        opcodes, blocks = min(4 * nbytes, self._opcodes), min(nbytes // 4, self._blocks)
        self._opcodes -= opcodes
        self._blocks -= blocks
        self.opcodes += opcodes
        self.blocks += blocks
        self.records += nbytes // 46
        self.stored += 4 * nbytes
        self._held = min(self._held + 4 * nbytes, limits.SCAN_INFLATED)

    def room(self) -> int:
        """Return the number of bytes that may be inflated now."""
        return max(min(limits.SCAN_INFLATED - self.inflated, self._held - self.held), 0)
