"""Rewrite the files of a run with some changes: each change goes to the file that has the entry, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from ckpt_cli.errors import RefusedError, UnsupportedError, quoted
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.places import folder_of, join, name_of
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.runs.json_values import UNLISTED
from ckpt_cli.formats.runs.read import MODEL, RunFiles, RunPart, apart
from ckpt_cli.formats.writing import Rewriter, SetRewriter, ShardWork
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_OF_TENSOR = attrgetter(*(one.name for one in fields(Tensor)[1:]))


class Rewriting:
    """A run about to be written with some changes; files that none of them concern stay as they are."""

    def __init__(
        self, checkpoint: Checkpoint, changes: Changes, rewriting: Callable[[Checkpoint, Changes], object]
    ) -> None:
        container = checkpoint.container
        if not isinstance(container, RunFiles):
            raise UnsupportedError(
                "the files of a run that are listed as they are can only have their elements changed",
                path=checkpoint.path,
                hint="leave --files out",
            )
        if changes.root:
            raise UnsupportedError("a part of a run cannot take the place of all of it", path=checkpoint.path)
        self.index: tuple[str, bytes] | None = None
        """None: the indices of sets are among the parts."""
        self._checkpoint = checkpoint
        self._container = container
        self._changes = changes
        self._tops = {part: _tops_of(part) for part in container.parts}
        self._refuse_crossing()
        self._works: list[tuple[RunPart, Rewriter | SetRewriter]] = []
        self._gone: list[str] = []
        """The files of parts of which nothing is left."""
        for part in container.parts:
            if self._is_dropped(part):
                self._gone += (name_of(file.path) for file in part.checkpoint.container.files)
            elif not self._add(part, rewriting):
                continue
            self._refuse_folders(part.checkpoint.container.files)

    def _add(self, part: RunPart, rewriting: Callable[[Checkpoint, Changes], object]) -> bool:
        """Plan the work of a part; returns False for one that stays as it is."""
        sub = self._changes_of(part)
        if sub is None:
            return False
        try:
            work = rewriting(part.checkpoint, sub)
        except UnsupportedError:
            if replace(sub, rewrite=False, contents={}, rename=None) != Changes():
                raise
            return False  # it can only be packed, and its format cannot be
        self._works.append((part, cast("Rewriter | SetRewriter", work)))
        return True

    @property
    def parts(self) -> Sequence[ShardWork]:
        """The files that are written, of a set the index last; a distributed checkpoint decides on them as it goes."""
        found: list[ShardWork] = []
        for part, work in self._works:
            if not part.checkpoint.is_set:
                found.append(_of_file(work, part.checkpoint.container.files[0]))
                continue
            of_set = cast("SetRewriter", work)
            data = list(of_set.parts)
            known = {each.name for each in data}
            found += data
            found += (ShardWork(name, _IndexWork(of_set)) for name in of_set.names if name not in known)
        return found

    @property
    def _sets(self) -> list[SetRewriter]:
        """The works of sets."""
        return [cast("SetRewriter", work) for part, work in self._works if part.checkpoint.is_set]

    @property
    def removed(self) -> Sequence[str]:
        """The files that go."""
        return [*self._gone, *(name for work in self._sets for name in work.removed)]

    @property
    def unreferenced(self) -> int:
        """The bytes that stay in old files of sets, though nothing refers to them any more."""
        return sum(work.unreferenced for work in self._sets)

    def for_new_folder(self) -> None:
        """Plan for a folder of its own, before anything else is asked."""
        for work in self._sets:
            work.for_new_folder()

    @property
    def unchanged(self) -> Sequence[str]:
        """The files that stay as they are."""
        written = {*self.names, *self.removed}
        return [name for name in (name_of(file.path) for file in self._container.files) if name not in written]

    @property
    def nbytes(self) -> int:
        """The bytes that will be written."""
        return sum(work.nbytes for _, work in self._works)

    @property
    def first(self) -> str:
        """The file that the journal stands beside: one that stays, or one that is written."""
        folder = self._checkpoint.path
        own = {name_of(file.path) for file in self._container.files if _is_in(file, folder)}
        return next(name for name in (*self.unchanged, *self.names) if name in own)

    @property
    def names(self) -> Sequence[str]:
        """The files that are written."""
        return [part.name for part in self.parts]

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if it fits into each file that it concerns."""
        fits = [work.patch(overlay) for _, work in self._works]
        return all(fits) and not self.removed

    # --- the changes of each part

    def _owner(self, name: str) -> RunPart | None:
        """Return the part that a name is of, or would be of; None for a name that no part can have."""
        for part in self._container.parts:
            if part.prefix and (name == part.prefix or name.startswith(f"{part.prefix}.")):
                return part
        top = name.partition(".")[0]
        return next((part for part, tops in self._tops.items() if not part.prefix and top in tops), None)

    def _refuse_crossing(self) -> None:
        """Raise RefusedError for names that another file would have, or none."""
        for old, new in self._changes.names.items():
            here, there = self._owner(old), self._owner(new)
            if here is not there:
                said = f"{_file_of(there)} has what is called so" if there else "no file of the run has such names"
                raise RefusedError(
                    f"{old!r} is in {_file_of(here)}, so it cannot be called {new!r}: {said}",
                    path=self._checkpoint.path,
                )
        for name in self._changes.added:
            part = self._owner(name)
            if part is None:
                known = ", ".join(f"{top}." for tops in self._tops.values() for top in tops)
                raise RefusedError(
                    f"no file of the run has names such as {name!r}",
                    path=self._checkpoint.path,
                    hint=f"names begin with the part that they belong to: {known}",
                )

    def _is_dropped(self, part: RunPart) -> bool:
        """True if nothing of a part is left, so that its files go."""
        if not part.prefix or any(entry.name == UNLISTED for entry in part.checkpoint.entries):
            return False
        changes = self._changes
        if any(self._owner(name) is part for name in (*changes.added, *changes.names.values())):
            return False
        if part.prefix in changes.dropped_prefixes:
            return True
        entries = part.checkpoint.entries
        return bool(entries) and all(part.outer(entry.name) in changes.dropped for entry in entries)

    def _changes_of(self, part: RunPart) -> Changes | None:
        """Return the changes of one part, in its own names; None if there are none."""
        changes = self._changes
        owned = {part.outer(entry.name) for entry in part.checkpoint.entries}
        names = {part.inner(old): part.inner(new) for old, new in changes.names.items() if old in owned}
        dropped = frozenset(part.inner(name) for name in changes.dropped if name in owned)
        prefixes = frozenset(part.inner(name) for name in changes.dropped_prefixes if self._owner(name) is part)
        tensors = {
            part.inner(name): self._own(part, tensor) for name, tensor in changes.tensors.items() if name in owned
        }
        values = {part.inner(name): value for name, value in changes.values.items() if name in owned}
        added = {
            part.inner(name): self._own(part, value) if isinstance(value, Tensor) else value
            for name, value in changes.added.items()
            if self._owner(name) is part
        }
        strings = changes if part.prefix == MODEL else Changes()
        is_packed = changes.rewrite and bool(part.checkpoint.tensors)
        device = changes.device
        if not any(each.document is not None and each.tensors for each in apart(part.checkpoint)):
            device = None  # nothing of it was written by torch.save
        anything = (
            device or names or dropped or prefixes or tensors or values or added or is_packed or strings.in_shards
        )
        if not anything and strings.metadata is None:
            return None
        return replace(
            changes,
            names=names,
            rename=self._rename_in(part) if changes.rename is not None else None,
            dropped=dropped,
            dropped_prefixes=prefixes,
            tensors=tensors,
            contents={storage: self._content(content) for storage, content in changes.contents.items()},
            values=values,
            added=added,
            metadata=strings.metadata,
            in_shards=strings.in_shards,
            device=device,
            rewrite=is_packed,
        )

    def _rename_in(self, part: RunPart) -> Callable[[str], str]:
        """Return the rule of new names for the prefixes of one part."""

        def rename(name: str) -> str:
            rule = self._changes.rename
            new = rule(part.outer(name)) if rule is not None else part.outer(name)
            return part.inner(new) if self._owner(new) is part else name

        return rename

    def _own(self, part: RunPart, tensor: Tensor) -> Tensor:
        """Return a tensor's new facts as its part knows its name and its storage.

        Raises RefusedError where the storage is that of another part.
        """
        storage = tensor.storage
        if storage is not None and storage not in self._changes.contents:
            owner, storage = self._container.owner_of(storage)
            if owner is not part:
                raise RefusedError(
                    f"{tensor.name!r} would share bytes with a tensor of another file, {_file_of(owner)}",
                    path=self._checkpoint.path,
                )
        name = part.inner(tensor.name) if tensor.name.startswith(part.prefix) else tensor.name
        alias = None if tensor.alias_of is None else part.inner(tensor.alias_of)
        holder = None if tensor.holder is None else part.inner(tensor.holder)
        parts = tuple(self._own(part, each) for each in tensor.parts)
        own = replace(tensor, storage=storage, parts=parts, alias_of=alias, holder=holder)
        return Tensor(name, *_OF_TENSOR(own))

    def _content(self, content: Content) -> Content:
        """Return a content whose origin is the storage as its part knows it."""
        if content.origin is None:
            return content
        return replace(content, origin=self._container.owner_of(content.origin)[1])

    def _refuse_folders(self, files: Sequence[SourceFile]) -> None:
        """Raise where an edit would write files in folders within that of the run."""
        for file in files:
            if not _is_in(file, self._checkpoint.path):
                folder = folder_of(file.path)
                raise UnsupportedError(
                    f"{name_of(folder)} is a folder of its own, whose files are not written together with the others",
                    path=self._checkpoint.path,
                    hint=f"edit it by itself: name {quoted(folder)}",
                )


