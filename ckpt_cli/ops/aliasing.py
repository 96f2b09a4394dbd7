"""Tensors that share bytes: tied, overlapping or only co-stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import lcm

from ckpt_cli.budget import Budget
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Names that share a storage."""

    names: tuple[str, ...]
    storage: str
    nbytes: int
    """Bytes of the storage that the views take, each counted once."""
    view: Tensor | None = None
    """The one view that all the names are, where they are tied."""

    @property
    def saved(self) -> int:
        """Bytes that the names would take more if each had its own."""
        return (len(self.names) - 1) * self.nbytes if self.view is not None else 0


def tie_groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups of two or more tensors that are one: the same view of the same storage."""
    tensors = list(tensors)
    storages = {tensor.storage for tensor in tensors}
    if len(storages) == len(tensors) and None not in storages:  # as in nearly every file: no two can be one
        return []
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    made_of_parts = [tensor for tensor in tensors if tensor.parts and tensor.storage is None]
    for views in (*(views for _, views in by_storage(tensors)), made_of_parts):
        if len(views) > 1:
            for tensor in views:
                view = tensor.view
                if view is not None:
                    groups.setdefault(view, []).append(tensor)
    return [group for group in groups.values() if len(group) > 1]


def tied_names(tensors: Iterable[Tensor]) -> dict[str, list[str]]:
    """For each tied name, all the names of its group, which share one list."""
    found: dict[str, list[str]] = {}
    for group in tie_groups(tensors):
        found.update(dict.fromkeys(names := [tensor.name for tensor in group], names))
    return found


class Companions:
    """Further names that one object has for a tensor, such as an LSTM's `_flat_weights.0` for a parameter.

    They are what the object computes with, so that no edit may separate them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        kept = {tensor.view for tensor in tensors if tensor.holder is not None and tensor.view is not None}
        self._same: dict[object, list[Tensor]] = {}
        for tensor in tensors if kept else ():
            if tensor.view in kept:
                self._same.setdefault(tensor.view, []).append(tensor)

    def of(self, tensor: Tensor) -> list[Tensor]:
        """Return the companions of a tensor."""
        if not self._same:
            return []
        same = self._same.get(tensor.view, ())
        return [each for each in same if each is not tensor and (_keeps(each, tensor) or _keeps(tensor, each))]


def _keeps(kept: Tensor, other: Tensor) -> bool:
    """True if an object keeps to itself a tensor that it has under another name as well."""
    holder = kept.holder
    return holder is not None and (not holder or other.name.startswith(f"{holder}."))


