"""A folder elsewhere that counts: files of the disk, asked for as if each question went to a server.

It caches, fetches ahead and lists as `remote/` does, so that a test can hold the number of requests and of bytes of a
command, and how many requests it made one after another, without a server and without a clock.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from far_file import FarFile, Ledger

from ckpt_cli.files.places import mounted
from ckpt_cli.files.source import Identity

SCHEME = "far"
HERE = f"{SCHEME}://server/"


class FarFolder:
    """A server of the files below a folder of the disk; one with `lists` says what is in a folder by one request."""

    is_local = False

    def __init__(self, root: Path, *, lists: bool = True) -> None:
        self.ledger = Ledger()
        self._root, self._lists = root, lists
        self._known: dict[str, str] = {}
        """What is known of a path without a request: `file`, `folder` or nothing (``)."""
        self._listed: set[str] = set()
        self._opened: dict[str, FarFile] = {}
        """Files of which the head was fetched to know what they are."""
        self._lock = threading.RLock()

    def _real(self, path: str) -> str:
        assert path.startswith(HERE[:-1]), path
        return os.path.join(self._root, path.removeprefix(HERE[:-1]).strip("/"))

    def _kind(self, path: str) -> str:
        """What a path is: known of a list or an earlier question, else its head is asked for, and then a list."""
        path = path.rstrip("/")
        with self._lock:
            if path in self._known:
                return self._known[path]
            if self._lists and path.rpartition("/")[0] in self._listed:
                return ""
            real = self._real(path)
            if os.path.isfile(real):
                self._opened[path] = FarFile(path, real, self.ledger)
                self._known[path] = "file"
                return "file"
            self.ledger.note("get", path)
            self.ledger.wait()
            self._known[path] = "folder" if self._names(path) else ""
            return self._known[path]

    def _names(self, path: str) -> list[str]:
        """The names in a folder, of one request; where there are no lists, those that a probe for known names finds."""
        path = path.rstrip("/")
        real = self._real(path)
        names = sorted(os.listdir(real)) if os.path.isdir(real) else []
        if path in self._listed:
            return [name for name in names if self._known.get(f"{path}/{name}")]
        self._listed.add(path)
        if not self._lists:
            self._listed.discard(path)
            names = self.present(path, PROBED)
            self._listed.add(path)
        else:
            self.ledger.note("list", path, 200 * len(names))
            self.ledger.wait()
        for name in names if self._lists else ():
            self._known[f"{path}/{name}"] = "folder" if os.path.isdir(os.path.join(real, name)) else "file"
        return names

    def is_folder(self, path: str) -> bool:
        """True if a path is a folder."""
        return self._kind(path) == "folder"

    def is_file(self, path: str) -> bool:
        """True if a path is a file."""
        return self._kind(path) == "file"

    def exists(self, path: str) -> bool:
        """True if there is something at a path."""
        return bool(self._kind(path))

    def is_link(self, path: str) -> bool:
        """Return False."""
        return False

    def is_taken(self, path: str) -> bool:
        """True if there is something at a path."""
        return self.exists(path)

    def size_of(self, path: str) -> int:
        """Return the number of bytes."""
        return os.path.getsize(self._real(path)) if self._known.get(path) == "folder" else self.open(path).size

    def is_listed(self, path: str) -> bool:
        """True if the names in a folder are known, which they never are without lists."""
        return self._lists and path.rstrip("/") in self._listed

    def names_in(self, path: str, most: int | None = None) -> list[str]:
        """Return the names in a folder."""
        names = self._names(path)
        if not names:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return names[:most]

    def present(self, path: str, names: Sequence[str]) -> list[str]:
        """Return those of some names that are files, of one list or of as many questions at once."""
        path = path.rstrip("/")
        if self._lists:
            for folder in dict.fromkeys(f"{path}/{name}".rpartition("/")[0] for name in names):
                self._names(folder)
            return [name for name in names if self._known.get(f"{path}/{name}") == "file"]
        asked = [name for name in names if f"{path}/{name}" not in self._known]
        for name in asked:
            real = self._real(f"{path}/{name}")
            if os.path.isfile(real):
                self._opened[f"{path}/{name}"] = FarFile(f"{path}/{name}", real, self.ledger, begun=True)
            else:
                self.ledger.note("get", f"{path}/{name}")
            self._known[f"{path}/{name}"] = "file" if os.path.isfile(real) else ""
        if asked:
            self.ledger.wait(len(asked))
        return [name for name in names if self._known[f"{path}/{name}"] == "file"]

    def files_below(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield each file below a folder."""
        path = path.rstrip("/")
        self.ledger.note("list", path)
        self.ledger.wait()
        root = self._real(path)
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            within = os.path.relpath(folder, root).replace(os.curdir, "")
            for name in sorted(names):
                below = f"{within}/{name}".lstrip("/")
                self._known[f"{path}/{below}"] = "file"
                yield below, f"{path}/{below}"

    def open(self, path: str) -> FarFile:
        """Open a file: at once where a list named it, else by fetching its head."""
        path = path.rstrip("/")
        with self._lock:
            if path in self._opened:
                return self._opened[path]
            listed = self._lists and self._known.get(path) == "file"
            real = self._real(path)
            if not os.path.isfile(real):
                if path not in self._known and not (self._lists and path.rpartition("/")[0] in self._listed):
                    self.ledger.note("get", path)
                    self.ledger.wait()
                number = errno.EISDIR if os.path.isdir(real) else errno.ENOENT
                raise OSError(number, os.strerror(number), path)
            self._opened[path] = FarFile(path, real, self.ledger, listed=listed)
            self._known[path] = "file"
            return self._opened[path]

    def begin_all(self, paths: Sequence[str]) -> None:
        """Ask for files at once where no list says what they are."""
        if not self._lists:
            self.present(HERE, [path.removeprefix(HERE) for path in paths])

    def head_of(self, path: str, nbytes: int) -> bytes:
        """Return the first bytes of a file."""
        file = self.open(path)
        return file.read(0, min(nbytes, file.size))

    def can_write(self, path: str) -> bool:
        """Return False."""
        return False

    def links_of(self, path: str) -> int:
        """Return 1."""
        return 1

    def identity_of(self, path: str) -> Identity | None:
        """Return the state of a file; None where there is none."""
        return self.open(path).seen if self.is_file(path) else None

    def is_same(self, path: str, other: str) -> bool:
        """True if two paths are one."""
        return self.canonical(path) == self.canonical(other)

    def canonical(self, path: str) -> str:
        """Return the path without slashes at its end."""
        return path.rstrip("/")


PROBED = (".metadata", "model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors",
          "pytorch_model.bin")  # fmt: skip
"""The names that are looked for in a folder of a server without lists."""


@contextmanager
def elsewhere(root: Path, *, lists: bool = True) -> Iterator[Ledger]:
    """Context manager: the files below a folder are at `far://server/…`; gives what is asked of them."""
    folder = FarFolder(root, lists=lists)
    with mounted(SCHEME, folder):
        yield folder.ledger
