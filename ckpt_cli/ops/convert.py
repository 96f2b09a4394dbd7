"""What `convert` does: a checkpoint of any format that can be read, written anew in another one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.changes import Changes, Content
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError, about
from ckpt_cli.files.copying import Progress, Told, counting, no_progress
from ckpt_cli.files.local import LocalFile
from ckpt_cli.formats import open_checkpoint, rewriting
from ckpt_cli.formats.targets import Target, target_of
from ckpt_cli.model import Checkpoint, Entry, Tensor, Value
from ckpt_cli.ops.cast import plan_cast
from ckpt_cli.ops.names import close_names
from ckpt_cli.ops.outputs import check_output, writing
from ckpt_cli.ops.packing import Casting, pack_plain, pack_whole, storage_content
from ckpt_cli.ops.remove import plan_root
from ckpt_cli.ops.shared import Comparisons, all_strided, by_storage, partly_shared, tie_groups
from ckpt_cli.ops.state import state_names
from ckpt_cli.outgoing import Outgoing

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.casting import Losses

KEEP_ONE, CLONE, ERROR = "keep-one", "clone", "error"

NOT_STATE = "not in the state_dict of the module"
"""Why what else a module has does not come along."""

_PICKLED = ("zip", "legacy", "pickle")
"""Formats whose pickle can become that of a torch zip file as a whole."""

_OF_THE_FILE = ("format", "total_size", "total_parameters", "ckpt.order")
"""Keys of metadata that are about the old file, not about the checkpoint."""

_MOST = 20
"""Names that are spelled out."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a conversion can be told."""

    to: str | None = None
    """The name of the format; None for what the output's name says."""
    select: str = ""
    """The prefix that becomes the whole."""
    dtype: DType | None = None
    """What floats become."""
    max_shard: int | None = None
    """Bytes of one shard, where shards are wanted."""
    shared: str = KEEP_ONE
    """What becomes of tensors that share bytes: `keep-one`, `clone` or `error`."""
    tensors_only: bool = False
    """Whether what the format cannot hold may be left out."""
    lossy: bool = False
    """Whether values may become infinite or zero in a cast."""
    force: bool = False
    """Whether what is there already may be replaced."""
    dry_run: bool = False
    progress: Progress = field(default=no_progress)
    """Told of bytes as they are written."""
    told: Told | None = None
    """Told of bytes done and bytes in all, once it takes a while, instead."""
    executor: Executor | None = None
    """What casts side by side."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that does not come along."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did, or would do."""

    path: str
    output: str
    format: str
    """The name of the new format."""
    what: str
    """The same in words."""
    tensors: int
    """How many were written."""
    bytes_written: int
    left_out: tuple[LeftOut, ...] = ()
    """What did not come along."""
    separated: tuple[str, ...] = ()
    """Names that shared bytes with others and have their own now."""
    files: tuple[str, ...] = ()
    """The names of the files, where the output is a folder."""
    dry_run: bool = False


class Job(Protocol):
    """What is left to do once all is planned."""

    nbytes: int

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write the one file."""

    def verify(self, path: str) -> None:
        """Raise where it does not read back."""


@dataclass(slots=True)
class _Flat:
    """Tensors under flat names, in whatever format."""

    outgoing: Outgoing
    writer: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.outgoing.nbytes

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write the one file."""
        self.writer.write(self.outgoing, target, progress)

    def verify(self, path: str) -> None:
        """Raise where it does not read back."""
        self.writer.verify(self.outgoing, path)


@dataclass(slots=True)
class _Plan:
    """What becomes of what."""

    job: Any
    tensors: int
    losses: Losses
    left_out: tuple[LeftOut, ...] = ()
    separated: tuple[str, ...] = ()


