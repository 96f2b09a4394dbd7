"""Opening: a path becomes a checkpoint, by the format that its content or its file names show."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.budget import within_request
from ckpt_cli.errors import (
    FormatError,
    LimitError,
    TruncatedError,
    UnknownFormatError,
    UsageError,
    about,
    listed,
    quoted,
)
from ckpt_cli.files.elsewhere import elsewhere
from ckpt_cli.files.open import Opener, finish_edits, open_beside_writers
from ckpt_cli.files.places import (
    exists,
    folder_of,
    is_folder,
    is_listed,
    join,
    leading_names,
    name_of,
    names_in,
    without_end,
)
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.registry import FORMATS, folder_kind
from ckpt_cli.formats.signatures import beginning
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckpt_cli.formats.salvage.found import Salvaged


def open_checkpoint(path: str, *, write: bool = False, files: bool = False) -> Checkpoint:
    """Open a path as a checkpoint: its names are read, its tensors are not.

    An edit that was interrupted is finished first. To `write`, every file of it is locked until the checkpoint is
    closed. Of a folder whose tensors are joined from the files of ranks, `files` opens these as they are.
    Raises OSError, BusyError, or a FormatError that says what the file looks like.
    """

    def read(opener: Opener) -> Checkpoint:
        return _open_folder(path, opener, files=files) if is_folder(path) else _open_file(path, opener)

    with within_request(), elsewhere():
        return open_beside_writers(path, read, write=write)


def open_salvaged(path: str) -> Salvaged:
    """Open what is left of a file that may be cut, or of a set whose shards may be cut or missing.

    What is whole opens as `open_checkpoint` opens it. Raises OSError, or the error of a path of which nothing can be
    had.
    """
    from ckpt_cli.formats.salvage.found import Salvaged

    whole: FormatError | UsageError
    try:
        found = open_checkpoint(path)
        if found.is_set or not is_folder(path) or _counted(path, names_in(path)) is None:
            return Salvaged(found)
        found.close()  # the only file of a set that should have more
        whole = UnknownFormatError("of the set only one shard is there", path=path)
    except LimitError:
        raise
    except (FormatError, UsageError) as error:
        error.hint = None if error.hint and "--salvage" in error.hint else error.hint
        whole = error

    def read(opener: Opener) -> Salvaged:
        return _salvaged_folder(path, opener, whole) if is_folder(path) else _salvaged_at(path, opener, whole)

    with within_request(), elsewhere():
        return open_beside_writers(path, read)


def _counted(path: str, names: Sequence[str]) -> list[str] | None:
    """Return the shards, there or not, of a folder that is a set without an index; None for other folders."""
    from ckpt_cli.formats.sharded.names import counted_set, index_in

    return counted_set(names) if folder_kind(path, names) is None and index_in(path, names) is None else None


def _salvaged_folder(path: str, opener: Opener, whole: FormatError | UsageError) -> Salvaged:
    """Return what is left of the checkpoint that a folder stands for."""
    from ckpt_cli.formats.salvage.shards import salvage_counted
    from ckpt_cli.formats.sharded.names import index_in

    finish_edits(path)
    opener.note_folder(path)
    names = names_in(path)
    kind = folder_kind(path, names)
    if kind is not None and kind.name == "dcp" and ".metadata" in names:
        from ckpt_cli.formats.salvage.dcp import salvage_distributed

        return salvage_distributed(path, opener, whole)
    if kind is not None:
        whole.hint = whole.hint or "this kind of folder cannot be salvaged as a whole: name one of its files"
        raise whole
    shards = _counted(path, names)
    if shards is not None:
        return salvage_counted(path, shards, opener, _read_cut, whole)
    return _salvaged_at(join(path, index_in(path, names) or one_file_in(path, names)), opener, whole)


def _salvaged_at(path: str, opener: Opener, whole: FormatError | UsageError) -> Salvaged:
    """Return what is left of a file, or of the set whose index it is."""
    from ckpt_cli.formats.sharded.names import is_index

    if name_of(path) == ".metadata":
        return _salvaged_folder(folder_of(path) or ".", opener, whole)
    file = opener.open(path)
    try:
        if _kind(file) == "shards" or is_index(name_of(path)):
            from ckpt_cli.formats.salvage.shards import salvage_indexed

            return salvage_indexed(file, opener, _read_cut, whole)
        return _salvaged(file, whole)
    except BaseException:
        file.close()
        raise


def _read_cut(file: SourceFile) -> Salvaged:
    """Return what is left of one open file of a set, or all of one that is whole."""
    from ckpt_cli.formats.salvage.found import Salvaged

    try:
        return Salvaged(read_one(file))
    except LimitError:
        raise
    except FormatError as error:
        return _salvaged(file, error)


def _salvaged(file: SourceFile, whole: FormatError | UsageError) -> Salvaged:
    """Return what is left of one open file that is not whole; raises `whole` where no format can be salvaged."""
    module = _SALVAGED.get(_kind(file))
    if module is None:
        raise whole
    with about(file.path):
        found: Salvaged = importlib.import_module(module).salvage(file, whole.problem, _kind(file))
    return found


_SALVAGED = {
    "zip": "ckpt_cli.formats.salvage.zip",
    "npz": "ckpt_cli.formats.salvage.npz",
    "safetensors": "ckpt_cli.formats.salvage.safetensors",
    "legacy": "ckpt_cli.formats.salvage.stream",
    "pickle": "ckpt_cli.formats.salvage.stream",
}
"""The modules with a function `salvage` for the files of each format that can be cut and still have tensors."""


def _kind(file: SourceFile) -> str:
    """Return the name of the format that a file would have if it were whole; empty for none."""
    head = beginning(file)
    return next((known.name for known in FORMATS if known.sniff(head)), "")


def _open_file(path: str, opener: Opener) -> Checkpoint:
    """The checkpoint that a path names: a file, or the index of several."""
    file = opener.open(path)
    try:
        checkpoint = _read(file, opener)
    except BaseException:
        file.close()
        raise
    return _noting_the_set(checkpoint) if "-of-" in name_of(path) else checkpoint


def _noting_the_set(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a note where it is but one shard of a set."""
    from ckpt_cli.formats.sharded.names import index_of

    index = index_of(checkpoint.path)
    return replace(checkpoint, notes=[*checkpoint.notes, f"one shard of {index}"]) if index else checkpoint


