"""The calls that only POSIX systems or Linux have, each with a fallback for systems without it.

Nothing else imports `fcntl`, `resource` and the like, or makes these calls (`tests/files/test_system.py`); signals and
timers are in `files/interrupts.py`. Without `pread` a file is read after a seek, one thread at a time; without `flock`
bytes far beyond the end of a file are locked (Windows), or nothing is, as on a file system without locks. Copies share
no blocks and go through memory, holes are filled, folders are not synced, owners and modes stay as the system sets
them. Two refusals remain: the edit in place of a file with hard links where there are no extended attributes, and of
what only a second name of a file could back up.
"""

from __future__ import annotations

import errno
import os
import stat
from _thread import allocate_lock
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mmap


def _module(name: str) -> Any:
    """Return a module of the standard library; None on a system that lacks it."""
    try:
        return __import__(name)
    except ImportError:
        return None


_fcntl = _module("fcntl")
_msvcrt: Any = None if _fcntl is not None else _module("msvcrt")


def _flag(name: str) -> int:
    """Return a flag of `os.open`; 0 on a system that lacks it."""
    return int(getattr(os, name, 0))


# --- opening ---------------------------------------------------------------------------------------------------------

_ALWAYS = _flag("O_CLOEXEC") | _flag("O_NOINHERIT") | _flag("O_BINARY")
_NO_FOLLOW, _NO_WAIT, _FOLDER = _flag("O_NOFOLLOW"), _flag("O_NONBLOCK"), _flag("O_DIRECTORY")

OPENS_ANYTHING = bool(_NO_WAIT and _FOLDER)
"""True where a folder or a named pipe can be opened without waiting, to see then that it is not a file."""


def open_file(path: str, *, write: bool = False, follow: bool = True, create: bool = False) -> int:
    """Open a file to read it, or also to write it; returns the descriptor.

    Without `follow`, a symbolic link raises OSError with ELOOP. With `create`, whatever has the name raises
    FileExistsError. Never waits for the other end of a named pipe where `OPENS_ANYTHING` is true.
    """
    flags = (os.O_RDWR if write else os.O_RDONLY) | _ALWAYS | _NO_WAIT
    if create:
        return os.open(path, flags | _NO_FOLLOW | os.O_CREAT | os.O_EXCL, 0o666)
    if not follow:
        _require_no_link(path)
        flags |= _NO_FOLLOW
    return os.open(path, flags)


def create_private(path: str) -> int:
    """Create a file to write that only its owner may read, and return its descriptor.

    Raises FileExistsError where something has the name.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _ALWAYS, 0o600)


def open_folder(path: str) -> int:
    """Open a folder, not a link to one, to lock it: `os.close` closes it, `stat_of` says what it is.

    Where folders cannot be opened, a file in the system's folder for temporary files stands for it.
    """
    if _FOLDER:
        return os.open(path, os.O_RDONLY | _FOLDER | _NO_FOLLOW | _ALWAYS)
    import tempfile

    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    lock = os.path.join(tempfile.gettempdir(), f"ckpt-{info.st_dev:x}-{info.st_ino:x}.lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | _flag("O_TEMPORARY") | _ALWAYS, 0o600)
    _folders[fd] = os.fstat(fd), info
    return fd


_folders: dict[int, tuple[os.stat_result, os.stat_result]] = {}
"""Descriptors that stand for folders: the file that is open, and the folder. Some may be closed by now."""


def stat_of(fd: int) -> os.stat_result:
    """Return the status of an open file or folder."""
    found = os.fstat(fd)
    standing, folder = _folders.get(fd, (None, found))
    return folder if standing is not None and os.path.samestat(standing, found) else found


def _require_no_link(path: str) -> None:
    """Raise OSError with ELOOP for a symbolic link, where `os.open` has no flag for that."""
    if not _NO_FOLLOW and os.path.islink(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


# --- bytes at an offset ----------------------------------------------------------------------------------------------

_HELD = 16 << 20
"""Bytes held at most by a read into a buffer that goes through memory."""

_position = allocate_lock()
"""Held from a seek to what is done at that position, where there is no call for both."""

if hasattr(os, "pread"):

    def read_at(fd: int, nbytes: int, offset: int) -> bytes:
        """Return at most `nbytes` bytes from an offset, none beyond the end of the file."""
        return os.pread(fd, nbytes, offset)

    def _write_at(fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

else:

    def read_at(fd: int, nbytes: int, offset: int) -> bytes:
        """Return at most `nbytes` bytes from an offset, none beyond the end of the file."""
        with _position:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, nbytes)

    def _write_at(fd: int, data: memoryview, offset: int) -> int:
        with _position:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)


def read_into_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill the begin of a buffer from an offset; returns the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = read_at(fd, min(len(buffer), _HELD), offset)
    buffer[: len(data)] = data
    return len(data)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of some bytes at an offset."""
    view = memoryview(data)
    while view:
        written = _write_at(fd, view, offset)
        view = view[written:]
        offset += written


