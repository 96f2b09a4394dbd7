"""The JSON that stands before the arrays of a file, by which a `.npy` stream could be mistaken for an index."""

from __future__ import annotations

from typing import Protocol

from ckpt_cli import limits

_ARRAY = b"\n\x93NUMPY"
"""The end of the JSON's line and the magic of an array, which no text in UTF-8 has in it."""


class _Readable(Protocol):
    """A file, or a part of one."""

    @property
    def size(self) -> int:
        """Bytes in it."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`."""


def preface_size(file: _Readable) -> int:
    """Return the bytes of JSON before the first array; 0 for a file that does not begin so."""
    head = file.read(0, min(8, file.size))
    if head.lstrip()[:1] != b"{" or not any(head[4:]):  # zeros: the length of a safetensors header of 123 bytes
        return 0
    return file.read(0, min(limits.NPY_PREFACE, file.size)).find(_ARRAY) + 1
