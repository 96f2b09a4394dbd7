"""Checks of what a checkpoint says of itself, in whatever format."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_cli.errors import CkptError, FormatError, UnsupportedError
from ckpt_cli.files.places import canonical, folder_of, join, name_of, names_in
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.check.safetensors import MISALIGNED
from ckpt_cli.ops.ls import list_waste
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.references import is_storage
from ckpt_cli.pickles.tensors.arguments import text_of

_PICKLE = {"unusual-global", "nested-pickle", "hidden-pickle"}
"""The warnings of `scan` about pickles; for containers there are checks of their own."""

_ITEMS = ".distcp"

_WASTE = 1 << 20
"""Unused bytes from which on they are reported."""


def _repeated(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for name, count in checkpoint.names.items():
        if count > 1:
            yield Occurrence(f"{_where(checkpoint)}: {name}", f"{count} entries have this name once flattened")


def _unreadable(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Tensors whose bytes are not where the metadata say: looked up one by one, as some formats do so only then."""
    if format_of(checkpoint).has_records:  # whose local headers have a check of their own
        return
    for tensor in all_strided(checkpoint.tensors):
        if tensor.storage is None or not tensor.numel:
            continue
        try:
            tensor.storage.extents(0, tensor.storage.nbytes)
        except UnsupportedError:  # compressed
            continue
        except CkptError as error:
            yield Occurrence(f"{_where(checkpoint)}: {tensor.name}", error.problem)


def _stray_items(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Files of items beside those that the metadata of a distributed checkpoint name."""
    known = {canonical(file.path) for file in checkpoint.container.files}
    folders = {folder_of(path) for path in known if path.endswith(_ITEMS)}
    for folder in sorted(folders):
        for name in names_in(folder):
            if name.endswith(_ITEMS) and join(folder, name) not in known:
                yield Occurrence(name, "the metadata of the distributed checkpoint do not name the file")


def _no_tensors(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    if not checkpoint.tensors:
        yield Occurrence(_where(checkpoint), "there is no tensor in it")


def _unlisted(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Storages that the pickle refers to, and no entry: a part of it is not understood."""
    graph = checkpoint.document
    if not format_of(checkpoint).is_torch_save or not isinstance(graph, Graph) or "[1]" in checkpoint.top_level:
        return
    known = {view.storage.key for view in all_strided(checkpoint.tensors) if view.storage is not None}
    references = filter(is_storage, graph.persistent)
    for key in dict.fromkeys(text_of(node.pid[2]) for node in references if isinstance(node.pid, tuple)):
        if key is not None and key not in known:
            yield Occurrence(
                f"{_where(checkpoint)}: storage {key}", "the pickle refers to the storage, and no name does"
            )


def _waste(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    wasted = sum(waste.nbytes - waste.used for waste in list_waste(checkpoint))
    if wasted >= _WASTE:
        yield Occurrence(_where(checkpoint), f"{wasted} bytes of its storages are used by no tensor")


def _notes(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for note in checkpoint.notes:
        yield Occurrence(_where(checkpoint), note)


def _unread(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for part in checkpoint.unread:
        yield Occurrence(_where(checkpoint), part)


def _where(checkpoint: Checkpoint) -> str:
    return name_of(checkpoint.path)


CHECKS: tuple[Check[Checkpoint], ...] = (
    Check("same-name", "warning", "two entries of a pickle flatten to one name", _repeated, "ckpt ls -l FILE"),
    Check(
        "unreadable",
        "error",
        "the bytes of a tensor are not where the metadata say",
        _unreadable,
        "fetch or write the whole folder again",
    ),
    Check(
        "stray-items",
        "warning",
        "a folder has a `.distcp` that its `.metadata` does not name",
        _stray_items,
        "remove it if it is left from an earlier save",
    ),
    Check(
        "unread-bytes",
        "warning",
        "a file has bytes that belong to none of its arrays and pickles",
        _unread,
        "find out what wrote them: ckpt reads past them",
    ),
    MISALIGNED,
    Check("waste", "note", "storages are 1 MiB or more larger than their tensors", _waste, "ckpt ls --waste FILE"),
    Check("unlisted-storage", "warning", "the pickle refers to a storage that no entry has", _unlisted),
    Check("no-tensors", "note", "there is no tensor", _no_tensors, "ckpt ls -a FILE"),
    Check("oddity", "note", "what opening the file says of it", _notes),
)


def _dangerous(path: str) -> Iterator[Occurrence]:
    from ckpt_cli.ops.scan import scan

    try:
        findings = scan(path).findings
    except FormatError:  # nothing that could hold a pickle
        return
    broken = any(found.code == "broken-zip" for found in findings)
    for found in findings:
        if found.severity == "error" and found.code != "too-many":
            yield Occurrence(found.where, found.message)
        elif found.code in _PICKLE and not (broken and found.code == "hidden-pickle"):
            yield Occurrence(found.where, found.message, "warning")


PICKLES: tuple[Check[str], ...] = (
    Check("dangerous", "error",
          "a pickle would run something dangerous if something else loaded it; a warning if it is only unusual",
          _dangerous, "do not load it; see ckpt scan FILE"),
)  # fmt: skip
"""Of one file, by its path."""