def _is_in(file: SourceFile, folder: str) -> bool:
    """True if a file lies in a folder itself."""
    return folder_of(file.path) == folder_of(join(folder, "x"))


def _file_of(part: RunPart | None) -> str:
    """Return the name of the file of a part, the index where it has one."""
    return name_of(part.checkpoint.container.files[0].path) if part else "no file"


def _of_file(work: object, file: SourceFile) -> ShardWork:
    return ShardWork(name_of(file.path), cast("Rewriter", work))


def _tops_of(part: RunPart) -> list[str]:
    """Return the first words of the names of a part's entries in the run."""
    if part.prefix:
        return [part.prefix]
    return list(dict.fromkeys(entry.name.partition(".")[0] for entry in part.checkpoint.entries))


class _IndexWork:
    """The index of a set among the files that are written; what it says is known once the others are."""

    def __init__(self, of_set: SetRewriter) -> None:
        self._set = of_set

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self._set.nbytes - sum(part.work.nbytes for part in self._set.parts)

    def patch(self, overlay: Overlay) -> bool:  # noqa: ARG002 - as the protocol has it
        """False: the set patches its index itself."""
        return False

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write it into an empty file."""
        _, content = self._set.index or ("", b"")
        write_all(target.fd, content, 0)
        target.size = len(content)
        progress(len(content))

    def verify(self, path: str) -> None:
        """Nothing is read back: the set made its content of what the files have."""
