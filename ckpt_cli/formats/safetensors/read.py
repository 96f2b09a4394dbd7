"""safetensors: a JSON header, then the bytes of every tensor without gaps.

The rules are those that the reference library (safetensors 0.8.0, src/tensor.rs) enforces when it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from math import isinf
from typing import TYPE_CHECKING, Any, NoReturn

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_SAFETENSORS, DType
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError
from ckpt_cli.files.source import ByteSource, Extent, SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Entry, PlainBytes, Storage, Tensor, contiguous_stride

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

NAME = "safetensors"

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


class Safetensors:
    """The container: each tensor is its own storage, at an offset from the end of the header."""

    def __init__(self, file: ByteSource, begin: int, number: int = 0) -> None:
        """Of a file, or of a part of file `number` of a container of several."""
        self.source = file
        self.number = number
        self.files: Sequence[SourceFile] = (file.whole,)
        self.begin = begin
        """The first byte after the header."""
        self.has_more = False
        """True if tensors may have fields in the header that mean nothing."""

    def add(self, name: str, offset: int, nbytes: int) -> Storage:
        """The storage of one tensor, `offset` bytes after the header."""
        return Storage(name, nbytes, "cpu", PlainBytes(self.source, self.begin + offset, self.number))

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """Return the extents of a range of a tensor."""
        return storage.extents(offset, nbytes)

    def seal(self, overlay: Overlay) -> None:
        """Nothing follows from changed bytes: the format has no checksums."""

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()


def read(file: SourceFile) -> Checkpoint:
    """Open a safetensors file: only its header is read."""
    container, tensors, metadata = read_part(file)
    entries = with_aliases(tensors, metadata)
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=container,
        version=f"safetensors, header of {container.begin} bytes",
        metadata=metadata,
        notes=_notes(container.begin - 8),
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
    )


def _notes(header: int) -> list[str]:
    """What there is to say of a header that was read because limits are raised."""
    most = limits.SAFETENSORS_WRITTEN
    return [f"its header has {header} bytes; the safetensors library reads {most} at most"] if header > most else []


def read_part(file: ByteSource, number: int = 0) -> tuple[Safetensors, list[Tensor], dict[str, str]]:
    """The container, tensors and metadata of a file, or of a part of file `number` of a container of several."""
    try:
        header, begin = _header(file)
        metadata = _metadata(header)
        container = Safetensors(file, begin, number)
        return container, _tensors(header, container, file.size - begin), metadata
    except CkptError as error:
        error.path = error.path or file.path
        raise


def _header(file: ByteSource) -> tuple[dict[str, Any], int]:
    """The parsed header and the first byte after it."""
    length = _length(file)
    raw = file.read(8, length)
    if raw[:1] != b"{":
        raise MalformedError("its header does not begin with a brace")
    cost = (2 if raw.isascii() else 8) * length + sum(raw.count(char) * nbytes for char, nbytes in _COSTS)
    if cost > limits.SAFETENSORS_PARSED:
        raise LimitError(f"its header of {length} bytes would take about {cost >> 20} MiB of memory")
    try:
        text = raw.decode("utf-8")
        del raw
        hooks: dict[str, Any] = {"parse_int": _integer} if "-0" in text else {}  # a hook costs time for each number
        header = json.loads(
            text, object_pairs_hook=_object, parse_float=_float, parse_constant=_refuse_constant, **hooks
        )
        if "\\u" in text:
            json.dumps(header, ensure_ascii=False).encode()  # raises for half a surrogate pair, as the reference does
    except RecursionError:
        raise MalformedError("its header nests too deeply") from None
    except ValueError as error:  # bad JSON, bad UTF-8, an integer of thousands of digits
        raise MalformedError(f"its header is not JSON: {error}") from None
    if type(header) is tuple:
        raise _lacks("dtype")
    return header, 8 + length


def _length(file: ByteSource) -> int:
    """The bytes of the header, which the file begins with."""
    if file.size < 8:
        raise TruncatedError(f"{file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > limits.SAFETENSORS_HEADER:
        problem = f"its header is said to have {length} bytes; {limits.SAFETENSORS_HEADER} is the most"
        raise LimitError(problem) if 8 + length <= file.size else MalformedError(problem)
    if 8 + length > file.size:
        raise TruncatedError(f"its header should have {length} bytes, the file has {file.size - 8} after its length")
    return length


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


def _tensors(header: dict[str, Any], container: Safetensors, nbytes: int) -> list[Tensor]:
    """The header's tensors in its order, their ranges checked to fill the file without gap or overlap."""
    found: list[Tensor] = []
    begins: list[int] = []
    lengths: list[int] = []
    layouts: dict[tuple[str, tuple[int, ...]], _Layout] = {}
    for name in list(header):
        if len(name) > limits.NAME_LENGTH:
            raise LimitError(f"it has a tensor whose name has {len(name)} characters")
        info = header.pop(name)  # popped, as a large header takes much memory
        if type(info) is not tuple:
            container.has_more = True
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
        storage = container.add(name, begin, layout.nbytes)
        found.append(Tensor(name, layout.dtype, layout.shape, layout.stride, storage))
    in_order = begins == list(accumulate(lengths, initial=0))[:-1]  # as writers list them: nothing to be sorted
    if not in_order:
        _require_no_gaps(zip(begins, lengths, [tensor.name for tensor in found], strict=True))
    position = sum(lengths)
    if position > nbytes:
        raise TruncatedError(f"its tensors need {position} bytes after the header, the file has {nbytes}")
    if position < nbytes:
        raise MalformedError(f"{nbytes - position} bytes follow its last tensor")
    return found


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
    in_torch, spelled_shape = _as_torch_spells(dtype, shape)
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


