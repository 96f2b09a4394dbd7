"""Streams of pickles that were cut: what torch.save wrote before 1.6, whose storages follow the pickle, and pickles."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, TruncatedError
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.salvage.found import CutStorages, Document, Lost, Salvaged, checkpoint_of, told_apart
from ckpt_cli.model.checkpoint import Entry
from ckpt_cli.pickles.cut import read_cut_pickle
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.legacy_save import NUMEL, after_preface, is_save, pickle_at, references_by_key
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace


def salvage(file: SourceFile, problem: str, kind: str) -> Salvaged:
    """Read pickles one after another, the last of which may be cut, or the storages after it.

    Raises FormatError for a stream that is wrong before its end.
    """
    entries: list[Entry] = []
    lost: list[Lost] = []
    document: Document | None = None
    end: int | None = None
    begin = number = 0
    while begin < file.size and number < limits.SAVES:
        label = f"[{number}]." if number else ""
        try:
            end, found, missing, document = _part(file, begin, label)
        except (TruncatedError, FormatError) as error:
            if isinstance(error, LimitError) or not number:
                raise
            break
        entries += [_labelled(entry, number) for entry in found]
        lost += [replace(item, name=f"{label}{item.name}") for item in missing]
        if end is None:
            break
        begin, number = end, number + 1
    only = None if number or end is not None else document
    return Salvaged(checkpoint_of(file, kind, entries), problem, tuple(lost), only)


def _labelled(entry: Entry, number: int) -> Entry:
    """Return an entry as the whole stream names it: those of the second pickle begin with `[1].`, and so on."""
    if not number:
        return entry
    return replace(entry, name=f"[{number}].{entry.name}" if entry.name else f"[{number}]")


def _part(file: SourceFile, begin: int, label: str) -> tuple[int | None, list[Entry], list[Lost], Document | None]:
    """Return the byte after one pickle and its storages, its entries, what is lost, and the pickle of a torch.save.

    The byte is None where the file ends within them, the pickle where it is not whole.
    """
    storages = CutStorages(file)
    storages.prefix = label
    head = file.read(begin, min(32, file.size - begin))
    is_torch = is_save(head)
    if is_torch:
        try:
            begin = after_preface(file, begin)
        except TruncatedError:
            return None, [], [Lost("", _REST)], None
    graph, is_whole = read_cut_pickle(file.view(begin, file.size - begin)) if begin < file.size else (None, False)
    if graph is None:
        return None, [], [Lost("", _REST)], None
    end = _place(file, begin + graph.nbytes, graph, storages) if is_torch and is_whole else None
    entries = entries_of(graph, storages, place=PicklePlace(begin))
    kept, lost = told_apart(entries, storages)
    if not is_whole:
        lost.append(Lost("", _REST))
    elif not is_torch:
        end = begin + graph.nbytes
    document = Document(graph, entries, storages, begin) if is_torch and is_whole else None
    return end, kept, lost, document


_REST = "the entries after these, whose names the file does not have any more"


def _place(file: SourceFile, position: int, graph: Graph, storages: CutStorages) -> int | None:
    """Note where the storages stand that follow a pickle, in the order of their keys; return the byte after the last.

    None where the file ends before.
    """
    try:
        keys = pickle_at(file, position)
    except TruncatedError:
        return None
    position += keys.nbytes
    known = references_by_key(graph)
    for key in map(text_of, keys.root if isinstance(keys.root, list) else ()):
        if key is None or key not in known or position + NUMEL.size > file.size:
            return None
        nbytes = known[key].numel * known[key].itemsize
        position += NUMEL.size
        storages.places[key] = position, min(nbytes, file.size - position)
        position += nbytes
        if position > file.size:
            return None
    return position
