"""The pickle of a file that was cut after it, as a new file: all its dicts, lists and values, without what is lost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import cast

from ckpt_cli.edits.convert_options import KEEP_ONE, ConvertOptions, ConvertPlan, stem_of
from ckpt_cli.errors import UnsupportedError, listed
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.salvage.found import Document, Salvaged, missing_of
from ckpt_cli.formats.targets import Target
from ckpt_cli.formats.torch_zip.write import SavedObject, unwrap_classes
from ckpt_cli.model.changes import Changes, content_of
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.nn.state_dict import state_names
from ckpt_cli.pickles.attributes import Field
from ckpt_cli.pickles.edit.apply import Editing
from ckpt_cli.pickles.edit.locate import NodePlace
from ckpt_cli.pickles.references import number_storages, reference_of, references_of, storage_references
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

_NAMED = 3
"""Names that a report spells out."""


def plan_salvaged(found: Salvaged, target: Target, output: str, options: ConvertOptions) -> ConvertPlan | None:
    """Plan a file with the nested values of a cut one; None where its tensors are to be written under flat names.

    So are those of a file whose pickle was cut too, of a module, and of a pickle that cannot be without what is lost.
    """
    document = found.document
    is_part = bool(options.select or options.names or options.exclude)
    if document is None or is_part or not target.keeps_objects or options.tensors_only:
        return None
    if options.dtype is not None or options.shared != KEEP_ONE or document.storages.big_endian:
        return None
    checkpoint = replace(found.checkpoint, document=document.graph, entries=document.entries)
    if state_names(checkpoint) is not None:
        return None
    try:
        return _planned(found, document, target, output)
    except UnsupportedError:
        return None


def _planned(found: Salvaged, document: Document, target: Target, output: str) -> ConvertPlan:
    """Plan the file; raises UnsupportedError where the pickle cannot be without what is lost."""
    from ckpt_cli.arrays.cast import Losses

    place = PicklePlace(document.begin)
    editing = Editing(document.graph, document.storages, place, document.entries)
    kept = [entry for entry in document.tensors if missing_of(entry, document.storages.present) is None]
    if not kept and len(document.tensors) == len(document.entries):
        raise UnsupportedError("nothing of it is left")
    whole = {tensor.name for tensor in kept}
    lost = {tensor.name for tensor in document.tensors if tensor.name not in whole}
    places = {name: editing.entry(name) for name in lost}
    listed_ones = [name for name, at in places.items() if not at.is_keyed]
    for name in listed_ones:
        _require_plain(places[name])
    changes = Changes(dropped=frozenset(lost.difference(listed_ones)), values=dict.fromkeys(listed_ones))
    of_kept = {id(node) for tensor in kept for node in references_of(editing.entry(tensor.name).node)}
    editing.carry_out(changes)
    root = editing.root
    unwrap_classes(root)
    storages = _storages(document, root, kept, of_kept)
    ordered = number_storages(root, storages)
    files = found.checkpoint.container.files
    contents = {storage: content_of(storage, files=files) for storage in ordered}
    new = NewCheckpoint((), contents, stem=stem_of(output))
    job = SavedObject(
        root, ordered, new, document.graph.data, open_checkpoint, write=target.object_writer().write_object
    )
    added = (f"None in the place of {listed(sorted(listed_ones), _NAMED)}",) if listed_ones else ()
    return ConvertPlan(job, len(kept), Losses(), contents, added=added)


def _require_plain(place: NodePlace) -> None:
    """Raise UnsupportedError where a place is not in plain lists, tuples and values of mappings: None might not do."""
    for at in place.chain():
        holder = at.parent.node if at.parent is not None else None
        if isinstance(at.sequence, Field) or not (at.is_keyed or type(holder) in (list, tuple)):
            raise UnsupportedError(f"{place.name!r} is what an object is made of, so None cannot stand in its place")


def _storages(document: Document, root: object, kept: Sequence[Tensor], of_kept: Collection[int]) -> dict[int, Storage]:
    """Return the storage of each reference by its identity; one that is cut ends where the last kept tensor does.

    `of_kept` are the references of kept tensors, by identity. Raises UnsupportedError where anything else refers to a
    storage that is cut.
    """
    ends = _ends(kept)
    by_key: dict[str, Storage] = {storage.key: storage for storage in ends}
    cut: dict[str, Storage] = {}
    found: dict[int, Storage] = {}
    for node in storage_references(root):
        reference = reference_of(node)
        if reference is None:
            continue
        key = reference.key
        if key not in by_key:
            by_key[key] = document.storages.find(key, reference.numel * reference.itemsize, reference.location)
        storage = by_key[key]
        if document.storages.present.get(storage, storage.nbytes) < storage.nbytes:
            if id(node) not in of_kept:
                raise UnsupportedError(f"an object refers to storage {key!r}, which is cut")
            nbytes = ends[storage]
            if key not in cut:
                cut[key] = Storage(key, nbytes, storage.location, storage.source)
            storage = cut[key]
            node.pid = (*cast("tuple[object, ...]", node.pid)[:4], nbytes // reference.itemsize)
        found[id(node)] = storage
    return found


def _ends(tensors: Sequence[Tensor]) -> dict[Storage, int]:
    """Return each storage of some tensors and their parts, with the byte after the last one that they have of it."""
    ends: dict[Storage, int] = {}
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if tensor.storage is not None:
            begin, end = tensor.span
            ends[tensor.storage] = max(ends.get(tensor.storage, 0), end if end > begin else 0)
        pending += tensor.parts
    return ends
