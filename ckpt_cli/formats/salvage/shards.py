"""Sets of which shards are cut, missing or not readable: the tensors of all others, and what is left of those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, FormatError, LimitError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.files.open import Opener
from ckpt_cli.files.places import exists, folder_of, join, name_of, names_in
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.salvage.found import Lost, Salvaged, checkpoint_of
from ckpt_cli.formats.sharded.names import counted_set
from ckpt_cli.formats.sharded.read import NAME, joined, read_index
from ckpt_cli.model.checkpoint import Checkpoint

ReadCut = Callable[[SourceFile], Salvaged]
"""Reads what is left of one file of a set, or all of one that is whole."""

_NAMED = 3
"""Names that a message spells out."""


def salvage_indexed(index: SourceFile, opener: Opener, read_cut: ReadCut, whole: CkptError) -> Salvaged:
    """List what the shards of an index have; raises `whole`, the error of opening the set, where nothing is left."""
    folder = folder_of(index.path)
    try:
        weight_map, metadata = read_index(index)
    except LimitError:
        raise
    except FormatError as error:
        names = counted_set(names_in(folder), name_of(index.path))
        if names is None:
            raise whole from None
        index.close()
        return _Salvage(folder, None, opener, read_cut, f"its index: {error.problem}").found(names, {}, {}, whole)
    names = list(dict.fromkeys(weight_map.values()))
    return _Salvage(folder, index, opener, read_cut).found(names, weight_map, metadata, whole)


def salvage_counted(folder: str, names: Sequence[str], opener: Opener, read_cut: ReadCut, whole: CkptError) -> Salvaged:
    """List what the shards `names` of a folder without an index have, as far as they are there."""
    return _Salvage(folder, None, opener, read_cut).found(names, {}, {}, whole)


@dataclass(slots=True)
class _Salvage:
    """One set in the making."""

    folder: str
    index: SourceFile | None
    opener: Opener
    read_cut: ReadCut
    problem: str = ""
    """What is wrong with the index."""
    cut: dict[str, Salvaged] = field(default_factory=dict)
    """What is left of the shards that are not whole, by their names."""
    unread: dict[str, str] = field(default_factory=dict)
    """The errors of the shards of which nothing is left, by their names."""

    def found(
        self, names: Sequence[str], weight_map: Mapping[str, str], metadata: Mapping[str, Any], whole: CkptError
    ) -> Salvaged:
        """Return the tensors of the shards `names` that are all there, and what is lost."""
        if len(names) > limits.SHARDS:
            raise LimitError(f"its names count {len(names)} shards")
        there = [name for name in names if exists(join(self.folder, name))]
        known = set(there)
        missing = [name for name in names if name not in known]
        if not there:
            raise whole
        path = self.index.path if self.index else self.folder
        checkpoint = joined(path, self.index, there, self.opener, self._read, weight_map, metadata)
        try:
            if len(self.unread) == len(there) or not (missing or self.cut or self.unread or self.problem):
                raise whole
            lost = self._lost(checkpoint, missing, weight_map)
            problem = "; ".join(self._problems(missing, len(names)))
        except BaseException:
            checkpoint.close()
            raise
        return Salvaged(replace(checkpoint, format=f"{NAME} (cut)", notes=[]), problem, tuple(lost))

    def _read(self, file: SourceFile) -> Checkpoint:
        """Return what is left of a shard; an empty checkpoint where that is nothing."""
        name = name_of(file.path)
        try:
            found = self.read_cut(file)
        except LimitError:
            raise
        except FormatError as error:
            self.unread[name] = error.problem
            return checkpoint_of(file, "unreadable", [])
        if not found.is_whole:
            self.cut[name] = found
        return found.checkpoint

    def _problems(self, missing: Sequence[str], count: int) -> list[str]:
        """Return a part of the message for each kind of fault."""
        kinds = (
            (missing, "not there"),
            (list(self.cut), "cut short"),
            (list(self.unread), "not readable"),
        )
        said = [
            f"{listed(names, _NAMED, repr)} {'is' if len(names) == 1 else 'are'} {what}"
            for names, what in kinds
            if names
        ]
        shards = [f"of its {count} shards {', '.join(said)}"] if said else []
        return [*([self.problem] if self.problem else []), *shards]

    def _lost(self, checkpoint: Checkpoint, missing: Sequence[str], weight_map: Mapping[str, str]) -> list[Lost]:
        """Return what is lost, under the names that the index has where the shard does not say them."""
        lost = {item.name: item for cut in self.cut.values() for item in cut.lost if item.name}
        lost = {name: item for name, item in lost.items() if name not in checkpoint.names}
        whys = {
            **dict.fromkeys(missing, "is not there"),
            **{name: f"is cut: {cut.problem}" for name, cut in self.cut.items()},
            **{name: f"is not readable: {problem}" for name, problem in self.unread.items()},
        }
        by_index: set[str] = set()
        for name, shard in weight_map.items():
            if name not in checkpoint.names and name not in lost:
                lost[name] = Lost(name, f"its shard {shard!r} {whys.get(shard, 'does not have it')}")
                by_index.add(shard)
        for name, kept_as in checkpoint.metadata.items():
            if kept_as in lost and name not in checkpoint.names and name not in lost:
                lost[name] = Lost(name, f"it is the same tensor as {kept_as!r}, which is lost")
        nameless = [
            Lost("", f"of shard {shard!r} {item.why}")
            for shard, cut in self.cut.items()
            for item in cut.lost
            if not item.name and shard not in by_index
        ]
        gone = [name for name in (*missing, *self.unread) if name not in by_index]
        return [*lost.values(), *nameless, *(Lost("", f"all of shard {name!r}, which {whys[name]}") for name in gone)]
