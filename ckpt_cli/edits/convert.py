"""The engine of `convert`: write a checkpoint of any readable format as a new one, as one file or into a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.cast import castable_views, other_floats, plan_cast, refuse_quantized
from ckpt_cli.edits.convert_folder import write_folder
from ckpt_cli.edits.convert_nested import plan_nested
from ckpt_cli.edits.convert_options import (
    CLONE,
    KEEP_ONE,
    Conversion,
    ConvertOptions,
    ConvertPlan,
    Job,
    NewFiles,
    stem_of,
)
from ckpt_cli.edits.convert_plan import beside_state, distributed_state, flatten, flatten_weights, refuse_shared
from ckpt_cli.edits.files_beside import Beside, copy_beside, files_beside, stale_dtype
from ckpt_cli.edits.rm import chosen_names, plan_root, whole_containers
from ckpt_cli.errors import NameNotFoundError, RefusedError, UnsupportedError, UsageError, about, some_of
from ckpt_cli.files.copy import counting
from ckpt_cli.files.new_folder import (
    passes_over,
    refuse_read_only,
    require_room,
)
from ckpt_cli.files.places import is_folder, is_taken, names_in, without_end
from ckpt_cli.files.unchanged import require_unchanged, unchanged
from ckpt_cli.formats import open_checkpoint, open_salvaged, rewriting
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.salvage.found import Salvaged
from ckpt_cli.formats.targets import Target, target_of
from ckpt_cli.model.changes import Changes, Content, content_of, entries_after
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor, Value
from ckpt_cli.model.names import prefixes_of
from ckpt_cli.nn.state_dict import state_names
from ckpt_cli.ops.aliasing import all_strided, by_storage
from ckpt_cli.ops.output import check_output, refuse_own, require_name, require_place, writing
from ckpt_cli.ops.select import close_names
from ckpt_cli.pickles.graph import Graph

if TYPE_CHECKING:
    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.edits.plan import EditPlan, Planner

_ELSEWHERE = "name another file: a conversion leaves its source as it is"


def convert(
    path: str,
    output: str,
    options: ConvertOptions,
    derive: Planner | None = None,
    already: Checkpoint | None = None,
) -> Conversion:
    """Write the checkpoint `path` as `output`, all or nothing, with the changes that `derive` plans.

    These are new tensors in the places of old ones or under new names, over storages that make their bytes, new names
    of old ones, and names that are dropped. `already` is the checkpoint where it is open, which is closed and used up.
    Raises RefusedError where something would be lost, or for an output that is there already; UnsupportedError
    for what no format could take.
    """
    refuse_read_only(output)
    target = target_of(output, options.to, sharded=options.max_shard is not None)
    _check_plain(target, options)
    _check(path, output, target, options)
    with _source(path, options, already) as found, unchanged(found.checkpoint.container.files):
        opened = found.checkpoint
        for file in opened.container.files:
            file.note_whole()
        if not target.is_folder:
            refuse_own(opened, output, _ELSEWHERE)
        edit = derive(opened) if derive is not None else None
        if found.is_whole:
            plan = _planned(opened, target, output, options, edit.changes if edit is not None else None)
        else:
            plan = _of_cut(found, target, output, options)
        check_edit = edit.check if edit is not None else None
        done = Conversion(
            path=path,
            output=output,
            format=target.name,
            what=target.what,
            tensors=plan.tensors,
            bytes_written=0,
            left_out=plan.left_out,
            separated=plan.separated,
            not_kept=plan.not_kept,
            left=plan.left,
            dry_run=options.dry_run,
            added=plan.added,
            plain=plan.plain,
            problem=found.problem,
            lost=found.lost,
            beside=_beside(opened, output, plan.job, edit) if not options.weights_only else None,
        )
        if options.dry_run:
            _rehearse(plan, options, check_edit)
            files, nbytes = plan.measured()
            return replace(done, files=files, bytes_written=nbytes)
        require_room(output, lambda: plan.largest)
        passes = passes_over(output)
        progress = counting(options.on_progress, lambda: plan.job.nbytes * passes, options.progress)
        if target.is_folder and isinstance(plan.job, NewFiles):

            def check() -> None:
                _refuse_losses(plan.losses, options)
                if check_edit is not None:
                    check_edit()
                require_unchanged(opened.container.files)

            def copy(folder: str) -> list[str]:
                return copy_beside(opened, done.beside, folder)

            files, nbytes = write_folder(output, plan.job, check, progress, copy)
            return replace(done, files=files, bytes_written=nbytes)
        mode_of = opened.container.files[0].path
        with writing(output, mode_of=mode_of, replace=options.force, progress=progress) as file:
            plan.job.write(file, progress)
            _refuse_losses(plan.losses, options)
            if check_edit is not None:
                check_edit()
            plan.job.verify(file.path)
            require_unchanged(opened.container.files)
            return replace(done, bytes_written=os.fstat(file.fd).st_size)


@contextmanager
def _source(path: str, options: ConvertOptions, already: Checkpoint | None) -> Iterator[Salvaged]:
    """Context manager: the source of a conversion, or what is left of it where that may be salvaged."""
    with about(path):
        found = open_salvaged(path) if options.salvage else Salvaged(already or open_checkpoint(path))
        with closing(found):
            yield found


def _beside(checkpoint: Checkpoint, output: str, job: Job, edit: EditPlan | None) -> Beside | None:
    """Return the plan for the files beside a model's weights, where the new folder is like the old one."""
    beside = files_beside(checkpoint, output) if isinstance(job, NewFiles) and job.target.is_set else None
    if beside is None or not isinstance(job, NewFiles):
        return None
    own = re.compile(job.target.files)
    copied = tuple(name for name in beside.copied if not own.fullmatch(name))
    beside = replace(beside, copied=copied, stale=stale_dtype(checkpoint, job.new.tensors))
    return beside.with_edits(edit.beside) if edit is not None else beside


