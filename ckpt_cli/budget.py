"""The budget of one request, a command or a call of the Python API: what it still may read, inflate and compare.

A small file can ask for work without end: views repeat and share its bytes, compressed records inflate, many names are
at one place. Everything that such a file could multiply is counted here and meets a limit (`limits.py`). The counts of
a request are its own, so that an open checkpoint answers any number of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ckpt_cli import limits
from ckpt_cli.errors import LimitError

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
    """What one request still may spend. Every method but `allow_pairs` raises LimitError once that is too little."""

    def __init__(self, files: Sequence[Any] = (), *, as_text: bool = False) -> None:
        """Of a request for values in files of some `size`; values that become text cost more."""
        self._repeated = limits.REPEATED_AS_TEXT if as_text else limits.REPEATED
        more = limits.READ_AGAIN_AS_TEXT if as_text else limits.READ_AGAIN
        self._bytes = limits.READ_TIMES * sum(file.size for file in files) + more
        self._constituents = limits.CONSTITUENTS
        self._pairs = limits.VIEW_PAIRS
        self._inflated = limits.INFLATED_IN_ALL
        self._items: dict[object, int] = {}

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
        self._items[owner] = self._items.get(owner, 0) + cost
        if self._items[owner] > most:
            raise LimitError("its items are far more than its files have: many are said to be at one place")


_READ_WHOLE = {"quantized": ("scales", "zero_points"), "sparse_coo": ("indices",)}
"""By layout, the parts that are read whole."""


def current() -> Budget:
    """Return the budget of the request that this thread works for."""
    found: Budget | None = getattr(_LOCAL, "budget", None)
    return found if found is not None else Budget().begun()


def require_bounded(tensor: Any, region: _Region, most: int = limits.REPEATED) -> None:
    """Raise LimitError for a region that repeats few stored elements as more than `most`, as expanded views do.

    Everything that goes through the elements of a view one by one, or copies them, asks this first.
    """
    low, high = region.span()
    if region.numel > max(high - low, most):
        stored = f"{high - low:,} {'element' if high - low == 1 else 'elements'}"
        raise LimitError(f"tensor {tensor.name!r} repeats {stored} as {region.numel:,}, too many to go through")
