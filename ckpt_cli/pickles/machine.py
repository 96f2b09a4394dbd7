"""The machine that opcodes work on: a pickle's bytes, stacks and memo, with the checks of every access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError
from ckpt_cli.pickles.graph import ByteArray, Call, Global, Inline, Located, PersistentId, RawString

SHORT = 64
"""Bytes up to which an ASCII string or an integer needs no accounting: its opcode and its memory block pay for it."""

_LINE = 255
"""Bytes that nearly every line is shorter than."""

_UNSET = object()
"""A memo slot that was never put."""

LATER = object()
"""A memo slot of a node that is made when it is asked for: it belongs to the row whose call is the next in the memo."""


class Machine:
    """The state of one pickle's interpretation. Its errors name the problem; the reader adds where it is."""

    __slots__ = (
        "_named",
        "below",
        "byte_strings",
        "data",
        "globals",
        "lines",
        "memo",
        "persistent",
        "protocol",
        "rows",
        "size",
        "sparse",
        "stack",
        "text",
    )

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data
        self.size = len(data)
        self.stack: list[object] = []
        """The nodes pushed since the last MARK."""
        self.below: list[list[object]] = []
        """The stacks that open MARKs put aside, outermost first."""
        self.memo: list[object] = []
        self.sparse: dict[str, object] = {}
        """Memo slots that were not filled in order, by their digits: the hashes of integers can be made to collide."""
        self.globals: dict[tuple[str, str], Global] = {}
        self._named: dict[bytes, Global] = {}
        """The same by the lines that name them: a pickle without a memo names the same ones for every tensor."""
        self.persistent: list[PersistentId | Call] = []
        """Every reference to something outside the pickle; for a row, the call that has it as its first argument."""
        self.rows: Any = None
        """The templates of rows, where tensors are read at once (`pickles/rows.py`)."""
        self.byte_strings: list[RawString | Inline] = []
        """The strings of Python 2 that are not ASCII, or that are long."""
        self.protocol = 0
        self.lines = 0
        """Lines read."""
        self.text = 0
        """Bytes of memory that long or wide strings take."""

    def since_mark(self) -> list[object]:
        """Pop what was pushed since the last MARK."""
        if not self.below:
            raise MalformedError("has no mark for an opcode that needs one")
        items = self.stack
        self.stack = self.below.pop()
        return items

    def put(self, slot: int) -> None:
        """Memoize the top of the stack."""
        node = self.stack[-1]
        memo = self.memo
        if slot == len(memo):
            memo.append(node)
        elif 0 <= slot < len(memo):
            if self.rows is not None:
                self._settle()
            memo[slot] = node
        elif slot < 0:
            raise MalformedError(f"puts into memo {slot}")
        elif slot == 1 and not memo:  # cPickle of Python 2 counts from 1
            memo += (_UNSET, node)
        else:
            if len(self.sparse) >= limits.MEMO_OUT_OF_ORDER:
                raise LimitError(f"puts {limits.MEMO_OUT_OF_ORDER} things into its memo out of order")
            self.sparse[str(slot)] = node

    def memoize(self) -> None:
        """Memoize the top of the stack in the next free slot."""
        if self.sparse or self.memo[:1] == [_UNSET]:
            raise MalformedError("both counts and numbers its memo, which no pickler does")
        self.memo.append(self.stack[-1])

    def get(self, slot: int) -> None:
        """Push from the memo."""
        node = self.memo[slot] if 0 <= slot < len(self.memo) else self.sparse.get(str(slot), _UNSET)
        if node is LATER:
            self._settle_row(slot)
            node = self.memo[slot]
        if node is _UNSET:
            raise MalformedError(f"asks for memo {slot}, which it never put")
        self.stack.append(node)

    def _settle(self) -> None:
        """Make all nodes that the memo has later, and no further ones: a slot is about to be filled once more."""
        self.rows = None
        for slot in range(len(self.memo)):
            if self.memo[slot] is LATER:
                self._settle_row(slot)

    def _settle_row(self, slot: int) -> None:
        """Make the nodes of the row that a slot of the memo belongs to."""
        memo = self.memo
        while memo[slot] is LATER:
            slot += 1
        args: Any = memo[slot].args  # type: ignore[attr-defined]  # the call of the row
        pid = args[0].pid
        nodes = [pid[2], pid, *(counts for counts in args[2:4] if counts), args[5], args]
        memo[slot - len(nodes) : slot] = nodes

    def take(self, begin: int, nbytes: int) -> bytes | memoryview:
        """Bytes of an argument."""
        if nbytes < 0 or begin + nbytes > self.size:
            raise TruncatedError(f"ends within an argument of {nbytes} bytes")
        return self.data[begin : begin + nbytes]

    def line(self, begin: int) -> bytes:
        """The line that begins there, without its newline."""
        self.lines += 1
        if self.lines > limits.PICKLE_LINES:
            raise LimitError(f"has more than {limits.PICKLE_LINES} lines")
        for reach in (_LINE, limits.INLINE_BYTES):
            raw, newline, _ = bytes(self.data[begin : begin + reach]).partition(b"\n")
            if newline:
                if len(raw) > SHORT:
                    self._account(4 * len(raw))
                return raw
        if begin + limits.INLINE_BYTES < self.size:
            raise LimitError(f"has a line of over {limits.INLINE_BYTES} bytes")
        raise TruncatedError("ends within a line")

    def two_lines(self, begin: int) -> tuple[bytes, bytes]:
        """The line that begins there and the one after it, without their newlines."""
        found = bytes(self.data[begin : begin + _LINE]).split(b"\n", 2)
        if len(found) < 3 or len(found[0]) > SHORT or len(found[1]) > SHORT:
            first = self.line(begin)
            return first, self.line(begin + len(first) + 1)
        self.lines += 2
        if self.lines > limits.PICKLE_LINES:
            raise LimitError(f"has more than {limits.PICKLE_LINES} lines")
        return found[0], found[1]

    def text_line(self, begin: int) -> tuple[object, int]:
        """The node of a str that is a line, and the position after it; a long one is left where it is."""
        end = self._line_end(begin)
        if end - begin <= limits.INLINE_BYTES - 1:
            return self.held(self.line(begin).decode("raw-unicode-escape")), end + 1
        self.lines += 1
        if self.lines > limits.PICKLE_LINES:
            raise LimitError(f"has more than {limits.PICKLE_LINES} lines")
        return Inline("escaped", begin, end - begin), end + 1

    def _line_end(self, begin: int) -> int:
        """Return the position of the newline that ends the line."""
        reach = _LINE
        while begin < self.size:
            found = bytes(self.data[begin : begin + reach]).find(b"\n")
            if found >= 0:
                return begin + found
            begin, reach = begin + reach, limits.INLINE_BYTES
        raise TruncatedError("ends within a line")

    def integer(self, begin: int, nbytes: int) -> int:
        """Return an integer of `nbytes` bytes."""
        if nbytes > limits.INLINE_BYTES:
            raise LimitError(f"has an integer of {nbytes} bytes")
        if nbytes > SHORT:
            self._account(nbytes)
        return int.from_bytes(self.take(begin, nbytes), "little", signed=True)

    def string(self, kind: str, begin: int, nbytes: int) -> object:
        """A string's node: `str`, `raw` (of Python 2), `bytes` or `bytearray`; a long one is left where it is."""
        if nbytes < 0 or begin + nbytes > self.size:
            raise TruncatedError(f"ends within a string of {nbytes} bytes")
        if nbytes > limits.INLINE_BYTES:
            inline = Inline(kind, begin, nbytes)
            if kind == "raw":
                self.byte_strings.append(inline)
            return ByteArray(inline) if kind == "bytearray" else inline
        raw = bytes(self.data[begin : begin + nbytes])
        if kind == "str":
            return self.held(raw.decode("utf-8", "surrogatepass"))
        if kind == "raw":
            return self.raw_string(raw, begin)
        if nbytes > SHORT:
            self._account(nbytes)
        located = Located.at(begin, raw)
        return ByteArray(located) if kind == "bytearray" else located

    def refer(self, pid: object) -> PersistentId:
        """The node of a reference to something outside."""
        node = PersistentId(pid)
        self.persistent.append(node)
        return node

    def raw_string(self, raw: bytes, offset: int | None = None) -> RawString:
        """The node of a Python 2 string, with room for its text."""
        node = RawString(raw, offset)
        if not raw.isascii():
            self._account(5 * len(raw))
            self.byte_strings.append(node)
        elif len(raw) > SHORT:
            self._account(2 * len(raw))
        return node

    def held(self, text: str) -> str:
        """The text itself, its memory accounted: one wide character makes every other one take four bytes."""
        if not text.isascii():
            self._account(4 * len(text))
        elif len(text) > SHORT:
            self._account(len(text))
        return text

    def _account(self, nbytes: int) -> None:
        """Count memory that neither opcodes nor memory blocks are a measure of."""
        self.text += nbytes
        if self.text > limits.PICKLE_TEXT:
            raise LimitError(f"holds more than {limits.PICKLE_TEXT} bytes of text")

    def named(self, begin: int) -> tuple[Global, int]:
        """The node of the global whose two lines begin there, and the position after them."""
        text = bytes(self.data[begin : begin + _LINE])
        end = text.find(b"\n", text.find(b"\n") + 1)
        node = self._named.get(text[:end])
        if node is not None and end > 0 and self.lines + 2 <= limits.PICKLE_LINES:
            self.lines += 2
            return node, begin + end + 1
        lines = self.two_lines(begin)
        module, name = (line.decode("utf-8", "surrogateescape") for line in lines)
        node = self.name(module, name)
        if len(lines[0]) <= SHORT and len(lines[1]) <= SHORT:
            self._named[b"\n".join(lines)] = node
        return node, begin + len(lines[0]) + len(lines[1]) + 2

    def name(self, module: str, name: str) -> Global:
        """The node of a global, one for each name."""
        key = (module, name)
        node = self.globals.get(key)
        if node is None:
            node = self.globals[key] = Global(module, name)
        return node

    def unexpected(self, doing: str) -> NoReturn:
        """Raise for an opcode whose target, on top of the stack, is of another kind."""
        raise MalformedError(f"{doing} a {type(self.stack[-1]).__name__}")


Handler = Callable[[Machine, int], int]
"""Does what one opcode does. Takes the position after the opcode and returns that of the next one.

It may raise IndexError for an empty stack, struct.error for a number cut short and ValueError for a bad argument: the
reader says what each means.
"""

Table = dict[bytes, Handler]


def entering(table: Table) -> Callable[[bytes], Callable[[Handler], Handler]]:
    """A decorator that enters a function into a table: `@enter(b"R")`."""

    def enter(code: bytes) -> Callable[[Handler], Handler]:
        def into(handler: Handler) -> Handler:
            table[code] = handler
            return handler

        return into

    return enter