def _check(path: str, output: str, target: Target, options: ConvertOptions) -> None:
    """Raise before any work is done where the output must not be written."""
    if target.is_folder:
        require_name(output)
        if is_taken(output) and not is_folder(output):
            raise UsageError(f"{target.what} go to a folder, and this is a file", path=output)
        require_place(without_end(output))
        occupied = is_folder(output) and bool(names_in(output))
    else:
        check_output(output, path, _ELSEWHERE)
        occupied = is_taken(output)
    if occupied and not options.force:
        raise RefusedError("it is there already", path=output, hint="--force replaces it")


def _check_plain(target: Target, options: ConvertOptions) -> None:
    """Raise where `--plain` cannot be done together with what else is asked for."""
    if not options.plain:
        return
    if not target.keeps_objects:
        raise UsageError(f"--plain writes a file of torch.save, and {target.what} hold no other values")
    if options.dtype is not None or options.tensors_only or options.salvage or options.shared != KEEP_ONE:
        raise UsageError("--plain goes with neither --dtype, --tensors-only, --salvage nor --shared: convert twice")


def _rehearse(plan: ConvertPlan, options: ConvertOptions, check: Callable[[], None] | None) -> None:
    """Make everything that is made and drop it, to look whether it would be refused."""
    if (options.dtype is None or options.lossy) and check is None:
        return
    for content in plan.contents.values():
        if content.make is not None:
            content.make(lambda _: None)
    _refuse_losses(plan.losses, options)
    if check is not None:
        check()


def _refuse_losses(losses: Losses, options: ConvertOptions) -> None:
    if losses and not options.lossy:
        raise RefusedError(
            f"{losses} in {options.dtype}",
            hint="--lossy casts all the same",
        )


# --- planning --------------------------------------------------------------------------------------------------------


def _planned(
    checkpoint: Checkpoint, target: Target, output: str, options: ConvertOptions, made: Changes | None = None
) -> ConvertPlan:
    """Return the plan: what is written, and what is left out; `made` has new, renamed and dropped tensors."""
    old, made = checkpoint, made or Changes()
    if made != Changes():
        added = [value if isinstance(value, Tensor) else Value(name, value) for name, value in made.added.items()]
        entries = [*entries_after(checkpoint.entries, made), *added]
        strings = checkpoint.metadata if made.metadata is None else made.metadata
        checkpoint = replace(checkpoint, entries=entries, metadata=strings)
    if checkpoint.weights and not (options.select or options.names or options.everything):
        dropped = _dropped(checkpoint, options)
        own = [entry for entry in checkpoint.own if entry.name not in dropped]
        refuse_shared(own, options)
        if options.dtype is not None and not options.raw:
            refuse_quantized(checkpoint, {entry.name for entry in own})
        return flatten_weights(checkpoint, target, output, options, [entry.name for entry in own], dropped)
    state = distributed_state(checkpoint)
    if state is not None and not (options.select or options.names or options.exclude or options.everything):
        return beside_state(_planned(state, target, output, options), checkpoint, state)
    return _planned_entries(old, checkpoint, target, output, options, made)


