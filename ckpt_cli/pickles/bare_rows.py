"""Rows of pickles without a memo: tensors that each say all of their call again, read at once where there are many.

Some programs that write pickles leave the memo out, and compressed that costs them little. Nearly all bytes of such a
row are those of others, and its nodes become those of a row (`pickles/rows.py`): torch has one object of the word
`storage` and one of a location, so that all rows have these in common.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from ckpt_cli import limits
from ckpt_cli.pickles.graph import Global
from ckpt_cli.pickles.machine import SHORT, Machine
from ckpt_cli.pickles.opcodes.encode import integer
from ckpt_cli.pickles.rows import Template, called, integers

_LINES = 6
"""Lines of a row: a module and a name each of the function, the storage's class and the class of hooks."""

_TEMPLATES = 1 << 10
"""Templates of one pickle: tensors of further shapes are read opcode by opcode."""

_LONGEST = 2048
"""Bytes of a row that are looked at: a tensor of 64 dimensions takes 900."""

_NAME = ord("X")
_INTEGER = rb"(?:K.|M..|J....)"
_COUNTS = rb"((?:\((?:%(one)s)*t)|\)|(?:%(one)s){1,3}[\x85-\x87])" % {b"one": _INTEGER}
_ROW = re.compile(
    rb"(ctorch\._utils\n_rebuild_tensor_v2\n\(\(X\x07\0\0\0storagec([\w.]{1,60})\n(\w{1,60})\nX)(.)(\0\0\0)([0-9]{1,20})"
    rb"(X(.)\0\0\0([ -~]{2,60}?)(%(one)s)tQ(%(one)s)%(counts)s%(counts)s([\x88\x89])"
    rb"ccollections\nOrderedDict\n(?:\)|\(t)RtR)" % {b"one": _INTEGER, b"counts": _COUNTS},
    re.DOTALL,
)
"""A row behind its name."""

_MARKED = ord("(")
_u32 = struct.Struct("<I").unpack_from


class BareTemplate(Template):
    """All that some rows without a memo have in common: everything but their names and storage keys."""

    __slots__ = ("_ends", "_layout", "nbytes")

    def __init__(self, nodes: tuple[Any, ...], found: re.Match[bytes]) -> None:
        """Make a template of the nodes that its rows have in common, and of one row."""
        counts = [_numbers_of(raw) for raw in found.group(12, 13)]
        each = [integer(_numbers_of(raw)[0]) for raw in found.group(10, 11)]
        numbers = (*each, *map(_tuple_of, counts), found[14])
        self._set_facts(nodes, numbers)
        head, tail = found[1] + found[4] + found[5], found[7]
        self._ends = head, tail
        self._layout = struct.Struct(f"{len(head)}s{len(found[6])}s{len(tail)}s")
        self.nbytes = self._layout.size
        """Bytes of a row behind its name."""
        marked = sum(raw[:1] == b"(" for raw in (*found.group(12, 13), tail[-5:]))
        self.opcodes = 20 + sum(map(len, counts)) + marked
        """Opcodes of a row."""

    def key_in(self, data: bytes | memoryview, pos: int) -> str | None:
        """Return the storage key of the row whose name ends at a byte; None for another kind of row."""
        if pos + self.nbytes > len(data):
            return None
        head, key, tail = self._layout.unpack_from(data, pos)
        return str(key, "ascii") if (head, tail) == self._ends and key.isdigit() else None


class BareRows:
    """The templates of one pickle."""

    def __init__(self) -> None:
        self.last: BareTemplate | None = None
        """The template of the last row."""
        self._templates: dict[tuple[bytes, ...], BareTemplate] = {}
        self._words: dict[str, str] = {}

    def at(self, m: Machine, pos: int) -> tuple[BareTemplate | None, str | None]:
        """Return the template and the storage key of the row whose name ends at a byte; nothing where there is none."""
        last = self.last
        for template in (last.followed_by, last.followed_before) if last is not None else ():
            key = template.key_in(m.data, pos)
            if key is not None:
                break
        else:
            template = self._template_at(m, pos)
            key = template.key_in(m.data, pos) if template is not None else None
        if last is not None and template is not None:
            last.follow(template)
        return template, key

    def _template_at(self, m: Machine, pos: int) -> BareTemplate | None:
        """Return the template of the row whose name ends at a byte; None where there is no row."""
        found = _ROW.match(bytes(m.data[pos : pos + _LONGEST]))
        if found is None or found[4][0] != len(found[6]) or found[8][0] != len(found[9]):
            return None
        known = found.group(1, 4, 7)
        if known not in self._templates and len(self._templates) < _TEMPLATES:
            names = _globals_of(m, found)
            shapes = [bool(_numbers_of(raw)) for raw in found.group(12, 13)]
            if None in names or shapes[0] != shapes[1] or not all(map(_is_whole, found.group(12, 13))):
                return None
            func, kind, hooks = names
            word, location = (self._words.setdefault(text, text) for text in ("storage", str(found[9], "ascii")))
            self._templates[known] = BareTemplate((func, word, kind, location, hooks), found)
        return self._templates.get(known)


def _globals_of(m: Machine, found: re.Match[bytes]) -> list[Global | None]:
    """Return the nodes of the names in a row; None for one that the pickle had no node of before."""
    kind = str(found[2], "utf-8"), str(found[3], "utf-8")
    names = (("torch._utils", "_rebuild_tensor_v2"), kind, ("collections", "OrderedDict"))
    return [m.globals.get(name) for name in names]


def read_bare_rows(m: Machine, pos: int) -> int:
    """Read the rows without a memo from a byte on, as many as follow each other; return the position after them.

    Raises LimitError where the pickle has too many.
    """
    m.rows.bare = rows = m.rows.bare or BareRows()
    data, push, refer = m.data, m.stack.append, m.persistent.append
    read = opcodes = 0
    while pos + 5 < m.size and data[pos] == _NAME and m.lines + _LINES <= limits.PICKLE_LINES:
        nbytes: int = _u32(data, pos + 1)[0]
        end = pos + 5 + nbytes
        template, key = rows.at(m, end)
        raw = bytes(data[pos + 5 : end]) if 2 <= nbytes <= SHORT else b"\xff"
        if template is None or key is None or not raw.isascii():
            break
        rows.last = template
        call = called(template, key)
        push(str(raw, "ascii"))
        push(call)
        refer(call)
        m.lines += _LINES
        pos = end + template.nbytes
        read += 1
        opcodes += template.opcodes
    m.rows.count(read, opcodes)
    return pos


def _numbers_of(raw: bytes) -> tuple[int, ...]:
    """Return the integers that the opcodes of one integer or tuple push."""
    return integers(raw[1:] if raw[0] == _MARKED else raw)


def _is_whole(raw: bytes) -> bool:
    """True if the opcodes of a tuple take no more from the stack than they push."""
    return raw[0] == _MARKED or len(integers(raw)) == _TUPLES.index(raw[-1:])


def _tuple_of(counts: tuple[int, ...]) -> bytes:
    """Return the opcodes of a tuple of integers, as rows with a memo have them."""
    raw = b"".join(map(integer, counts))
    return b"(" + raw + b"t" if len(counts) > 3 else raw + _TUPLES[len(counts)]


_TUPLES = (b")", b"\x85", b"\x86", b"\x87")
"""The opcode that makes a tuple of up to three items of what was pushed last."""
