"""The servers that one command or one open checkpoint asks, and the questions of `files/places.py` answered by them.

What a server said once is remembered here: which version a file has, what a folder lists, what is not there. So a file
costs one request however many questions there are, and all see one version of it. `files/elsewhere.py` says for how
long.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from ckpt_cli.errors import NetworkError, UnsupportedError
from ckpt_cli.remote import url
from ckpt_cli.remote.fetched import PAGE, Fetched, workers
from ckpt_cli.remote.source import BEGINNING, RemoteFile, identity_of
from ckpt_cli.remote.store import Listed, Object, Store, Upload

WELL_KNOWN = (
    ".metadata",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Names that are looked for in a folder of a server without lists, those first that say what the folder is."""

_STAGES = (WELL_KNOWN[:2], WELL_KNOWN[2:3], WELL_KNOWN[3:])
"""The same in parts: the names of one are asked for side by side, and a later one only where nothing was found."""


class Servers:
    """All servers of one command or one open checkpoint."""

    def __init__(self, known: Servers | None = None) -> None:
        """Begin with the secrets that another has for addresses, and with nothing else of it."""
        self.addresses: url.Addresses = url.Addresses(known.addresses if known else None)
        """The addresses that the user gave, by their paths."""
        self._fetched = Fetched()
        self._folders: dict[str, RemoteFolder] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of files that came over the network."""
        return self._fetched.nbytes

    def clear(self) -> None:
        """Give back the memory of what was fetched."""
        self._fetched.clear()

    def place_of(self, path: str) -> RemoteFolder:
        """Return the folder of all files of a path's scheme; raises FileNotFoundError for an unknown one."""
        scheme = url.scheme_of(path) or ""
        if scheme not in self._folders:
            self._folders[scheme] = RemoteFolder(url.store_for(scheme), self.addresses, self._fetched)
        return self._folders[scheme]


