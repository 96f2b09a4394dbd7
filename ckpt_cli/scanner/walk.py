"""Every pickle that any file could hold, found without trusting the file: the walk behind `ckpt scan`.

It depends on no strict reader accepting the file, because what loads a hostile file may be less strict. Containers
within containers are opened a few levels deep and within limits; what is not opened is reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError
from ckpt_cli.files.copy import long_view
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.files.source import ByteSource, Window
from ckpt_cli.formats import signatures
from ckpt_cli.formats.signatures import HEAD, preface_size
from ckpt_cli.scanner.arrays import data_elsewhere, walk_npy, walk_safetensors
from ckpt_cli.scanner.configs import TEMPLATES, template_in, text_findings
from ckpt_cli.scanner.documents import configurations_within, is_json, is_wide, walk_json
from ckpt_cli.scanner.packed import Packing, decodings, held, may_be_packed, packing_of, transformed, unpack
from ckpt_cli.scanner.streams import (
    PICKLE_NAMES,
    Found,
    Inner,
    Oddity,
    Walk,
    acts,
    hidden_pickles,
    is_magic,
    outside,
    storages_of_tar,
    streams,
    tensors_of_tar,
    trailing,
)
from ckpt_cli.scanner.tolerant_zip import zips_within
from ckpt_cli.scanner.torch_zip import walk_zip, walk_zips
from ckpt_cli.scanner.trace import trace_pickle
from ckpt_cli.scanner.transforms import UNDONE_TWICE, backwards, narrowed

if TYPE_CHECKING:
    from ckpt_cli.formats.torch_legacy.tar import Member

Walker = Callable[[ByteSource, str, int, ScanBudget], Walk]

_LOOK = 4096
"""Bytes of a source of no known kind that are traced to see if it may be a pickle."""


def walker_of(source: ByteSource, where: str) -> Walker | None:
    """Return the walker for the pickles of a source, by its content or, for those without a PROTO opcode, its name."""
    head = source.read(0, min(HEAD, source.size))
    walker = _kind(head, (*_SURE, *_KINDS))
    if walker is _pickles and signatures.is_safetensors(head) and not any(head[4:8]):
        return None  # the length of a header, whatever its bytes look like: only what acts as a pickle is one
    if walker is not None:
        return walker
    if head.lstrip()[:1] == b"{" and preface_size(source):
        return _npy
    packing = packing_of(head)
    if packing is not None and (packing.sure or head[0] in _NO_OPCODES):
        return _unpacked(packing)
    named = head and where.lower().endswith(PICKLE_NAMES) and not signatures.is_lfs_pointer(head)
    return _pickles if named else None


_NO_OPCODES = b"x]"
"""First bytes of weak signs of compression after which no pickle can follow, whatever the file is called."""


def _kind(head: bytes, kinds: _Kinds) -> Walker | None:
    return next((walker for matches, walker in kinds if matches(head)), None)


def walk(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Every pickle within a source; nothing where it holds none."""
    walker = walker_of(source, where)
    if walker is None:
        yield from guess(source, where, depth, budget)
        return
    yield from enter(walker, source, where, depth, budget)


