"""The header of a safetensors file: parsed, checked, and turned into tensors over the bytes that follow it.

The rules are those that the reference library (safetensors 0.8.0, src/tensor.rs) enforces when it reads. A long header
that is written as writers do, without white space and in the order of the bytes, is read by one regular expression,
which takes a quarter of the time that a JSON parser takes. Whatever it does not take, sound or not, goes to the parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import accumulate
from math import isinf
from typing import Any, NoReturn

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_SAFETENSORS, DType
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import ByteSource
from ckpt_cli.model.checkpoint import PlainBytes, Storage, Tensor, contiguous_stride

FIELDS = ("dtype", "shape", "data_offsets")

_Plain = tuple[Any, tuple[int, ...], int, int]
"""The fields of a tensor, where there are no others: dtype, shape, and a range of the data."""

_INTEGERS = frozenset([int])

_DEEPEST = 126
"""Levels that a field of a tensor may have: the reference reads 127, two of which are around it."""

_TOO_LARGE = 1 << 1024
"""An integer that is out of range for the reference reader, which takes a large integer for a float."""

_COSTS = ((b"{", 300), (b"[", 64), (b",", 40), (b'"', 28))
"""Bytes of memory that what begins, goes on or ends with a character of a header takes when parsed."""

_LONG = 16_384
"""Characters from which on a header is worth the time that the regular expression takes to be compiled."""

_NOTHING_LEFT = "fetch or copy it again: without its header no tensor has a name"


@dataclass(frozen=True, slots=True)
class Header:
    """The content of a header."""

    nbytes: int
    """Bytes before the data: those of the header and its length."""
    tensors: list[Tensor]
    metadata: dict[str, str]
    has_more: bool = False
    """True if tensors may have fields that mean nothing."""


def read_header(file: ByteSource) -> Header:
    """Read the header of a file, or of a part of one.

    Raises MalformedError, TruncatedError or LimitError for a header that is not sound or does not fit the file.
    """
    text, begin = _text(file)
    data = _Data(file, begin)
    header = _read_plain(text, data) if len(text) > _LONG else None
    if header is not None:
        return header
    parsed = _json(text)
    del text  # before the tensors are made, for the memory that it takes
    return _checked(parsed, data)


class _Data:
    """The bytes that follow a header."""

    def __init__(self, file: ByteSource, begin: int) -> None:
        self.file = file
        self.begin = begin

    @property
    def nbytes(self) -> int:
        """Bytes to the end of the file."""
        return self.file.size - self.begin


def _text(file: ByteSource) -> tuple[str, int]:
    """Return the text of the header and the first byte after it."""
    length = _length(file)
    raw = file.read(8, length)
    if raw[:1] != b"{":
        raise MalformedError("its header does not begin with a brace")
    cost = (2 if raw.isascii() else 8) * length + sum(raw.count(char) * nbytes for char, nbytes in _COSTS)
    if cost > limits.SAFETENSORS_PARSED:
        raise LimitError(f"its header of {length} bytes would take about {cost >> 20} MiB of memory")
    try:
        return raw.decode("utf-8"), 8 + length
    except ValueError as error:
        raise _not_json(error) from None


def _length(file: ByteSource) -> int:
    """The bytes of the header, which the file begins with."""
    if file.size < 8:
        raise TruncatedError(f"{file.size} bytes are too few for a safetensors file", hint=_NOTHING_LEFT)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > limits.SAFETENSORS_HEADER:
        problem = f"its header is said to have {length} bytes; {limits.SAFETENSORS_HEADER} is the most"
        raise LimitError(problem) if 8 + length <= file.size else MalformedError(problem)
    if 8 + length > file.size:
        raise TruncatedError(
            f"its header should have {length} bytes, the file has {file.size - 8} after its length", hint=_NOTHING_LEFT
        )
    return length


def _not_json(error: ValueError) -> MalformedError:
    return MalformedError(f"its header is not JSON: {error}")


# --- read by one expression ------------------------------------------------------------------------------------------

_PLAIN = (
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+","shape":\[[0-9,]*)\],'
    r'"data_offsets":\[(0|[1-9][0-9]{0,18}),(0|[1-9][0-9]{0,18})\]\}(?:,(?=")|\}\Z)'
)
"""An entry of a header without white space and escapes: its name, its dtype and shape, and its range of the data."""


def _read_plain(text: str, data: _Data) -> Header | None:
    """Read a header whose entries are all plain and stand in the order of their bytes; None for any other."""
    text = text.rstrip(" \t\n\r")
    try:
        metadata, at = _metadata_first(text)
        if "\\u" in text or text.find('"__metadata__"', at) >= 0:
            return None
        tensors = _plain_tensors(text, at, data)
    except (CkptError, ValueError, RecursionError):
        return None
    return None if tensors is None else Header(data.begin, tensors, metadata)


def _metadata_first(text: str) -> tuple[dict[str, str], int]:
    """Return the metadata, where a header begins with it, and the place of the first tensor."""
    key = '{"__metadata__":'
    if not text.startswith(key):
        return {}, 1
    metadata, end = json.JSONDecoder().raw_decode(text, len(key))
    if text[end : end + 1] != ",":
        raise ValueError("no tensor follows the metadata")
    return _metadata({"__metadata__": metadata}), end + 1


def _plain_tensors(text: str, at: int, data: _Data) -> list[Tensor] | None:
    """Return the tensors of the entries from a place on; None where one is not plain or not where it should be."""
    found: list[Tensor] = []
    layouts: dict[str, _Layout] = {}
    file, offset = data.file, data.begin
    last = "0"
    for match in re.compile(_PLAIN).finditer(text, at):
        name, kind, first, end = match.groups()
        layout = layouts.get(kind) or layouts.setdefault(kind, _layout_of(kind))
        storage = Storage(name, layout.nbytes, "cpu", PlainBytes(file, offset))
        found.append(Tensor(name, layout.dtype, layout.shape, layout.stride, storage))
        offset += layout.nbytes
        if first != last or int(end) != offset - data.begin or match.start() != at:
            return None
        at, last = match.end(), end
    names = [tensor.name for tensor in found]
    if not names or len(set(names)) < len(names) or max(map(len, names)) > limits.NAME_LENGTH:
        return None
    return found if at == len(text) and offset == data.file.size else None


def _layout_of(kind: str) -> _Layout:
    """Return the layout that an entry gives as `F32","shape":[2,3`."""
    spelled, _, sizes = kind.partition('","shape":[')
    return _layout("", spelled, tuple(json.loads(f"[{sizes}]")))


# --- read by the JSON parser -----------------------------------------------------------------------------------------


def _checked(header: dict[str, Any], data: _Data) -> Header:
    """Return the content of a parsed header."""
    metadata = _metadata(header)
    tensors, has_more = _tensors(header, data)
    return Header(data.begin, tensors, metadata, has_more)


def _json(text: str) -> dict[str, Any]:
    """Return the parsed header."""
    try:
        hooks: dict[str, Any] = {"parse_int": _integer} if "-0" in text else {}  # a hook costs time for each number
        header = json.loads(
            text, object_pairs_hook=_object, parse_float=_float, parse_constant=_refuse_constant, **hooks
        )
        if "\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # raises for half a surrogate pair, as the reference does
    except RecursionError:
        raise MalformedError("its header nests too deeply") from None
    except ValueError as error:  # bad JSON, an integer of thousands of digits
        raise _not_json(error) from None
    if type(header) is tuple:
        raise _lacks("dtype")
    return header  # type: ignore[no-any-return]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Plain:
    """An object, as a dict; what nearly every tensor has at once as less, for a header has 100,000 of them.

    Of names that are there twice the last counts, but fields may not be there twice.
    """
    if len(pairs) == 3:
        (first, dtype), (second, shape), (third, offsets) = pairs
        if (first, second, third) == FIELDS and type(offsets) is list and len(offsets) == 2 and type(shape) is list:
            begin, end = offsets
            if type(begin) is type(end) is int and _INTEGERS.issuperset(map(type, shape)):
                return dtype, tuple(shape), begin, end
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next((key for key in (*FIELDS, "__metadata__") if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice")
    return made


def _float(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"{text} is out of range")
    return number


def _integer(text: str) -> float | int:
    """An integer, but for -0, which the reference takes for a float."""
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError("its __metadata__ is not a map of strings")
    if sum(64 + len(key) + len(value) for key, value in metadata.items()) > limits.METADATA:
        raise LimitError(f"its __metadata__ of {len(metadata)} entries is far larger than that of a checkpoint")
    return metadata


@dataclass(frozen=True, slots=True)
class _Layout:
    """The facts of a dtype and a shape of the header, found once for all tensors that have both."""

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


def _tensors(header: dict[str, Any], data: _Data) -> tuple[list[Tensor], bool]:
    """Return the header's tensors in its order, and whether they may have fields that mean nothing.

    Their ranges are checked to fill the file without gap or overlap.
    """
    has_more = False
    found: list[Tensor] = []
    begins: list[int] = []
    lengths: list[int] = []
    layouts: dict[tuple[str, tuple[int, ...]], _Layout] = {}
    for name in list(header):
        if len(name) > limits.NAME_LENGTH:
            raise LimitError(f"it has a tensor whose name has {len(name)} characters")
        info = header.pop(name)  # popped, as a large header takes much memory
        if type(info) is not tuple:
            has_more = True
            info = _fields(name, info)
        spelled, shape, begin, end = info
        layout = layouts.get((spelled, shape)) if type(spelled) is str else None
        if layout is None:
            layout = layouts[spelled, shape] = _layout(name, spelled, shape)
        if not 0 <= begin <= end < 1 << 64:
            raise _no_counts(name)
        if end - begin != layout.nbytes:
            raise MalformedError(
                f"tensor {name!r}: {spelled} {shape} takes {layout.nbytes} bytes, "
                f"its data_offsets {begin}–{end} hold {end - begin}"
            )
        begins.append(begin)
        lengths.append(layout.nbytes)
        storage = _storage(name, begin, layout.nbytes, data)
        found.append(Tensor(name, layout.dtype, layout.shape, layout.stride, storage))
    in_order = begins == list(accumulate(lengths, initial=0))[:-1]  # as writers list them: nothing to be sorted
    if not in_order:
        _require_no_gaps(zip(begins, lengths, [tensor.name for tensor in found], strict=True))
    position, nbytes = sum(lengths), data.nbytes
    if position > nbytes:
        raise TruncatedError(f"its tensors need {position} bytes after the header, the file has {nbytes}")
    if position < nbytes:
        raise MalformedError(f"{nbytes - position} bytes follow its last tensor")
    return found, has_more


def _storage(name: str, begin: int, nbytes: int, data: _Data) -> Storage:
    """Return the storage of a tensor that begins at byte `begin` of the data."""
    return Storage(name, nbytes, "cpu", PlainBytes(data.file, data.begin + begin))


def _require_no_gaps(ranges: Iterable[tuple[int, int, str]]) -> None:
    """Raise where tensors, each with its first byte, its bytes and its name, do not follow one another from byte 0."""
    position = 0
    for begin, nbytes, name in sorted(ranges):
        if begin != position:
            fault = "a gap before" if begin > position else "an overlap at"
            raise MalformedError(f"there is {fault} tensor {name!r}: it begins at byte {begin}, {position} was due")
        position += nbytes


def _layout(name: str, spelled: Any, shape: tuple[int, ...]) -> _Layout:
    """The layout of a tensor of some dtype and shape, each checked to be one that there can be."""
    dtype = BY_SAFETENSORS.get(spelled) if isinstance(spelled, str) else None
    if dtype is None:
        given = spelled[:20] if isinstance(spelled, str) else type(spelled).__name__
        raise MalformedError(f"tensor {name!r} has dtype {given!r}, which safetensors does not know")
    if not all(0 <= size < 1 << 64 for size in shape):
        raise _no_counts(name)
    if len(shape) > limits.DIMENSIONS:
        raise MalformedError(f"tensor {name!r} has {len(shape)} dimensions; {limits.DIMENSIONS} is the most")
    count = _elements(name, dtype, shape)
    if count * dtype.bits % 8:
        raise MalformedError(f"tensor {name!r}: {count} elements of {dtype.bits} bits are not whole bytes")
    in_torch, spelled_shape = as_torch_spells(dtype, shape)
    return _Layout(in_torch, spelled_shape, contiguous_stride(spelled_shape), count * dtype.bits // 8)


def _lacks(name: str) -> MalformedError:
    return MalformedError(f"tensor {name!r} lacks dtype, shape or data_offsets")


def _no_counts(name: str) -> MalformedError:
    return MalformedError(f"tensor {name!r} has a shape or data_offsets that are not valid counts")


def _elements(name: str, dtype: DType, shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape.

    Raises MalformedError where 64 bits cannot count them one dimension after the other.
    """
    count = 1
    for size in shape:
        count *= size
        if count >= 1 << 64:
            raise MalformedError(f"tensor {name!r}: shape {shape} overflows")
    if count * dtype.bits >= 1 << 64:
        raise MalformedError(f"tensor {name!r}: shape {shape} overflows")
    return count