def _read(file: SourceFile, opener: Opener) -> Checkpoint:
    """The checkpoint that an open file is, or is the index of."""
    try:
        return _read_any(file, opener)
    except FormatError as error:
        folder = folder_of(file.path)
        if file.path.endswith(".distcp") and exists(join(folder, ".metadata")):
            error.hint = f"this is one rank's part of a checkpoint: name its folder, {folder or '.'}"
        raise


def _read_any(file: SourceFile, opener: Opener) -> Checkpoint:
    """The checkpoint that an open file is, or is the index of."""
    head = beginning(file)
    for known in FORMATS:
        if known.is_set and known.sniff(head):
            checkpoint: Checkpoint = importlib.import_module(known.module).read_set(file, opener, read_one)
            return checkpoint
    return read_one(file)


def read_one(file: SourceFile) -> Checkpoint:
    """The checkpoint that one open file is, be it a part of a set; raises UnknownFormatError for an index."""
    head = beginning(file)
    for known in FORMATS:
        if not known.is_set and known.sniff(head):
            try:
                checkpoint: Checkpoint = importlib.import_module(known.module).read(file)
            except TruncatedError as error:
                if known.name in _SALVAGED and error.hint is None:
                    path = quoted(file.path)
                    error.hint = (
                        f"ckpt ls --salvage {path} lists the tensors that are all there, "
                        f"ckpt convert --salvage {path} OUT writes them"
                    )
                raise
            return checkpoint
    from ckpt_cli.formats.signatures import unknown

    raise unknown(head, file.path, FORMATS)


def _open_folder(path: str, opener: Opener, *, files: bool) -> Checkpoint:
    """The checkpoint that a folder holds, by the names of the files in it."""
    finish_edits(path)
    opener.note_folder(path)
    names = leading_names(path)
    known = folder_kind(path, names)
    if known is None:
        return _noting_no_list(path, _read_files(path, names, opener))
    module = importlib.import_module(known.module)
    read = module.read_files if files and known.is_joined else module.read_folder
    checkpoint: Checkpoint = read(path, names, opener, read_one)
    return checkpoint


def one_file_in(path: str, names: Sequence[str]) -> str:
    """Return the one checkpoint file that a folder holds.

    Raises UnknownFormatError where it has none, UsageError for several, or for folders that are checkpoints.
    """
    from ckpt_cli.formats.sharded.names import file_in

    try:
        return file_in(path, names)
    except UnknownFormatError:
        from ckpt_cli.formats.runs.names import steps_in

        steps = steps_in(path, names)
        if not steps:
            raise
        raise UsageError(
            f"a folder of {len(steps)} checkpoint{'s' if len(steps) > 1 else ''} of a run: {listed(steps, 3)}",
            path=path,
            hint=f"name one of them; ckpt info {quoted(path)} lists them",
        ) from None


def _noting_no_list(path: str, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a note where a folder seems to be that of a run, and its server cannot list the files."""
    if is_listed(path):
        return checkpoint
    from ckpt_cli.formats.runs.names import is_step

    if not is_step(name_of(without_end(path))):
        return checkpoint
    note = "its server has no lists, so only the model is known: name other files of the run by themselves"
    return replace(checkpoint, notes=[*checkpoint.notes, note])


def _read_files(path: str, names: Sequence[str], opener: Opener) -> Checkpoint:
    """Open the checkpoint that a folder of files stands for: a set with an index, one without, or one file.

    Raises UsageError where there are several checkpoints to choose from.
    """
    from ckpt_cli.formats.sharded.names import index_in, whole_set

    index = index_in(path, names)
    if index is not None:
        return open_checkpoint(join(path, index), write=opener.write)
    shards = whole_set(names)
    if shards is not None:
        from ckpt_cli.formats.sharded.read import read_without_index

        return read_without_index(path, shards, opener, read_one)
    return open_checkpoint(join(path, one_file_in(path, names)), write=opener.write)
