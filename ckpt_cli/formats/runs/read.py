"""Open the folder of a training run as one checkpoint: the entries of each file below a name of its own.

`model.*`, `optimizer.*`, `scheduler.*`, `rng_state.*` or `rng_state_R.*`, `trainer_state.*`; every other file that is a
checkpoint has its own name. What is put together of several files, such as shards or the files of ranks, is one part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, UnknownFormatError, UnsupportedError, about, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import folder_of, join, name_of, names_in
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.ranks.names import LATEST, rank_files
from ckpt_cli.formats.runs.json_values import read_json
from ckpt_cli.formats.runs.names import RunFile, files_of, has_ranks, writer_of
from ckpt_cli.formats.sharded.names import SUFFIXES
from ckpt_cli.formats.sharded.read import ReadOne, ShardSet, read_set, read_without_index
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor, Value

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

NAME = "run"
MODEL = "model"

_WITH_OWN_KEYS = ("safetensors", "shards")
"""Formats whose storages have keys that say what they are of; others number them."""

_OF_TENSOR = attrgetter(*(one.name for one in fields(Tensor)[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class RunPart:
    """One part of a run."""

    prefix: str
    """The beginning of its entries' names in the run, without a dot; empty where they have their own names there."""
    checkpoint: Checkpoint
    """The part as the checkpoint that it is alone, with its document and the names that it has there."""

    def outer(self, name: str) -> str:
        """Return the name in the run of what the part calls `name`."""
        if not self.prefix or not name:
            return name or self.prefix
        return f"{self.prefix}.{name}"

    def inner(self, name: str) -> str:
        """Return the part's own name of what the run calls `name`, which must be of this part."""
        return name[len(self.prefix) :].removeprefix(".") if self.prefix else name


class RunFiles:
    """The container: those of the parts side by side."""

    def __init__(self, parts: Sequence[RunPart], folder: str, names: Sequence[str] = ()) -> None:
        """The parts of the run in `folder`, which has files of these names."""
        self.parts = parts
        self.tops = {part: _tops(part) for part in parts}
        """The outermost keys that each part has in the run."""
        self.folder = folder
        self.leading = [name for name in LATEST if name in names]
        """The names of files that say which folder has the files of ranks; a copy of the run has them too."""
        self.files: Sequence[SourceFile] = list(chain.from_iterable(part.checkpoint.container.files for part in parts))
        self._known: dict[Storage, Storage] = {}
        """The storages of the run by those of the parts, where they differ."""
        self._owners: dict[Storage, tuple[RunPart, Storage]] = {}
        """The part of each storage of the run, and the storage as that knows it."""

    def part(self, prefix: str) -> Checkpoint | None:
        """Return the part below a prefix, such as `optimizer`, as the checkpoint that it is alone; None without one.

        Where the files of ranks have it, it is the part of all that these have.
        """
        found = next((part for part in self.parts if part.prefix == prefix), None)
        inside = f"{prefix}."
        within = (
            p for p in self.parts if not p.prefix and any(e.name.startswith(inside) for e in p.checkpoint.entries)
        )
        found = found or next(within, None)
        return found.checkpoint if found else None

    def name_of(self, file: SourceFile) -> str:
        """Return the name of a file relative to the folder of the run: with a slash where it is in a folder there."""
        folder, path, names = folder_of(join(self.folder, "x")), file.path, [name_of(file.path)]
        while (path := folder_of(path)) not in (folder, ""):
            names.insert(0, name_of(path))
        return "/".join(names)

    def part_of(self, name: str) -> RunPart | None:
        """Return the part that an entry's name is of, or would be of; None for a name that no part can have."""
        for part in self.parts:
            if part.prefix and (name == part.prefix or name.startswith(f"{part.prefix}.")):
                return part
        top = name.partition(".")[0]
        return next((part for part in self.parts if not part.prefix and top in self.tops[part]), None)

    def refuse_joined(self, names: Iterable[str]) -> None:
        """Raise UnsupportedError for the first of some names that is of what the files of ranks are joined to."""
        for name in names:
            part = self.part_of(name)
            if part is not None and part.checkpoint.fixed:
                raise UnsupportedError(
                    f"{name!r} is joined from the files of several ranks: only entries of other files can be edited",
                    path=self.folder,
                    hint=f"ckpt convert {quoted(self.folder)} OUT.safetensors writes the model, to be edited there",
                )

    def owner_of(self, storage: Storage) -> tuple[RunPart, Storage]:
        """Return the part that has a storage, and the storage as that knows it."""
        return self._owners[storage]

    def entries_of(self, part: RunPart) -> Iterator[Entry]:
        """Yield the entries of a part as those of the run."""
        plain = part.checkpoint.format in _WITH_OWN_KEYS or part.checkpoint.is_set
        for entry in part.checkpoint.entries:
            holder = part.outer(entry.holder) if entry.holder is not None else None
            if isinstance(entry, Value):
                yield Value(part.outer(entry.name), entry.content, holder, entry.of_module)
                continue
            adopted = self._adopted(part, entry, plain=plain)
            alias = part.outer(adopted.alias_of) if adopted.alias_of is not None else None
            if holder != adopted.holder or alias != adopted.alias_of:
                adopted = replace(adopted, holder=holder, alias_of=alias)
            yield Tensor(part.outer(adopted.name), *_OF_TENSOR(adopted)) if part.prefix else adopted

    def _adopted(self, part: RunPart, tensor: Tensor, *, plain: bool) -> Tensor:
        """Return a tensor over the storages of the run, whose keys say which file they are of."""
        if tensor.parts:
            tensor = replace(tensor, parts=tuple(self._adopted(part, each, plain=plain) for each in tensor.parts))
        storage = tensor.storage
        if storage is None:
            return tensor
        known = self._known.get(storage)
        if known is None:
            key = storage.key if plain else f"{name_of(part.checkpoint.path)}:{storage.key}"
            known = storage if plain else replace(storage, key=key)
            self._known[storage] = known
            self._owners[known] = part, storage
        return tensor if known is storage else replace(tensor, storage=known)

    def seal(self, overlay: Overlay) -> None:
        """Seal each part's patches."""
        touched = set(overlay.touched)
        for part in self.parts:
            if not touched.isdisjoint(part.checkpoint.container.files):
                part.checkpoint.container.seal(overlay)

    def close(self) -> None:
        """Close every file."""
        for part in self.parts:
            part.checkpoint.close()


