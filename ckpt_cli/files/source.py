"""Sources of bytes, of which only the ranges asked for are read: open files, and parts of them or of other sources."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from functools import cache
from types import TracebackType
from typing import BinaryIO, Protocol

from ckpt_cli.errors import ChangedError, FormatError, TruncatedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files import system


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a file in which bytes are stored unencoded."""

    file: SourceFile
    offset: int
    """The first byte."""
    nbytes: int
    """The number of bytes."""

    def cut(self, offset: int, nbytes: int) -> Extent:
        """A part of it."""
        return Extent(self.file, self.offset + offset, nbytes)


Identity = tuple[int, int, int, int]
"""The identity of a file and its state: device, inode, bytes, and the time of the last change of its content."""


class ByteSource(Protocol):
    """Bytes that are read by ranges: a file here or elsewhere, a part of one, or bytes in memory.

    It can be pickled and then reads the same bytes in another process. Ranges may be read from several threads.
    """

    @property
    def path(self) -> str:
        """The path of the file, for messages."""

    @property
    def size(self) -> int:
        """Bytes in it."""

    @property
    def begin(self) -> int:
        """Its first byte within the whole file; 0 for a whole file."""

    @property
    def whole(self) -> SourceFile:
        """The whole file that it is a part of; itself where it is one."""

    @property
    def in_memory(self) -> bool:
        """True if its bytes are in memory, so that a view of any length costs nothing."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`; raises TruncatedError where it is too short."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises TruncatedError where it is too short."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return the bytes as a read-only view, which need not be copied."""

    def expect(self, offset: int, nbytes: int) -> None:
        """Begin to fetch a range that will be read; never waits."""

    def will_read(self, ranges: Sequence[tuple[int, int]], sampled: Sequence[tuple[int, int]] = ()) -> None:
        """Note ranges, pairs of offset and bytes, that will be read, in about this order; what is elsewhere needs it.

        It fetches nothing, but neighbours among them are later fetched together. What is `sampled` is read once before.
        """

    def expect_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch many small ranges, pairs of offset and bytes, that will be read: at once where each costs a request.

        It waits until they are there, and does nothing for what is read fast one by one. Ranges outside are left out.
        """

    def check(self, offset: int, nbytes: int) -> None:
        """Raise TruncatedError for a range that is not all there."""

    def forget(self) -> None:
        """Give back the memory that views have taken; their bytes are fetched again when they are touched again."""

    def close(self) -> None:
        """Close it; views handed out stay valid until they are dropped."""


class SourceFile(ByteSource, Protocol):
    """A whole file of a checkpoint as a source, with what shows whether it changed since it was opened."""

    @property
    def fd(self) -> int:
        """Its file descriptor, by which the system copies and locks it; -1 where it has none."""

    @property
    def writable(self) -> bool:
        """True if it was opened to be written."""

    @property
    def seen(self) -> Identity:
        """Its identity and state when it was opened, to be compared with what its folder says of it later."""

    was_read: bool
    """True if values were read from it without a lock."""
    on_read: Callable[[], None] | None
    """Called before the first read of a value, once the document has been read (`files/unchanged.py`)."""

    def note_read(self) -> None:
        """Note that a value is read."""

    def note_whole(self) -> None:
        """Note that nearly all of it will be read, so that what lies between small ranges may be fetched with them."""

    def has_changed(self) -> bool:
        """True if its content is not the one that was opened, as far as can be seen; False once closed."""

    def is_whole(self) -> bool:
        """True if it still has the bytes that it had when it was opened."""


PREAD_LIMIT = 1 << 20
"""Bytes up to which a view is read rather than mapped: cheaper, and exact about what is touched."""


class LocalFile:
    """An open regular file of which only the ranges asked for are read.

    Raises OSError when it cannot be opened and FormatError when it is not a regular file; without `follow`, a
    symbolic link is an error. With `create` it is a new file, and whatever has its name already is an error. With `fd`
    it is the file that is open there, which is closed with it, and the path is its name in messages.
    """

    begin = 0
    in_memory = False

    def __init__(
        self, path: str, *, write: bool = False, follow: bool = True, create: bool = False, fd: int = -1
    ) -> None:
        self.path = path
        self.writable = write
        """True if it was opened to be written."""
        self.fd = fd
        if fd < 0:
            if not system.OPENS_ANYTHING and not create:
                self._require_regular(os.stat(path) if follow else os.lstat(path))
            self.fd = system.open_file(path, write=write, follow=follow, create=create)
        info = os.fstat(self.fd)
        self._require_regular(info)
        self.size = info.st_size
        """Bytes in the file when it was opened."""
        self.seen = self.identity(info)
        """Device, inode, bytes and time of the last change when it was opened."""
        self.on_read: Callable[[], None] | None = None
        """Called before the first read of a value, once the document has been read (`files/unchanged.py`)."""
        self.was_read = False
        """True if values were read, without a lock."""
        self.links = info.st_nlink
        """Names that it had then: more than one with hard links."""
        self._map: mmap.mmap | None = None

    def _require_regular(self, info: os.stat_result) -> None:
        """Close it and raise an error where it is not a regular file."""
        if stat.S_ISREG(info.st_mode):
            return
        self.close()
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)
        raise FormatError("not a regular file, so it has no ranges to read", path=self.path)

    @property
    def whole(self) -> LocalFile:
        """The file itself."""
        return self

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`; raises TruncatedError where the file is too short."""
        self.check(offset, nbytes)
        if (on_read := self.on_read) is not None:
            on_read()
        data = system.read_at(self.fd, nbytes, offset)
        if len(data) < nbytes:
            pieces = [data]
            got = len(data)
            while got < nbytes:
                piece = system.read_at(self.fd, nbytes - got, offset + got)
                if not piece:
                    raise TruncatedError(f"became shorter than byte {offset + nbytes} while read", path=self.path)
                pieces.append(piece)
                got += len(piece)
            data = b"".join(pieces)
        return data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises TruncatedError where the file is too short."""
        self.check(offset, len(buffer))
        if (on_read := self.on_read) is not None:
            on_read()
        done = 0
        while done < len(buffer):
            got = system.read_into_at(self.fd, buffer[done:], offset + done)
            if not got:
                raise TruncatedError(f"became shorter than byte {offset + len(buffer)} while read", path=self.path)
            done += got

    def expect(self, offset: int, nbytes: int) -> None:
        """Have the system begin to read bytes that will be asked for: readers on several threads look random to it."""
        system.begin_to_read(self.fd, offset, nbytes)

    def will_read(self, ranges: Sequence[tuple[int, int]], sampled: Sequence[tuple[int, int]] = ()) -> None:
        """Do nothing: each range is asked for when its turn comes."""

    def expect_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: small ranges are read fast one by one."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes as a read-only view: a small range is read, a large one is mapped and costs what is touched."""
        if nbytes <= PREAD_LIMIT:
            return memoryview(self.read(offset, nbytes))
        self.check(offset, nbytes)
        if (on_read := self.on_read) is not None:
            on_read()
        if self._map is None:
            try:
                self._map = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ)
            except ValueError:
                raise TruncatedError(f"became shorter than {self.size} bytes while read", path=self.path) from None
        return memoryview(self._map)[offset : offset + nbytes]

    def stream(self) -> BinaryIO:
        """Return a buffered stream that writes to the file from its beginning; closing it leaves the file open."""
        return open(self.fd, "wb", closefd=False)

    @staticmethod
    def identity(info: os.stat_result) -> Identity:
        """Return the identity of a file and its state: device, inode, bytes and the time of the last change."""
        return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns

    def note_whole(self) -> None:
        """Do nothing: small ranges are read fast one by one."""

    def note_read(self) -> None:
        """Note that a value is read."""
        self.on_read = None
        self.was_read = True

    def look_again(self) -> os.stat_result:
        """Take note of the state that the file has now."""
        info = os.fstat(self.fd)
        self.size, self.seen = info.st_size, self.identity(info)
        return info

    def has_changed(self) -> bool:
        """True if the content is not the one that was opened, as far as its size and time show; False once closed."""
        return self.fd >= 0 and self.identity(os.fstat(self.fd)) != self.seen

    def is_whole(self) -> bool:
        """True if it still has the bytes that it had when it was opened."""
        return os.fstat(self.fd).st_size >= self.size

    def forget(self) -> None:
        """Give back the memory of mapped bytes that were touched; they are read again when touched again."""
        if self._map is not None:
            system.drop_pages(self._map)

    def check(self, offset: int, nbytes: int) -> None:
        """Raise TruncatedError for a range that is not all there."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise TruncatedError(
                f"bytes {offset}–{offset + nbytes} are promised, the file has {self.size}", path=self.path
            )

    def close(self) -> None:
        """Close the file; views handed out stay valid until they are dropped."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __reduce__(self) -> tuple[Callable[[str, Identity], LocalFile], tuple[object, ...]]:
        return _reopened, (os.path.abspath(self.path), self.seen)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@cache