def enter(walker: Walker, source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Let a walker find the pickles of a source, within the limits."""
    budget.files += 1
    if budget.files > limits.SCAN_FILES or depth > limits.SCAN_NESTING:
        yield Oddity("warning", "not-searched", where, "files within files beyond the limits: this one was not opened")
        return
    yield from walker(source, where, depth, budget)


def search(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The pickles of bytes that are not said to be any: a storage, another record, what a string decodes to.

    The few bytes that identify most kinds of files occur in numbers by chance, so a weak sign is followed in silence.
    """
    head = source.read(0, min(HEAD, source.size))
    walker = _kind(head, _SURE)
    packing = packing_of(head) if walker is None else None
    if packing is not None:
        walker = _unpacked(packing, quiet=True)
    if walker is not None:
        yield from enter(walker, source, where, depth, budget)
    if walker is None or packing is not None:
        yield from guess(source, where, depth, budget, numbers=True)


def guess(source: ByteSource, where: str, depth: int, budget: ScanBudget, *, numbers: bool = False) -> Walk:
    """The pickles of a source of no known kind, if one begins at its first byte, or if it is text that has some in it.

    Of `numbers` only a pickle that does something counts.
    """
    head = memoryview(source.read(0, min(_LOOK, source.size)))  # most sources are numbers, and end here
    trace = trace_pickle(head, 0, budget)
    data = head
    if source.size > _LOOK and (trace.cut or acts(trace) or trace.problem is None):
        data = long_view(source, 0, source.size)
        trace = trace_pickle(data, 0, budget)
    if acts(trace):
        if numbers:
            yield Found(where, trace, data)
            yield from hidden_pickles(data, trace.end, where, budget)
        else:
            yield from _opened(streams(source, where, budget, sure=False, depth=depth), budget)
        yield from _zip_at_the_end(source, where, depth, budget)
    elif not numbers and (packing := packing_of(bytes(head[:HEAD]))) is not None:
        yield from enter(_unpacked(packing, quiet=True), source, where, depth, budget)
    elif not numbers and trace.problem is None and (is_magic(trace) or trace.end == len(data) > 1):
        yield from _opened(streams(source, where, budget, sure=False, depth=depth), budget)
    else:
        yield from _of_text(source, bytes(head), where, depth, budget)
        yield from _transformed(source, bytes(head), where, depth, budget)
        if where.lower().endswith(_MAY_HOLD_PICKLES):
            room = max(min(source.size, limits.SCAN_BYTES - budget.searched), 0)
            yield from hidden_pickles(source.view(0, room), 0, where, budget)
        elif where.lower().endswith(".onnx"):
            yield from data_elsewhere(source, where, budget)
        if not numbers and not signatures.is_safetensors(bytes(head[:HEAD])):
            yield from _zip_at_the_end(source, where, depth, budget)


_MAY_HOLD_PICKLES = (".msgpack",)
"""Suffixes of files whose strings a loader may unpickle, as msgpack-numpy does arrays of objects."""


def _transformed(source: ByteSource, head: bytes, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The pickles of a source that is to be read backwards, or as characters or integers of several bytes each.

    Of a longer one the end is only read where its first byte may be the last one of a pickle.
    """
    if _TEXT.fullmatch(head[: len(head) // 2 + 1]):
        return  # seen by `_of_text`
    tail = head[1:]
    if source.size > len(head):
        tail = source.read(source.size - HEAD, HEAD) if head[:1] == b"." else b""
    if backwards(head[:1] + tail) is None and next(narrowed(head, may_be_packed), None) is None:
        return
    room = max(min(source.size, limits.SCAN_BYTES - budget.searched), 0)
    budget.searched += room
    for how, content in transformed(source.view(0, room)):
        if how in UNDONE_TWICE and where.endswith(f"{how})"):
            continue
        if depth >= limits.SCAN_NESTING or budget.tries <= 0:
            yield Oddity("warning", "not-searched", where, f"{how} within files within files was not decoded")
            return
        budget.tries -= 1
        yield from search(MemorySource(content), f"{where} ({how})", depth + 1, budget)


def _of_text(source: ByteSource, head: bytes, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The pickles that a text has in base64 or hex, and what a JSON document would make a loader run."""
    if signatures.is_safetensors(head):
        header = Window(source, 8, min(int.from_bytes(head[:8], "little"), source.size - 8))
        room = max(min(header.size, limits.SCAN_BYTES - budget.searched), 0)
        yield from _opened(walk_safetensors(source, where, depth, header.view(0, room)), budget)
        source, head = header, head[8:]
    if is_json(head) and not where.endswith(TEMPLATES):
        if depth or _hints(source, budget):
            yield from _opened(walk_json(source.view(0, source.size), where, depth, budget), budget)
        return
    if head.startswith(b"GGUF"):
        yield from template_in(source.view(0, min(source.size, limits.SCAN_BYTES)), where)
    if not _TEXT.fullmatch(head[: len(head) // 2 + 1]) and not (is_wide(head) and head[:1] >= b"\xfe"):
        return
    room = max(min(source.size, limits.SCAN_BYTES - budget.searched), 0)
    budget.searched += room
    text = bytes(source.view(0, room))
    yield from text_findings(text, where)
    for how, content in decodings(text):
        if how in UNDONE_TWICE and where.endswith(f"{how})"):
            continue
        if depth >= limits.SCAN_NESTING or budget.tries <= 0:
            yield Oddity("warning", "not-searched", where, f"{how} within files within files was not decoded")
            return
        budget.tries -= 1
        yield from search(MemorySource(content), f"{where} ({how})", depth + 1, budget)


_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]{8,}")
_HINT = re.compile(
    rb"class_name|expr_str|range_constraints|guards_code|class_path|parent_library|\"(?:type|impl|target)\"|:serialized:|\\u00[2-7]|auto_map|trust_remote|_template|_target_|__class__"
    rb"|[A-Za-z0-9+/]{32}"  # what may be encoded
    rb"|[\[,]\s{0,64}(?:128|99|40|93|125)\s{0,64},\s{0,64}[0-9]{1,3}\s{0,64},\s{0,64}[0-9]{1,3}\s{0,64},"
    rb'|"[A-Za-z0-9_-]{0,64}[!#$%&()*+;<=>?@^`{|}~][0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]{20}'
)
"""The texts that only JSON documents have that make something run, or that hold something encoded."""


def _hints(source: ByteSource, budget: ScanBudget) -> bool:
    """True if a document that lies in a file of its own is worth a search: a tokenizer's has a million strings."""
    room = max(min(source.size, limits.SCAN_BYTES - budget.searched), 0)
    return is_wide(source.read(0, min(4, source.size))) or _HINT.search(source.view(0, room)) is not None


def _zip(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    yield from _opened(walk_zips(source, where, depth, budget), budget)


def _opened(found: Iterator[Found | Oddity | Inner], budget: ScanBudget) -> Walk:
    """Yield the findings of a zip file, those of each record in its place."""
    for item in found:
        if not isinstance(item, Inner):
            yield item
        elif item.numbers:
            yield from search(item.source, item.where, item.depth, budget)
        else:
            yield from walk(item.source, item.where, item.depth, budget)


def _pickles(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    yield from _opened(streams(source, where, budget, sure=True, depth=depth), budget)
    yield from _zip_at_the_end(source, where, depth, budget)


def _zip_at_the_end(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The zip that a pickle or anything else ends in: torch looks at the beginning of a file, others at its end."""
    found = next(zips_within(source, budget), None)
    if found is None or not found.members or found.end < source.size:
        return
    if depth > limits.SCAN_NESTING:
        yield Oddity("warning", "not-searched", where, "a zip file within files within files was not opened")
    else:
        yield Oddity("warning", "two-formats", where, "something else that is a zip file too, for readers of its end")
        yield from _opened(walk_zip(source, found, where, depth, budget), budget)


def _tar(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The members of a tar file."""
    position = 0
    for member in _members_of_tar(source):
        if member is None:
            yield Oddity("warning", "broken-tar", where, f"a member's header at byte {position} makes no sense")
            break
        position = member.end
        yield from _leading_out(source, member, where)
        if member.kind in _NOT_FILES or not member.size:
            continue
        budget.files += 1
        if budget.files > limits.SCAN_FILES:
            yield Oddity("warning", "not-searched", where, "members beyond the limit were not opened")
            return
        part = Window(source, member.begin, member.size)
        yield from _tar_member(part, f"{where}/{member.name}", depth, budget)
    rest = source.view(min(position, source.size), max(source.size - position, 0))
    if any(rest[: 1 << 20]):
        yield from trailing(rest, 0, where, budget)


_NOT_FILES = tuple(bytes((kind,)) for kind in b"123456LKxgX")
"""Kinds of members that are not files: links, devices, folders, and what describes the next member.

Python's tarfile takes every kind that it does not know for a file.
"""


def _leading_out(source: ByteSource, member: Member, where: str) -> Iterator[Oddity]:
    """The findings for a member that lies outside of the folder that a tar file is unpacked into, or links there."""
    place = f"{where}/{member.name}"
    if member.kind not in _DESCRIBING:
        yield from outside(member.name, place)
    if member.kind in _LINKS:
        target = source.read(member.begin - _TAR_HEADER, _TAR_HEADER)[157:257]
    elif member.kind in _DESCRIBING:
        target = b"".join(_LINK_PATH.findall(source.read(member.begin, min(member.size, _TAR_HEADER * 8))))
    else:
        return
    yield from outside(target.partition(b"\0")[0].decode("utf-8", "replace"), place, "the target of its link")


_TAR_HEADER = 512
_LINKS, _DESCRIBING = (b"1", b"2"), (b"x", b"g", b"X", b"L", b"K")
_LINK_PATH = re.compile(rb"^\d+ linkpath=([^\n]*)", re.MULTILINE)


def _members_of_tar(source: ByteSource) -> Iterator[Member | None]:
    """The members, then None where the file breaks off."""
    from ckpt_cli.formats.torch_legacy.tar import members

    try:
        yield from members(source, tolerant=True)
    except FormatError:
        yield None


def _tar_member(member: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    base = where.rpartition("/")[2]
    special = {"storages": storages_of_tar, "tensors": tensors_of_tar}.get(base)
    if special is not None:
        yield from _opened(special(member, where, budget, depth), budget)
    elif base == "pickle":
        yield from _opened(streams(member, where, budget, sure=True, depth=depth), budget)
    else:
        yield from walk(member, where, depth + 1, budget)


def _npy(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    yield from _opened(walk_npy(source, where, depth, budget), budget)


def _unpacked(packing: Packing, *, quiet: bool = False) -> Walker:
    """Return the walker for what is compressed as a whole.

    Where `quiet`, or where chance may have made the first bytes, data that do not decode are not reported.
    """

    def walker(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
        found = unpack(packing, source.view(0, source.size), budget)
        if found is None:
            yield Oddity("warning", "not-searched", where, f"{packing.name}: unpack it and scan what is in it")
            return
        if found.broken and not quiet and (packing.sure or len(found.data) > _CHANCE):
            yield Oddity("warning", "not-searched", where, f"it is compressed ({packing.name}), and does not inflate")
        if found.cut:
            message = f"it inflates to more than the {len(found.data)} bytes that were looked at"
            yield Oddity("warning", "not-searched", where, message)
        if not found.data:
            return
        inner = search if quiet or not packing.sure else walk
        with held(budget, len(found.data)):
            yield from inner(MemorySource(found.data), where, depth + 1, budget)

    return walker


_CHANCE = 1 << 12
"""Bytes that numbers may decode to before they turn out not to be compressed."""


def _closed(kind: str) -> Walker:
    """A walker for what is not opened."""

    def walker(_: ByteSource, where: str, __: int, ___: ScanBudget) -> Walk:
        yield Oddity("warning", "not-searched", where, f"{kind}: unpack it and scan what is in it")

    return walker


def _keras(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Lambda layers that Keras puts into its configuration, and the attributes that PyTables reads as pickles."""
    room = max(min(source.size, limits.SCAN_BYTES - budget.searched), 0)
    if room < source.size:
        message = f"{source.size - room} bytes were not searched for Lambda layers and pickles"
        yield Oddity("note", "not-searched", where, message)
    yield from configurations_within(source.view(0, room), where, depth, budget)
    yield from hidden_pickles(source.view(0, room), 0, where, budget)
    yield from _zip_at_the_end(source, where, depth, budget)


_Kinds = tuple[tuple[Callable[[bytes], bool], Walker], ...]

_SURE: _Kinds = (
    (signatures.is_zip, _zip),
    (signatures.is_tar, _tar),
    (signatures.is_old_tar, _tar),
    (signatures.is_npy, _npy),
)
"""Kinds that enough bytes identify for chance to be excluded."""

_KINDS: _Kinds = (
    (lambda head: head.startswith(signatures.SEVEN_ZIP), _closed("a 7z archive")),
    (lambda head: head.startswith(signatures.RAR), _closed("a RAR archive")),
    (lambda head: head.startswith(signatures.HDF5), _keras),
    (lambda head: signatures.has_proto(head, bytes(range(6))), _pickles),
)
"""Other kinds that can hold pickles, by their first bytes."""
