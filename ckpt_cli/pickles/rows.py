"""Rows: tensors as torch.save writes nearly all of them, a name and a call of `_rebuild_tensor_v2`, read at once.

torch writes each such tensor by the same opcodes, so that one comparison of bytes stands for some thirty of them. The
call's arguments become nodes when they are asked for (`Call.args`), which to list or rename a tensor nobody does. All
that differs from the pattern in any byte is left to the machine's own opcodes, and so are the first tensors of a
pickle, by which names and words get into the memo.
Sources: torch/_tensor.py (`__reduce_ex__`), torch/serialization.py (`persistent_id`), CPython's Modules/_pickle.c.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.pickles.graph import Call, Global, Letter, PersistentId
from ckpt_cli.pickles.machine import LATER, SHORT, Machine
from ckpt_cli.pickles.opcodes.encode import integer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_AT_ONCE = 1 << 9
"""Rows between two looks at the limits."""

_BLOCKS = 5
"""Blocks of memory that opcodes take more for a tensor than a row does whose nodes are not made."""

_TEMPLATES = 1 << 12
"""Templates of one pickle: tensors of further shapes are read opcode by opcode."""

_u32 = struct.Struct("<I").unpack_from
_NAME = ord("X")
_new = object.__new__


class Template:
    """All that some rows have in common: everything but their names, storage keys and memo slots."""

    __slots__ = ("followed_before", "followed_by", "func", "hooks", "kind", "layout", "location", "numbers", "numel",
                 "offset", "opcodes", "parts", "requires_grad", "size", "stride", "word")  # fmt: skip

    def __init__(self, nodes: tuple[Any, ...], gets: Sequence[bytes], numbers: tuple[bytes, ...], key: bytes) -> None:
        """Make a template of the nodes that its rows get from the memo, and of the bytes of their numbers.

        `key` is the storage key of one row.
        """
        self._set_facts(nodes, numbers)
        self.parts = (b"r", *self._parts(gets, len(key)))
        """What stands between slots; the storage key follows the second one."""
        self.layout = struct.Struct(f"<sI{_layout(self.parts[1:], len(key))}")
        """The layout of a row from its name's slot on: parts and slots in turn, after the second part the key."""
        dimensions = len(self.size), len(self.stride)
        self.opcodes = 28 + sum(dimensions) + sum(count > 3 for count in dimensions) if self.size else 26
        """Opcodes of a row."""

    def _set_facts(self, nodes: tuple[Any, ...], numbers: tuple[bytes, ...]) -> None:
        self.func, self.word, self.kind, self.location, self.hooks = nodes
        self.numbers = numbers
        """The opcodes of the numbers: elements of the storage, offset, size, stride, whether it needs a gradient."""
        numel, offset, size, stride, flag = numbers
        self.numel, self.offset = integers(numel)[0], integers(offset)[0]
        self.size, self.stride = integers(size), integers(stride)
        self.requires_grad = flag == b"\x88"
        self.followed_by: Any = self
        """The template of the row that came last after one of this template."""
        self.followed_before: Any = self
        """The one that came there before it: in the states of an optimizer two take turns."""

    @classmethod
    def of(cls, row: Template, numel: int, offset: int, location: object) -> Template | None:
        """Return the template of rows like another one's that are views of other storages; they are written, not read.

        None for numbers that no row has.
        """
        if not (0 <= numel < 1 << 31 and 0 <= offset < 1 << 31):
            return None
        made = cls.__new__(cls)
        numbers = (integer(numel), integer(offset), *row.numbers[2:])
        made._set_facts((row.func, row.word, row.kind, location, row.hooks), numbers)
        return made

    def follow(self, template: Template) -> None:
        """Note the template of the row after one of this template."""
        if template is not self.followed_by:
            self.followed_by, self.followed_before = template, self.followed_by

    def _parts(self, gets: Sequence[bytes], digits: int) -> tuple[bytes, ...]:
        """Return what stands between slots behind that of the name, where the row gets its nodes from the memo so."""
        func, word, kind, location, hooks = gets
        numel, offset, size, stride, flag = self.numbers
        head = func + b"((" + word + kind + b"X" + bytes((digits,)) + b"\0\0\0"
        tail = flag + hooks + b")Rr"
        view = (size + b"r", stride + b"r", tail) if self.size else (size + stride + tail,)
        return (head, b"r", location + numel + b"tr", b"Q" + offset + view[0], *view[1:], b"tr", b"Rr")

    def packing(self, gets: Sequence[bytes], digits: int) -> tuple[Callable[..., bytes], tuple[bytes, ...]]:
        """Return what packs a row behind its name, and the parts to give it.

        Parts and slots in turn, after the first part the storage key, of a number of `digits`. `gets` are the
        opcodes that get the function, the word, the class, the location and the class of hooks.
        """
        parts = self._parts(gets, digits)
        return struct.Struct(f"<{_layout(parts, digits)}").pack, parts

    @property
    def slots(self) -> int:
        """Slots that a row fills behind that of its name."""
        return 7 if self.size else 5

    def arguments(self, key: str) -> tuple[object, ...]:
        """Return new nodes for the arguments of a row's call."""
        node = key if len(key) > 1 else Letter(key)  # or all equal ones would be one object
        reference = PersistentId((self.word, self.kind, node, self.location, self.numel))
        size, stride = tuple([*self.size]), tuple([*self.stride])  # noqa: C409 - tuple(tuple) is the same one again
        return reference, self.offset, size, stride, self.requires_grad, Call("reduce", self.hooks, ())

    def key_at(self, data: bytes | memoryview, pos: int, slot: int) -> str | None:
        """Return the storage key of the row whose name ends at a byte and has a slot; None for another kind of row."""
        layout = self.layout
        if pos + layout.size > len(data):
            return None
        found = layout.unpack_from(data, pos)
        if found[::2] != self.parts:
            return None
        key = found[3]
        slots: tuple[object, ...]
        if self.size:
            slots = (slot, key, slot + 1, slot + 2, slot + 3, slot + 4, slot + 5, slot + 6, slot + 7)
        else:
            slots = (slot, key, slot + 1, slot + 2, slot + 3, slot + 4, slot + 5)
        return str(key, "ascii") if found[1::2] == slots and key.isdigit() else None


