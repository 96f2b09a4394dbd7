"""The engine of `delta create`: what a checkpoint has that another one has not, as a file.

A delta is a safetensors file. Its metadata have one string `ckpt_delta`, which is JSON:

    {"version": 1,
     "base": {NAME: blake3 digest, as `ckpt hash` prints it},
     "changed": {NAME: {"how": "whole"} or {"how": "sparse", "at": key, "shape": […]} or {"how": "tied", "to": NAME}},
     "removed": [NAME, …],
     "values": {NAME: plain value}}

The tensor NAME of a `whole` change is the new one. Of a `sparse` one it has the new elements in a row, and the
tensor `at` their places in row-major order, ascending.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.changed import COUNT, PLACES, VALUES, Changed
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.edits.convert_options import NewFiles
from ckpt_cli.edits.taken import Taken
from ckpt_cli.errors import RefusedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress, counting
from ckpt_cli.files.new_folder import require_room
from ckpt_cli.files.places import is_taken
from ckpt_cli.files.unchanged import require_unchanged
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.targets import target_of
from ckpt_cli.model.changes import Content, Write
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Storage, Tensor, Value
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.ops.aliasing import digest_of_all
from ckpt_cli.ops.hash import hash_tensors
from ckpt_cli.ops.output import check_output, refuse_own, writing
from ckpt_cli.parallel.made import PIECE, pieces_made
from ckpt_cli.parallel.tensor_chunks import TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

KEY = "ckpt_delta"
VERSION = 1

WHOLE, SPARSE, TIED = "whole", "sparse", "tied"

_SHORT = 1 << 31
"""Elements from which on a place needs 64 bits."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The result of making a delta, or of its dry run."""

    base: str
    tuned: str
    output: str
    equal: int
    """Tensors that are the same bit for bit."""
    changed: Mapping[str, str]
    """How each of the others is in the delta: `whole`, `sparse` or `tied`."""
    removed: Sequence[str]
    left_out: Sequence[str]
    """Values that changed and are not plain, so that the delta does not have them."""
    bytes_written: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """Options of `delta create`."""

    force: bool = False
    dry_run: bool = False
    on_progress: OnProgress | None = None


def create(base: str, tuned: str, output: str, executor: Executor, options: CreateOptions) -> Delta:
    """Write what a checkpoint has that another one has not, from which it can be made again bit for bit.

    Raises RefusedError for an output that is there already, UnsupportedError for what a delta cannot have.
    """
    check_output(output, base, "name another file")
    if is_taken(output) and not options.force:
        raise RefusedError("it is there already", path=output, hint="--force replaces it")
    with about(base), closing(open_checkpoint(base)) as old, about(tuned), closing(open_checkpoint(tuned)) as new:
        for checkpoint in (old, new):
            refuse_own(checkpoint, output, "name another file")
        digests = hash_tensors(old, "blake3", executor).tensors
        found = _Difference(old, new, executor)
        facts = {
            "version": VERSION,
            "base": digests,
            "changed": found.changed,
            "removed": found.removed,
            "values": found.values,
        }
        metadata = {KEY: json.dumps(facts, ensure_ascii=False), "format": "pt"}
        made = NewCheckpoint(found.tensors, found.contents, metadata, mode_of=new.container.files[0].path)
        job = NewFiles(made, target_of("delta.safetensors", None, sharded=False))
        if options.dry_run:
            nbytes = job.measured()[1]
        else:
            require_room(output, lambda: job.nbytes)
            progress = counting(options.on_progress, lambda: job.nbytes)
            with writing(output, mode_of=made.mode_of, replace=options.force, progress=progress) as file:
                job.write(file, progress)
                job.verify(file.path)
                for each in (old, new):
                    require_unchanged(each.container.files)
                nbytes = file.size
        how = {name: str(change["how"]) for name, change in found.changed.items()}
        return Delta(base, tuned, output, found.equal, how, found.removed, found.left_out, nbytes, options.dry_run)