def _fields(name: str, info: Any) -> _Plain:
    """Return the fields of one tensor, checked to be there and of the right types."""
    if not isinstance(info, dict) or any(field not in info for field in FIELDS):
        raise _lacks(name)
    if len(info) > len(FIELDS):
        _check_unknown(name, info)
    shape, offsets = info["shape"], info["data_offsets"]
    if not _are_integers(shape) or not _are_integers(offsets) or len(offsets) != 2:
        raise _no_counts(name)
    return info["dtype"], tuple(shape), offsets[0], offsets[1]


def _check_unknown(name: str, info: dict[str, Any]) -> None:
    """Fields of no meaning may hold anything that the reference can read: so deep and no deeper."""
    level: list[Any] = [value for field, value in info.items() if field not in FIELDS]
    for _ in range(_DEEPEST):
        if any(isinstance(value, int) and abs(value) >= _TOO_LARGE for value in level):
            raise MalformedError(f"tensor {name!r} has a number that is out of range")
        lists = [
            value.values() if isinstance(value, dict) else value
            for value in level
            if isinstance(value, dict | list | tuple)
        ]
        level = [value for values in lists for value in values]
        if not lists:
            return
    raise MalformedError(f"tensor {name!r} has a field that nests too deeply")


def _are_integers(node: Any) -> bool:
    return isinstance(node, list) and _INTEGERS.issuperset(map(type, node))


def as_torch_spells(dtype: DType, shape: tuple[int, ...]) -> tuple[DType, tuple[int, ...]]:
    """F4 counts values, torch's float4_e2m1fn_x2 counts pairs: halve the last dimension where that can be."""
    if dtype.name == "float4_e2m1fn" and shape and shape[-1] % 2 == 0:
        return BY_NAME["float4_e2m1fn_x2"], (*shape[:-1], shape[-1] // 2)
    return dtype, shape
