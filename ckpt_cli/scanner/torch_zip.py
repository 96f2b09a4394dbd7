"""The pickles of zip files, and what is wrong with where they stand: the part of the walk that knows torch's layout."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.files.at_once import is_elsewhere
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.files.source import ByteSource, Window
from ckpt_cli.formats import signatures
from ckpt_cli.formats.zip.layout import LOCAL, LOCAL_MAGIC, STORED, local_header_in, name_in
from ckpt_cli.scanner.documents import is_json
from ckpt_cli.scanner.packed import held, packing_of, take, zip_decoder
from ckpt_cli.scanner.scripts import bytecode_findings, script_findings
from ckpt_cli.scanner.streams import (
    PICKLE_NAMES,
    Found,
    Inner,
    Oddity,
    acts,
    hidden_pickles,
    outside,
    streams,
    trailing,
)
from ckpt_cli.scanner.tolerant_zip import LooseZip, Member, unlisted, zips_within
from ckpt_cli.scanner.trace import trace_pickle

Walk = Iterator[Found | Oddity | Inner]

_OURS = (
    "data.pkl",
    "constants.pkl",
    "attributes.pkl",
    "traced_inputs.pkl",
    "bytecode.pkl",
    "mobile_debug_handles.pkl",
)
"""The pickles that torch puts right below the prefix."""

_CODE = ("/code/", "/extra/")
"""Folders in which TorchScript and .pt2 keep other things than pickles of their own."""

_SAID = 100
"""Findings of one kind that are reported for one zip."""

_BEGINNING = 1 << 16
"""Bytes of a compressed record that are inflated to see what it is."""

_HEAD = 4096
"""Bytes of these that are traced as a pickle."""

_UNLISTED_COSTS = 50
"""Places to be tried for a hidden pickle, in whose time a record is opened that no directory lists."""

_CRC_BYTES = 64 * 2**20
"""Bytes up to which a pickle's CRC is checked."""


def walk_zips(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Every zip of a file, and what stands before, between and after them."""
    zips = list(zips_within(source, budget))
    if not zips:
        yield Oddity("warning", "broken-zip", where, "a zip file without an end record: it is cut short")
        yield from trailing(source.view(0, source.size), 0, where, budget)
        return
    end = zips[0].end
    if end < source.size:
        far = is_elsewhere(source.whole)  # where a view of all would fetch all
        base = end if far else 0
        yield from trailing(source.view(base, source.size - base), end - base, where, budget, base)
    first = zips[-1].begin
    if first > 0:
        yield Oddity("warning", "leading-data", where, f"{first} bytes before the zip that it ends in")
        yield from streams(Window(source, 0, first), where, budget, sure=False)
    if len(zips) > 1 and not where.endswith(".distcp"):
        yield Oddity("warning", "several-zips", where, f"{len(zips)} zips one after another; readers take the last")
    for found in reversed(zips):
        budget.files += 1
        if budget.files > limits.SCAN_FILES:
            yield Oddity("warning", "not-searched", where, "zips beyond the limit were not opened")
            return
        place = where if len(zips) == 1 else f"{where} (byte {found.begin})"
        yield from walk_zip(source, found, place, depth, budget)


def walk_zip(source: ByteSource, found: LooseZip, where: str, depth: int, budget: ScanBudget) -> Walk:
    """One zip: its layout, its records, and what stands between them."""
    for fault in found.faults[:_SAID]:
        yield Oddity("warning", "broken-zip", where, fault)
    yield from _layout(found, where)
    for member in found.members:
        budget.stored -= min(max(member.stored, 0), source.size)
        if budget.stored < 0:
            message = "its records are far more than the file has: many are said to be at one place"
            yield Oddity("warning", "not-searched", f"{where}/{member.name}", message)
            break
        yield from _walk_member(source, member, f"{where}/{member.name}", depth, budget)
        for begin, nbytes in member.margins:
            yield from _margin(source, begin, nbytes, f"{where}/{member.name} (extra fields)", depth, budget)
    yield from _margin(source, found.end - found.comment, found.comment, f"{where} (comment)", depth, budget)
    for begin, end in unlisted(found):
        piece = source.view(begin, end - begin)
        if any(piece[: 1 << 20]):
            yield Oddity("warning", "unlisted-data", where, f"{end - begin} bytes at {begin} that no record lists")
            yield from hidden_pickles(piece, 0, f"{where} (byte {begin})", budget)
            yield from _unlisted_records(source, begin, end, where, depth, budget)


def _margin(source: ByteSource, begin: int, nbytes: int, where: str, depth: int, budget: ScanBudget) -> Walk:
    """A comment or extra fields of a zip file, which Python's zipfile hands out."""
    text = source.read(begin, min(nbytes, max(source.size - begin, 0))) if nbytes else b""
    if len(text) - text.count(text[4:5]) < _SMALLEST:
        return  # what torch aligns its records with
    budget.stored -= len(text)
    for content in (text, text[4:]):  # an extra field begins with its kind and size
        yield Inner(MemorySource(content), where, depth + 1, numbers=True)
    yield from hidden_pickles(memoryview(text), 1, where, budget)


_SMALLEST = 16
"""Bytes in which a pickle that does anything has room."""


def _layout(found: LooseZip, where: str) -> Walk:
    """Names twice, and records that are not where torch's writer puts them."""
    counts = Counter(member.name for member in found.members)
    for name in counts:
        yield from outside(name, f"{where}/{name}")
    twice = [name for name, count in counts.items() if count > 1]
    for name in twice[:_SAID]:
        message = f"{counts[name]} records of that name: torch reads the first, others the last"
        yield Oddity("warning", "duplicate-record", f"{where}/{name}", message)
    faulty = [member for member in found.members if member.faults]
    for member in faulty[:_SAID]:
        yield Oddity("warning", "header-mismatch", f"{where}/{member.name}", f"it {', '.join(member.faults)}")
    if len(faulty) > _SAID:
        yield Oddity("warning", "header-mismatch", where, f"{len(faulty) - _SAID} more records like that")
    if not found.members:
        return
    prefix, slash, _ = found.members[0].name.partition("/")
    misplaced = [name for name in counts if name.rpartition("/")[2] == "data.pkl" and name != f"{prefix}/data.pkl"]
    for name in misplaced[:_SAID]:
        yield Oddity(
            "warning", "misplaced-pickle", f"{where}/{name}", "a data.pkl that is not where torch looks for it"
        )
    if not slash or f"{prefix}/data.pkl" not in counts:
        return
    for name in [name for name in counts if not name.startswith(f"{prefix}/")][:_SAID]:
        yield Oddity(
            "warning", "outside-prefix", f"{where}/{name}", f"a record outside {prefix}/, which torch never writes"
        )
    for name in [name for name in counts if _is_extra(name, prefix)][:_SAID]:
        yield Oddity("warning", "extra-pickle", f"{where}/{name}", "a pickle that torch never writes")


_LIBRARIES = (".so", ".dll", ".pyd", ".dylib")
_NATIVE = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"\xce\xfa\xed\xfe")
"""Suffixes of libraries, and the first bytes of those of Linux, Windows and macOS."""