class _Difference:
    """Collects what changed from one checkpoint to another."""

    def __init__(self, old: Checkpoint, new: Checkpoint, executor: Executor) -> None:
        self._old, self._new, self._executor = old, new, executor
        self._taken = Taken(new, executor)
        self._made: dict[object, str] = {}
        self._known = {entry.name for entry in (*old.entries, *new.entries)}
        self.tensors: list[Tensor] = []
        self.contents: dict[Storage, Content] = {}
        self.changed: dict[str, dict[str, object]] = {}
        self.values: dict[str, object] = {}
        self.left_out: list[str] = []
        self.equal = 0
        before = {entry.name: entry for entry in old.entries}
        for entry in new.entries:
            was = before.pop(entry.name, None)
            if isinstance(entry, Tensor):
                self._tensor(entry, was if isinstance(was, Tensor) else None)
            elif not isinstance(was, Value) or repr(was.value) != repr(entry.value):
                self._value(entry)
        self.removed = list(before)
        self.contents |= self._taken.contents()

    def _value(self, entry: Value) -> None:
        if isinstance(entry.value, Opaque):
            self.left_out.append(entry.name)
        else:
            self.values[entry.name] = entry.value

    def _tensor(self, tensor: Tensor, was: Tensor | None) -> None:
        """Take one tensor, if it changed."""
        count = self._count(tensor, was)
        if count == 0 or (count is None and was is not None and self._are_equal(was, tensor)):
            self.equal += 1
            return
        tied = self._made.setdefault(tensor.view, tensor.name) if tensor.view is not None else tensor.name
        if tied != tensor.name:
            self.changed[tensor.name] = {"how": TIED, "to": tied}
        elif (
            count is not None
            and was is not None
            and count * (_place_size(tensor) + tensor.dtype.itemsize) < (tensor.nbytes)
        ):
            self._sparse(tensor, was, count)
        else:
            self.tensors.append(self._taken.tensor(tensor, tensor.name))
            self.changed[tensor.name] = {"how": WHOLE}

    def _are_equal(self, was: Tensor, tensor: Tensor) -> bool:
        """True if two tensors are the same that cannot be compared element by element."""
        if (was.dtype, was.shape, was.layout) != (tensor.dtype, tensor.shape, tensor.layout):
            return False
        return digest_of_all(self._old, was) == digest_of_all(self._new, tensor)

    def _count(self, tensor: Tensor, was: Tensor | None) -> int | None:
        """Return the number of elements that differ; None where shapes or dtypes do, or elements are not plain."""
        if was is None or (was.dtype, was.shape, was.layout) != (tensor.dtype, tensor.shape, tensor.layout):
            return None
        if tensor.storage is None or was.storage is None or tensor.layout != "strided" or tensor.dtype.bits < 8:
            return None
        return sum(int(str(facts)) for _, facts in self._pieces(tensor, was, COUNT))

    def _pieces(self, tensor: Tensor, was: Tensor, what: str) -> Any:
        making = Changed(tensor.dtype.itemsize, what, _place_size(tensor) == 8)
        sides = ((self._old, was), (self._new, tensor))
        readers = [TensorReader(checkpoint, side, Region.of(side)) for checkpoint, side in sides]
        return pieces_made(making, readers, tensor.numel, PIECE, self._executor)

    def _sparse(self, tensor: Tensor, was: Tensor, count: int) -> None:
        """Take the elements that differ, and their places."""
        size = _place_size(tensor)
        at = f"{tensor.name}.changed_at"
        while at in self._known:
            at += "_"
        self._known.add(at)
        places = BY_NAME["int64" if size == 8 else "int32"]
        for name, dtype, what in ((tensor.name, tensor.dtype, VALUES), (at, places, PLACES)):
            storage = Storage(name, count * dtype.itemsize)
            self.tensors.append(Tensor(name, dtype, (count,), (1,), storage))
            self.contents[storage] = Content(storage.nbytes, make=self._writer(tensor, was, what))
        self.changed[tensor.name] = {"how": SPARSE, "at": at, "shape": list(tensor.shape or ())}

    def _writer(self, tensor: Tensor, was: Tensor, what: str) -> Callable[[Write], object]:
        def make(write: Write) -> None:
            for data, _ in self._pieces(tensor, was, what):
                write(data)

        return make


def _place_size(tensor: Tensor) -> int:
    """Return the bytes of the place of an element."""
    return 4 if tensor.numel < _SHORT else 8
