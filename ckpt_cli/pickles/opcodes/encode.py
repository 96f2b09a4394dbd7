"""Opcodes that push a value, as CPython's pickler chooses them: the shortest that can say it."""

from __future__ import annotations

import struct

from ckpt_cli.errors import UnsupportedError

_SMALL = [b"K" + byte for byte in (bytes((number,)) for number in range(256))]
"""The encoding of each integer of one byte."""


def integer(number: int) -> bytes:
    """Return the opcode of an integer, with its argument; raises UnsupportedError for one that none can hold."""
    if 0 <= number < 256:
        return _SMALL[number]
    if 0 <= number < 65536:
        return b"M" + struct.pack("<H", number)
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    raw = _shortest(number)
    if len(raw) < 256:
        return b"\x8a" + bytes((len(raw),)) + raw
    if len(raw) >= 1 << 31:
        raise UnsupportedError("an integer is too large to be pickled")
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def _shortest(number: int) -> bytes:
    """Two's complement in as few bytes as it takes (CPython's `pickle.encode_long`)."""
    size = number.bit_length() // 8 + 1
    raw = number.to_bytes(size, "little", signed=True)
    return raw[:-1] if number < 0 and size > 1 and raw[-1] == 0xFF and raw[-2] & 0x80 else raw


def str_head(nbytes: int) -> bytes:
    """Return what stands before the UTF-8 of a str."""
    return b"X" + struct.pack("<I", nbytes) if nbytes < 1 << 32 else b"\x8d" + struct.pack("<Q", nbytes)


def bytes_head(nbytes: int) -> bytes:
    """Return what stands before bytes."""
    if nbytes < 256:
        return b"C" + bytes((nbytes,))
    return b"B" + struct.pack("<I", nbytes) if nbytes < 1 << 32 else b"\x8e" + struct.pack("<Q", nbytes)


def raw_head(nbytes: int) -> bytes:
    """Return what stands before the bytes of a string of Python 2."""
    return b"U" + bytes((nbytes,)) if nbytes < 256 else b"T" + struct.pack("<i", nbytes)


def extension(code: int) -> bytes:
    """Return the opcode of a code of copyreg's registry, with the code."""
    if 0 <= code < 256:
        return b"\x82" + bytes((code,))
    return b"\x83" + struct.pack("<H", code) if 0 <= code < 65536 else b"\x84" + struct.pack("<i", code)
