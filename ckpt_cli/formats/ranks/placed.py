"""Rank files of FSDP: each has the parts of one rank, and says where in the whole they lie.

`model_world_size_W_rank_R.pt`, as verl, SkyRL and others write them, and Accelerate's `pytorch_model_fsdp_0_rankR.bin`
(`save_fsdp_model` with `use_dcp=False`) hold the state_dict of a model under FSDP: a DTensor or a ShardedTensor with
the rank's own part of each tensor, or a plain tensor that every rank has whole. Placements decide how parts are put
together, never their values. `pytorch_model_fsdp_rankR.bin` are Accelerate's files of FSDP's local state, which is
without names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.errors import CkptError, RanksError, UnsupportedError, about, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import join
from ckpt_cli.files.source import Extent
from ckpt_cli.formats.dcp.boxes import Box, Chunks
from ckpt_cli.formats.dcp.container import ChunkedTensor, Composed, Stored
from ckpt_cli.formats.ranks.listed import as_they_are, beside_note, count
from ckpt_cli.formats.ranks.names import MODEL, OPTIMIZER, files_by_kind, rank_of
from ckpt_cli.formats.ranks.rank_file import RankFile
from ckpt_cli.formats.ranks.refused import FIXED, as_files
from ckpt_cli.formats.sharded.read import ReadOne
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor, Value, contiguous_stride

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

NAME = "fsdp"

_FLAT = ("_flat_param", "flat_param")
"""The last part of the names of FSDP's flat parameters, of which only its local state has any."""

_FLAT_STATES = "they are of flat parameters, of which each rank has a part, and no file says which"

_PLAIN = 4 << 20
"""Bytes of tensors that several ranks have whole, compared at a time."""