def convert(path: str, output: str, wishes: Wishes) -> Conversion:
    """Write the checkpoint `path` as `output`, all or nothing.

    Raises RefusedError where something would not come along, or for an output that is there already; UnsupportedError
    for what no format could take.
    """
    target = target_of(output, wishes.to, sharded=wishes.max_shard is not None)
    _check(path, output, target, wishes)
    with about(path), closing(open_checkpoint(path)) as opened:
        plan = _planned(opened, target, output, wishes)
        done = Conversion(
            path=path,
            output=output,
            format=target.name,
            what=target.what,
            tensors=plan.tensors,
            bytes_written=plan.job.nbytes,
            left_out=plan.left_out,
            separated=plan.separated,
            dry_run=wishes.dry_run,
        )
        if wishes.dry_run:
            return done
        progress = counting(wishes.told, lambda: plan.job.nbytes, wishes.progress)
        if target.is_folder:
            from ckpt_cli.ops.convert_folder import write_folder

            def check() -> None:
                _refuse_losses(plan.losses, wishes)

            files, nbytes = write_folder(output, target, plan.job.outgoing, check, progress)
            return replace(done, files=files, bytes_written=nbytes)
        with writing(output, mode_of=opened.container.files[0].path) as file:
            plan.job.write(file, progress)
            _refuse_losses(plan.losses, wishes)
            plan.job.verify(file.path)
            return replace(done, bytes_written=os.fstat(file.fd).st_size)


def _check(path: str, output: str, target: Target, wishes: Wishes) -> None:
    """Raise before any work is done where the output must not be written."""
    if target.is_folder:
        if os.path.lexists(output) and not os.path.isdir(output):
            raise UsageError(f"{target.what} go to a folder, and this is a file", path=output)
        occupied = os.path.isdir(output) and bool(os.listdir(output))
    else:
        check_output(output, path, "name another file: a conversion leaves its source as it is")
        occupied = os.path.lexists(output)
    if occupied and not wishes.force:
        raise RefusedError("it is there already", path=output, hint="--force replaces it")


def _refuse_losses(losses: Losses, wishes: Wishes) -> None:
    if losses and not wishes.lossy:
        raise RefusedError(
            f"{losses.infinite:,} values would become infinite and {losses.zero:,} zero in {wishes.dtype}",
            hint="--lossy casts all the same",
        )


# --- planning --------------------------------------------------------------------------------------------------------


def _planned(checkpoint: Checkpoint, target: Target, output: str, wishes: Wishes) -> _Plan:
    """What is to be written, and what is not."""
    prefix = wishes.select.removesuffix(".")
    names = state_names(checkpoint, prefix)
    selected = _selected(checkpoint, prefix)
    _refuse_shared(selected, wishes)
    keeps_all = target.keeps_objects and names is None and not wishes.tensors_only and wishes.shared != CLONE
    if keeps_all and _has_a_document(checkpoint):
        return _document(checkpoint, output, wishes)
    return _flat(checkpoint, target, output, wishes, names, selected)


def _has_a_document(checkpoint: Checkpoint) -> bool:
    """Whether it is one pickle that can become that of a torch zip file as it is.

    What pickle.dump wrote of a plain dict of tensors has their bytes within the pickle: that is better written anew.
    """
    if checkpoint.format not in _PICKLED or "[1]" in checkpoint.top_level:  # a stream may have several saves
        return False
    top = set(checkpoint.top_level)
    plain = all(isinstance(entry, Tensor) and entry.name in top for entry in checkpoint.entries)
    return checkpoint.format != "pickle" or not plain


def _selected(checkpoint: Checkpoint, prefix: str) -> list[Entry]:
    """The entries below a prefix, under their old names."""
    if not prefix:
        return list(checkpoint.entries)
    found = [entry for entry in checkpoint.entries if entry.name.startswith(f"{prefix}.")]
    if not found:
        names = [entry.name.split(".") for entry in checkpoint.entries]
        known = list(dict.fromkeys(".".join(parts[:end]) for parts in names for end in range(1, len(parts))))
        raise NameNotFoundError(prefix, close_names(prefix, known), path=checkpoint.path)
    return found


def _refuse_shared(entries: Sequence[Entry], wishes: Wishes) -> None:
    if wishes.shared == ERROR:
        groups = tie_groups(entry for entry in entries if isinstance(entry, Tensor))
        if groups:
            raise RefusedError(
                f"tensors share their bytes ({len(groups)} groups)",
                details=_short([", ".join(tensor.name for tensor in group) for group in groups]),
                hint="--shared keep-one keeps them tied, --shared clone writes each",
            )