def _planned_entries(
    old: Checkpoint, checkpoint: Checkpoint, target: Target, output: str, options: ConvertOptions, made: Changes
) -> ConvertPlan:
    """Return the plan for the entries that are selected: as one pickle, nested, or as tensors under flat names."""
    prefix = options.select.removesuffix(".")
    names = _names_after(state_names(old, prefix), prefix, made)
    whole, dropped = checkpoint, _dropped(checkpoint, options)
    if dropped:
        checkpoint = replace(whole, entries=[entry for entry in whole.entries if entry.name not in dropped])
    selected = _selected(checkpoint, prefix)
    refuse_shared(selected, options)
    if options.dtype is not None and not options.raw:
        refuse_quantized(checkpoint, {entry.name for entry in selected})
    if options.plain and names is None and isinstance(checkpoint.document, Graph):
        if dropped:
            raise UsageError("--plain takes all entries", hint="ckpt keep FILE NAME... -o OUT takes some of them first")
        from ckpt_cli.edits.convert_plain import plan_plain

        return plan_plain(checkpoint, checkpoint.document, target, output, prefix)
    keeps_all = target.keeps_objects and names is None and not options.tensors_only and options.shared != CLONE
    is_part = bool(prefix) and any(name.startswith(f"{prefix}.") for name in dropped)  # a document would keep the rest
    if keeps_all and not is_part and _has_a_document(checkpoint):
        return _document(old, target, output, options, dropped, made)
    is_whole = options.everything and names is None and not (options.tensors_only or dropped or prefix)
    is_whole &= target.keeps_nesting and options.shared != CLONE and made == Changes()
    of_run = _whole_run(checkpoint, target, output, options) if is_whole else None
    nested = of_run or (plan_nested(old, target, output, options, dropped, made) if names is None else None)
    if nested is not None:
        return nested
    return flatten(checkpoint, target, output, options, names, selected)


def _names_after(names: Sequence[str] | None, prefix: str, made: Changes) -> list[str] | None:
    """Return the names of a module's state_dict after some changes; None where there was none."""
    if names is None:
        return None
    staying = [made.names.get(name, name) for name in names if name not in made.dropped]
    inside = f"{prefix}." if prefix else ""
    return [*staying, *(name for name in made.new_tensors if name.startswith(inside))]


def _whole_run(checkpoint: Checkpoint, target: Target, output: str, options: ConvertOptions) -> ConvertPlan | None:
    """Return the plan for all that a run has as one checkpoint; None for other checkpoints."""
    from ckpt_cli.edits.convert_run import plan_run

    return plan_run(checkpoint, target, output, options)


def _of_cut(found: Salvaged, target: Target, output: str, options: ConvertOptions) -> ConvertPlan:
    """Return the plan for what is left of a cut file: its nested values where these are there, else its tensors."""
    from ckpt_cli.edits.convert_salvaged import plan_salvaged

    nested = plan_salvaged(found, target, output, options)
    return nested or _planned(found.checkpoint, target, output, replace(options, tensors_only=True))


def _dropped(checkpoint: Checkpoint, options: ConvertOptions) -> frozenset[str]:
    """Return the names of the entries that NAMEs and --exclude leave out."""
    if not options.names and not options.exclude:
        return frozenset()
    chosen = chosen_names(checkpoint, options.names, options.exclude)
    return frozenset(entry.name for entry in checkpoint.entries if entry.name not in chosen)


def _has_a_document(checkpoint: Checkpoint) -> bool:
    """True if it is one pickle that can become that of a torch zip file as it is.

    What pickle.dump wrote of a plain dict of tensors has their bytes within the pickle: that is better rewritten.
    """
    if not format_of(checkpoint).is_pickle or "[1]" in checkpoint.top_level:  # a stream may have several saves
        return False
    top = set(checkpoint.top_level)
    plain = all(isinstance(entry, Tensor) and entry.name in top for entry in checkpoint.entries)
    return format_of(checkpoint).is_torch_save or not plain