def _layout(parts: Sequence[bytes], digits: int) -> str:
    """Return the layout of a row's parts: after the first one the storage key, after each other one a slot."""
    return f"{len(parts[0])}s{digits}s" + "".join(f"{len(part)}sI" for part in parts[1:])


_CHECK_EVERY = 20_000
"""Opcodes of rows between two looks at the memory, each of which takes as long as some hundred of them."""


class Rows:
    """The templates of a pickle's rows, and how many rows there are."""

    def __init__(self, blocks: int | None) -> None:
        """Begin a pickle during which the interpreter may come to have allocated `blocks` blocks of memory.

        With None nothing looks at the memory, which takes 0.2 ms in a process that holds much.
        """
        self.last: Template | None = None
        """The template of the last row."""
        self.opcodes = 0
        """Opcodes of all rows."""
        self._blocks = blocks
        self._next_check = 0
        self._templates: dict[tuple[int | bytes, ...], Template | None] = {}
        self.bare: Any = None
        """The rows without a memo (`pickles/bare_rows.py`), where there are any."""

    def count(self, rows: int, opcodes: int) -> None:
        """Count rows that were read; raises LimitError once they or the memory that they may take are too many."""
        self.opcodes += opcodes
        if self._blocks is not None:
            self._blocks -= rows * _BLOCKS
        if self.opcodes > limits.PICKLE_OPCODES:
            raise LimitError(f"has more than {limits.PICKLE_OPCODES} opcodes")
        if self.opcodes >= self._next_check:
            self._next_check = self.opcodes + _CHECK_EVERY
            self.check_blocks()

    def check_blocks(self) -> None:
        """Raise LimitError for more objects than a checkpoint needs."""
        if self._blocks is not None and sys.getallocatedblocks() > self._blocks:
            raise LimitError("builds far more objects than a checkpoint needs")

    def template_at(self, m: Machine, pos: int) -> Template | None:
        """Return the template of the row whose name ends at a byte; None where there is no row."""
        parts = _parts_at(m.data, pos)
        if parts is None:
            return None
        *gets, key, numel, offset, size, stride, flag, hooks = parts
        known: tuple[int | bytes, ...] = (len(key), *gets, numel, offset, size, stride, flag, hooks)
        if known not in self._templates and len(self._templates) < _TEMPLATES:
            gets.append(hooks)
            nodes = tuple(_memoized(m, get) for get in gets)
            is_row = 1 <= len(key) <= SHORT and (size == b")") == (stride == b")") and _are_torchs(*nodes)
            made = Template(nodes, gets, (numel, offset, size, stride, flag), key) if is_row else None
            self._templates[known] = made
        return self._templates.get(known)


def read_rows(m: Machine, pos: int) -> int:
    """Read the rows from a byte on, as many as follow each other; return the position after them.

    Raises LimitError where the pickle has too many.
    """
    rows: Rows = m.rows
    data, memo, push, refer = m.data, m.memo, m.stack.append, m.persistent.append
    last, read, opcodes = rows.last, 0, 0
    while pos + 5 < m.size and data[pos] == _NAME and not m.sparse:
        nbytes: int = _u32(data, pos + 1)[0]
        end, slot = pos + 5 + nbytes, len(memo)
        for template in (last.followed_by, last.followed_before) if last is not None else ():
            key = template.key_at(data, end, slot)
            if key is not None:
                break
        else:
            template = rows.template_at(m, end)
            key = template.key_at(data, end, slot) if template is not None else None
        if template is None or key is None or not 2 <= nbytes <= limits.INLINE_BYTES:
            break
        raw = bytes(data[pos + 5 : end])
        name = str(raw, "ascii") if nbytes <= SHORT and raw.isascii() else _name_of(m, raw)
        if name is None:
            break
        if last is not None:
            last.follow(template)
        last = template
        call = called(template, key)
        if template.size:
            memo += (name, LATER, LATER, LATER, LATER, LATER, LATER, call)
        else:
            memo += (name, LATER, LATER, LATER, LATER, call)
        push(name)
        push(call)
        refer(call)
        pos = end + template.layout.size
        read += 1
        opcodes += template.opcodes
        if read == _AT_ONCE:
            rows.count(read, opcodes)
            read = opcodes = 0
    rows.last = last
    rows.count(read, opcodes)
    return pos


