"""Places: every question of what a path is, asked of the folder that the path lies in, on disk or elsewhere.

A path lies on this machine's disk, unless it begins with the scheme of a kind of server (`remote/url.py`), or of a
folder that was mounted, as `memory://` is while a `MemoryFolder` is mounted there. Code outside this room asks the
functions of this module and never `os`.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from ckpt_cli.files.disk import LocalFolder
from ckpt_cli.files.elsewhere import current, names_server
from ckpt_cli.files.source import Identity, SourceFile

SEPARATOR = "://"
"""It stands between the scheme and the rest of a path that does not lie on the disk."""

STANDARD_INPUT = "-"
"""The path of standard input where that is mounted (`files/standard_input.py`), and the scheme of its neighbours."""


class Folder(Protocol):
    """A tree of files, and what can be asked of a path in it; paths are whole, their scheme included."""

    @property
    def is_local(self) -> bool:
        """True if its files lie on this machine's disk, where they can be locked and edited in place."""

    def is_folder(self, path: str) -> bool:
        """True if a path is a folder."""

    def is_file(self, path: str) -> bool:
        """True if a path is a regular file."""

    def exists(self, path: str) -> bool:
        """True if a path leads to something."""

    def is_link(self, path: str) -> bool:
        """True if a path is a symbolic link."""

    def is_taken(self, path: str) -> bool:
        """True if there is something at a path, be it a link that leads nowhere."""

    def size_of(self, path: str) -> int:
        """Return the number of bytes of a file; raises OSError where there is none."""

    def names_in(self, path: str, most: int | None = None) -> list[str]:
        """Return the sorted names in a folder, or some `most` of them; raises OSError where it cannot be listed."""

    def leading_names(self, path: str) -> list[str]:
        """Return the same; where each name costs a request, only those that decide which checkpoint the folder is."""

    def is_listed(self, path: str) -> bool:
        """True if it costs nothing to ask what is in a folder: it is near, or its list was fetched."""

    def present(self, path: str, names: Sequence[str]) -> list[str]:
        """Return those of some names, which may lead into subfolders, that are regular files in a folder, in order."""

    def files_below(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield the name below a folder, and the path, of each regular file in it and in its subfolders.

        The name has `/` between its parts on every system. Subfolders whose names begin with a dot are not entered.
        """

    def open(self, path: str) -> SourceFile:
        """Open a file to be read, without a lock; raises OSError, or FormatError for what is not a regular file."""

    def begin_all(self, paths: Sequence[str]) -> None:
        """Fetch the beginnings of files that will be opened: all at once where each costs a request."""

    def head_of(self, path: str, nbytes: int) -> bytes:
        """Return at most the first `nbytes` bytes of a file, or of a pipe; raises OSError where it cannot be read."""

    def can_write(self, path: str) -> bool:
        """True if this process may write to the file at a path."""

    def identity_of(self, path: str) -> Identity | None:
        """Return the identity and state of the file at a path; None where there is none."""

    def links_of(self, path: str) -> int:
        """Return the number of names (hard links) that a file has; raises OSError where there is none."""

    def is_same(self, path: str, other: str) -> bool:
        """True if two paths lead to the same file or folder."""

    def canonical(self, path: str) -> str:
        """Return the one spelling of a path, without links."""


LOCAL = LocalFolder()

_mounted: dict[str, Folder] = {}
"""The folder of each scheme."""


@contextmanager
def mounted(scheme: str, folder: Folder) -> Iterator[None]:
    """Context manager: paths that begin with `scheme://` are those of a folder within the block."""
    before = dict(_mounted)
    _mounted[scheme] = folder
    try:
        yield
    finally:
        _mounted.clear()
        _mounted.update(before)


def place_of(path: str) -> Folder:
    """Return the folder that a path lies in: the one mounted at its scheme, a server's, else this machine's disk.

    Raises FileNotFoundError for a scheme that nothing is read from.
    """
    if _mounted and (found := _mounted.get(path.partition(SEPARATOR)[0])) is not None:
        return found if SEPARATOR in path or path == STANDARD_INPUT else LOCAL
    if SEPARATOR not in path or not names_server(path):
        return LOCAL
    return current().servers.place_of(path)


def is_at_server(path: str) -> bool:
    """True if a path is one of a server's files, which nothing is asked for that."""
    return SEPARATOR in path and names_server(path) and path.partition(SEPARATOR)[0] not in _mounted


def is_folder(path: str) -> bool:
    """True if a path is a folder."""
    return place_of(path).is_folder(path)


def is_file(path: str) -> bool:
    """True if a path is a regular file."""
    return place_of(path).is_file(path)


def exists(path: str) -> bool:
    """True if there is something at a path, a broken link not counted."""
    return place_of(path).exists(path)


def is_link(path: str) -> bool:
    """True if a path is a symbolic link."""
    return place_of(path).is_link(path)


def is_taken(path: str) -> bool:
    """True if there is something at a path, be it a link that leads nowhere."""
    return place_of(path).is_taken(path)


def size_of(path: str) -> int:
    """Return the number of bytes of a file; raises OSError where there is none."""
    return place_of(path).size_of(path)


def names_in(path: str, most: int | None = None) -> list[str]:
    """Return the sorted names in a folder, or some `most` of them; raises OSError where it cannot be listed."""
    return place_of(path).names_in(path, most)


def leading_names(path: str) -> list[str]:
    """Return the sorted names in a folder; where each costs a request, those that decide which checkpoint it is."""
    return place_of(path).leading_names(path)


def is_listed(path: str) -> bool:
    """True if it costs nothing to ask what is in a folder: on the disk it never does, elsewhere once it was listed.

    What only adds to an answer is not looked for in any other folder.
    """
    return place_of(path).is_listed(path)


def matching(pattern: str) -> list[str]:
    """Return the sorted paths that a glob matches, each of whose parts may have `*`, `?` and sets in brackets.

    The `?` of a web address begins its query, so that none is a glob.
    """
    if pattern.startswith(("http://", "https://")):
        return [pattern] if exists(pattern) else []
    folder, name = folder_of(pattern), (posixpath if SEPARATOR in pattern else os.path).basename(pattern)
    if not name or not re.search(_GLOB, pattern):
        return [pattern] if exists(pattern) else []
    folders = matching(folder) if re.search(_GLOB, folder) else [folder]
    if not re.search(_GLOB, name):
        return [path for each in folders if exists(path := join(each, name))]
    from fnmatch import translate  # to an expression that never backtracks

    fits = re.compile(translate(name)).fullmatch
    found: list[str] = []
    for each in folders:
        with suppress(OSError):
            found += [join(each, known) for known in names_in(each) if fits(known) and known[0] != "."]
    return found


_GLOB = r"[*?\[]"
"""What makes a pattern of a path."""


def present(path: str, names: Sequence[str]) -> list[str]:
    """Return those of some names that are regular files in a folder, in the same order."""
    return place_of(path).present(path, names)


def files_below(path: str) -> Iterator[tuple[str, str]]:
    """Yield the name below a folder, and the path, of each regular file in it and in subfolders that are not hidden."""
    return place_of(path).files_below(path)


def open_file(path: str) -> SourceFile:
    """Open a file to be read, without a lock; raises OSError, or FormatError for what is not a regular file."""
    return place_of(path).open(path)


def begin_all(paths: Sequence[str]) -> None:
    """Fetch the beginnings of files of one folder that will be opened: all at once where each costs a request."""
    if paths:
        place_of(paths[0]).begin_all(paths)


def head_of(path: str, nbytes: int) -> bytes:
    """Return at most the first `nbytes` bytes of a file, or of a pipe; raises OSError where it cannot be read."""
    return place_of(path).head_of(path, nbytes)


def can_write(path: str) -> bool:
    """True if this process may write to the file at a path."""
    return place_of(path).can_write(path)


def links_of(path: str) -> int:
    """Return the number of names (hard links) that a file has; raises OSError where there is none."""
    return place_of(path).links_of(path)


def identity_at(path: str) -> Identity | None:
    """Return the identity and state of the file at a path; None where there is none."""
    return place_of(path).identity_of(path)


def is_same(path: str, other: str) -> bool:
    """True if there is something at two paths and it is the same."""
    place = place_of(path)
    return type(place) is type(place_of(other)) and place.is_same(path, other)


def canonical(path: str) -> str:
    """Return the one spelling of a path, without links."""
    return place_of(path).canonical(path)


# --- the parts of a path, as text ------------------------------------------------------------------------------------

_system = os.path
"""The rules of this system: those of POSIX or of Windows (`ntpath`)."""

_HTTP = ("http://", "https://")
"""Where paths have the rules of URLs."""

_DEVICE = r"(?i:con|prn|aux|nul|com[1-9¹²³]|lpt[1-9¹²³]) *([.:]|$)"
"""Names that Windows takes for a device, with any suffix."""


def is_plain_name(name: str) -> bool:
    """True if a name that a document gives is that of something in one folder, and can lead nowhere else.

    Where the separator of paths is a backslash, it also has no drive or stream (`:`), is not a device, and does not end
    in what Windows drops.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name or _system.basename(name) != name:
        return False
    return _system.sep == "/" or not (":" in name or name.endswith((".", " ")) or re.match(_DEVICE, name))


def names_folder(path: str) -> bool:
    """True if a path says by a separator at its end that it is a folder."""
    return path.endswith(("/", _system.sep))


def without_end(path: str) -> str:
    """Return a path without separators at its end, apart from the root of a tree."""
    stripped = path.rstrip("/" if SEPARATOR in path else f"/{_system.sep}")
    return path if stripped in ("", _system.splitdrive(path)[0]) else stripped


def slashed(path: str) -> str:
    """Return a path of the disk with `/` between its parts on every system."""
    return path.replace(_system.sep, "/")


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder."""
    if SEPARATOR not in folder:
        return os.path.join(folder, name)
    if name and folder.startswith(_HTTP):
        from ckpt_cli.remote import url

        return url.join(folder, name)
    return posixpath.join(folder, name)


def folder_of(path: str) -> str:
    """Return the folder that a path is in; empty for a bare name."""
    if path == STANDARD_INPUT and STANDARD_INPUT in _mounted:
        return f"{STANDARD_INPUT}{SEPARATOR}"
    if SEPARATOR not in path:
        return os.path.dirname(path)
    folder = posixpath.dirname(path)
    return f"{folder}//" if folder.endswith(":") else folder


def name_of(path: str) -> str:
    """Return the last part of a path; slashes at its end do not count."""
    if path.startswith(_HTTP):
        from ckpt_cli.remote import url

        return url.name_of(path)
    if SEPARATOR in path:
        return posixpath.basename(path.rstrip("/"))
    name = os.path.basename(path)
    return name if name not in ("", ".", "..") else os.path.basename(os.path.normpath(path))
