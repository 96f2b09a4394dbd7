"""Bytes in another order, width or alphabet: backwards, UTF-16 and UTF-32, wide integers, and rot13.

A transform is undone only where what it would yield may begin a pickle or packed data, so that it costs ordinary data
a look at their first bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

OPENERS = frozenset(b"(])}NILSVTUXcFGJKMBC\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x95\x96PdltE")
"""Opcodes that a pickle without a protocol can begin with."""

_ROTATED_NAME = re.compile(rb"[pv][A-Za-z_][\w.]{0,99}\n[A-Za-z_][\w.]{0,99}\n(?:[^\w\s]|c[0-9]|d[\0-\x1f])")
"""GLOBAL or INST in rot13, its module and name, and the beginning of its arguments, or a PUT."""

_LOOK = 96
"""Bytes of the result of a transform that are looked at."""

_ROT13 = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", b"NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm"
)

_DIGITS_64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _leads() -> str:
    """Return a pattern for the first characters of the base64 or hex of a pickle, a zip file or compressed data."""
    firsts = ["gA[A-X]", "UEsD", "H4sI", "Qlpo", "/Td6", "KLUv", "k05V", "e[AFJN]", "800[0-5]", "504b0304", "1f8b08"]
    firsts += ["425a68", "fd377a", "28b52ffd", "934e55", "78(?:01|5e|9c|da)"]
    for byte in sorted(OPENERS):
        second = _DIGITS_64[(byte & 3) << 4 : ((byte & 3) << 4) + 16]
        firsts += [f"{_DIGITS_64[byte >> 2]}[{second}]", f"{byte:02x}"]
    return "|".join(firsts)


_LEADS = re.compile(_leads().encode())
_PACKED = re.compile(
    rb"\x80[\x00-\x05]|PK\x03\x04|\x1f\x8b\x08|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|\x93NUMPY|x[\x01\x5e\x9c\xda]"
)

_PADDING = b"= \t\r\n"


def turned(digits: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield digits of base64 or hex backwards, and out of rot13, where they may then be those of a pickle."""
    tail = digits[: -_LOOK - 1 : -1].lstrip(_PADDING)
    if _LEADS.match(tail) or _LEADS.match(tail.lower()):
        yield "reversed", digits[::-1].lstrip(_PADDING)
    head = digits[:8].translate(_ROT13)
    if _LEADS.match(head) or _LEADS.match(head.lower()):
        yield "rot13", digits.translate(_ROT13)


def rotated(text: bytes) -> bytes | None:
    """Return a text out of rot13, if it then imports a name as pickles of protocol 0 to 3 do; else None."""
    return text.translate(_ROT13) if b"\n" in text and _ROTATED_NAME.search(text) else None


def backwards(data: bytes | memoryview) -> bytes | None:
    """Return data backwards, if they then begin as a pickle, a zip file or compressed data do; else None."""
    tail = bytes(data[-_LOOK:])[::-1]
    opens = data[:1] == b"." and tail[:1] and tail[0] in OPENERS and (tail.count(b"\n") > 1 or b"\x93" in tail)
    return bytes(data)[::-1] if opens or _PACKED.match(tail) else None


def narrowed(data: bytes | memoryview, promising: Callable[[bytes], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the low bytes of text in UTF-16 or UTF-32, or of an array of integers, where these are below 256."""
    head = bytes(data[: 8 * _LOOK])
    if b"\0" not in head[:8]:
        return
    mark = next((len(mark) for mark in _MARKS if head.startswith(mark)), 0)
    for width in (8, 4, 2):
        for place in {0, width - 1}:
            low = head[mark + place :: width]
            rest = bytearray(head[mark:])
            del rest[place::width]
            if len(low) >= _FEWEST and not any(rest) and promising(low[:_LOOK]):
                yield f"low bytes of {8 * width} bits", bytes(data[mark + place :: width])
                return


UNDONE_TWICE = ("rot13", "reversed")
"""Transforms that undo themselves, so that what comes of one is not put through it again."""

_MARKS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\xff\xfe", b"\xfe\xff")
"""The marks that a text in UTF-32 or UTF-16 may begin with."""

_FEWEST = 12
"""Numbers or characters in which a pickle that does something has room."""
