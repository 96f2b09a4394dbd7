"""A stream of pickles: what torch.save wrote before 1.6, and what pickle.dump writes.

Both may stand in one file, one after another. The names of the first are plain, those of the second begin with
`[1].`, and so on. Bytes after the last pickle are left alone, as torch.load and pickle.load do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, MalformedError, UnsupportedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.formats.signatures import has_proto
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage
from ckpt_cli.pickles.flatten import entries_of, objects_of, top_level_of
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.legacy_save import Save, is_save, pickle_at, read_save
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

LEGACY, PICKLE = "legacy", "pickle"

_WORDS = {LEGACY: "torch.save stream of before 1.6", PICKLE: "pickle"}

_JOBLIB = "joblib.numpy_pickle"
_SEARCHED = 1 << 20
"""Bytes of a pickle that does not read in which the traces of joblib are looked for."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One pickle of the stream, with the storages that follow it."""

    graph: Graph
    begin: int
    """The first byte of the pickle."""
    end: int
    """The byte after its last storage."""
    save: Save | None
    """The save that it belongs to; None for a pickle of pickle.dump."""


class _Finder:
    """The storages of one part."""

    big_endian = False

    def __init__(self, container: PlainFile, part: _Part, prefix: str) -> None:
        self._container = container
        self._save = part.save
        self._prefix = prefix

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage of that key, checked to be long enough."""
        if self._save is None:
            raise MalformedError(
                "a pickle whose tensors lie elsewhere: is it the data.pkl of a torch.save file?",
                hint="ckpt reads the whole file that it was taken from",
            )
        if key not in self._save.places:
            raise MalformedError(f"the save does not have storage {key!r}")
        begin, has = self._save.places[key]
        if has < nbytes:
            raise MalformedError(f"storage {key!r} should have {nbytes} bytes, it has {has}")
        return self._container.storage(f"{self._prefix}{key}", nbytes, begin, location)


def read(file: SourceFile) -> Checkpoint:
    """Open a stream: its pickles are read, and of each storage how many elements it has."""
    container = PlainFile(file)
    parts: list[Graph] = []
    entries: list[Entry] = []
    kind, end = PICKLE, 0
    with about(file.path):
        for number, part in enumerate(_parts(file)):
            _refuse_joblib(part.graph)
            finder = _Finder(container, part, f"[{number}]." if number else "")
            place = PicklePlace(file.begin + part.begin, file.whole)
            found = entries_of(part.graph, finder, place=place)
            entries += [_prefixed(entry, number) for entry in found] if number else found
            if not number:
                kind = LEGACY if part.save else PICKLE
            parts.append(part.graph)
            end = part.end
    first = parts[0]
    return Checkpoint(
        path=file.path,
        format=kind,
        entries=entries,
        container=container,
        version=f"{_WORDS[kind]}, protocol {first.protocol or '0 or 1'}",
        objects=list(dict.fromkeys(name for graph in parts for name in objects_of(graph))),
        top_level=[*top_level_of(first), *(f"[{number}]" for number in range(1, len(parts)))],
        document=first,
        notes=_notes(len(parts)),
        unread=_unread(file.size - end, end),
    )


def _notes(parts: int) -> list[str]:
    many = f"{parts} saves stand one after another: the names of the second begin with [1]., and so on"
    return [many] if parts > 1 else []


def _unread(rest: int, end: int) -> list[str]:
    return [f"{rest} bytes after the last pickle that are not a pickle (byte {end})"] if rest else []


def _prefixed(entry: Entry, number: int) -> Entry:
    return replace(entry, name=f"[{number}].{entry.name}" if entry.name else f"[{number}]")


def _parts(file: SourceFile) -> Iterator[_Part]:
    """The parts in their order; a first one that does not read is an error, and so is a later one that begins well."""
    blocks = sys.getallocatedblocks() + limits.PICKLE_BLOCKS + limits.ENTRY_BLOCKS
    begin = number = 0
    while begin < file.size:
        head = file.read(begin, min(32, file.size - begin))
        try:
            part = _part(file, begin, head)
        except LimitError:
            raise
        except FormatError as error:
            if not number:
                raise _or_joblib(file, error) from None
            if has_proto(head):
                raise type(error)(f"save [{number}], which begins at byte {begin}: {error.problem}") from None
            return
        yield part
        begin, number = part.end, number + 1
        if number > limits.SAVES or sys.getallocatedblocks() > blocks:
            raise LimitError(f"over {number - 1} saves stand one after another in it, far more than can be listed")


def _part(file: SourceFile, begin: int, head: bytes) -> _Part:
    if is_save(head):
        save = read_save(file, begin)
        return _Part(save.graph, save.begin, save.end, save)
    graph = pickle_at(file, begin)
    return _Part(graph, begin, begin + graph.nbytes, None)


def _or_joblib(file: SourceFile, error: FormatError) -> FormatError | UnsupportedError:
    """The error, or that the file is joblib's, whose arrays stand between the opcodes of its pickle."""
    head = file.read(0, min(_SEARCHED, file.size))
    return _joblib() if _JOBLIB.encode() in head else error


def _refuse_joblib(graph: Graph) -> None:
    if any(node.module == _JOBLIB for node in graph.globals):
        raise _joblib()


def _joblib() -> UnsupportedError:
    return UnsupportedError(
        "a file of joblib.dump, whose arrays stand between the opcodes of its pickle; that is not read",
        hint="joblib.load it where you trust it, and pickle.dump it again",
    )