def model_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the model of a run as the checkpoint that it is alone; any other checkpoint as it is."""
    container = checkpoint.container
    return (container.part(MODEL) or checkpoint) if isinstance(container, RunFiles) else checkpoint


def run_parts(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the parts of a run as the checkpoints that they are alone; none for any other checkpoint."""
    container = checkpoint.container
    return [part.checkpoint for part in container.parts] if isinstance(container, RunFiles) else []


def apart(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the files of a set, and those of all parts of a run, as the checkpoints that they are alone."""
    container = checkpoint.container
    if isinstance(container, RunFiles):
        return [each for part in run_parts(checkpoint) for each in apart(part)]
    return list(container.shards) if isinstance(container, ShardSet) else [checkpoint]


def read_folder(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the folder of a run."""
    with ExitStack() as opened:
        parts: list[RunPart] = []
        for part in _joined_parts(path, names, opener, read_one):
            opened.callback(part.checkpoint.close)
            parts.append(part)
        ranks = rank_files(names)
        taken = list(chain.from_iterable(part.checkpoint.top_level for part in parts))
        found = files_of(path, [name for name in names if name not in ranks], taken)
        if len(found) > limits.SHARDS:
            raise LimitError(f"it has {len(found)} files", path=path)
        notes: list[str] = []
        by_prefix: dict[str, RunPart] = {}
        for file, part in _parts(path, found, opener, read_one, notes):
            opened.callback(part.checkpoint.close)
            by_prefix[file.prefix] = part
        parts += [by_prefix[file.prefix] for file in found if file.prefix in by_prefix]
        run = _run(path, names, parts, notes)
        opened.pop_all()
    return run


def read_files(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the same files side by side, as they are; those with other values than tensors and pickles are left out."""
    from ckpt_cli.formats.ranks.listed import as_they_are, files_of_ranks, latest

    found = [name for name in names if name.endswith((*SUFFIXES, ".pkl")) and not name.startswith(".")]
    if has_ranks(path, names):
        folder, tag = latest(path, names)
        found = [*(join(tag, name) for name in files_of_ranks(folder)), *found]
    return replace(
        as_they_are(path, found, opener, read_one),
        format=NAME,
        version=f"{writer_of(names)}, {len(found)} files",
        fixed="the files of a run are edited through the run, or each by itself",
    )


def _joined_parts(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Iterator[RunPart]:
    """Yield what the files of ranks, or a distributed checkpoint, in the folder itself have under names of the run."""
    if has_ranks(path, names):
        from ckpt_cli.formats.ranks.folder import read_folder as read_ranks

        ranks = [name for name in names if not name.endswith(SUFFIXES)]
        yield RunPart("", read_ranks(path, ranks, opener, read_one))
    elif ".metadata" in names:
        from ckpt_cli.formats.dcp.read import read_folder as read_distributed

        yield RunPart("", read_distributed(path, names, opener, read_one))
    placed = rank_files(names)
    if placed:
        from ckpt_cli.formats.ranks.placed import read_folder as read_placed

        yield RunPart("", read_placed(path, sorted(placed), opener, read_one))


def _parts(
    path: str, found: Sequence[RunFile], opener: Opener, read_one: ReadOne, notes: list[str]
) -> Iterator[tuple[RunFile, RunPart]]:
    """Yield the parts that have files or folders of their own; what cannot be one is noted."""
    single: list[RunFile] = []
    own: set[str] = set()
    for file in found:
        if file.kind in ("file", "json"):
            single.append(file)
            continue
        part = _part_of_several(path, file, opener, read_one)
        own.update(name_of(each.path) for each in part.checkpoint.container.files if file.kind != "dcp")
        yield file, part
    single = [file for file in single if file.name not in own]
    files = opener.open_all([join(path, file.name) for file in single])
    with closed_on_error(files):
        for file, source in zip(single, documented(files), strict=True):
            with about(source.path):
                try:
                    yield file, RunPart(file.prefix, read_json(source) if file.kind == "json" else read_one(source))
                except UnknownFormatError as error:
                    if file.is_known:
                        raise
                    source.close()
                    notes.append(f"not opened with it: {file.name}, {error.problem}")


def _part_of_several(path: str, file: RunFile, opener: Opener, read_one: ReadOne) -> RunPart:
    """Open a part that consists of several files."""
    if file.kind == "dcp":
        from ckpt_cli.formats.dcp.read import read_folder as read_distributed

        folder = join(path, file.name)
        checkpoint = read_distributed(folder, names_in(folder), opener, read_one)
        has_prefix = all(entry.name.startswith(f"{file.prefix}.") for entry in checkpoint.entries)
        return RunPart("" if has_prefix else file.prefix, checkpoint)
    if file.kind == "shards":
        return RunPart(file.prefix, read_without_index(path, file.shards, opener, read_one))
    index = opener.open(join(path, file.name))
    with closed_on_error([index]):
        return RunPart(file.prefix, read_set(index, opener, read_one))


def _run(path: str, names: Sequence[str], parts: Sequence[RunPart], notes: Sequence[str]) -> Checkpoint:
    """Return the parts as one checkpoint."""
    container = RunFiles(parts, path, names)
    entries = [entry for part in parts for entry in container.entries_of(part)]
    of_model = next((part.checkpoint for part in parts if part.prefix == MODEL), None)
    has_model = of_model is not None or any(entry.name.startswith(f"{MODEL}.") for entry in entries)
    own = [part.checkpoint for part in parts]
    inner = "; ".join(part.checkpoint.version for part in parts if not part.prefix)
    said = f"{writer_of(names)}, {len(container.files)} files" + (f"; {inner}" if inner else "")
    return Checkpoint(
        path=path,
        format=NAME,
        entries=entries,
        container=container,
        version=said,
        metadata=_strings(of_model) if of_model is not None else {},
        objects=list(dict.fromkeys(chain.from_iterable(each.objects for each in own))),
        top_level=list(dict.fromkeys(chain.from_iterable(container.tops.values()))),
        is_set=True,
        notes=[*(_told(part, note) for part in parts for note in part.checkpoint.notes), *notes],
        unread=[_told(part, line) for part in parts for line in part.checkpoint.unread],
        weights=MODEL if has_model else "",
    )


def _tops(part: RunPart) -> Sequence[str]:
    if part.prefix:
        return [part.prefix]
    return list(dict.fromkeys(entry.name.partition(".")[0] for entry in part.checkpoint.entries))


def name_within(checkpoint: Checkpoint, file: SourceFile) -> str:
    """Return the name of one of a checkpoint's files, relative to the folder of the run where it is one."""
    container = checkpoint.container
    return container.name_of(file) if isinstance(container, RunFiles) else name_of(file.path)


def _told(part: RunPart, line: str) -> str:
    """Return a note on a part as one of the run."""
    return f"{part.prefix}: {line}" if part.prefix else line


def _strings(model: Checkpoint) -> Mapping[str, str]:
    """Return the metadata of a run: those strings of its model that are not ties."""
    aliases = {tensor.name for tensor in model.tensors if tensor.alias_of is not None}
    return {key: value for key, value in model.metadata.items() if key not in aliases} if aliases else model.metadata
