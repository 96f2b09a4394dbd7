"""New folders of files: filled beside their place and then renamed, or their files put into a folder that is there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack

from ckpt_cli.edits.convert_options import NewFiles, Written
from ckpt_cli.files.atomic import creating, refuse_cached, replacing_folder, staging_folder
from ckpt_cli.files.copy import Progress
from ckpt_cli.files.journal.replace import replacing_set
from ckpt_cli.files.open import finish_edits
from ckpt_cli.files.places import is_folder, is_taken, join, names_in, without_end
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
        return _into(output, job, check, progress, copy)
    with replacing_folder(output) as folder:
        written = _fill(folder, job, check, progress)
        copy(folder)
        return written


def _fill(folder: str, job: NewFiles, check: Callable[[], None], progress: Progress) -> Written:
    """Write the files into an empty folder, make them durable and read them back."""
    writer, new = job.target.folder_writer(), job.new
    files: dict[str, LocalFile] = {}
    with ExitStack() as opened:

        def create(name: str) -> LocalFile:
            file = opened.enter_context(creating(join(folder, name), mode_of=new.mode_of))
            files[name] = file
            return file

        writer.write_folder(new, create, progress)
        check()
        nbytes = sum(os.fstat(file.fd).st_size for file in files.values())
        writer.verify_folder(new, folder, open_checkpoint)
    return tuple(files), nbytes


def _into(output: str, job: NewFiles, check: Callable[[], None], progress: Progress, copy: Copy) -> Written:
    """Write the files beside those of a folder, then put them in place as one."""
    finish_edits(output)
    stale = re.compile(job.target.files)
    with staging_folder(output) as folder:
        names, nbytes = _fill(folder, job, check, progress)
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
