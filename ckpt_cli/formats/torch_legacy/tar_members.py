"""The members of a tar file: where each one's bytes are, from the headers alone.

The layout is POSIX's ustar with pax's extended headers and GNU's numbers in base 256 (POSIX.1-2017, pax; GNU tar's
manual, "Basic Tar Format").
"""

from __future__ import annotations

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError
from ckpt_cli.files.source import SourceFile, Window

_BLOCK = 512
_FILES = (b"0", b"\0")
_EXTENDED, _GLOBAL = b"x", b"g"
_EXTENDED_BYTES = 64 << 10
"""Bytes of an extended header that are looked at: names and sizes are short."""


def members(file: SourceFile) -> dict[str, Window]:
    """The regular files in a tar file by their names; of several of one name, the last, as tarfile takes it.

    Raises MalformedError, TruncatedError or LimitError for a file that is no sound tar.
    """
    found: dict[str, Window] = {}
    position = 0
    extended: dict[str, str] = {}
    for _ in range(limits.TAR_MEMBERS):
        if position + _BLOCK > file.size:
            raise TruncatedError(f"the tar file ends at byte {file.size}, before its end mark")
        header = file.read(position, _BLOCK)
        if not any(header):
            return found
        kind = header[156:157]
        name, size = _text(header[:100]), _number(header[124:136])
        if kind not in (_EXTENDED, _GLOBAL):
            name, size = extended.get("path", name), _decimal(extended.get("size"), size)
        if _number(header[148:156]) != sum(header[:148]) + 256 + sum(header[156:]):
            raise MalformedError(f"the tar header at byte {position} does not have its own checksum")
        begin = position + _BLOCK
        if begin + size > file.size:
            raise TruncatedError(f"member {name!r} needs bytes {begin}–{begin + size}, the file has {file.size}")
        if kind == _EXTENDED:
            extended = _records(file.read(begin, min(size, _EXTENDED_BYTES)))
        elif kind != _GLOBAL:
            if kind in _FILES:
                found[name] = Window(file, begin, size)
            extended = {}
        position = begin + -(-size // _BLOCK) * _BLOCK
    raise LimitError(f"a tar file of more than {limits.TAR_MEMBERS} members")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or from GNU tar a number in base 256 after a byte of 128."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise MalformedError(f"a tar header has {field!r} in the place of a number") from None


def _decimal(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else default


def _records(data: bytes) -> dict[str, str]:
    """The records of a pax header: `LENGTH KEY=VALUE` and a newline each, whose length counts all of it."""
    found = {}
    position = 0
    while position < len(data):
        length, space, _ = data[position : position + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        record = data[position + len(length) + 1 : position + int(length) - 1]
        key, _, value = record.partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += int(length)
    return found
