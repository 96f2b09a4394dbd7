"""Pickles one after another: a bare file of them, and the streams of torch before 1.6, whose storages stand between.

The legacy layout is that of torch/serialization.py `_legacy_save`; the tar layout's members are those of
`legacy_load` there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import is_elsewhere
from ckpt_cli.files.copy import beginnings, long_view
from ckpt_cli.files.source import ByteSource, Window
from ckpt_cli.formats.signatures import PROTO
from ckpt_cli.pickles.graph import Global
from ckpt_cli.pickles.legacy_save import MAGIC, NUMEL
from ckpt_cli.pickles.tensors.arguments import storage_dtype, text_of
from ckpt_cli.scanner.judge import dangerous
from ckpt_cli.scanner.packed import INSIDE
from ckpt_cli.scanner.trace import Trace, trace_pickle

_LEGACY_PICKLES = 5
"""Magic, protocol, sys_info, the object, the keys of its storages."""

_STREAMS_TOLD = 100
"""Streams after the first that are reported one by one."""

_After = Callable[[memoryview, Trace], int | None]
"""The byte after what follows a pickle; None where that does not fit."""

_SMALLEST = 16
"""Bytes of a storage in which a pickle that does anything has room."""

PICKLE_NAMES = (".pkl", ".pickle", ".p", ".pk", ".joblib", ".dill", ".debug_pkl")
"""Suffixes of pickles; `.bin`, `.pt`, `.ckpt`, `.dat` and `.data` can be anything."""

_BEGINS = re.compile(PROTO + rb"[\x00-\x05]|\(?c[A-Za-z_][\w.]{0,99}\n[A-Za-z_][\w.]{0,99}\n")
"""The first bytes of a pickle that may stand anywhere: a PROTO opcode, or a name as protocol 0 has it."""

_BEGINS_INSIDE = re.compile(INSIDE.pattern + rb"|\(?c[A-Za-z_][\w.]{0,99}\n[A-Za-z_][\w.]{0,99}\n")
"""The first bytes of a pickle that may stand anywhere in a string."""


@dataclass(frozen=True, slots=True)
class Found:
    """One pickle."""

    where: str
    trace: Trace
    data: memoryview
    """The data that its offsets count in."""


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something about the container that no ordinary checkpoint has, or that was not searched."""

    severity: str
    code: str
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Inner:
    """A part of a file that is to be searched as a file of its own."""

    source: ByteSource
    where: str
    depth: int
    numbers: bool = False
    """True for a record of numbers, which may look like most kinds of files by chance."""


Walk = Iterator[Found | Oddity]


def is_pickle(trace: Trace, data: memoryview) -> bool:
    """True if bytes that were traced are a pickle, or the beginning of one, rather than anything else.

    A text that begins with `c` and a word may look like a name, and `N.` is None: they have to go further than that.
    """
    named = any(_is_name(node) for node in trace.globals)
    if trace.problem is None and trace.end - trace.offset > 1:
        return named or trace.end == len(data) or data[trace.offset] == PROTO[0] or is_magic(trace)
    return bool(trace.computed) or (named and (bool(trace.calls) or any(dangerous(trace.globals))))


def acts(trace: Trace) -> bool:
    """True if bytes that nothing says are a pickle are one that does something: numbers look like one by chance.

    It has to import what has a name and call it, or import something dangerous; a name that it computes counts only
    in a whole pickle that also calls something.
    """
    if any(_is_name(node) for node in trace.globals):
        return bool(trace.calls) or any(dangerous(trace.globals))
    computes = bool(trace.computed or trace.extensions) and bool(trace.calls)
    return computes and trace.problem is None and trace.protocol > 1


def is_magic(trace: Trace) -> bool:
    """True if it is the pickle that torch before 1.6 began a file with."""
    return type(trace.root) is int and trace.root == MAGIC


def _is_name(node: Global) -> bool:
    parts = f"{node.module}.{node.name}".split(".")
    return all(part.isidentifier() or (part[:1] == "<" and part[-1:] == ">") for part in parts)


