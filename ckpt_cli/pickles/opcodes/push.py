"""Opcodes that push a value given in the pickle itself, and those about the pickle as a whole."""

from __future__ import annotations

import struct
from collections.abc import Callable

from ckpt_cli.errors import MalformedError, TruncatedError
from ckpt_cli.pickles.describe import unescaped
from ckpt_cli.pickles.graph import Extension, Letter, OutOfBand
from ckpt_cli.pickles.machine import SHORT, Machine, Table, entering

VALUES: Table = {}

_enter = entering(VALUES)
_i32, _u64 = (struct.Struct(code).unpack_from for code in ("<i", "<Q"))


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The pickle came to its end."""


def _constant(code: bytes, value: object) -> None:
    """Enter an opcode that pushes a value that cannot change."""

    @_enter(code)
    def push(m: Machine, pos: int) -> int:
        m.stack.append(value)
        return pos


def _number(code: bytes, layout: str, make: Callable[[int], object] | None = None) -> None:
    """Enter an opcode whose argument is a number of a fixed width."""
    number = struct.Struct(layout)
    unpack, width = number.unpack_from, number.size

    @_enter(code)
    def push(m: Machine, pos: int) -> int:
        value = unpack(m.data, pos)[0]
        m.stack.append(make(value) if make else value)
        return pos + width


def _line(code: bytes, make: Callable[[Machine, bytes], object]) -> None:
    """Enter an opcode whose argument is a line of text."""

    @_enter(code)
    def push(m: Machine, pos: int) -> int:
        line = m.line(pos)
        m.stack.append(make(m, line))
        return pos + len(line) + 1


def _text(code: bytes, layout: str) -> None:
    """Enter an opcode for text in UTF-8; nearly all of a checkpoint's is short and ASCII, so that is quick."""
    length = struct.Struct(layout)
    unpack, width = length.unpack_from, length.size

    @_enter(code)
    def push(m: Machine, pos: int) -> int:
        nbytes: int = unpack(m.data, pos)[0]
        pos += width
        end = pos + nbytes
        if nbytes > SHORT or end > m.size:
            m.stack.append(m.string("str", pos, nbytes))
        elif nbytes < 2:
            m.stack.append(Letter(m.data[pos:end], "utf-8"))
        else:
            text = str(m.data[pos:end], "utf-8", "surrogatepass")
            m.stack.append(text if text.isascii() else m.held(text))
        return end


def _string(code: bytes, layout: str, kind: str) -> None:
    """Enter an opcode whose argument is a length of a fixed width, and that many bytes."""
    length = struct.Struct(layout)
    unpack, width = length.unpack_from, length.size

    @_enter(code)
    def push(m: Machine, pos: int) -> int:
        nbytes: int = unpack(m.data, pos)[0]
        pos += width
        m.stack.append(m.string(kind, pos, nbytes))
        return pos + nbytes


_constant(b")", ())
_constant(b"N", None)
_constant(b"\x88", True)
_constant(b"\x89", False)

_number(b"M", "<H")
_number(b"J", "<i")
_number(b"G", ">d")
_number(b"\x82", "<B", Extension)
_number(b"\x83", "<H", Extension)
_number(b"\x84", "<i", Extension)

_text(b"X", "<I")
_text(b"\x8c", "<B")
_text(b"\x8d", "<Q")

_string(b"U", "<B", "raw")
_string(b"T", "<i", "raw")
_string(b"C", "<B", "bytes")
_string(b"B", "<I", "bytes")
_string(b"\x8e", "<Q", "bytes")
_string(b"\x96", "<Q", "bytearray")

_line(b"I", lambda _, line: line == b"01" if line in (b"00", b"01") else int(line, 0))
_line(b"L", lambda _, line: int(line.removesuffix(b"L"), 0))
_line(b"F", lambda _, line: float(line))
_line(b"P", lambda m, line: m.refer(line.decode("utf-8", "surrogateescape")))
_line(b"S", lambda m, line: m.raw_string(unescaped(_unquoted(line.strip()))))


@_enter(b"V")
def _unicode_line(m: Machine, pos: int) -> int:
    node, pos = m.text_line(pos)
    m.stack.append(node)
    return pos


def _unquoted(line: bytes) -> bytes:
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
        raise MalformedError("has a string without quotes")
    return line[1:-1]


@_enter(b"K")
def _binint1(m: Machine, pos: int) -> int:
    m.stack.append(m.data[pos])
    return pos + 1


@_enter(b"\x8a")
def _long1(m: Machine, pos: int) -> int:
    nbytes = m.data[pos]
    m.stack.append(m.integer(pos + 1, nbytes))
    return pos + 1 + nbytes


@_enter(b"\x8b")
def _long4(m: Machine, pos: int) -> int:
    nbytes: int = _i32(m.data, pos)[0]
    m.stack.append(m.integer(pos + 4, nbytes))
    return pos + 4 + nbytes


@_enter(b"\x97")
def _next_buffer(m: Machine, pos: int) -> int:
    m.stack.append(OutOfBand())
    return pos


@_enter(b"\x98")
def _readonly_buffer(m: Machine, pos: int) -> int:
    if isinstance(m.stack[-1], OutOfBand):
        m.stack[-1].readonly = True
    return pos


# --- the frame of it all ---------------------------------------------------------------------------------------------


@_enter(b"\x80")
def _proto(m: Machine, pos: int) -> int:
    m.protocol = m.data[pos]
    if m.protocol > 5:
        raise MalformedError(f"says protocol {m.protocol}, while 5 is the newest,")
    return pos + 1


@_enter(b"\x95")
def _frame(m: Machine, pos: int) -> int:
    nbytes = _u64(m.data, pos)[0]
    if pos + 8 + nbytes > m.size:
        raise TruncatedError(f"ends within a frame of {nbytes} bytes")
    return pos + 8


@_enter(b".")
def _stop(_: Machine, __: int) -> int:
    raise Stopped
