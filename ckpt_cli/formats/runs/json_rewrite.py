"""Rewrite a JSON file of a run with some changes of its values."""

from __future__ import annotations

import copy
import json
import math
from contextlib import closing
from typing import Any

from ckpt_cli.errors import CkptError, RefusedError, UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.places import open_file
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.runs.json_values import UNLISTED, JsonFile, Path, leaves, read_json, repeats_keys
from ckpt_cli.formats.writing import OpenCopy, not_read_back
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.model.names import Below


class Rewriting:
    """A JSON file about to be written with some changes."""

    def __init__(self, checkpoint: Checkpoint, changes: Changes, open_copy: OpenCopy) -> None:  # noqa: ARG002 - as all have it
        container = checkpoint.container
        if not isinstance(container, JsonFile):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} is not a JSON file")
        if changes.tensors or changes.new_tensors:
            raise UnsupportedError("tensors cannot be written to a JSON file", path=checkpoint.path)
        self._path = checkpoint.path
        self._file: SourceFile = container.files[0]
        self._data: dict[str, Any] = copy.deepcopy(dict(container.data))
        if repeats_keys(self._file):
            raise RefusedError("an object in it has one key twice, and would lose one of them", path=self._path)
        self._places: dict[str, Path] = {}
        for name, path, _ in leaves(container.data):
            if name in self._places:
                raise RefusedError(f"two of its values are called {name!r}", path=self._path)
            self._places[name] = path
        self._change(changes)
        end = "\n" if bytes(self._file.read(self._file.size - 1, 1)) == b"\n" else ""
        self._text = (json.dumps(self._data, indent=_indent_of(self._file)) + end).encode()

    @property
    def nbytes(self) -> int:
        """Bytes of the new file."""
        return len(self._text)

    def patch(self, overlay: Overlay) -> bool:
        """Make the new text that of the file: it is small, and the journal has it."""
        overlay.replace_end(self._file, 0, self._text)
        return True

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write all of it into an empty file."""
        write_all(target.fd, self._text, 0)
        target.size = len(self._text)
        progress(len(self._text))

    def verify(self, path: str) -> None:
        """Raise CkptError where the file that was written does not read back as the data that was meant."""
        try:
            with closing(open_file(path)) as file:
                read = read_json(file).container
        except CkptError as error:
            raise not_read_back(error.problem) from None
        if not isinstance(read, JsonFile) or json.dumps(read.data) != json.dumps(self._data):
            raise not_read_back("it has other values")

    # --- the changes

    def _change(self, changes: Changes) -> None:
        if UNLISTED in {*changes.dropped, *changes.values, *changes.names}:
            raise RefusedError("it has more values than are listed", path=self._path)
        for name, value in changes.values.items():
            holder, key = self._holder(self._places[name])
            holder[key] = self._json(name, value)
        for old, new in changes.names.items():
            self._rename(old, new)
        for name, value in changes.added.items():
            if not isinstance(value, Tensor):
                self._add(name, value)
        going = Below(changes.dropped_prefixes)
        gone = [self._places[name] for name in changes.dropped if name in self._places]
        for path in sorted(gone, key=_order, reverse=True):
            holder, key = self._holder(path)
            del holder[key]
            self._drop_empty(path[:-1], going)

    def _drop_empty(self, path: Path, going: Below) -> None:
        """Take out a container of which nothing is left, where it was to go with all that is in it."""
        while path and f"{'.'.join(map(str, path))}.x" in going:
            holder, key = self._holder(path)
            if holder[key]:
                return
            del holder[key]
            path = path[:-1]

    def _holder(self, path: Path) -> tuple[Any, Any]:
        """Return the container that a path ends in, and the last key."""
        found: Any = self._data
        for key in path[:-1]:
            found = found[key]
        return found, path[-1]

    def _rename(self, old: str, new: str) -> None:
        path = self._places[old]
        before = old[: len(old) - len(str(path[-1]))]
        holder, key = self._holder(path)
        own = new[len(before) :]
        if not new.startswith(before) or not own or not isinstance(holder, dict):
            raise RefusedError(f"a value of a JSON file stays in its container: {old!r} cannot be called {new!r}")
        if own in holder:
            raise RefusedError(f"there is already a value called {new!r}", path=self._path)
        items = [(own if each == key else each, value) for each, value in holder.items()]
        holder.clear()
        holder.update(items)

    def _add(self, name: str, value: object) -> None:
        *containers, key = name.split(".")
        holder: Any = self._data
        for each in containers:
            inner = holder.setdefault(each, {}) if isinstance(holder, dict) else None
            if not isinstance(inner, dict):
                raise RefusedError(f"{name!r} would not lie in an object", path=self._path)
            holder = inner
        holder[key] = self._json(name, value)

    def _json(self, name: str, value: object) -> object:
        """Return a value as JSON has it; raises UnsupportedError where it has none."""
        if isinstance(value, float) and not math.isfinite(value):
            return value  # as Python's json writes and reads it
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            raise UnsupportedError(f"the value of {name!r} cannot be written as JSON", path=self._path) from None
        return value


def _order(path: Path) -> list[tuple[bool, int, str]]:
    """The key by which later items of a list go first, so that the places of the others stay."""
    return [(isinstance(key, int), key if isinstance(key, int) else 0, str(key)) for key in path]


def _indent_of(file: SourceFile) -> int | None:
    """Return the indent of a JSON file: that of its first line."""
    head = bytes(file.read(0, min(file.size, 64)))
    _, newline, rest = head.partition(b"\n")
    return len(rest) - len(rest.lstrip(b" ")) if newline else None