def _is_extra(name: str, prefix: str) -> bool:
    """True if a record is named as a pickle and is not one of those that torch writes."""
    inner = name.removeprefix(f"{prefix}/")
    if not inner.lower().endswith(PICKLE_NAMES[:-1]) or inner in _OURS or inner.rpartition("/")[2] == "data.pkl":
        return False
    return not f"/{inner}".startswith(_CODE)


def _walk_member(source: ByteSource, member: Member, where: str, depth: int, budget: ScanBudget) -> Walk:
    if member.begin < 0 or member.begin > source.size:
        return
    stored = Window(source, member.begin, min(max(member.stored, 0), source.size - member.begin))
    if member.method == STORED:
        yield from _content(stored, member, where, depth, budget)
        return
    decode = zip_decoder(member.method, member.nbytes)
    if decode is None:
        message = f"it is compressed by method {member.method}, which is not unpacked here"
        yield Oddity("warning", "not-searched", where, message)
        return
    found = take(decode, stored.view(0, stored.size), budget, _BEGINNING)
    if found.cut and _is_worth(found.data, member.name, budget):
        found = take(decode, stored.view(0, stored.size), budget)
        if found.cut:
            message = f"it inflates to more than the {len(found.data)} bytes that were looked at"
            yield Oddity("warning", "not-searched", where, message)
    if not found.data and (found.broken or member.nbytes):
        yield Oddity("warning", "not-searched", where, "it is compressed, and was not inflated")
        return
    with held(budget, len(found.data)):
        yield from _content(MemorySource(found.data), member, where, depth, budget)


def _is_worth(beginning: memoryview, name: str, budget: ScanBudget) -> bool:
    """True if more than the beginning of a compressed record is looked at: it is not just numbers."""
    head = bytes(beginning[:_HEAD])
    if name.lower().endswith((*PICKLE_NAMES, ".py", ".json")) or signatures.is_zip(head) or signatures.is_tar(head):
        return True
    if signatures.is_npy(head):
        return b"O" in head.partition(b"}")[0]
    if packing_of(head) is not None or is_json(head) or head.isascii():
        return True
    trace = trace_pickle(beginning[:_HEAD], 0, budget)
    return trace.cut or acts(trace)


def _content(inner: ByteSource, member: Member, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The findings in the bytes of a record, which the caller of the walk searches as a file of its own."""
    base = member.name.rpartition("/")[2]
    if base.endswith(".py"):
        yield from script_findings(inner.view(0, inner.size), where, budget)
    elif base.lower().endswith(_LIBRARIES) and inner.read(0, min(4, inner.size)).startswith(_NATIVE):
        message = "a library of machine code, which a loader such as that of AOTInductor runs in its process"
        yield Oddity("warning", "native-code", where, message)
    elif base == "bytecode.pkl":
        yield from bytecode_findings(inner.view(0, min(inner.size, limits.SCAN_BYTES)), where)
    named = base.lower().endswith(PICKLE_NAMES)
    if named and member.crc and inner.size <= min(_CRC_BYTES, budget.checksums):
        budget.checksums -= inner.size
        if zlib.crc32(inner.view(0, inner.size)) != member.crc:
            yield Oddity(
                "warning", "wrong-crc", where, "its CRC is not that of its bytes; torch does not look, others do"
            )
    if inner.size:
        yield Inner(inner, where, depth + 1, numbers=not named)


def _unlisted_records(source: ByteSource, begin: int, end: int, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Records that have a local header but no entry in the directory."""
    piece = bytes(source.view(begin, min(end - begin, limits.SCAN_BYTES)))
    at = piece.find(LOCAL_MAGIC)
    while 0 <= at <= len(piece) - LOCAL.size and budget.tries > 0 and (local := local_header_in(piece, at)):
        budget.tries -= _UNLISTED_COSTS
        name = name_in(piece[at + LOCAL.size : at + LOCAL.size + local.name_length])
        data = begin + at + local.size
        room = max(end - data, 0)
        stored, nbytes = min(local.stored or room, room), local.nbytes or room
        hidden = Member(name, begin + at, local.method, 0, 0, stored, nbytes, data)
        yield Oddity("warning", "unlisted-record", f"{where}/{name}", "a record that the directory does not list")
        yield from _walk_member(source, hidden, f"{where}/{name}", depth, budget)
        at = piece.find(LOCAL_MAGIC, at + 4)