class RemoteFolder:
    """The files of one scheme, as one command or one open checkpoint sees them."""

    is_local = False

    def __init__(self, store: Store, addresses: url.Addresses, fetched: Fetched) -> None:
        self._store = store
        self._addresses = addresses
        self._fetched = fetched
        self._files: dict[str, Object] = {}
        """The files that were seen."""
        self._absent: set[str] = set()
        """Paths that are not those of files."""
        self._lists: dict[str, dict[str, Listed]] = {}
        """The names in folders."""
        self._probes: dict[str, tuple[int, dict[str, Listed]]] = {}
        """Of folders without a list, how many stages were asked for, and the names that were found."""

    # --- questions of places ---------------------------------------------------------------------------------------

    def is_folder(self, path: str) -> bool:
        """True if a path is a folder: one with a list, or where there is none, with a file of a well-known name."""
        path = self._path(path)
        listed = self._listed_at(path)
        if listed is not None:
            return listed.is_folder
        if not path.endswith("/") and self._found(path) is not None:
            return False
        return bool(self._leading(path))

    def is_file(self, path: str) -> bool:
        """True if a path is a file."""
        path = self._path(path)
        listed = self._listed_at(path)
        if listed is not None:
            return not listed.is_folder
        try:
            return self._found(path) is not None
        except NetworkError as error:
            if error.status not in (401, 403) or not self._knows_in(url.folder_of(path)):
                raise
            self._absent.add(path)  # servers that do not say what is there refuse it, though they gave the file beside
            return False

    def exists(self, path: str) -> bool:
        """True if there is something at a path; well-known names are looked for in it only if it ends with a slash."""
        if self.is_file(path):
            return True
        path = self._path(path)
        found = self._store_list(path, 1)
        if found is None and path.endswith("/"):
            return bool(self._probed(path, enough=True))
        return bool(found)

    def is_link(self, path: str) -> bool:  # noqa: ARG002
        """Return False: there are no links."""
        return False

    def is_taken(self, path: str) -> bool:
        """True if there is something at a path."""
        return self.exists(path)

    def size_of(self, path: str) -> int:
        """Return the number of bytes of a file."""
        return self.open(path).size

    def names_in(self, path: str, most: int | None = None) -> list[str]:
        """Return the sorted names in a folder: where there are no lists, the well-known ones that are there."""
        path = self._path(path)
        found = self._list(path, most)
        if not found:
            raise self._no_list(path)
        return sorted(found)[:most]

    def leading_names(self, path: str) -> list[str]:
        """Return the same, but where there are no lists only names that decide which checkpoint the folder is."""
        path = self._path(path)
        found = self._leading(path)
        if not found:
            raise self._no_list(path)
        return sorted(found)

    def is_listed(self, path: str) -> bool:
        """True if a list of the folder was fetched; where there are none, it is not known what else is there."""
        return not self._has_gaps and self._folder_key(path) in self._lists

    def present(self, path: str, names: Sequence[str]) -> list[str]:
        """Return the names that are files in a folder, by one list of each folder, or by requests side by side."""
        path = self._path(path)
        if len(names) > 1:
            for folder in dict.fromkeys(url.folder_of(url.join(path, name)) for name in names):
                if self._store_list(folder, None) is None:
                    self.begin_all([url.join(path, name) for name in names])
                    break
        return [name for name in names if self.is_file(url.join(path, name))]

    def files_below(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield each file of a folder, and of its subfolders that are not hidden; without lists, those known."""
        path = self._path(path)
        has_list = False
        for name, version in self._store.entries_below(self._addresses.address(path)):
            has_list = True
            if any(part.startswith(".") for part in name.split("/")[:-1]):
                continue
            found = url.join(path, name)
            self._files.setdefault(found, self._store.object_at(self._addresses.address(found), version))
            yield name, found
        if not has_list:
            for name in self.names_in(path):
                yield name, url.join(path, name)

    def open(self, path: str) -> RemoteFile:
        """Open a file; raises FileNotFoundError, IsADirectoryError, NetworkError."""
        path = self._path(path)
        found = self._found(path)
        if found is None:
            folder = self._folder_key(path)
            if self._lists.get(folder) or self._probes.get(folder, (0, {}))[1]:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            raise self._no_list(path) if path.endswith("/") else _missing(path)
        return RemoteFile(path, found, self._fetched)

    def begin_all(self, paths: Sequence[str]) -> None:
        """Fetch the beginnings of files side by side, those of which a list gave the version too."""
        asked = [path for path in dict.fromkeys(map(self._path, paths)) if path not in self._absent]
        list(workers().map(self._begin, asked))

    def head_of(self, path: str, nbytes: int) -> bytes:
        """Return at most the first `nbytes` bytes of a file."""
        file = self.open(path)
        return file.read(0, min(nbytes, file.size))

    def can_write(self, path: str) -> bool:  # noqa: ARG002
        """Return False: no file elsewhere is edited in place."""
        return False

    def links_of(self, path: str) -> int:
        """Return 1, as a file elsewhere has one name."""
        self.open(path)
        return 1

    def identity_of(self, path: str) -> tuple[int, int, int, int] | None:
        """Return what stands for the identity and state of a file; None where there is none."""
        found = self._found(self._path(path))
        return None if found is None else identity_of(found)

    def is_same(self, path: str, other: str) -> bool:
        """True if two paths are one."""
        return self.canonical(path) == self.canonical(other) and self.exists(path)

    def canonical(self, path: str) -> str:
        """Return the path without slashes at its end."""
        return self._path(path).rstrip("/")

    # --- uploads ---------------------------------------------------------------------------------------------------

    def upload(self, path: str, *, replace: bool, nbytes: int) -> AbstractContextManager[Upload]:
        """Return a context manager of an upload; raises as that of the store does."""
        self._forget(path)
        return self._store.upload(self._addresses.address(path), replace=replace, nbytes=nbytes)

    def remove(self, path: str) -> None:
        """Remove a file; where there is none, nothing happens."""
        self._forget(path)
        self._store.remove(self._addresses.address(path))

    def names_at(self, path: str) -> list[str]:
        """Return the names in a folder as they are now; none where there is no such folder."""
        self._lists.pop(self._folder_key(path), None)
        return sorted(self._list(self._path(path)))

    def _forget(self, path: str) -> None:
        """Forget what was seen of a file that is about to change, and of the folders that it is in."""
        self._files.pop(path, None)
        self._absent.discard(path)
        folder = path
        while "/" in folder.partition("://")[2]:
            folder = url.folder_of(folder)
            self._lists.pop(folder, None)
            self._absent.discard(folder)

    # --- what was seen ---------------------------------------------------------------------------------------------

    def _path(self, path: str) -> str:
        return self._addresses.admitted(path)

    def _folder_key(self, path: str) -> str:
        return url.join(self._path(path), "").rstrip("/")

    def _listed_at(self, path: str) -> Listed | None:
        """Return what a list that is there says of a path; None where it says nothing."""
        names = self._lists.get(url.folder_of(path))
        return None if names is None or path.endswith("/") else names.get(url.name_of(path))

    def _knows_in(self, folder: str) -> bool:
        """True if a file was seen in a folder."""
        return any(url.folder_of(path) == folder for path in self._files)

    def _found(self, path: str) -> Object | None:
        """Return the file at a path, asked for unless it was seen; None where there is none."""
        known = self._known(path)
        if known is None and path not in self._absent:
            self._begin(path)
            known = self._files.get(path)
        return known

    def _known(self, path: str) -> Object | None:
        """Return the file at a path where its version is known; None where it is not."""
        if path not in self._files:
            listed = self._listed_at(path)
            if listed is not None and listed.version is not None:
                self._files[path] = self._store.object_at(self._addresses.address(path), listed.version)
            elif url.folder_of(path) in self._lists and not self._has_gaps:
                self._absent.add(path)
        return self._files.get(path)

    _has_gaps = False
    """True if lists have some names only, as those of a server without lists do."""

    def _begin(self, path: str) -> None:
        """Ask for the beginning of a file and keep it, or note that there is no such file."""
        known = self._known(path)
        if known is not None:
            RemoteFile(path, known, self._fetched).begin_to_read()
            return
        if path in self._absent:
            return
        try:
            found, data = self._store.begin(self._addresses.address(path), BEGINNING)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            self._absent.add(path)
            return
        self._files[path] = found
        whole = len(data) == found.version.size
        RemoteFile(path, found, self._fetched).keep(data if whole else data[: len(data) // PAGE * PAGE])

    def _list(self, path: str, most: int | None = None) -> dict[str, Listed]:
        """Return the names in a folder: those of its list, or the well-known ones that are there."""
        found = self._store_list(path, most)
        return self._probed(path) if found is None else found

    def _leading(self, path: str) -> dict[str, Listed]:
        """Return the names in a folder: those of its list, or the first well-known ones that are there."""
        found = self._store_list(path, None)
        return self._probed(path, enough=True) if found is None else found

    def _store_list(self, path: str, most: int | None) -> dict[str, Listed] | None:
        """Return the list of a folder, kept unless it is of some names only; None where there are no lists."""
        folder = self._folder_key(path)
        if folder in self._lists:
            return self._lists[folder]
        found = self._store.entries_in(self._addresses.address(folder), most)
        if found is not None and (most is None or len(found) < most):
            self._lists[folder] = found
        return found

    def _probed(self, path: str, *, enough: bool = False) -> dict[str, Listed]:
        """Return the well-known names that are files in a folder; raises NetworkError where all are refused.

        Where the first ones are `enough`, what comes after these is not asked for.
        """
        folder = self._folder_key(path)
        self._has_gaps = True
        asked, found = self._probes.get(folder, (0, {}))
        errors: list[NetworkError] = []
        while asked < len(_STAGES) and not (enough and found):
            stage = _STAGES[asked]
            try:
                answers = list(workers().map(self._probe, [url.join(path, name) for name in stage]))
            except NetworkError as error:
                error.path = path
                raise
            errors += [error for error in answers if error is not None]
            places = {name: url.join(path, name) for name in stage}
            found |= {name: Listed(False, self._files[at].version) for name, at in places.items() if at in self._files}
            asked += 1
        if errors and not found:
            errors[0].path = path
            raise errors[0]
        self._probes[folder] = asked, found
        if asked == len(_STAGES):
            self._lists[folder] = found
        return found

    def _probe(self, path: str) -> NetworkError | None:
        """Ask for a file that need not be there; returns the error of a server that does not say whether it is."""
        try:
            self._begin(path)
        except NetworkError as error:
            if error.status not in (401, 403):
                raise
            self._absent.add(path)
            return error
        return None

    def _no_list(self, path: str) -> Exception:
        """Return the error of a folder that has no names."""
        if self._has_gaps and self._found(path) is None:
            names = f"{', '.join(WELL_KNOWN[:-1])} and {WELL_KNOWN[-1]}"
            return UnsupportedError(
                f"its server has no lists, and none of {names} is there",
                path=path,
                hint="give the URL of a file, or of an index",
            )
        if self._found(path) is None:
            return _missing(path)
        return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
