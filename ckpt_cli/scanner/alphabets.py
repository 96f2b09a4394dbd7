"""Text that stands for bytes: base64, hex, base32, base85, uuencode, escapes, and lists of numbers.

Decoders are as lenient as Python's: what they pass over is passed over. Texts in base85 look like any other, so only
their beginning is decoded to see what they are. Sources: CPython's Lib/base64.py, RFC 4648, RFC 1924.
"""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice

from ckpt_cli.scanner.transforms import rotated, turned

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
_HEX_DIGITS = b"0123456789abcdefABCDEF"
_NOT_HEX = bytes(byte for byte in range(256) if byte not in _HEX_DIGITS)

_RUN = re.compile(rb"[A-Za-z0-9+/_-]{24,}(?:\r?\n[A-Za-z0-9+/_-]+)*")
_HEX_RUN = re.compile(rb"(?:[0-9a-fA-F]{2}){20,}")
_LETTERS = re.compile(rb"[0-9A-Za-z]{32,}")
_BASE85_RUN = re.compile(rb"[0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]{25,}")
_ASCII85 = re.compile(rb"\s*(?:<~)?([!-uyz\s]{25,})(?:~>)?\s*")
_ASCII85_RUN = re.compile(rb"<~([!-uz\s]{25,}?)~>")
_ESCAPES = re.compile(rb"\\(?:x[0-9a-fA-F]{2}|u00[0-9a-fA-F]{2}|[0-7]{3}|n)")
_PERCENTS = re.compile(rb"%80%0[0-5]|%0[aA]")
_QUOTED = re.compile(rb"=80=0[0-5]|=0A|=\r?\n")

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
    yield from _with_escapes(text)
    if (plain := rotated(text)) is not None:
        yield "rot13", plain
    yield from _turned(text)
    if text[:6] == b"begin ":
        yield "uuencode", _uuencoded(text)


def _with_escapes(text: bytes) -> Encoded:
    """A text in which signs stand for bytes, beside others that stand for themselves."""
    if b"\\" in text and _ESCAPES.search(text):
        yield "escapes", _unescaped(text)
    if b"%" in text and (match := _PERCENTS.search(text)):
        yield "percent signs", _PERCENT.sub(_byte_of, text[_begin_of(match) :])
    if b"=" in text and (match := _QUOTED.search(text)):
        yield "quoted-printable", binascii.a2b_qp(text[_begin_of(match) :])


def runs(text: bytes, promising: Callable[[bytes], bool]) -> Encoded:
    """The parts of a longer text that are encoded, and its lists of numbers."""
    yield from number_lists(text, promising)
    for match in islice(_ASCII85_RUN.finditer(text), _RUNS):
        yield from _base85(match[1].translate(None, _WHITE), _ASCII_85, promising)
    words = [word for word in text.split() if len(word) >= _SHORTEST]  # prose has none
    if not words:
        return
    for match in islice(_RUN.finditer(text), _RUNS):
        if match.end() - match.start() < len(text):
            yield "base64", _base64(match[0].translate(_URL_SAFE, _NOT_URL_SAFE))
            yield from _turned(match[0])
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


def _turned(digits: bytes) -> Encoded:
    """Base64 and hex that are read backwards, or in rot13."""
    for how, plain in turned(digits):
        yield f"{how} base64", _base64(plain.translate(_URL_SAFE, _NOT_URL_SAFE))
        if not plain.rstrip(_WHITE).translate(None, _HEX_DIGITS):
            yield f"{how} hex", _hex(plain)


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
    return _ESCAPE.sub(_meant, text)


_ESCAPE = re.compile(rb"""\\(?:([nrt\\'"])|(?:x|u00)([0-9a-fA-F]{2})|([0-3]?[0-7]{1,2}))""")
_MEANT = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b"'": b"'", b'"': b'"'}


def _meant(match: re.Match[bytes]) -> bytes:
    if match[1]:
        return _MEANT[match[1]]
    return bytes((int(match[2], 16) if match[2] else int(match[3], 8),))


_PERCENT = re.compile(rb"%([0-9a-fA-F]{2})")


def _byte_of(match: re.Match[bytes]) -> bytes:
    return bytes((int(match[1], 16),))


def _begin_of(match: re.Match[bytes]) -> int:
    """Return the place of what looks like the protocol of a pickle; 0, the whole text, for the end of a line."""
    return match.start() if b"80" in match[0] else 0


# --- lists of numbers -------------------------------------------------------------------------------------------------

_BYTE = rb"(?:0[xX][0-9a-fA-F]{1,2}|[0-9]{1,3})"
_NUMBERS = re.compile(rb"(?<![\w.])(?:%b[^\w.]{1,8}){15,}%b" % (_BYTE, _BYTE))
_NUMBER = re.compile(rb"\w+")

_LOOK_NUMBERS = 400
"""Characters of a list of numbers that are read to see whether the rest is worth it."""


def number_lists(text: bytes, promising: Callable[[bytes], bool]) -> Encoded:
    """The lists of numbers below 256, decimal or with `0x`, whose first ones may begin a pickle."""
    for match in islice(_NUMBERS.finditer(text), _RUNS):
        if promising(_numbers(match[0][:_LOOK_NUMBERS])):
            yield "numbers", _numbers(match[0])


def _numbers(text: bytes) -> bytes:
    """Return the bytes of a list of numbers, up to one that is not a byte."""
    found = bytearray()
    for digits in _NUMBER.findall(text):
        value = int(digits, 16) if digits[1:2] in (b"x", b"X") else int(digits)
        if value > 255:
            break
        found.append(value)
    return bytes(found)