def streams(
    source: ByteSource, where: str, budget: ScanBudget, *, sure: bool, depth: int = 0
) -> Iterator[Found | Oddity | Inner]:
    """The pickles of a file that is nothing but pickles, its storages, and what stands after them.

    `sure`: it must be a pickle, by its name or its first bytes, so one that is broken from the start is reported.
    """
    reader = _Reader(source)
    position = number = 0
    step, legacy = 0, False
    while position < source.size:
        trace = reader.trace(position, budget)
        data = reader.data
        if not (is_pickle(trace, data) or (number == 0 and sure) or (legacy and trace.problem is None)):
            yield from trailing(reader.all(), position, where, budget)
            return
        step += 1
        if is_magic(trace):
            step, legacy = 1, True
            odd = number > 0
        else:
            odd = number > 0 and not legacy
        number += 1
        place = where if number == 1 else f"{where} (pickle {number}, byte {position})"
        yield Found(place, trace, data)
        if odd and number <= _STREAMS_TOLD:
            yield Oddity("warning", "extra-stream", place, "another pickle after the first, which few scanners read")
        position = trace.end
        if trace.problem is not None:
            yield from hidden_pickles(reader.all(), position, where, budget)
            return
        if legacy and step == _LEGACY_PICKLES - 1:
            objects = trace
        elif legacy and step == _LEGACY_PICKLES:
            legacy = False
            ends = _after_storages(source, position, trace.root, _itemsizes(objects))
            if ends is None:
                yield Oddity("warning", "odd-storages", where, "its storages are not where its pickles say")
                yield from hidden_pickles(reader.all(), position, where, budget)
                return
            for end in ends:
                yield from _storage(source, position, end, where, depth)
                position = end


class _Reader:
    """The bytes of a source; of one elsewhere no more of its beginning than its pickles take."""

    def __init__(self, source: ByteSource) -> None:
        self._size = source.size
        self._longer = beginnings(source)
        self.data = next(self._longer)

    def all(self) -> memoryview:
        """Return all of them."""
        self.data = next(reversed([*self._longer]), self.data)
        return self.data

    def trace(self, position: int, budget: ScanBudget) -> Trace:
        """Trace the pickle at a byte, with as many bytes as it has."""
        opcodes = budget.opcodes
        while True:
            trace = trace_pickle(self.data, position, budget)
            if len(self.data) == self._size or (trace.problem is None and trace.end < len(self.data)):
                return trace
            budget.opcodes = opcodes
            self.data = next(self._longer)


def _itemsizes(trace: Trace) -> dict[str, tuple[int, int]]:
    """Bytes of an element of each storage that a pickle refers to, and its elements as that says."""
    sizes = {}
    for node in trace.storages:
        pid = node.pid
        if isinstance(pid, tuple) and len(pid) >= 3 and isinstance(pid[1], Global):
            key, size = text_of(pid[2]), itemsize(pid[1])
            if key is not None and size:
                numel = pid[4] if len(pid) > 4 and type(pid[4]) is int else 0
                sizes[key] = size, max(numel, 0)
    return sizes