def read_folder(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the files of all ranks as the model whose parts they have."""
    found = files_by_kind(path, names)
    every = [name for of_kind in found.values() for name in of_kind]
    files = opener.open_all([join(path, name) for name in every])
    with closed_on_error(files):
        saved = dict(zip(every, (RankFile(file, read_one) for file in documented(files)), strict=True))
        joining = _Joining(path, Composed(files, _no_seal))
        with about(path):
            entries, notes = _joined_kinds(joining, {kind: [saved[name] for name in found[kind]] for kind in found})
    models = [kind for kind in found if kind.startswith(MODEL)]
    ranks = max(len(found[kind]) for kind in models)
    return Checkpoint(
        path=path,
        format=NAME,
        entries=entries,
        container=joining.container,
        version=f"FSDP, {count(ranks, 'rank')}; {joining.kinds()}",
        objects=list(dict.fromkeys(name for file in saved.values() for name in file.objects)),
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
        is_set=True,
        notes=[*beside_note(sorted(set(names) - set(every))), *notes],
        weights=MODEL if models == [MODEL] else "",
        fixed=FIXED,
    )


def _joined_kinds(joining: _Joining, by_kind: Mapping[str, Sequence[RankFile]]) -> tuple[list[Entry], list[str]]:
    """The entries of the models, of optimizers and of each rank's own state; and what is left out, a line each."""
    entries: list[Entry] = []
    notes: list[str] = []
    for kind, files in by_kind.items():
        if kind.startswith(MODEL):
            entries += joining.entries(files, kind)
            continue
        try:
            if kind.startswith(OPTIMIZER):
                found = list(joining.entries(files, kind))
                if joining.are_flat(found):
                    found = [entry for entry in found if not isinstance(entry, Tensor) or not entry.shape]
                    notes.append(f"the {kind}'s states are left out: {_FLAT_STATES}")
            else:
                roots = [(file, [(f"{kind}.{rank}", file.graph.root)]) for rank, file in enumerate(files)]
                found = [entry for file, root in roots for entry in file.entries(root)]
            entries += found
        except (RanksError, UnsupportedError) as error:
            what = f"the {kind}'s states are" if kind.startswith(OPTIMIZER) else f"{kind} is"
            notes.append(f"{what} left out: {error.problem}")
    return entries, notes


def read_files(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the same files side by side, as they are."""
    found = sorted(name for name in names if rank_of(name) is not None)
    version = f"FSDP, {count(len(found), 'file')} of ranks"
    return replace(as_they_are(path, found, opener, read_one), format=NAME, version=version)


def _no_seal(_: Overlay) -> None:
    """Nothing is patched."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One rank's part of a tensor."""

    box: Box
    tensor: Tensor
    file: RankFile


class _Joining:
    """The tensors of some rank files, being joined."""

    def __init__(self, path: str, container: Composed) -> None:
        self._path = path
        self.container = container
        self._kinds: dict[str, None] = {}
        self._storages: dict[tuple[int, ...], Storage] = {}
        """The storages that were joined, by those of the parts, so that tied tensors have one."""

    def kinds(self) -> str:
        """Return how its tensors are spread, in words."""
        return listed(list(self._kinds), 4) if self._kinds else "whole tensors"

    def entries(self, files: Sequence[RankFile], prefix: str) -> Iterator[Entry]:
        """The entries of the whole, each called by a prefix and the name that all ranks have it under."""
        by_rank = [{entry.name: entry for entry in file.entries([(prefix, file.graph.root)])} for file in files]
        for file, found in zip(files, by_rank, strict=True):
            if found.keys() != by_rank[0].keys():
                odd = sorted(found.keys() ^ by_rank[0].keys())
                raise RanksError(
                    f"it has other entries than {files[0].name}, such as {odd[0]!r}: one is of another save",
                    path=file.path,
                )
        flat = next((name for name in by_rank[0] if name.rpartition(".")[2] in _FLAT), None)
        if flat is not None:
            raise UnsupportedError(
                "FSDP's local state (LOCAL_STATE_DICT): each rank has a part of flat parameters "
                f"({flat.removeprefix(f'{prefix}.')}), and no file says the names and shapes of what they are made of",
                path=self._path,
                hint="load it under FSDP with the model's code, and save its full or sharded state; "
                f"{as_files(self._path)}",
            )
        for name, first in by_rank[0].items():
            same = [found[name] for found in by_rank]
            if isinstance(first, Value):
                yield first
                continue
            tensors = [entry for entry in same if isinstance(entry, Tensor)]
            try:
                yield self._joined(name, first, tensors, files)
            except CkptError as error:
                error.problem = f"{name!r}: {error.problem}"
                raise

    def are_flat(self, states: Sequence[Entry]) -> bool:
        """True if no state of an optimizer says of what it is a part, as those of flat parameters do not."""
        tensors = [entry for entry in states if isinstance(entry, Tensor) and entry.shape]
        agreed = [isinstance(each.storage.source, AgreedBytes) for each in tensors if each.storage is not None]
        return bool(self._kinds and agreed and all(agreed))

    def _joined(self, name: str, first: Tensor, tensors: Sequence[Tensor], files: Sequence[RankFile]) -> Tensor:
        if len(tensors) < len(files) or any(
            (each.dtype, each.shape, each.layout) != (first.dtype, first.shape, first.layout) for each in tensors
        ):
            raise RanksError("the ranks do not have it with one dtype and shape, so it is no whole")
        if first.sharding is None:
            return self._agreed(first, tensors, files)
        parts = list(_parts(tensors, files))
        self._kinds[_kind(first)] = None
        return self._of_parts(name, first, parts)

    def _agreed(self, first: Tensor, tensors: Sequence[Tensor], files: Sequence[RankFile]) -> Tensor:
        """A plain tensor, which all ranks must have alike; it is compared when it is read."""
        storages = [each.storage for each in tensors]
        if len(tensors) == 1 or first.storage is None or any(each.view is None for each in tensors):
            return first
        for each in tensors:
            if (each.stride, each.storage_offset) != (first.stride, first.storage_offset):
                raise RanksError("it is whole on each rank, but not stored alike")
        key = tuple(map(id, storages))
        if key not in self._storages:
            agreed = AgreedBytes(first.name, [each for each in storages if each], [file.name for file in files])
            self._storages[key] = Storage(first.storage.key, first.storage.nbytes, first.storage.location, agreed)
        return replace(first, storage=self._storages[key])

    def _of_parts(self, name: str, first: Tensor, parts: Sequence[_Part]) -> Tensor:
        shape = first.shape or ()
        once: dict[Box, _Part] = {}
        for part in parts:
            once.setdefault(part.box, part)
        boxes = list(once)
        have, chunks = sum(box.numel for box in boxes), Chunks(shape, boxes)
        if have != chunks.numel:
            raise RanksError(f"its parts have {have:,} elements, it has {chunks.numel:,}")
        held = list(once.values())

        def stored(number: int) -> Stored:
            part = held[number].tensor
            if part.storage is None:
                raise RanksError(f"tensor {name!r}: its part in {held[number].file.name} has no bytes")
            return Stored(part.storage, part.storage_offset, part.stride)

        key = tuple(x for part in held for x in (id(part.tensor.storage), part.tensor.storage_offset))
        if key not in self._storages or not chunks.numel:
            chunked = ChunkedTensor(name, first.dtype, chunks, stored)
            self._storages[key] = self.container.storage(
                name, first.dtype.nbytes(chunks.numel), chunked, composed=len(boxes) > 1
            )
        return Tensor(name, first.dtype, shape, contiguous_stride(shape), self._storages[key],
                      requires_grad=first.requires_grad, kind=first.kind)  # fmt: skip


def _kind(tensor: Tensor) -> str:
    said = tensor.sharding
    if said is None or not said.placements:
        return "ShardedTensor"
    return f"DTensor {said.placements}"


def _parts(tensors: Sequence[Tensor], files: Sequence[RankFile]) -> Iterator[_Part]:
    """The parts of a tensor that the ranks have, each with its place; raises UnsupportedError for one without."""
    for tensor, file in zip(tensors, files, strict=True):
        said = tensor.sharding
        local = [part for part in tensor.parts if part.name == "_local_tensor" or part.name.startswith("shard")]
        if said is None or len(said.offsets) != len(local) or (said.placements and not local):
            where = f"placements {said.placements or '?'} on {said.mesh or '?'}" if said else "it is no DTensor there"
            raise UnsupportedError(
                f"which part {file.name} has is not known: {where}",
                hint="only Shard and Replicate are joined; load it with torch.distributed on the same mesh, and save "
                "its full state (full_tensor(), or FULL_STATE_DICT)",
            )
        for part, offset in zip(local, said.offsets, strict=True):
            shape = part.shape or ()
            if part.dtype is not tensor.dtype or part.layout != "strided" or part.conj or part.neg or part.big_endian:
                raise UnsupportedError(
                    f"its part in {file.name} is {part.dtype} or {part.layout}, it is {tensor.dtype}"
                )
            if part.dtype.bits % 8:
                raise UnsupportedError(f"it is {part.dtype}, whose elements share bytes")
            whole = tensor.shape or ()
            if len(offset) != len(whole) or len(shape) != len(whole):
                raise RanksError(f"its part in {file.name} has another number of dimensions")
            if any(at + size > most for at, size, most in zip(offset, shape, whole, strict=True)):
                raise RanksError(f"its part in {file.name} lies beyond its end")
            yield _Part(Box(tuple(offset), tuple(shape)), part, file)


class AgreedBytes:
    """The bytes of a tensor that every rank has whole: those of the first, once the others are found to be the same."""

    __slots__ = ("_files", "_name", "_storages")
    composed = False

    def __init__(self, name: str, storages: Sequence[Storage], files: Sequence[str]) -> None:
        self._name = name
        self._storages = storages
        self._files = files

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the tensor; raises RanksError where they differ between ranks."""
        self._compare(begin, nbytes)
        return self._storages[0].view(begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return the extents of a range in the first rank's file; raises RanksError where another rank differs."""
        self._compare(begin, nbytes)
        return self._storages[0].extents(begin, nbytes)

    def _compare(self, begin: int, nbytes: int) -> None:
        for at in range(begin, begin + nbytes, _PLAIN):
            size = min(_PLAIN, begin + nbytes - at)
            first = self._storages[0].view(at, size)
            for storage, file in zip(self._storages[1:], self._files[1:], strict=True):
                if storage.view(at, size) != first:
                    raise RanksError(
                        f"{self._name!r} is whole on each rank, but {file} has other values than {self._files[0]}",
                        hint="it was trained or updated apart on each rank: which one is right, no file says",
                    )
