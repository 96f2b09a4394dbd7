"""Write the files of a set for an edit: those that its format makes, and copies of the others with new elements."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ckpt_cli.edits.plan import EditPlan
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import Progress, copy_into
from ckpt_cli.files.journal import apply as journal
from ckpt_cli.files.new_folder import NewFolder, new_folder
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.places import is_folder, join, name_of, open_file
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.system import sync, write_all
from ckpt_cli.files.unchanged import require_unchanged
from ckpt_cli.formats import open_checkpoint, verify_copy
from ckpt_cli.formats.runs.read import RunFiles, name_within
from ckpt_cli.formats.sharded.read import ShardSet
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckpt_cli.edits.files_beside import Beside
    from ckpt_cli.formats.writing import SetRewriter


@dataclass(frozen=True, slots=True)
class NewSet:
    """A set of files that an edit writes to a new folder."""

    checkpoint: Checkpoint
    plan: EditPlan
    overlay: Overlay
    """The new bytes of elements, over the old files."""
    work: SetRewriter | None
    """The work of the format; None where only elements change."""
    beside: Beside | None
    """What lies beside the old files and goes to the new folder."""
    check: Callable[[], None]
    """Raises, once all is written, where the result must not stand."""

    def write(self, output: str, progress: Progress) -> int:
        """Write all files; returns their bytes."""
        from ckpt_cli.edits.files_beside import copy_beside

        files = self.checkpoint.container.files
        modes = {name_within(self.checkpoint, file): file.path for file in files}
        with new_folder(output, progress) as folder:
            with folder:

                def create(name: str) -> LocalFile:
                    return folder.create(name, mode_of=modes.get(name, files[0].path))

                nbytes = 0
                if self.work is not None:
                    release = folder.close if self._is_patched_after else folder.release
                    nbytes = write_set(self.work, create, progress, self.check, files, release)
                nbytes += self._copy_staying(folder, output, progress)
                nbytes += self._copy_leading(folder)
                copy_beside(self.checkpoint, self.beside, folder.path)
            if self._is_patched_after:
                self._patch(folder.path)
            if self.work is None and not self._sends_early(folder):
                verify_copy(self.checkpoint, self._own(folder.path), output)
        return nbytes

    def staged(self) -> int:
        """Return the bytes on the disk at a time while the folder is written for a place elsewhere."""
        sizes = [file.size for file in self.overlay.files]
        sizes += [part.work.nbytes for part in self.work.parts] if self.work is not None else []
        return sum(sizes) if self._shards is None or self._is_patched_after else max(sizes)

    @property
    def _is_patched_after(self) -> bool:
        """True if elements change too where files are rewritten, in which they lie elsewhere."""
        return self.work is not None and self.plan.patch is not None

    def _own(self, folder: str) -> str:
        """Return the path of the checkpoint in a new folder."""
        path = self.checkpoint.path
        return folder if is_folder(path) else os.path.join(folder, name_of(path))

    def _patch(self, folder: str) -> None:
        """Put the new bytes of elements into the new files."""
        with closing(open_checkpoint(self._own(folder))) as copy, closing(Overlay(copy.container.files)) as overlay:
            if self.plan.patch is not None:
                self.plan.patch(copy, overlay)
            copy.container.seal(overlay)
            journal.patch_copies(overlay)

    def _sends_early(self, folder: NewFolder) -> bool:
        """True if each file is verified and sent by itself, as it can be opened by itself."""
        return folder.sends_early and self._shards is not None and not self._is_patched_after

    @property
    def _shards(self) -> Sequence[Checkpoint] | None:
        """The files that can be opened by themselves; None for what is no such set."""
        container = self.checkpoint.container
        return container.shards if isinstance(container, ShardSet) else None

    def _copy_staying(self, folder: NewFolder, output: str, progress: Progress) -> int:
        """Copy the files that no rewriter writes, with their patches; returns their bytes."""
        nbytes, work = 0, self.work
        shards = {shard.path: shard for shard in self._shards or ()}
        for file in self.overlay.files:
            name = name_within(self.checkpoint, file)
            if work is None or name in work.unchanged:
                target = folder.create(name, mode_of=file.path)
                if self._is_patched_after:
                    copy_into(file, target, progress)
                else:
                    copy_patched(self.overlay, file, target, progress)
                nbytes += target.size
                folder.close(name)
                if self._sends_early(folder):
                    if file.path in shards:
                        verify_copy(shards[file.path], target.path, output)
                    folder.release(name)
        require_unchanged(self.checkpoint.container.files)
        return nbytes

    def _copy_leading(self, folder: NewFolder) -> int:
        """Copy the files of a run that say where its others are; returns their bytes."""
        container, nbytes = self.checkpoint.container, 0
        if not isinstance(container, RunFiles):
            return 0
        for name in container.leading:
            with closing(open_file(join(container.folder, name))) as file:
                copy_into(file, folder.create(name, mode_of=file.path))
                nbytes += file.size
        return nbytes


def write_set(
    work: SetRewriter,
    create: Callable[[str], LocalFile],
    progress: Progress,
    check: Callable[[], None],
    old: Collection[SourceFile],
    release: Callable[[str], None] = lambda _: None,
) -> int:
    """Write the files that change, each of which is released then, and the index; returns their bytes."""
    nbytes = 0
    for part in work.parts:
        target = create(part.name)
        part.work.write(target, progress)
        sync(target.fd)
        part.work.verify(target.path)
        nbytes += target.size
        release(part.name)
    check()
    require_unchanged(old)
    if work.index is not None:
        name, content = work.index
        target = create(name)
        write_all(target.fd, content, 0)
        sync(target.fd)
        nbytes += len(content)
    return nbytes


def copy_patched(overlay: Overlay, file: SourceFile, target: LocalFile, progress: Progress) -> None:
    """Write a copy of one of the files, patched."""
    copy_into(file, target, progress)
    journal.write_patches(overlay, file, target)
