"""Edit safetensors files of ranks that were not consolidated: each file by itself, all of them as one edit.

Every file names the tensors of which it has chunks, in its header and in the places of these chunks
(`formats/dcp/safetensors.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from ckpt_cli.errors import UnsupportedError, quoted
from ckpt_cli.files.places import name_of
from ckpt_cli.formats.dcp.safetensors import INFO, sharding_of
from ckpt_cli.formats.safetensors.read import read
from ckpt_cli.formats.writing import Rewriter, ShardWork
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.model.names import Below

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class RankShards:
    """Files of ranks about to be written with other names, or fewer (a `SetRewriter`)."""

    index = None
    unreferenced = 0

    def __init__(
        self, checkpoint: Checkpoint, changes: Changes, rewriting: Callable[[Checkpoint, Changes], Rewriter]
    ) -> None:
        if changes.tensors or changes.added or changes.values or changes.rewrite:
            raise UnsupportedError(
                "of safetensors files of ranks only names and elements can be changed",
                path=checkpoint.path,
                hint=f"ckpt convert {quoted(checkpoint.path)} OUT.safetensors makes one that can be changed freely",
            )
        self.parts: list[ShardWork] = []
        self.removed: list[str] = []
        """Files that have no chunk any more."""
        self.unchanged: list[str] = []
        self._below = Below(changes.dropped_prefixes)
        for file in checkpoint.container.files:
            shard, name = read(file), name_of(file.path)
            own = self._changes_of(shard, changes)
            if shard.entries and all(entry.name in own.dropped for entry in shard.entries):
                self.removed.append(name)
            elif own.names or own.dropped:
                self.parts.append(ShardWork(name, rewriting(shard, own)))
            else:
                self.unchanged.append(name)

    def _changes_of(self, shard: Checkpoint, changes: Changes) -> Changes:
        """Return the changes of one file, in the places of its chunks too."""
        names = {entry.name for entry in shard.entries}
        dropped = frozenset(name for name in names if name in changes.dropped or name in self._below)
        renamed = {old: new for old, new in changes.names.items() if old in names}
        metadata = None
        if INFO in shard.metadata and (dropped or renamed):
            places = sharding_of(shard.metadata[INFO])
            kept = {renamed.get(name, name): place for name, place in places.items() if name not in dropped}
            metadata = {**shard.metadata, INFO: json.dumps(kept)}
        return Changes(names=renamed, rename=changes.rename, dropped=dropped, metadata=metadata)

    def for_new_folder(self) -> None:
        """Do nothing: files are written in the same way wherever they go."""

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if it is one of headers alone, and they fit where they are."""
        return not self.removed and all(part.work.patch(overlay) for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the new files."""
        return sum(part.work.nbytes for part in self.parts)

    @property
    def first(self) -> str:
        """The file that the journal stands beside: one that stays, where there is one."""
        return (self.unchanged or self.names or self.removed)[0]

    @property
    def names(self) -> list[str]:
        """The files that are written."""
        return [part.name for part in self.parts]
