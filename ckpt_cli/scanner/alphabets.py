"""Text that stands for bytes: base64, hex, base32, base85, uuencode and Python's escapes.

Decoders are as lenient as Python's: what they pass over is passed over. Texts in base85 look like any other, so only
their beginning is decoded to see what they are. Sources: CPython's Lib/base64.py, RFC 4648, RFC 1924.
"""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice

Encoded = Iterator[tuple[str, bytes]]
"""The name of an encoding, and the bytes that a text would stand for."""

_RUNS = 1_000
"""Runs of one text that are decoded."""

_SHORTEST = 24
"""Characters of a run."""

_LOOK = 80
"""Characters of a text in base85 that are decoded to see whether the rest is worth it: 64 bytes."""

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_NOT_BASE64 = bytes(byte for byte in range(256) if byte not in _BASE64)
_NOT_URL_SAFE = bytes(byte for byte in range(256) if byte not in _BASE64 + b"-_")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_NOT_HEX = bytes(byte for byte in range(256) if byte not in b"0123456789abcdefABCDEF")

_RUN = re.compile(rb"[A-Za-z0-9+/_-]{24,}(?:\r?\n[A-Za-z0-9+/_-]+)*")
_HEX_RUN = re.compile(rb"(?:[0-9a-fA-F]{2}){20,}")
_LETTERS = re.compile(rb"[0-9A-Za-z]{32,}")
_BASE85_RUN = re.compile(rb"[0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]{25,}")
_ASCII85 = re.compile(rb"\s*(?:<~)?([!-uyz\s]{25,})(?:~>)?\s*")
_ASCII85_RUN = re.compile(rb"<~([!-uz\s]{25,}?)~>")
_ESCAPES = re.compile(rb"\\x[0-9a-fA-F]{2}|\\n")

_PLAIN_32 = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", bytes(range(32)))
_HEX_32 = bytes.maketrans(b"0123456789ABCDEFGHIJKLMNOPQRSTUV", bytes(range(32)))
_DIGITS_85 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_PLAIN_85 = bytes.maketrans(_DIGITS_85, bytes(range(85)))
_ASCII_85 = bytes.maketrans(bytes(range(33, 118)), bytes(range(85)))
_AROUND = (b"``", b"()", b"<>", b"{}")
"""Characters around a run, which base85 has too."""

_WHITE = b" \t\r\n\v\f"


def whole(text: bytes, promising: Callable[[bytes], bool]) -> Encoded:
    """The text as a whole, decoded as leniently as Python does: what is not of the alphabet is passed over.

    Of what is decoded at length, only what is `promising` by its first bytes.
    """
    yield "base64", _base64(text.translate(None, _NOT_BASE64))
    if b"-" in text or b"_" in text:
        yield "base64", _base64(text.translate(_URL_SAFE, _NOT_URL_SAFE))
    digits = text.translate(None, _NOT_HEX)
    if len(digits) * 2 >= len(text):  # white space, colons or a prefix between them, but not any text
        yield "hex", _hex(digits)
    if _LETTERS.match(text):
        yield from _base32(text)
    if _BASE85_RUN.fullmatch(text):
        yield from _base85(text, _PLAIN_85, promising)
    if match := _ASCII85.fullmatch(text):
        yield from _base85(match[1].translate(None, _WHITE), _ASCII_85, promising)
    if b"\\" in text and _ESCAPES.search(text):
        yield "escapes", _unescaped(text)
    if text[:6] == b"begin ":
        yield "uuencode", _uuencoded(text)


def runs(text: bytes, promising: Callable[[bytes], bool]) -> Encoded:
    """The parts of a longer text that are encoded."""
    for match in islice(_ASCII85_RUN.finditer(text), _RUNS):
        yield from _base85(match[1].translate(None, _WHITE), _ASCII_85, promising)
    words = [word for word in text.split() if len(word) >= _SHORTEST]  # prose has none
    if not words:
        return
    for match in islice(_RUN.finditer(text), _RUNS):
        if match.end() - match.start() < len(text):
            yield "base64", _base64(match[0].translate(_URL_SAFE, _NOT_URL_SAFE))
    found = 0
    for word in words:
        for how, content in _runs_of_word(word, text, promising):
            yield how, content
            found += 1
            if found >= _RUNS:
                return