def _selected(checkpoint: Checkpoint, prefix: str) -> list[Entry]:
    """The entries below a prefix, under their old names."""
    if not prefix:
        return list(checkpoint.entries)
    found = [entry for entry in checkpoint.entries if entry.name.startswith(f"{prefix}.")]
    if not found:
        known = dict.fromkeys(prefixes_of(entry.name for entry in checkpoint.entries))
        raise NameNotFoundError(prefix, close_names(prefix, known), path=checkpoint.path)
    return found


def _document(
    checkpoint: Checkpoint,
    target: Target,
    output: str,
    options: ConvertOptions,
    dropped: frozenset[str],
    made: Changes,
) -> ConvertPlan:
    """The whole pickle, with every object in it but those that are left out, as a file of torch.save."""
    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.formats.torch_zip.write import document

    losses = Losses()
    changes = plan_root(checkpoint, options.select).changes if options.select else Changes()
    if dropped:
        remaining = {entry.name for entry in checkpoint.entries if entry.name not in changes.dropped | dropped}
        within = [name for name in dropped if name not in changes.dropped]
        prefixes = frozenset(whole_containers(within, remaining))
        changes = replace(changes, dropped=changes.dropped | dropped, dropped_prefixes=prefixes)
    kept = [entry for entry in checkpoint.entries if entry.name not in changes.dropped]
    cast_ones = [tensor for tensor in kept if isinstance(tensor, Tensor) and not _is_in_the_pickle(tensor)]
    if options.dtype is not None and any(other_floats(castable_views(cast_ones), options.dtype)):
        some = replace(checkpoint, entries=cast_ones)
        casts = plan_cast(
            some, options.dtype, (), lossy=True, raw=True, losses=losses, executor=options.executor
        ).changes
        changes = replace(changes, tensors=casts.tensors, contents=casts.contents)
    if made != Changes():
        kept = [entry for entry in kept if entry.name not in made.dropped]
        changes = replace(
            made,
            root=changes.root,
            dropped=changes.dropped | made.dropped,
            dropped_prefixes=changes.dropped_prefixes | made.dropped_prefixes,
        )
    if format_of(checkpoint).has_records and target.is_zip:
        job: Job = cast("Job", rewriting(checkpoint, changes))
    else:
        contents = {**_contents(checkpoint, kept), **changes.contents}
        swapped = next((one.name for one in all_strided(cast_ones) if one.big_endian), None)
        if swapped is not None and format_of(checkpoint).has_records:
            raise UnsupportedError(f"{swapped!r} is big-endian", hint="--tensors-only writes it in the usual order")
        write = target.object_writer().write_object
        job = document(checkpoint, changes, contents, stem_of(output), open_checkpoint, write)
    tensors = [*(entry for entry in kept if isinstance(entry, Tensor)), *changes.new_tensors.values()]
    left = _left(tensors, changes, options.dtype)
    unread = tuple(checkpoint.unread)
    return ConvertPlan(job, len(tensors), losses, changes.contents, left=left, not_kept=unread)


def _is_in_the_pickle(tensor: Tensor) -> bool:
    """True if it is an array of numpy, which is kept as the object that it is."""
    from ckpt_cli.pickles.tensors.inline_bytes import InlineBytes

    return tensor.storage is not None and isinstance(tensor.storage.source, InlineBytes)


def _left(tensors: Iterable[Tensor], changes: Changes, dtype: DType | None) -> tuple[str, ...]:
    """The floats that stay as they are; raises RefusedError where nothing is of the dtype that was asked for."""
    if dtype is None:
        return ()
    tensors = list(tensors)
    left = tuple(tensor.name for tensor in other_floats(tensors, dtype) if tensor.name not in changes.tensors)
    if left and not changes.tensors and not any(tensor.dtype is dtype for tensor in tensors):
        raise RefusedError(f"nothing of it can be cast to {dtype}", details=some_of(left))
    return left


def _contents(checkpoint: Checkpoint, entries: Sequence[Entry]) -> dict[Storage, Content]:
    """The bytes of every storage of some entries as they are."""
    tensors = all_strided([entry for entry in entries if isinstance(entry, Tensor)])
    return {storage: content_of(storage, files=checkpoint.container.files) for storage, _ in by_storage(tensors)}