def _as_torch_spells(dtype: DType, shape: tuple[int, ...]) -> tuple[DType, tuple[int, ...]]:
    """F4 counts values, torch's float4_e2m1fn_x2 counts pairs: halve the last dimension where that can be."""
    if dtype.name == "float4_e2m1fn" and shape and shape[-1] % 2 == 0:
        return BY_NAME["float4_e2m1fn_x2"], (*shape[:-1], shape[-1] // 2)
    return dtype, shape


ORDER = "ckpt.order"
"""The key of our own in the metadata that says at which places among all names the aliases stood: {name: place}."""


def order_text(names: Sequence[str], aliases: Mapping[str, str]) -> str:
    """Return the content of `ORDER` for names in their order, some of which are aliases."""
    return json.dumps({name: place for place, name in enumerate(names) if name in aliases}, ensure_ascii=False)


def renamed_order(text: str, names: Mapping[str, str], aliases: set[str]) -> str:
    """The same once names are others: of those that are aliases still, by their old names."""
    places = _places(text)
    return json.dumps({names.get(name, name): places[name] for name in places if name in aliases}, ensure_ascii=False)


def _places(text: str) -> dict[str, int]:
    """The places that `ORDER` says; none where it does not read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: place for name, place in found.items() if type(place) is int and place >= 0}


def with_aliases(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
    """The tensors and the dropped names of tied ones, which `save_model` notes in the metadata as {dropped: kept}.

    Where we wrote the file, each is at the place that it had; else all come last.
    """
    if not metadata:
        return list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors if isinstance(tensor, Tensor)}
    aliases = {
        dropped: replace(by_name[kept], name=dropped, alias_of=kept)
        for dropped, kept in metadata.items()
        if kept in by_name and dropped not in by_name
    }
    places = _places(metadata[ORDER]) if ORDER in metadata and aliases else {}
    placed = sorted((place, name) for name, place in places.items() if name in aliases)
    found: list[Entry] = []
    rest = iter(tensors)
    for place, name in placed:
        found.extend(islice(rest, max(place - len(found), 0)))
        found.append(aliases.pop(name))
    return [*found, *rest, *aliases.values()]


def repeated_names(file: SourceFile) -> list[str]:
    """The names that stand in the header of a sound file more than once; readers take the last."""
    length = int.from_bytes(file.read(0, 8), "little")
    from collections import Counter

    repeated: list[str] = []

    def noting(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and all(isinstance(value, dict) for value in made.values()):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    json.loads(file.read(8, length), object_pairs_hook=noting)
    return repeated