def called(template: Template, key: str) -> Call:
    """Return the call of a row."""
    call = _new(Call)
    call.opcode, call.func, call.kwargs = "reduce", template.func, None
    call.states = call.items = call.pairs = ()
    call.row, call.key = template, key
    return call


def _name_of(m: Machine, raw: bytes) -> str | None:
    """Return a name that is long or not of ASCII; None for one that a row cannot have."""
    try:
        name = str(raw, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    if m.text + 4 * len(raw) > limits.PICKLE_TEXT or len(name) < 2:
        return None
    return m.held(name)


def _memoized(m: Machine, get: bytes) -> object:
    """Return the node that an opcode gets from the memo."""
    slot = int.from_bytes(get[1:], "little")
    return m.memo[slot] if slot < len(m.memo) else None


def _are_torchs(func: object, word: object, kind: object, location: object, hooks: object) -> bool:
    """True if nodes are those by which torch rebuilds a plain tensor."""
    return (
        type(func) is Global
        and func.name == "_rebuild_tensor_v2"
        and func.module == "torch._utils"
        and type(word) is str
        and word == "storage"
        and type(kind) is Global
        and type(location) is str
        and type(hooks) is Global
        and hooks.name == "OrderedDict"
        and hooks.module == "collections"
    )


def integers(raw: bytes) -> tuple[int, ...]:
    """Return the integers that opcodes push: one, or those of a tuple."""
    found = []
    at = 0
    while at < len(raw):
        width = _WIDTHS.get(raw[at], 0)
        if width:
            found.append(int.from_bytes(raw[at + 1 : at + 1 + width], "little", signed=width == 4))
        at += 1 + width
    return tuple(found)


_WIDTHS = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
"""Bytes of the argument of each opcode that pushes an integer."""


class _Cursor:
    """A place in a pickle, where the parts of a row are looked for; IndexError where one is not there."""

    def __init__(self, data: bytes | memoryview, pos: int) -> None:
        self._data = data
        self._pos = pos

    def skip(self, opcodes: bytes, argument: int = 0) -> bytes:
        """Pass opcodes and the argument of the last one; return this."""
        begin = self._pos + len(opcodes)
        if self._data[self._pos : begin] != opcodes or begin + argument > len(self._data):
            raise IndexError
        self._pos = begin + argument
        return bytes(self._data[begin : self._pos])

    def get(self) -> bytes:
        """Pass a GET."""
        return self._pass(5 if self._data[self._pos] == _LONG_GET else 2, b"hj")

    def integer(self) -> bytes:
        """Pass an integer."""
        return self._pass(1 + _WIDTHS.get(self._data[self._pos], 0), b"KMJ")

    def counts(self) -> bytes:
        """Pass a tuple of integers and its slot in the memo; return the tuple's opcodes."""
        begin = self._pos
        marked = self._data[begin] == _MARK
        self._pos += marked
        count = 0
        while self._data[self._pos] in _WIDTHS:
            self.integer()
            count += 1
        self.skip(b"t" if marked else _TUPLES[count])
        raw = bytes(self._data[begin : self._pos])
        if count:
            self.skip(b"r", 4)
        return raw if not marked or count > len(_TUPLES) - 1 else self._refuse()

    def flag(self) -> bytes:
        """Pass a truth value."""
        return self._pass(1, b"\x88\x89")

    def _pass(self, nbytes: int, opcodes: bytes) -> bytes:
        begin = self._pos
        self._pos += nbytes
        if self._data[begin] not in opcodes or self._pos > len(self._data):
            raise IndexError
        return bytes(self._data[begin : self._pos])

    def _refuse(self) -> bytes:
        raise IndexError


def _parts_at(data: bytes | memoryview, pos: int) -> tuple[bytes, ...] | None:
    """Return the parts of the row whose name ends at a byte: four GETs, a key, the numbers, and a GET of the hooks."""
    at = _Cursor(data, pos)
    try:
        at.skip(b"r", 4)
        func = at.get()
        at.skip(b"((")
        word, kind = at.get(), at.get()
        digits = at.skip(b"X", 4)[0]
        key = at.skip(b"", digits)
        at.skip(b"r", 4)
        location, numel = at.get(), at.integer()
        at.skip(b"tr", 4)
        at.skip(b"Q")
        numbers = numel, at.integer(), at.counts(), at.counts(), at.flag()
        hooks = at.get()
    except IndexError:
        return None
    return func, word, kind, location, key, *numbers, hooks


_LONG_GET, _MARK = b"j("
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")
