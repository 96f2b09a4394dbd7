"""Elements of a tensor whose bits differ from those of another one of the same shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

COUNT, PLACES, VALUES = "count", "places", "values"


class Changed:
    """Finds the elements of the second source that differ from those of the first."""

    def __init__(self, itemsize: int, what: str, wide: bool) -> None:
        """`what` is what is made of a piece: nothing, their places in the tensor, or their bytes.

        `wide` is True if places are int64, else they are int32.
        """
        self._itemsize = itemsize
        self._what = what
        self._wide = wide

    def at(self, begin: int) -> _ChangedAt:
        """Return what finds them from the element `begin` on."""
        return _ChangedAt(self._itemsize, self._what, self._wide, begin)


class _ChangedAt:
    """Finds the changed elements of one piece."""

    def __init__(self, itemsize: int, what: str, wide: bool, begin: int) -> None:
        self._itemsize = itemsize
        self._what = what
        self._wide = wide
        self._begin = begin

    def run(self, parts: Iterable[memoryview]) -> tuple[bytes, int]:
        """Return what is made of a piece, and the number of changed elements."""
        import numpy as np

        old, new = (np.array(np.frombuffer(data, np.uint8)).reshape(-1, self._itemsize) for data in parts)
        places: Array = np.flatnonzero(_words(old) != _words(new))
        if self._what == VALUES:
            return new[places].tobytes(), len(places)
        if self._what == PLACES:
            return (places + self._begin).astype("<i8" if self._wide else "<i4").tobytes(), len(places)
        return b"", len(places)


def _words(rows: Array) -> Array:
    """Return a number for each row of bytes that says whether rows are the same."""
    import numpy as np

    width = rows.shape[1]
    if width in (1, 2, 4, 8):
        return np.asarray(rows.view(f"u{width}")[:, 0])
    return np.asarray(rows.view(f"V{width}")[:, 0])
