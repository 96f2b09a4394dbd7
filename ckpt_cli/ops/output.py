"""New files that commands write on demand (`-o OUT`): refused paths, and errors by the user's name for the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt_cli.errors import UsageError
from ckpt_cli.files.atomic import refuse_cached, replacing
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.hidden_files import journal_path, require_fitting, temporary_path
from ckpt_cli.files.journal.apply import recover
from ckpt_cli.files.new_folder import refuse_read_only, staged_file
from ckpt_cli.files.places import (
    can_write,
    canonical,
    exists,
    folder_of,
    identity_at,
    is_at_server,
    is_file,
    is_folder,
    is_same,
    is_taken,
    links_of,
    names_folder,
    names_in,
    without_end,
)
from ckpt_cli.files.source import LocalFile
from ckpt_cli.model.checkpoint import Checkpoint


def check_output(output: str, source: str, hint: str) -> None:
    """Raise before any work is done where `output` cannot become a new file made from `source`."""
    require_name(output)
    if is_folder(output) or names_folder(output):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), output)
    if exists(output) and not is_file(output):  # a device, a pipe: a rename would take its place
        raise UsageError(
            "is not a regular file, and only a regular file can be replaced", path=output, hint="name another file"
        )
    if is_same(source, output):
        raise UsageError("the output is the file itself", path=output, hint=hint)
    if is_at_server(output):
        return
    refuse_cached(output)
    require_place(output)
    if is_taken(journal_path(output)):  # what an edit of it left is finished before it is replaced
        recover(output)


def require_place(path: str) -> None:
    """Raise, as creating it would, where there can be no new file or folder beside what a path leads to."""
    if is_at_server(path):  # where folders are but parts of names
        return
    real = canonical(path)
    folder = folder_of(real) or "."
    number = None
    if not exists(folder):
        number = errno.ENOENT
    elif not is_folder(folder):
        number = errno.ENOTDIR
    elif not can_write(folder):
        number = errno.EACCES
    if number is not None:
        raise OSError(number, os.strerror(number), path)
    require_fitting(real)


def require_name(output: str) -> None:
    """Raise for the empty name that a variable of a script had which was never set, and for what means no file."""
    if not output:
        raise UsageError("the output has an empty name", hint="name a file, or leave -o out to edit in place")
    if output == "-":
        raise UsageError(
            "'-' is not the name of a file, and checkpoints are not written to standard output",
            hint="name a file; ./- is one that is called -",
        )
    refuse_read_only(output)


def own_file(checkpoint: Checkpoint, path: str) -> str:
    """The file that an edit of a checkpoint opened as `path` is about: where that is a folder, the one in it."""
    own: str = checkpoint.container.files[0].path if is_folder(path) and not checkpoint.is_set else path
    return own


def refuse_own(checkpoint: Checkpoint, output: str, hint: str) -> None:
    """Raise where an output is one of the files that the checkpoint consists of."""
    there = identity_at(output)
    if there is not None and any(file.seen[:2] == there[:2] for file in checkpoint.container.files):
        raise UsageError("the output is the file itself", path=output, hint=hint)


def check_output_folder(output: str) -> None:
    """Raise before any work is done where `output` cannot become a new folder."""
    require_name(output)
    if is_taken(output) and not (is_folder(output) and not names_in(output)):
        raise UsageError(
            "the result consists of several files, so it must go to a folder that is new or empty",
            path=output,
            hint="name another folder",
        )
    require_place(without_end(output))


def other_names(*paths: str) -> int:
    """Count the further names (hard links) of files that are to be replaced by new ones."""
    count = 0
    for path in paths:
        with suppress(FileNotFoundError):
            count += links_of(path) - 1
    return count


@contextmanager
def writing(
    output: str, *, mode_of: str | None = None, replace: bool = True, progress: Progress = no_progress
) -> Iterator[LocalFile]:
    """Context manager: a file that becomes `output` when the block ends well; its errors name `output`.

    Elsewhere, `progress` is called with the bytes that are uploaded; without `replace` there must be no such file.
    """
    if is_at_server(output):
        with staged_file(output, replace=replace, progress=progress) as target:
            yield target
        return
    try:
        with replacing(output, mode_of=mode_of) as target:
            yield target
    except OSError as error:
        if error.filename == temporary_path(output):
            error.filename = output
        raise