def are_tied(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are one."""
    return a.view is not None and a.view == b.view


def unique_numel(tensors: Iterable[Tensor]) -> int:
    """Elements of all tensors, those of tied ones counted once."""
    tensors = list(tensors)
    repeated = sum((len(group) - 1) * group[0].numel for group in tie_groups(tensors))
    return sum(tensor.numel for tensor in tensors) - repeated


def stored_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each counted once."""
    return sum(storage.nbytes for storage in {tensor.storage for tensor in all_strided(tensors)} if storage is not None)


def all_strided(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors and the parts of those that are made of others, as far as they have storages.

    A part is called by the name of the whole and its own, `emb.weight.values`.
    """
    found = []
    for tensor in tensors:
        if tensor.storage is not None:
            found.append(tensor)
        if tensor.parts:
            found.extend(all_strided(_named_parts(tensor)))
    return found


def _named_parts(tensor: Tensor) -> list[Tensor]:
    return [replace(part, name=f"{tensor.name}.{part.name}" if tensor.name else part.name) for part in tensor.parts]


def all_named(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors and their parts, by name; of several that are made of the same parts, those of the first."""
    found: list[Tensor] = []
    seen: set[object] = set()
    for tensor in tensors:
        found.append(tensor)
        if tensor.parts:
            view = tensor.view
            if view is None or view not in seen:
                seen.add(view)
                found.extend(all_named(_named_parts(tensor)))
    return found


def by_storage(tensors: Iterable[Tensor]) -> list[tuple[Storage, list[Tensor]]]:
    """Every storage with the tensors that are views of it."""
    groups: dict[Storage, tuple[Storage, list[Tensor]]] = {}
    for tensor in tensors:
        storage = tensor.storage
        if storage is not None:
            known = groups.get(storage)
            if known is None:
                groups[storage] = (storage, [tensor])
            else:
                known[1].append(tensor)
    return list(groups.values())


def share_bytes(a: Tensor, b: Tensor) -> bool:
    """True if two views of one storage have a byte in common; undecidable cases of many strides count as yes."""
    (begin_a, end_a), (begin_b, end_b) = a.span, b.span
    if end_a <= begin_b or end_b <= begin_a:
        return False
    if a.is_contiguous and b.is_contiguous:
        return True
    from ckpt_cli.arrays.indexing import regions_meet

    return regions_meet(a, b)


def is_array(view: Tensor) -> bool:
    """True if it is numpy's, whose bytes are a part of the pickle: those stay as they are."""
    return view.python_type == "numpy.ndarray"


def needed_nbytes(storage: Storage, views: Sequence[Tensor]) -> int:
    """Bytes that a storage keeps when it is compacted: of one view its elements, of several the spans of all."""
    if any(map(is_array, views)):
        return storage.nbytes
    distinct = {view.view: view for view in views if view.view is not None}
    alone = next(iter(distinct.values())).nbytes if len(distinct) == 1 else storage.nbytes
    if alone < storage.nbytes:
        return alone
    return min(sum(end - begin for begin, end, _ in blocks_of(views)), storage.nbytes)


def blocks_of(views: Iterable[Tensor]) -> Iterator[tuple[int, int, int]]:
    """Yield the unions of the views' spans, as (begin, end, place in the new storage).

    Each begins at a multiple of 16 bytes, and of the blocks of the views' dtypes.
    """
    views = [view for view in views if view.numel]
    unit = lcm(16, *(view.dtype.block_nbytes for view in views))
    at = 0
    begin = end = -1
    for first, last in sorted(view.span for view in views):
        first -= first % unit
        if begin < 0:
            begin, end = first, last
        elif first <= end:
            end = max(end, last)
        else:
            yield begin, min(end + -end % unit, first), at
            at += min(end + -end % unit, first) - begin
            begin, end = first, last
    if begin >= 0:
        yield begin, end, at


def spans_used(views: Iterable[Tensor]) -> int:
    """Bytes between the first and last byte of each view, bytes of several views counted once."""
    used = reached = 0
    for begin, end in sorted(view.span for view in views):
        used += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return used


def partly_shared(views: Sequence[Tensor], budget: Budget) -> tuple[list[Tensor], list[Tensor]]:
    """Return the distinct views of one storage that overlap another one, and those that share no byte with any.

    Of tied names the first stands for all. Where some overlap, the first of them leads the second list, so that it
    says whose storage its views lie in. Where the `budget` has no more pairs, spans decide.
    """
    first: dict[object, Tensor] = {}
    for view in views:
        if view.view is not None:
            first.setdefault(view.view, view)
    distinct = list(first.values())
    if len(distinct) < 2:
        return [], []
    overlapping = _overlapping(distinct, budget)
    meeting = [view for view in distinct if id(view) in overlapping]
    return meeting, meeting[:1] + [view for view in distinct if id(view) not in overlapping]


def _overlapping(views: Sequence[Tensor], budget: Budget) -> set[int]:
    """Return the identities of views that share a byte with another one."""
    strided = [view for view in views if not view.is_contiguous]
    if not budget.allow_pairs(len(strided) * len(views)):
        return _meeting_spans(views)
    found = _meeting_spans([view for view in views if view.is_contiguous])
    for a in strided:
        for b in views:
            if a is not b and not {id(a), id(b)} <= found and share_bytes(a, b):
                found.update((id(a), id(b)))
    return found


def _meeting_spans(views: Iterable[Tensor]) -> set[int]:
    """Return the identities of views whose spans meet those of others: contiguous ones then share bytes."""
    found: set[int] = set()
    reach: Tensor | None = None
    end = 0
    for span, view in sorted(((view.span, view) for view in views), key=lambda pair: pair[0]):
        if reach is not None and span[0] < end:
            found.update((id(view), id(reach)))
        if span[1] > end:
            reach, end = view, span[1]
    return found


def content_digest(checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    """Return a digest of a tensor's stored elements in row-major order, which are read in bounded pieces."""
    import hashlib

    from ckpt_cli.arrays.indexing import Region
    from ckpt_cli.parallel.map import JOB
    from ckpt_cli.parallel.tensor_chunks import TensorReader

    digest = hashlib.blake2b(digest_size=32)
    for data in TensorReader(checkpoint, tensor, Region.of(tensor)).read_all(JOB):
        digest.update(data)
    return digest.digest()


def digest_of_all(checkpoint: Checkpoint, tensor: Tensor) -> object:
    """Return a digest of a tensor's bytes; of one without bytes of its own, those of its parts."""
    if tensor.storage is None:
        return tuple((part.name, digest_of_all(checkpoint, part)) for part in tensor.parts)
    return content_digest(checkpoint, tensor)
