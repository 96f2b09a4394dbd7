"""CRC-32 of a record after a patch, from the patched bytes alone, and of pieces that were summed apart.

CRC-32 is linear over GF(2): the checksum of a changed record is the old one XOR a term that depends only on the
old bytes, the new bytes and how many bytes follow them. So an edit of 4 bytes in a 100 GB record costs 64 steps,
not 100 GB. The arithmetic is that of zlib's `crc32_combine` (crc32.c), which CPython offers only from 3.15.
"""

from __future__ import annotations

import zlib

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1: bit 31 is x⁰ in the reflected order of CRC-32."""


def _multiply(a: int, b: int) -> int:
    """a·b modulo the CRC polynomial."""
    product = 0
    bit = _ONE
    while True:
        if a & bit:
            product ^= b
            if not a & (bit - 1):
                return product
        bit >>= 1
        if not bit:
            return product
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1


def _shift(crc: int, nbytes: int) -> int:
    """The register `crc` after `nbytes` zero bytes: crc·x^(8·nbytes)."""
    power = _ONE >> 8  # x⁸
    while nbytes and crc:
        if nbytes & 1:
            crc = _multiply(power, crc)
        power = _multiply(power, power)
        nbytes >>= 1
    return crc


def change(old: bytes, new: bytes, following: int) -> int:
    """Return the value to XOR into a record's CRC-32 when `old` becomes `new` with `following` bytes after them."""
    if len(old) != len(new):
        raise ValueError("a patch must not change the number of bytes")
    return _shift(zlib.crc32(old) ^ zlib.crc32(new), following)


def of_zeros(nbytes: int, crc: int = 0) -> int:
    """Return the CRC-32 of the same data with `nbytes` zero bytes appended: `zlib.crc32(bytes(nbytes), crc)`."""
    return _shift(crc ^ 0xFFFFFFFF, nbytes) ^ 0xFFFFFFFF


def combine(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of two pieces, from the CRC of each; the second has `nbytes` bytes."""
    return _shift(first, nbytes) ^ second
