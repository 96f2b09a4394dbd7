"""Rewrite the files of a run with some changes: each change goes to the file that has the entry, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from ckpt_cli.errors import RefusedError, UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.places import name_of
from ckpt_cli.files.source import LocalFile
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
        changed = {*changes.names, *changes.dropped, *changes.tensors, *changes.values}
        container.refuse_joined(entry.name for entry in checkpoint.entries if entry.name in changed)
        container.refuse_joined(changes.added)
        self._refuse_crossing()
        self._works: list[tuple[RunPart, Rewriter | SetRewriter]] = []
        self._gone: list[str] = []
        """The files of parts of which nothing is left."""
        for part in container.parts:
            if self._is_dropped(part):
                self._gone += map(container.name_of, part.checkpoint.container.files)
            else:
                self._add(part, rewriting)

    def _add(self, part: RunPart, rewriting: Callable[[Checkpoint, Changes], object]) -> None:
        """Plan the work of a part, if any of the changes concerns it."""
        sub = self._changes_of(part)
        if sub is None:
            return
        try:
            work = rewriting(part.checkpoint, sub)
        except UnsupportedError:
            if replace(sub, rewrite=False, contents={}, rename=None) != Changes():
                raise
            return  # it can only be packed, and its format cannot be
        self._works.append((part, cast("Rewriter | SetRewriter", work)))

    @property
    def parts(self) -> Sequence[ShardWork]:
        """The files that are written, of a set the index last; a distributed checkpoint decides on them as it goes."""
        found: list[ShardWork] = []
        for part, work in self._works:
            if not part.checkpoint.is_set:
                name = self._container.name_of(part.checkpoint.container.files[0])
                found.append(ShardWork(name, cast("Rewriter", work)))
                continue
            of_set, folder = cast("SetRewriter", work), self._folder_of(part)
            data = list(of_set.parts)
            known = {each.name for each in data}
            found += (ShardWork(folder + each.name, each.work) for each in data)
            found += (ShardWork(folder + name, _IndexWork(of_set)) for name in of_set.names if name not in known)
        return found

    def _folder_of(self, part: RunPart) -> str:
        """Return what the names of a part's files begin with: the folder that it has of its own, with a slash."""
        own, slash, _ = self._container.name_of(part.checkpoint.container.files[0]).rpartition("/")
        return own + slash

    @property
    def _sets(self) -> list[SetRewriter]:
        """The works of sets."""
        return [cast("SetRewriter", work) for part, work in self._works if part.checkpoint.is_set]

    @property
    def removed(self) -> Sequence[str]:
        """The files that go."""
        sets = ((self._folder_of(part), work) for part, work in self._works if part.checkpoint.is_set)
        return [*self._gone, *(folder + name for folder, work in sets for name in cast("SetRewriter", work).removed)]

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
        return [name for name in map(self._container.name_of, self._container.files) if name not in written]

    @property
    def nbytes(self) -> int:
        """The bytes that will be written."""
        return sum(work.nbytes for _, work in self._works)

    @property
    def first(self) -> str:
        """The file that the journal stands beside: one in the folder itself that stays, or that is written."""
        return next(name for name in (*self.unchanged, *self.names) if "/" not in name)

    @property
    def names(self) -> Sequence[str]:
        """The files that are written."""
        return [part.name for part in self.parts]

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if it fits into each file that it concerns."""
        fits = [work.patch(overlay) for _, work in self._works]
        return all(fits) and not self.removed

    # --- the changes of each part

    def _refuse_crossing(self) -> None:
        """Raise RefusedError for names that another file would have, or none."""
        for old, new in self._changes.names.items():
            here, there = self._container.part_of(old), self._container.part_of(new)
            if here is not there:
                said = f"{_file_of(there)} has what is called so" if there else "no file of the run has such names"
                raise RefusedError(
                    f"{old!r} is in {_file_of(here)}, so it cannot be called {new!r}: {said}",
                    path=self._checkpoint.path,
                )
        for name in self._changes.added:
            part = self._container.part_of(name)
            if part is None:
                known = ", ".join(f"{top}." for tops in self._container.tops.values() for top in tops)
                raise RefusedError(
                    f"no file of the run has names such as {name!r}",
                    path=self._checkpoint.path,
                    hint=f"names begin with the part that they belong to: {known}",
                )

    def _is_dropped(self, part: RunPart) -> bool:
        """True if nothing of a part is left, so that its files go."""
        is_apart = bool(part.prefix or self._folder_of(part))
        if not is_apart or any(entry.name == UNLISTED for entry in part.checkpoint.entries):
            return False
        changes = self._changes
        if any(self._container.part_of(name) is part for name in (*changes.added, *changes.names.values())):
            return False
        if all(top in changes.dropped_prefixes for top in self._container.tops[part]):
            return True
        entries = part.checkpoint.entries
        return bool(entries) and all(part.outer(entry.name) in changes.dropped for entry in entries)

    def _changes_of(self, part: RunPart) -> Changes | None:
        """Return the changes of one part, in its own names; None if there are none."""
        changes = self._changes
        owned = {part.outer(entry.name) for entry in part.checkpoint.entries}
        names = {part.inner(old): part.inner(new) for old, new in changes.names.items() if old in owned}
        dropped = frozenset(part.inner(name) for name in changes.dropped if name in owned)
        prefixes = frozenset(
            part.inner(name) for name in changes.dropped_prefixes if self._container.part_of(name) is part
        )
        tensors = {
            part.inner(name): self._own(part, tensor) for name, tensor in changes.tensors.items() if name in owned
        }
        values = {part.inner(name): value for name, value in changes.values.items() if name in owned}
        added = {
            part.inner(name): self._own(part, value) if isinstance(value, Tensor) else value
            for name, value in changes.added.items()
            if self._container.part_of(name) is part
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
            return part.inner(new) if self._container.part_of(new) is part else name

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


def _file_of(part: RunPart | None) -> str:
    """Return the name of the file of a part, the index where it has one."""
    return name_of(part.checkpoint.container.files[0].path) if part else "no file"


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
