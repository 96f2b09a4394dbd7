"""Where torch expects the storages of a file that it wrote itself, without looking at their headers.

With a `.format_version` record, torch computes offsets for `map_location="meta"`, for fake tensors and under
`torch.utils.serialization.config.load.calculate_storage_offsets` (torch/serialization.py `_get_offset`); the
arithmetic is that of caffe2/serialize/inline_container.cc `getPadding` and `getRecordOffsetNoRead`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_FULL = 0xFFFFFFFF
_LOCAL = 30
"""Bytes of a local header without name and extra."""

_DESCRIPTOR, _DESCRIPTOR64 = 16, 24


def computed_offsets(
    first: int, header: int, storages: Iterable[tuple[str, int]], alignment: int
) -> Iterator[tuple[str, int]]:
    """Each record's name with the first byte of its data as torch computes it.

    `storages` are names of records and their bytes in the order of the pickle; the data of the first is at byte
    `first`, its local header at byte `header`.
    """
    cursor = first
    for number, (name, nbytes) in enumerate(storages):
        begin = header if number == 0 else cursor
        data = first if number == 0 else _data_after(cursor, len(name.encode()), nbytes, alignment)
        yield name, data
        cursor = data + nbytes
        if nbytes:
            cursor += _DESCRIPTOR64 if begin >= _FULL or nbytes >= _FULL else _DESCRIPTOR


def _data_after(cursor: int, name: int, nbytes: int, alignment: int) -> int:
    """The first byte of the data of a record whose local header begins at `cursor`."""
    start = cursor + _LOCAL + name + 4
    if nbytes >= _FULL or cursor >= _FULL:
        start += 4 + 16 * (nbytes >= _FULL) + 8 * (cursor >= _FULL)
    return -(-start // alignment) * alignment
