"""Folders that `convert` writes: all files of a format and those beside the weights, all or none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from ckpt_cli.edits.convert_options import NewFiles, Written
from ckpt_cli.files.atomic import refuse_cached, staging_folder
from ckpt_cli.files.copy import Progress
from ckpt_cli.files.new_folder import NewFolder, new_folder, replacing_elsewhere
from ckpt_cli.files.open import finish_edits
from ckpt_cli.files.places import is_at_server, is_folder, is_taken, join, names_in, without_end
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import sync_folder
from ckpt_cli.formats import open_checkpoint

Copy = Callable[[str], "list[str]"]
"""Copies the files beside the old weights into a folder, and returns their names."""


def write_folder(output: str, job: NewFiles, check: Callable[[], None], progress: Progress, copy: Copy) -> Written:
    """Write all files of a format into a folder, and those that lay beside the old weights, all or none.

    In a folder that has files already, those of a checkpoint of the same kind give way and all others stay.
    """
    output = without_end(output)
    if is_folder(output) and names_in(output):
        if is_at_server(output):
            with replacing_elsewhere(output, re.compile(job.target.files), progress) as new:
                written = _fill(new, job, check, progress)
                copy(new.path)
                return written
        return _into(output, job, check, progress, copy)
    with new_folder(output, progress) as folder:
        written = _fill(folder, job, check, progress)
        copy(folder.path)
        return written


def _fill(folder: NewFolder, job: NewFiles, check: Callable[[], None], progress: Progress) -> Written:
    """Write the files into an empty folder, make them durable and read them back.

    Where the folder sends them early, each is read back and sent before the next one is begun.
    """
    writer, new = job.target.folder_writer(), job.new
    verify = writer.verifier(new, folder.path, open_checkpoint) if folder.sends_early else None
    sizes: dict[str, int] = {}
    files: dict[str, LocalFile] = {}

    def finish() -> None:
        check()
        for name, file in files.items():
            sizes[name] = os.fstat(file.fd).st_size
            if verify is not None:
                verify(name)
                folder.release(name)

    def create(name: str) -> LocalFile:
        if verify is not None:
            finish()
            files.clear()
        files[name] = file = folder.create(name, mode_of=new.mode_of)
        return file

    with folder:
        writer.write_folder(new, create, progress)
        finish()
        if verify is None:
            writer.verify_folder(new, folder.path, open_checkpoint)
    return tuple(sizes), sum(sizes.values())


def _into(output: str, job: NewFiles, check: Callable[[], None], progress: Progress, copy: Copy) -> Written:
    """Write the files beside those of a folder, then put them in place as one."""
    from ckpt_cli.files.journal.replace import replacing_set

    finish_edits(output)
    stale = re.compile(job.target.files)
    with staging_folder(output) as folder:
        names, nbytes = _fill(NewFolder(folder), job, check, progress)
        removed = [name for name in names_in(output) if stale.fullmatch(name) and name not in names]
        for name in (*names, *removed):
            if is_taken(join(output, name)):
                refuse_cached(join(output, name))
        more = [name for name in copy(folder) if not is_taken(join(output, name))]
        with replacing_set(output, names[0]) as replacement:
            for name in (*names, *more):
                replacement.adopt(join(folder, name), name)
            replacement.removed.extend(removed)
            sync_folder(output)
    return names, nbytes
