"""A server that counts: files of the disk, read as those of a server are, by the classes of `remote/`.

A test can hold the number of requests and of bytes of a command, and the requests that something waited for one by
one, without a network and without a clock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.places import mounted
from ckpt_cli.remote.fetched import Fetched
from ckpt_cli.remote.folder import RemoteFolder
from ckpt_cli.remote.store import Listed, Object, Upload, Version
from ckpt_cli.remote.url import Addresses

SCHEME = "far"
HERE = f"{SCHEME}://server/"


@dataclass(slots=True)
class Ledger:
    """What a command asked of the server."""

    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Each request: what it was (`get`, `list`), of which path, and the bytes of its answer."""
    alone: int = 0
    """Requests that something waited for while nothing else was asked: each takes its time."""
    latency: float = 0.0
    """Seconds that each takes."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, path: str, nbytes: int = 0) -> None:
        """Count one request."""
        with self._lock:
            self.requests.append((kind, path, nbytes))
            self.alone += not threading.current_thread().name.startswith("ckpt-fetch")
        if self.latency:
            time.sleep(self.latency)

    @property
    def count(self) -> int:
        """Requests."""
        return len(self.requests)

    def of(self, kind: str) -> int:
        """Requests of one kind."""
        return sum(each == kind for each, _, _ in self.requests)

    @property
    def nbytes(self) -> int:
        """Bytes of all answers."""
        return sum(nbytes for _, _, nbytes in self.requests)

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        return Ledger, ()


class FarObject:
    """One file of the server."""

    revision = ""

    def __init__(self, path: str, real: str, version: Version, ledger: Ledger) -> None:
        self.path, self.version = path, version
        self._real, self._ledger = real, ledger

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer, by one request."""
        self._ledger.note("get", self.path, len(buffer))
        fd = os.open(self._real, os.O_RDONLY)
        try:
            assert os.preadv(fd, [buffer], offset) == len(buffer)
        finally:
            os.close(fd)


class FarStore:
    """The server of the files below a folder; one with `lists` says what is in a folder by one request."""

    def __init__(self, root: Path, *, lists: bool) -> None:
        self.ledger = Ledger()
        self._root, self._lists = root, lists

    def _real(self, path: str) -> str:
        assert path.startswith(HERE[:-1]), path
        return os.path.join(self._root, path.removeprefix(HERE[:-1]).strip("/"))

    def begin(self, path: str, nbytes: int) -> tuple[Object, bytes]:
        """Return a file and its beginning."""
        real = self._real(path)
        if not os.path.isfile(real):
            self.ledger.note("get", path)
            raise FileNotFoundError(2, "No such file or directory", path)
        with open(real, "rb") as file:
            data = file.read(nbytes)
        self.ledger.note("get", path, len(data))
        return self.object_at(path, self._version(real)), data

    def object_at(self, path: str, version: Version) -> Object:
        """Return a file of a known version."""
        return FarObject(path, self._real(path), version, self.ledger)

    def _version(self, real: str) -> Version:
        info = os.stat(real)
        return Version(info.st_size, f"{info.st_ino}-{info.st_mtime_ns}")

    def entries_in(self, path: str, most: int | None = None) -> dict[str, Listed] | None:
        """Return the names in a folder, at some 200 bytes each."""
        if not self._lists:
            return None
        real = self._real(path)
        names = sorted(os.listdir(real)) if os.path.isdir(real) else []
        self.ledger.note("list", path, 200 * len(names))
        paths = {name: os.path.join(real, name) for name in names}
        return {
            name: Listed(True) if os.path.isdir(at) else Listed(False, self._version(at)) for name, at in paths.items()
        }

    def entries_below(self, path: str) -> Iterator[tuple[str, Version]]:
        """Yield the files below a folder."""
        if not self._lists:
            return
        root = Path(self._real(path))
        self.ledger.note("list", path)
        for found in sorted(root.rglob("*"), key=lambda found: (len(found.relative_to(root).parts), found)):
            if found.is_file():
                yield found.relative_to(root).as_posix(), self._version(str(found))

    def upload(self, path: str, *, replace: bool) -> AbstractContextManager[Upload]:
        """Raise UnsupportedError."""
        raise UnsupportedError("this server is not written to", path=path)


@contextmanager
def elsewhere(root: Path, *, lists: bool = True) -> Iterator[Ledger]:
    """Context manager: the files below a folder are at `far://server/…`; gives what is asked of them."""
    store = FarStore(root, lists=lists)
    with mounted(SCHEME, RemoteFolder(store, Addresses(), Fetched())):
        yield store.ledger