def _document(checkpoint: Checkpoint, output: str, wishes: Wishes) -> _Plan:
    """The whole pickle, with every object in it, as a torch zip file."""
    from ckpt_cli.arrays.casting import Losses
    from ckpt_cli.formats.new_document import Document

    losses = Losses()
    changes = plan_root(checkpoint, wishes.select).changes if wishes.select else Changes()
    kept = [entry for entry in checkpoint.entries if entry.name not in changes.dropped]
    cast_ones = [tensor for tensor in kept if isinstance(tensor, Tensor) and not _is_in_the_pickle(tensor)]
    if wishes.dtype is not None and any(_is_other_float(tensor, wishes.dtype) for tensor in all_strided(cast_ones)):
        some = replace(checkpoint, entries=cast_ones)
        cast = plan_cast(some, wishes.dtype, (), lossy=True, losses=losses, executor=wishes.executor).changes
        changes = replace(changes, tensors=cast.tensors, contents=cast.contents)
    if checkpoint.format == "zip":
        job: Any = rewriting(checkpoint, changes)
    else:
        contents = {**_contents(checkpoint, kept), **changes.contents}
        job = Document(checkpoint, changes, contents, _stem(output))
    return _Plan(job, sum(isinstance(entry, Tensor) for entry in kept), losses)


def _is_in_the_pickle(tensor: Tensor) -> bool:
    """Whether it is an array of numpy's, which comes along as the object that it is."""
    from ckpt_cli.pickles.embedded import Embedded

    return isinstance(tensor.storage, Embedded)


def _is_other_float(tensor: Tensor, dtype: DType) -> bool:
    return tensor.dtype.category == "float" and tensor.dtype is not dtype


def _contents(checkpoint: Checkpoint, entries: Sequence[Entry]) -> dict[int, Content]:
    """The bytes of every storage of some entries as they are, by the identity of the storage."""
    tensors = all_strided([entry for entry in entries if isinstance(entry, Tensor)])
    return {id(storage): storage_content(checkpoint, storage) for storage, _ in by_storage(tensors)}


def _flat(
    checkpoint: Checkpoint,
    target: Target,
    output: str,
    wishes: Wishes,
    names: Sequence[str] | None,
    entries: Sequence[Entry],
) -> _Plan:
    """The tensors under their dotted names; refused where something else would be lost that nobody allowed."""
    from ckpt_cli.arrays.casting import Losses

    writer = target.writer()
    prefix = f"{wishes.select.removesuffix('.')}." if wishes.select else ""
    fits: list[Tensor] = []
    lost: list[LeftOut] = []
    aside: list[LeftOut] = []
    for entry, why in _judged(entries, names, target, writer, wishes.dtype):
        if why is None and isinstance(entry, Tensor):
            fits.append(replace(entry, name=entry.name[len(prefix) :]))
        else:
            wanted = names is None or entry.name in names
            (lost if wanted else aside).append(LeftOut(entry.name, why or ""))
    if names is not None:
        order = {name[len(prefix) :]: place for place, name in enumerate(names)}
        fits.sort(key=lambda tensor: order[tensor.name])
    metadata = _metadata_of(checkpoint)
    if not target.keeps_metadata:
        lost += [LeftOut(key, "metadata") for key in metadata if key != "format"]
        metadata = {}
    _refuse_lost(checkpoint, lost, fits, target, wishes)
    _refuse_names(fits)
    casting = Casting(wishes.dtype, Losses(), wishes.executor)
    tied = target.keeps_ties and wishes.shared != CLONE
    if target.keeps_views and tied:
        tensors, contents = pack_whole(checkpoint, fits, casting)
    else:
        tensors, contents = pack_plain(checkpoint, fits, casting, tied=tied)
    outgoing = Outgoing(
        tensors, contents, checkpoint.container.files, metadata,
        ordered=names is not None, mode_of=checkpoint.container.files[0].path, stem=_stem(output),
    )  # fmt: skip
    if wishes.max_shard is not None:
        outgoing = replace(outgoing, max_shard=wishes.max_shard)
    separated = () if target.keeps_views and tied else tuple(_separated(fits, tied=tied))
    return _Plan(_Flat(outgoing, writer), len(tensors), casting.losses, (*lost, *aside), separated)