def begin_to_read(fd: int, offset: int, nbytes: int) -> None:
    """Have the system begin to read a range that will be asked for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def begin_to_write(fd: int, offset: int, nbytes: int) -> None:
    """Have the system begin to write a new range to the disk, so that it need not wait for all of it at the end."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)  # Linux: starts dirty pages, drops clean ones


def drop_pages(mapped: mmap.mmap) -> None:
    """Give back the memory of mapped bytes that were touched; they are read again when touched again."""
    import mmap

    if hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


# --- copies ----------------------------------------------------------------------------------------------------------

_FICLONE = 0x40049409
"""Linux's ioctl that makes one file share another's blocks (btrfs, XFS, bcachefs)."""


def share_blocks(source: int, target: int) -> bool:
    """Let an empty file share all blocks of another one; False where that cannot be."""
    with suppress(OSError):
        if _fcntl is not None:
            _fcntl.ioctl(target, _FICLONE, source)
            return True
    return False


def copy_in_kernel(source: int, target: int, nbytes: int, begin: int, at: int) -> int | None:
    """Copy at most `nbytes` bytes without holding them in memory; returns their number, None where that cannot be."""
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        return os.copy_file_range(source, target, nbytes, begin, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return None


def next_data(fd: int, position: int, end: int) -> tuple[int, int] | None:
    """Return the next part of a file from a position on that is not a hole, or None; all up to `end` where not known.

    The part may reach beyond `end`.
    """
    if not hasattr(os, "SEEK_DATA"):
        return position, end
    try:
        first = os.lseek(fd, position, os.SEEK_DATA)
        return first, os.lseek(fd, first, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole is left
            return None
        if error.errno != errno.EINVAL:
            raise
        return position, end  # a file system that does not say


# --- durable changes -------------------------------------------------------------------------------------------------


def sync(fd: int) -> None:
    """Make the content of a file durable, also in the cache of the disk where the system leaves that out (macOS)."""
    if hasattr(_fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # a file system that has only the other
            _fcntl.fcntl(fd, _fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_folder(folder: str) -> None:
    """Make the folder's own entries durable: a new, renamed or removed file. A system without that does so itself."""
    if not _FOLDER:
        return
    fd = os.open(folder, os.O_RDONLY | _FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def link(path: str, name: str) -> None:
    """Give a file a second name; raises OSError with EOPNOTSUPP on a system that has no such names."""
    if not hasattr(os, "link"):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
    os.link(path, name)


# --- locks -----------------------------------------------------------------------------------------------------------

_LOCKED_AT, _LOCKED = (8 << 40) + (2 << 30) - 256, 64
"""The first of the bytes that Windows locks, which no file reaches, and their number: a reader locks one of them."""


def lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file or folder, exclusively or as one of its readers; False where it is taken.

    Raises OSError with ENOTSUP, or what the file system says, where there are no locks.
    """
    if _fcntl is not None:
        try:
            _fcntl.flock(fd, (_fcntl.LOCK_SH if shared else _fcntl.LOCK_EX) | _fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    if _msvcrt is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    if not shared:
        return _lock_bytes(fd, _LOCKED_AT, _LOCKED)
    return any(_lock_bytes(fd, _LOCKED_AT + number, 1) for number in range(_LOCKED))


def unlock(fd: int) -> None:
    """Give back the lock of an open file."""
    if _fcntl is not None:
        _fcntl.flock(fd, _fcntl.LOCK_UN)
    elif _msvcrt is not None and (held := _held.pop(fd, None)) is not None:
        with suppress(OSError), _position:
            os.lseek(fd, held[0], os.SEEK_SET)
            _msvcrt.locking(fd, _msvcrt.LK_UNLCK, held[1])


_held: dict[int, tuple[int, int]] = {}
"""The first byte and the number of bytes that a descriptor has locked; some may be closed by now."""


def _lock_bytes(fd: int, begin: int, nbytes: int) -> bool:
    try:
        with _position:
            os.lseek(fd, begin, os.SEEK_SET)
            _msvcrt.locking(fd, _msvcrt.LK_NBLCK, nbytes)
    except OSError:
        return False
    _held[fd] = begin, nbytes
    return True


# --- users, modes and attributes -------------------------------------------------------------------------------------


def user() -> int:
    """Return the id of the user whose rights this process has; 0, as every file has it, where there are no ids."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def set_owner(fd: int, uid: int, gid: int) -> None:
    """Give an open file an owner and a group, of which -1 leaves one as it is; raises OSError where it may not be."""
    if hasattr(os, "fchown"):
        os.fchown(fd, uid, gid)


def set_mode(fd: int, mode: int) -> None:
    """Give an open file the permissions of a mode, as far as the system has any."""
    if hasattr(os, "fchmod"):
        os.fchmod(fd, mode & 0o777)


def get_attribute(fd: int, name: str) -> bytes | None:
    """Return an extended attribute of an open file; None where it has none of that name."""
    if hasattr(os, "getxattr"):
        with suppress(OSError):
            return os.getxattr(fd, name)
    return None


def set_attribute(fd: int, name: str, value: bytes) -> None:
    """Give an open file an extended attribute; raises OSError with ENOTSUP on a system without them."""
    if not hasattr(os, "setxattr"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    os.setxattr(fd, name, value)


def remove_attribute(fd: int, name: str) -> None:
    """Remove an extended attribute that `get_attribute` returned."""
    os.removexattr(fd, name)


def name_limit(folder: str) -> int | None:
    """Return the number of bytes of a name in a folder at most; None where the system does not say."""
    if not hasattr(os, "pathconf"):
        return None
    with suppress(OSError, ValueError):
        return os.pathconf(folder, "PC_NAME_MAX")
    return None


# --- the process -----------------------------------------------------------------------------------------------------


_MANY = 100
"""Files that a process may have open on every system, besides those that it has anyway."""


def allow_open_files(count: int) -> int:
    """Let the process have `count` files open, or as many as the system allows; return how many it then may have."""
    resource = _module("resource") if count > _MANY - _NEEDED else None
    if resource is None:
        return min(count, _MANY)
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        allowed = most
    return count if allowed == resource.RLIM_INFINITY else max(min(count, allowed - _NEEDED), 1)


_NEEDED = 40
"""Files that a process has open besides those that it asks for: streams, folders, modules, connections."""


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_COARSE = 5
"""Linux's CLOCK_REALTIME_COARSE, by which file systems note when a file changed; Python does not name it."""


def change_time_ns() -> tuple[int, bool]:
    """Return the time that a file which changed now would have, and True if that is the clock of file systems."""
    import time

    is_linux = hasattr(time, "CLOCK_BOOTTIME")
    return (time.clock_gettime_ns(_COARSE), True) if is_linux else (time.time_ns(), False)
