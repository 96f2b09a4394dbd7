"""Refusals of edits: where files may not be written, are not the checkpoint's own, or belong to a set."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckpt_cli.edits.plan import EditOptions, EditPlan
from ckpt_cli.errors import RefusedError, UnsupportedError
from ckpt_cli.files.outcome import state_hint
from ckpt_cli.files.places import can_write, folder_of, is_link
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.sharded.names import index_of
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.output import require_place

if TYPE_CHECKING:
    from ckpt_cli.formats.runs.read import RunFiles


def refuse_links(files: Iterable[SourceFile]) -> None:
    """Raise where a file of a set is a link: what it leads to may be part of another set too."""
    for file in files:
        if is_link(file.path):
            raise RefusedError(
                "is a symbolic link, and the files of a set are changed where they lie",
                path=file.path,
                hint="write the result elsewhere with -o OUT",
            )


def require_writable_at(path: str) -> None:
    """Raise PermissionError where a dry run is of an edit in place that could not open its file, or write beside it."""
    require_place(path)
    if not can_write(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""The errors of a place that may not be written."""


@contextmanager
def hinting_at_outputs(options: EditOptions) -> Iterator[None]:
    """Note with an error of a place that may not be written that the result can go elsewhere."""
    try:
        yield
    except OSError as error:
        if options.output is None and error.errno in _READ_ONLY:
            state_hint(error, "-o OUT writes the result to another place, and leaves the file as it is")
        raise


def require_writable(files: Iterable[SourceFile], *, dry_run: bool = False) -> None:
    """Raise PermissionError where a file that is to change may not be written."""
    for file in files:
        if not (can_write(file.path) if dry_run else file.writable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file.path)


def refuse_same_names(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError where two files of a set have one name, in different folders: but for those of a run."""
    if _run_of(checkpoint) is not None:
        return
    names = [os.path.basename(file.path) for file in checkpoint.container.files]
    if len(set(names)) < len(names):
        raise UnsupportedError(
            "its files have the same names in several folders, so they cannot be written to one",
            path=checkpoint.path,
            hint="copy the folder, and change the copy",
        )
    if len({folder_of(file.path) for file in checkpoint.container.files}) > 1:
        raise UnsupportedError(
            "its files lie in several folders, so they cannot be written to one",
            path=checkpoint.path,
            hint="copy the folder, and change the copy",
        )


def refuse_joined(checkpoint: Checkpoint, planned: EditPlan) -> None:
    """Raise UnsupportedError where elements would change that are joined from the files of ranks."""
    run = _run_of(checkpoint)
    if run is not None:
        run.refuse_joined((*planned.changed, *planned.also_changed))


def _run_of(checkpoint: Checkpoint) -> RunFiles | None:
    """Return the files of the run that a checkpoint is; None for any other."""
    if not checkpoint.is_set:
        return None
    from ckpt_cli.formats.runs.read import RunFiles

    return checkpoint.container if isinstance(checkpoint.container, RunFiles) else None


def refuse_part_of_set(checkpoint: Checkpoint, changes: Changes) -> None:
    """Refuse to change one shard in a way that would leave its index behind."""
    is_listed = changes.names or changes.dropped or changes.tensors or changes.added
    index = index_of(checkpoint.path) if is_listed else None
    if index is not None:
        whole = os.path.join(os.path.dirname(checkpoint.path), index)
        raise RefusedError(
            f"is one shard of {index}, which would no longer describe it",
            path=checkpoint.path,
            hint=f"edit the whole set: name {whole}, or -o OUT writes the one shard elsewhere",
        )
