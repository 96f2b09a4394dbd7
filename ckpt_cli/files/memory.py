"""Files in memory: bytes that are read as a file, and a folder of them, in which a checkpoint may lie wholly."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from ckpt_cli.errors import TruncatedError
from ckpt_cli.files.places import SEPARATOR, folder_of, join
from ckpt_cli.files.source import Identity


class MemorySource:
    """Bytes in memory that read as a file.

    Of a longer file they may be the beginning: `size` is then that of all of it, reading what is not in memory raises
    TruncatedError, and a view ends where the bytes do.
    """

    begin = 0
    in_memory = True
    fd = -1
    writable = False

    def __init__(self, data: bytes | bytearray | memoryview, path: str = "", size: int | None = None) -> None:
        self._data = memoryview(data).toreadonly()
        self.path = path
        self.size = len(self._data) if size is None else size
        """Bytes in the file."""
        self.seen: Identity = (0, 0, self.size, 0)
        self.was_read = False
        self.on_read: Callable[[], None] | None = None

    @property
    def whole(self) -> MemorySource:
        """The source itself."""
        return self

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`; raises TruncatedError where they are not all in memory."""
        self.check(offset, nbytes)
        found = bytes(self._data[offset : offset + nbytes])
        if len(found) < nbytes:
            raise TruncatedError(f"bytes {offset}–{offset + nbytes} are not there", path=self.path or None)
        return found

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises TruncatedError where they are not all in memory."""
        buffer[:] = self.read(offset, len(buffer))

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return the bytes, as far as they are in memory, without a copy."""
        self.check(offset, nbytes)
        return self._data[offset : offset + nbytes]

    def expect(self, offset: int, nbytes: int) -> None:
        """Do nothing: the bytes are there."""

    def will_read(self, ranges: Sequence[tuple[int, int]], sampled: Sequence[tuple[int, int]] = ()) -> None:
        """Do nothing: the bytes are there."""

    def expect_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: the bytes are there."""

    def check(self, offset: int, nbytes: int) -> None:
        """Raise TruncatedError for a range that is not all there."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise TruncatedError(
                f"bytes {offset}–{offset + nbytes} are promised, the file has {self.size}", path=self.path or None
            )

    def note_whole(self) -> None:
        """Do nothing: the bytes are there."""

    def note_read(self) -> None:
        """Note that a value is read."""
        self.on_read, self.was_read = None, True

    def has_changed(self) -> bool:
        """Return False: no one else changes it."""
        return False

    def is_whole(self) -> bool:
        """Return True: no one else changes it."""
        return True

    def forget(self) -> None:
        """Do nothing: views take no memory of their own."""

    def close(self) -> None:
        """Do nothing: its bytes go when nothing refers to them."""

    def __reduce__(self) -> tuple[type[MemorySource], tuple[bytes, str, int]]:
        return MemorySource, (bytes(self._data), self.path, self.size)


class MemoryFolder:
    """Files in memory: bytes by their whole path, such as `memory://folder/model.pt`."""

    is_local = False

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)
        self._folders = {f"{path.partition(SEPARATOR)[0]}{SEPARATOR}" for path in files}
        for path in files:
            while (path := folder_of(path)) not in self._folders:
                self._folders.add(path)

    def is_folder(self, path: str) -> bool:
        """True if a path is a folder."""
        return self.canonical(path) in self._folders

    def is_file(self, path: str) -> bool:
        """True if a path is a file."""
        return path in self._files

    def exists(self, path: str) -> bool:
        """True if there is something at a path."""
        return self.is_file(path) or self.is_folder(path)

    def is_link(self, path: str) -> bool:  # noqa: ARG002
        """Return False: there are no links."""
        return False

    def is_taken(self, path: str) -> bool:
        """True if there is something at a path."""
        return self.exists(path)

    def size_of(self, path: str) -> int:
        """Return the number of bytes of a file."""
        return len(self._bytes(path))

    def names_in(self, path: str, most: int | None = None) -> list[str]:
        """Return the sorted names in a folder."""
        if not self.is_folder(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        start = join(self.canonical(path), "")
        names = {found[len(start) :].partition("/")[0] for found in self._files if found.startswith(start)}
        return sorted(names)[:most]

    def leading_names(self, path: str) -> list[str]:
        """Return the names in a folder."""
        return self.names_in(path)

    def is_listed(self, path: str) -> bool:  # noqa: ARG002
        """Return True."""
        return True

    def present(self, path: str, names: Sequence[str]) -> list[str]:
        """Return the names that are files in a folder."""
        return [name for name in names if self.is_file(join(path, name))]

    def files_below(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield each file of a folder, those of its subfolders after its own."""
        names = self.names_in(path)
        yield from ((name, join(path, name)) for name in names if self.is_file(join(path, name)))
        for name in names:
            if not name.startswith(".") and self.is_folder(join(path, name)):
                yield from ((f"{name}/{inner}", found) for inner, found in self.files_below(join(path, name)))

    def open(self, path: str) -> MemorySource:
        """Open a file."""
        return MemorySource(self._bytes(path), path)

    def begin_all(self, paths: Sequence[str]) -> None:
        """Do nothing: the files are there."""

    def head_of(self, path: str, nbytes: int) -> bytes:
        """Return at most the first `nbytes` bytes of a file."""
        return self._bytes(path)[:nbytes]

    def can_write(self, path: str) -> bool:  # noqa: ARG002
        """Return False: its files stay as they are."""
        return False

    def links_of(self, path: str) -> int:
        """Return 1, as a file in memory has one name."""
        self._bytes(path)
        return 1

    def identity_of(self, path: str) -> Identity | None:
        """Return the state that a source of the file has; None where there is no file."""
        return self.open(path).seen if path in self._files else None

    def is_same(self, path: str, other: str) -> bool:
        """True if two paths are one."""
        return self.exists(path) and self.canonical(path) == self.canonical(other)

    def canonical(self, path: str) -> str:
        """Return the path without slashes at its end."""
        scheme, separator, rest = path.partition(SEPARATOR)
        return scheme + separator + rest.rstrip("/")

    def _bytes(self, path: str) -> bytes:
        if path in self._files:
            return self._files[path]
        number = errno.EISDIR if self.is_folder(path) else errno.ENOENT
        raise OSError(number, os.strerror(number), path)
