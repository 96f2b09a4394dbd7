"""The folder of all files on this machine's disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from ckpt_cli.files.source import Identity, LocalFile


class LocalFolder:
    """The files on this machine's disk."""

    is_local = True

    def is_folder(self, path: str) -> bool:
        """True if a path is a folder."""
        return os.path.isdir(path)

    def is_file(self, path: str) -> bool:
        """True if a path is a regular file."""
        return os.path.isfile(path)

    def exists(self, path: str) -> bool:
        """True if there is something at a path."""
        return os.path.exists(path)

    def is_link(self, path: str) -> bool:
        """True if a path is a symbolic link."""
        return os.path.islink(path)

    def is_taken(self, path: str) -> bool:
        """True if there is something at a path, be it a link that leads nowhere."""
        return os.path.lexists(path)

    def size_of(self, path: str) -> int:
        """Return the number of bytes of a file."""
        return os.path.getsize(path)

    def names_in(self, path: str, most: int | None = None) -> list[str]:
        """Return the sorted names in a folder; in the current one for an empty path."""
        with os.scandir(path or os.curdir) as entries:
            return sorted(entry.name for entry in islice(entries, most))

    def leading_names(self, path: str) -> list[str]:
        """Return the names in a folder."""
        return self.names_in(path)

    def is_listed(self, path: str) -> bool:  # noqa: ARG002
        """Return True."""
        return True

    def present(self, path: str, names: Sequence[str]) -> list[str]:
        """Return the names that are regular files in a folder."""
        return [name for name in names if os.path.isfile(os.path.join(path, name))]

    def files_below(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield each regular file of a folder, those of its subfolders after its own."""
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            within = [part for part in os.path.relpath(folder, path).split(os.sep) if part != os.curdir]
            for name in sorted(names):
                found = os.path.join(folder, name)
                if os.path.isfile(found):
                    yield "/".join([*within, name]), found

    def open(self, path: str) -> LocalFile:
        """Open a file to be read, without a lock."""
        return LocalFile(path)

    def begin_all(self, paths: Sequence[str]) -> None:
        """Do nothing: files are opened fast one by one."""

    def head_of(self, path: str, nbytes: int) -> bytes:
        """Return at most the first `nbytes` bytes of a file or a pipe."""
        with open(path, "rb") as file:
            return file.read(nbytes)

    def can_write(self, path: str) -> bool:
        """True if this process may write to the file at a path."""
        return os.access(path, os.W_OK)

    def links_of(self, path: str) -> int:
        """Return the number of names that a file has."""
        return os.stat(path).st_nlink

    def identity_of(self, path: str) -> Identity | None:
        """Return the identity and state of the file at a path; None where there is none."""
        try:
            return LocalFile.identity(os.stat(path))
        except OSError:
            return None

    def is_same(self, path: str, other: str) -> bool:
        """True if two paths lead to the same file or folder."""
        return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)

    def canonical(self, path: str) -> str:
        """Return the absolute path, without links, and spelled as `spelled` does."""
        return spelled(path)


def spelled(path: str) -> str:
    """Return the real path of a file on the disk with its name as the folder spells it.

    Where upper and lower case name one file, hidden names and backups follow the one spelling, not that of the user.
    """
    real = os.path.realpath(path)
    folder, name = os.path.split(real)
    other = os.path.join(folder, name.swapcase())
    with suppress(OSError):
        if other != real and os.path.lexists(other) and os.path.samestat(os.lstat(other), os.lstat(real)):
            names = [found for found in os.listdir(folder) if found.casefold() == name.casefold()]
            return real if name in names or len(names) != 1 else os.path.join(folder, names[0])
    return real