def _runs_of_word(word: bytes, text: bytes, promising: Callable[[bytes], bool]) -> Encoded:
    """The parts that are encoded without white space, but for one that is the whole text."""
    for run in _LETTERS.findall(word):
        for match in _HEX_RUN.finditer(run):
            if match[0] != text:
                yield "hex", _hex(match[0])
        if run != text:
            yield from _base32(run)
    for run in _BASE85_RUN.findall(word):
        if run[:1] + run[-1:] in _AROUND:
            yield from _base85(run[1:-1], _PLAIN_85, promising)
        if run != text:
            yield from _base85(run, _PLAIN_85, promising)


def _base64(digits: bytes) -> bytes:
    if len(digits) % 4 == 1:
        digits = digits[:-1]
    return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4))


def _hex(digits: bytes) -> bytes:
    return binascii.unhexlify(digits[: len(digits) // 2 * 2])


def _base32(text: bytes) -> Encoded:
    """Both alphabets of RFC 4648, in either case."""
    digits = text.rstrip(b"= \t\r\n").upper()
    if not set(digits) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"):
        yield "base32", _from_base(digits.translate(_PLAIN_32), 5)
    if not set(digits) - set(b"0123456789ABCDEFGHIJKLMNOPQRSTUV"):
        yield "base32", _from_base(digits.translate(_HEX_32), 5)


def _from_base(values: bytes, bits: int) -> bytes:
    """Return the bytes whose bits, `bits` at a time, are some values."""
    parts = []
    for begin in range(0, len(values) - 7, 8):
        number = 0
        for value in values[begin : begin + 8]:
            number = number << bits | value
        parts.append(number.to_bytes(5, "big"))
    rest = values[len(values) // 8 * 8 :]
    number = 0
    for value in rest:
        number = number << bits | value
    spare = len(rest) * bits % 8
    parts.append((number >> spare).to_bytes(len(rest) * bits // 8, "big"))
    return b"".join(parts)


def _base85(text: bytes, alphabet: bytes, promising: Callable[[bytes], bool]) -> Encoded:
    """Groups of five digits that are four bytes; `z` and `y` are groups of zeros and of spaces in the one of Adobe."""
    name = "base85"
    if alphabet is _ASCII_85:
        name = "ascii85"
        text = text.replace(b"z", b"!!!!!").replace(b"y", b"+<VdL")
    if promising(_from_base85(text[:_LOOK], alphabet)):
        yield name, _from_base85(text, alphabet)


def _from_base85(text: bytes, alphabet: bytes) -> bytes:
    missing = -len(text) % 5
    digits = (text + b"~u"[alphabet is _ASCII_85 :][:1] * missing).translate(alphabet)
    numbers = [
        (((a * 85 + b) * 85 + c) * 85 + d) * 85 + e & 0xFFFFFFFF
        for a, b, c, d, e in zip(digits[::5], digits[1::5], digits[2::5], digits[3::5], digits[4::5], strict=True)
    ]
    content = struct.pack(f">{len(numbers)}I", *numbers)
    return content[: len(content) - missing]


def _uuencoded(text: bytes) -> bytes:
    """Return what the lines after the first stand for, up to one that is not uuencoded."""
    content = bytearray()
    try:
        for line in text.splitlines()[1:]:
            content += binascii.a2b_uu(line)
    except binascii.Error:
        pass
    return bytes(content)


def _unescaped(text: bytes) -> bytes:
    """Return what a literal of Python stands for: repr of bytes, with or without its quotes."""
    text = text.strip()
    if text[:2] in (b"b'", b'b"'):
        text = text[2:-1]
    named = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b"'": b"'", b'"': b'"'}
    return _ESCAPE.sub(lambda match: bytes((int(match[2], 16),)) if match[2] else named[match[1]], text)


_ESCAPE = re.compile(rb"""\\(?:([nrt\\'"])|x([0-9a-fA-F]{2}))""")
