"""Arrays of bytes, which may be a pickle: those of safetensors and of numpy, and numpy's arrays of objects.

What unpickles a tensor's bytes keeps them as uint8, as torch.distributed does, or as wider integers of these values.
Only integers are looked at: they are few in an ordinary checkpoint, and each costs a read; of files elsewhere, only
those of one byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError
from ckpt_cli.files.at_once import is_elsewhere
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.files.source import ByteSource, Window
from ckpt_cli.formats.numpy.npy import HEAD as NPY_HEAD
from ckpt_cli.formats.numpy.npy import PICKLED, Header, header_size, parse_header, text_in
from ckpt_cli.formats.signatures import preface_size
from ckpt_cli.scanner.streams import Found, Inner, Oddity, outside, streams, trailing

Walk = Iterator[Found | Oddity | Inner]

_BYTES = re.compile(rb'"dtype"\s{0,64}:\s{0,64}"(?:[UI](?:8|16|32|64)|BOOL|F8_\w{1,16})"')

_SMALLEST = 16
"""Bytes in which a pickle that does anything has room."""

_NPY_HEADER = 1 << 20
"""Bytes of an array's header that are looked at."""

_TEXT = 1 << 20
"""Characters of an array of text that are looked at."""


def walk_safetensors(source: ByteSource, where: str, depth: int, header: bytes | memoryview) -> Iterator[Inner]:
    """The tensors of bytes of a safetensors file that its loaders accept; `header` is what it begins with."""
    if not _BYTES.search(header):
        return
    from ckpt_cli.formats.safetensors.header import read_header

    try:
        tensors = read_header(source).tensors
    except FormatError:
        return  # no loader takes it
    wide = not is_elsewhere(source.whole)
    for tensor in tensors:
        bytes_ = tensor.dtype.bits == 8 or (wide and tensor.dtype.category in ("int", "uint"))
        if bytes_ and tensor.storage is not None and tensor.nbytes >= _SMALLEST:
            for extent in tensor.storage.extents(0, tensor.nbytes):
                part = Window(extent.file, extent.offset, extent.nbytes)
                yield Inner(part, f"{where} ({tensor.name})", depth + 1, numbers=True)


def data_elsewhere(source: ByteSource, where: str, budget: ScanBudget) -> Iterator[Oddity]:
    """The files that the tensors of an ONNX model are read from, if they are not in its folder (onnx.proto)."""
    data = source.view(0, max(min(source.size, limits.SCAN_BYTES - budget.searched), 0))
    budget.searched += len(data)
    paths = {bytes(data[match.end() : match.end() + match[1][0]]) for match in _LOCATION.finditer(data)}
    for path in sorted(paths)[:_LOCATIONS]:
        yield from outside(path.decode("utf-8", "replace"), where, "a file that its tensors are read from")


_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")
_LOCATIONS = 100


def walk_npy(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Arrays one after another; one of objects is a pickle after a header (numpy/lib/format.py `read_array`)."""
    position = preface_size(source)
    header = _array_header(source, position)
    for _number in range(limits.NPY_ARRAYS):
        if header is None or header.itemsize is None or header.itemsize == PICKLED:
            break
        yield from _elements(source, position + header.nbytes, header, where, depth)
        position += header.nbytes + header.nbytes_of_elements
        header = _array_header(source, position)
    if position and header is None and position < source.size:
        yield from trailing(source.view(position, source.size - position), 0, where, budget)
    elif position < source.size:
        yield from _objects(Window(source, position, source.size - position), where, budget)


def _array_header(source: ByteSource, position: int) -> Header | None:
    """The header of the array that begins at a byte; None where none does."""
    try:
        size = header_size(source.read(position, min(NPY_HEAD, max(source.size - position, 0))))
        return parse_header(source.read(position, size), "array") if position + size <= source.size else None
    except FormatError:
        return None


def _elements(source: ByteSource, begin: int, header: Header, where: str, depth: int) -> Iterator[Inner]:
    """The elements of an array of integers, bytes or text, where they may be a pickle."""
    nbytes = min(header.nbytes_of_elements, max(source.size - begin, 0))
    if nbytes < _SMALLEST:
        return
    kind = header.code.lstrip("<>|=")[:1]
    if header.itemsize == 1 or kind in "SaViu":
        yield Inner(Window(source, begin, nbytes), where, depth + 1, numbers=True)
    elif kind == "U":
        wide = bytes(source.view(begin, min(nbytes, 4 * _TEXT) // 4 * 4))
        text = wide.decode("utf-32-be" if header.big_endian else "utf-32-le", "replace").replace("\0", "")
        yield Inner(MemorySource(text.encode("utf-8", "replace")), where, depth + 1, numbers=True)


def _objects(source: ByteSource, where: str, budget: ScanBudget) -> Walk:
    """The pickle of an array of objects, or of one whose header is not what numpy writes."""
    first, length = text_in(source.read(0, min(NPY_HEAD, source.size)))
    begin = first + length
    text = source.read(first, min(length, _NPY_HEADER, source.size - first)) if source.size > first else b""
    if begin < source.size and (b"O" in text or b"object" in text or b"\\" in text or length > _NPY_HEADER):
        yield from streams(Window(source, begin, source.size - begin), where, budget, sure=False)