def _judged(
    entries: Sequence[Entry], names: Sequence[str] | None, target: Target, writer: Any, dtype: DType | None
) -> Iterator[tuple[Entry, str | None]]:
    """Each entry with why it cannot come along, None where it can."""
    known = set(names) if names is not None else None
    for entry in entries:
        if known is not None and entry.name not in known:
            yield entry, NOT_STATE
        elif isinstance(entry, Value):
            yield entry, "a value, no tensor"
        else:
            yield entry, _why_not(entry, target, writer, dtype)


def _why_not(tensor: Tensor, target: Target, writer: Any, dtype: DType | None) -> str | None:
    """Why a tensor cannot come along."""
    if tensor.layout != "strided" or tensor.storage is None or tensor.shape is None:
        return f"{tensor.layout} tensor"
    becomes = dtype if dtype is not None and tensor.dtype.category == "float" else tensor.dtype
    if writer.spelled(becomes) is None:
        return f"{becomes}, which {target.what} cannot hold"
    if becomes is not tensor.dtype and tensor.dtype.numpy is None:
        return f"{tensor.dtype}, which cannot be cast"
    return None


def _refuse_lost(
    checkpoint: Checkpoint, lost: Sequence[LeftOut], fits: Sequence[Tensor], target: Target, wishes: Wishes
) -> None:
    """Raise where something would be lost that nobody allowed, or where nothing would be left."""
    if lost and not wishes.tensors_only:
        raise RefusedError(
            f"{len(lost)} of its entries cannot come along into {target.what}",
            details=_short([f"{item.name}: {item.why}" for item in lost]),
            hint=_hint(checkpoint, lost, wishes),
        )
    if not fits and lost:
        raise RefusedError(f"none of its entries can come along into {target.what}")


def _hint(checkpoint: Checkpoint, lost: Sequence[LeftOut], wishes: Wishes) -> str:
    """What to do about what would be lost: cast it, take the state_dict alone, or leave it out."""
    dtypes = {entry.name: entry.dtype for entry in checkpoint.tensors}
    unsaid = [dtypes[item.name] for item in lost if item.name in dtypes and "which" in item.why]
    if wishes.dtype is None and any(dtype.category == "float" for dtype in unsaid):
        return "--dtype float32 casts them; --tensors-only leaves out what does not fit"
    nested = _nested_state(checkpoint) if not wishes.select else None
    if nested is not None:
        return f"--select {nested} takes the tensors below it as the whole; --tensors-only takes all tensors"
    return "--tensors-only leaves them out"


def _nested_state(checkpoint: Checkpoint) -> str | None:
    """The outermost key below which there are tensors only, the most bytes of them: the state_dict of a training."""
    sizes: dict[str, int] = {}
    mixed: set[str] = set()
    for entry in checkpoint.entries:
        key, dot, _ = entry.name.partition(".")
        if not dot or isinstance(entry, Value):
            mixed.add(key)
        else:
            sizes[key] = sizes.get(key, 0) + entry.nbytes
    candidates = {key: size for key, size in sizes.items() if key not in mixed}
    return max(candidates, key=candidates.__getitem__, default=None)


def _refuse_names(tensors: Sequence[Tensor]) -> None:
    """Raise where two tensors have one name, as no format with flat names can have that."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise RefusedError(f"several tensors are called {tensor.name!r}, and only one can be in the new file")
        seen.add(tensor.name)


def _metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The strings that are about the checkpoint, not about its file or its ties."""
    aliases = {tensor.name for tensor in checkpoint.tensors if tensor.alias_of is not None}
    kept = {key: value for key, value in checkpoint.metadata.items() if key not in aliases}
    return {key: value for key, value in kept.items() if key not in _OF_THE_FILE or key == "format"}


def _separated(tensors: Sequence[Tensor], *, tied: bool) -> Iterator[str]:
    """The names that share bytes with others now and will not any more."""
    comparisons = Comparisons()
    if not tied:
        for group in tie_groups(tensors):
            yield from (tensor.name for tensor in group)
    for _, views in by_storage(tensors):
        if len(views) > 1:
            meeting, _rest = partly_shared(views, comparisons)
            yield from (tensor.name for tensor in meeting)


def _short(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return [*lines[:_MOST], *more]


def _stem(output: str) -> str:
    """What the folder within a torch zip file is called: as the file without its last suffix."""
    return os.path.splitext(os.path.basename(output))[0] or "archive"