def _reopened(path: str, seen: Identity) -> LocalFile:
    """A file of another process, open in this one as long as it lives; raises ChangedError if it is another state."""
    file = LocalFile(path)
    if file.seen != seen:
        file.close()
        raise ChangedError(path)
    return file


class Window:
    """A part of a source that reads as a file of its own: a record, or one of several saves in a stream.

    Raises TruncatedError where the source does not have all of it.
    """

    def __init__(self, source: ByteSource, begin: int, size: int) -> None:
        source.check(begin, size)
        self.whole: SourceFile = source.whole
        self.path: str = source.path
        self.begin: int = source.begin + begin
        """Its first byte within the whole file."""
        self.size = size
        """Bytes in it."""
        self.in_memory: bool = source.in_memory

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`."""
        self.check(offset, nbytes)
        return self.whole.read(self.begin + offset, nbytes)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`."""
        self.check(offset, len(buffer))
        self.whole.read_into(buffer, self.begin + offset)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return the bytes as a read-only view, as the whole file gives it."""
        self.check(offset, nbytes)
        return self.whole.view(self.begin + offset, nbytes)

    def expect(self, offset: int, nbytes: int) -> None:
        """Begin to fetch a range that will be read."""
        self.whole.expect(self.begin + offset, nbytes)

    def will_read(self, ranges: Sequence[tuple[int, int]], sampled: Sequence[tuple[int, int]] = ()) -> None:
        """Note ranges that will be read, as the whole file does."""
        within, before = ([(self.begin + at, nbytes) for at, nbytes in each] for each in (ranges, sampled))
        self.whole.will_read(within, before)

    def expect_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch many small ranges that will be read, as the whole file does."""
        self.whole.expect_all([(self.begin + offset, nbytes) for offset, nbytes in ranges])

    def check(self, offset: int, nbytes: int) -> None:
        """Raise TruncatedError for a range that is not all there."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise TruncatedError(
                f"bytes {offset}–{offset + nbytes} of the part at byte {self.begin} are promised, it has {self.size}",
                path=self.path,
            )

    def forget(self) -> None:
        """Give back the memory that views of the whole file have taken."""
        self.whole.forget()

    def close(self) -> None:
        """Do nothing: the whole file is closed by who opened it."""