def itemsize(kind: Global) -> int:
    """Bytes of an element of a storage class; 0 for a class that is not one."""
    try:
        return max(storage_dtype(kind).bits // 8, 1)
    except FormatError:
        return 0


def _after_storages(
    source: ByteSource, position: int, keys: object, sizes: dict[str, tuple[int, int]]
) -> list[int] | None:
    """The byte after each storage of one save; None where they do not fit."""
    if not isinstance(keys, list | tuple):
        return None
    ends = []
    for number, key in enumerate(keys):
        if not number % _HEADERS and is_elsewhere(source.whole):
            source.expect_all(_headers(position, keys[number : number + _HEADERS], sizes))
        head = memoryview(source.read(position, min(NUMEL.size, source.size - position)))
        after = after_storage(head, 0, sizes.get(text_of(key) or "", (0, 0))[0], source.size - position)
        if after is None:
            return None
        position += after
        ends.append(position)
    return ends


def _storage(source: ByteSource, begin: int, end: int, where: str, depth: int) -> Iterator[Inner]:
    """The elements of a storage, which follow their count, to be searched as numbers."""
    nbytes = end - begin - NUMEL.size
    if nbytes >= _SMALLEST:
        elements = Window(source, begin + NUMEL.size, nbytes)
        yield Inner(elements, f"{where} (storage at byte {begin})", depth + 1, numbers=True)


def _headers(position: int, keys: Sequence[object], sizes: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where the counts of storages stand if these are as long as the pickle says, and what is searched first."""
    found = []
    for key in keys:
        size, numel = sizes.get(text_of(key) or "", (0, 0))
        found.append((position, NUMEL.size + min(numel * size, _LOOKED_AT)))
        position += NUMEL.size + numel * size
    return found


_LOOKED_AT = 4096
"""Bytes of a storage that are searched before more of it is."""

_HEADERS = 2_000
"""Counts of storages that are fetched together."""


def after_storage(data: memoryview, position: int, size: int, reach: int) -> int | None:
    """Return the byte after an element count and its elements, which end by `reach`."""
    if not size or position + NUMEL.size > len(data):
        return None
    numel: int = NUMEL.unpack_from(data, position)[0]
    end = position + NUMEL.size + numel * size
    return end if numel >= 0 and end <= reach else None


def trailing(
    data: memoryview, position: int, where: str, budget: ScanBudget, base: int = 0
) -> Iterator[Found | Oddity]:
    """Yield the findings in bytes after the end of all that a file should have; the data begin at its byte `base`."""
    rest = len(data) - position
    first = bytes(data[position : position + (1 << 16)])
    if rest > len(first) or first.strip(b"\0\t\n\r "):
        yield Oddity("warning", "trailing-data", where, f"{rest} bytes after its end, at byte {base + position}")
        yield from hidden_pickles(data, position, where, budget, base)


def hidden_pickles(
    data: memoryview, position: int, where: str, budget: ScanBudget, base: int = 0
) -> Iterator[Found | Oddity]:
    """Pickles that begin anywhere in a range where there should be none; only those that import something count."""
    end = len(data)
    room = limits.SCAN_BYTES - budget.searched
    if end - position > room:
        end = position + max(room, 0)
        yield Oddity("note", "not-searched", where, f"{len(data) - end} bytes were not searched for hidden pickles")
    budget.searched += end - position
    yield from _beginning(_BEGINS, data, position, end, where, budget, base)


def inside_string(data: memoryview, position: int, where: str, budget: ScanBudget) -> Iterator[Found | Oddity]:
    """Pickles that begin anywhere in a string; it is counted already where it is long."""
    yield from _beginning(_BEGINS_INSIDE, data, position, len(data), where, budget)


def _beginning(
    pattern: re.Pattern[bytes],
    data: memoryview,
    position: int,
    end: int,
    where: str,
    budget: ScanBudget,
    base: int = 0,
) -> Iterator[Found | Oddity]:
    """Pickles that import something, of those that may begin where a pattern matches."""
    last = -1
    for match in pattern.finditer(data, position, end):
        if match.start() < last:
            continue
        if budget.tries <= 0 or budget.opcodes <= 0:
            yield Oddity("note", "not-searched", where, f"bytes from {base + match.start()} on were not searched")
            return
        budget.tries -= 1
        trace = trace_pickle(data, match.start(), budget)
        if acts(trace) and (trace.calls or match[0][:1] == PROTO):  # two words of a list look like a name
            last = trace.end
            place = f"{where} (byte {base + match.start()})"
            yield Found(place, trace, data)
            yield Oddity("warning", "hidden-pickle", place, "a pickle where there should be none")


def outside(name: str, where: str, what: str = "its name") -> Iterator[Oddity]:
    """The finding for a member of an archive that lies, or a link that leads, outside of where it is unpacked."""
    plain = name.replace("\\", "/")
    if plain.startswith("/") or ".." in plain.split("/") or plain[1:3] == ":/":
        yield Oddity("warning", "outside-folder", where, f"{what} leads out of its folder: {name[:100]}")


def storages_of_tar(source: ByteSource, where: str, budget: ScanBudget, depth: int) -> Iterator[Found | Oddity | Inner]:
    """The member `storages`: a count, then for each a pickle and its elements, then the views."""
    yield from _interleaved(source, where, budget, _after_tar_storage, depth)


def tensors_of_tar(source: ByteSource, where: str, budget: ScanBudget, depth: int) -> Iterator[Found | Oddity | Inner]:
    """The member `tensors`: a count, then for each a pickle, its sizes, its strides and its offset."""
    yield from _interleaved(source, where, budget, _after_tar_tensor, depth)


def _after_tar_storage(data: memoryview, trace: Trace) -> int | None:
    root = trace.root
    kind = root[2] if isinstance(root, tuple) and len(root) == 3 else None
    return after_storage(data, trace.end, itemsize(kind), len(data)) if isinstance(kind, Global) else None


def _after_tar_tensor(data: memoryview, trace: Trace) -> int | None:
    if trace.end + 4 > len(data):
        return None
    dimensions: int = struct.unpack_from("<i", data, trace.end)[0]
    end = trace.end + 8 + 16 * dimensions + 8
    return end if 0 <= dimensions <= limits.DIMENSIONS and end <= len(data) else None


def _interleaved(
    source: ByteSource, where: str, budget: ScanBudget, after: _After, depth: int
) -> Iterator[Found | Oddity | Inner]:
    """Pickles with bytes of another kind after all but the first and those that follow the last."""
    data = long_view(source, 0, source.size)
    position = number = 0
    count: object = 0
    while position < len(data):
        trace = trace_pickle(data, position, budget)
        number += 1
        place = f"{where} (pickle {number})"
        if number > 1 and trace.problem is not None and not is_pickle(trace, data):
            yield from trailing(data, position, where, budget)
            return
        yield Found(place, trace, data)
        position = trace.end
        if number == 1:
            count = trace.root
        elif isinstance(count, int) and number <= count + 1:
            behind = after(data, trace)
            if behind is None:
                yield Oddity("warning", "odd-storages", where, "its elements are not where its pickles say")
                yield from hidden_pickles(data, position, where, budget)
                return
            yield from _storage(source, position, behind, place, depth)
            position = behind
        if trace.problem is not None:
            yield from hidden_pickles(data, position, where, budget)
            return
