"""Rewrite a stream of torch.save from before 1.6: its preface as it is, the pickle, the keys, the storages.

Source: torch/serialization.py (`_legacy_save`). Storages keep their keys; further saves in the same file are copied
byte for byte.
"""

from __future__ import annotations

from ckpt_cli.errors import MalformedError, RefusedError, UnsupportedError, quoted
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import Extent, LocalFile
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.formats.torch_legacy.read import LEGACY
from ckpt_cli.formats.writing import Appender, OpenCopy, announced, reading_back
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Storage
from ckpt_cli.pickles.edit.rewrite import EditedPickle
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.legacy_save import NUMEL, Save, pickle_at, read_save
from ckpt_cli.pickles.references import referred, rekey
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.write import write_pickle


class _Finder:
    """The storages of the first save, as the checkpoint knows them."""

    big_endian = False

    def __init__(self, checkpoint: Checkpoint, save: Save) -> None:
        self._known = {tensor.storage.key: tensor.storage for tensor in checkpoint.tensors if tensor.storage}
        self._save = save

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage of a key; one that no tensor names is made."""
        if key not in self._save.places:
            raise MalformedError(f"the save does not have storage {key!r}")
        return self._known.setdefault(key, Storage(key, nbytes, location))


class Rewriting:
    """A legacy stream about to be rewritten with some changes."""

    def __init__(self, checkpoint: Checkpoint, changes: Changes, open_copy: OpenCopy) -> None:
        container, graph = checkpoint.container, checkpoint.document
        if not isinstance(container, PlainFile) or not isinstance(graph, Graph):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} cannot be written as a legacy stream")
        self._source = container.files[0]
        self._save = read_save(self._source, 0)
        self._changes = changes
        self._open_copy = open_copy
        entries = [entry for entry in checkpoint.entries if not entry.name.startswith("[")]
        self._others = [entry for entry in checkpoint.entries if entry.name.startswith("[")]
        changed = {*changes.names, *changes.dropped, *changes.tensors, *changes.values}
        if any(entry.name in changed for entry in self._others):
            raise RefusedError(
                "of several saves in one file only the first can be changed but in its elements", path=checkpoint.path
            )
        untyped = next((t for t in changes.new_tensors.values() if not t.dtype.storage), None)
        if untyped is not None:
            raise UnsupportedError(
                f"{untyped.name!r} would be of {untyped.dtype}, which torch cannot load from a file of before 1.6",
                path=checkpoint.path,
                hint=f"ckpt convert {quoted(checkpoint.path)} OUT.pt writes one of today's format",
            )
        graph = self._save.graph
        place = PicklePlace(self._save.begin, self._source)
        self._edited = EditedPickle(graph, _Finder(checkpoint, self._save), place, entries, changes)
        self._rekeyed = False
        """True if the list of storages becomes another one."""
        self._storages = self._assign_keys()

    def _assign_keys(self) -> dict[str, Storage]:
        """Give each new storage a key of its own, in the pickle too, and set `_rekeyed` if the list of keys changes.

        Returns the storages that the new pickle refers to, by their keys.
        """
        found: dict[str, Storage] = {}
        keys: dict[Storage, str] = {}
        references = list(self._edited.references())
        kept = {key for reference, key, _ in references if id(reference) not in self._edited.new}
        number = 0
        for reference, key, storage in references:
            if id(reference) not in self._edited.new:
                found.setdefault(key, storage)
                continue
            if storage not in self._changes.contents:  # one that another name has already
                found.setdefault(storage.key, storage)
                rekey(reference, storage.key, None)
                continue
            if storage not in keys:
                new = key
                while new in kept or new in found:
                    new, number = f"new{number}", number + 1
                keys[storage] = new
            found[keys[storage]] = storage
            rekey(reference, keys[storage], None)
            self._rekeyed = True
        self._rekeyed |= found.keys() != self._save.places.keys()
        return {key: found[key] for key in sorted(found)} if self._rekeyed else {k: found[k] for k in self._save.places}

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if only the pickle changes, and not in its length."""
        if not self._changes.only_names_and_metadata or self._rekeyed:
            return False
        pickle = self._edited.verified(self._save.graph.nbytes)
        if pickle is None or len(pickle) < self._save.graph.nbytes:
            return False
        overlay.write(self._source, self._save.begin, pickle)
        return True

    @property
    def nbytes(self) -> int:
        """The bytes of a new file."""
        return self._write(Appender(None), no_progress)

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write the whole stream."""
        self._write(Appender(target), progress)

    def _write(self, out: Appender, progress: Progress) -> int:
        out.append(self._source.read(0, self._save.begin))
        self._edited.write(out.append)
        out.append(self._keys())
        itemsizes = self._itemsizes()
        contents = [self._content(storage) for storage in self._storages.values()]
        for key, content in zip(self._storages, contents if out.target is None else announced(contents), strict=True):
            if self._storages[key] in self._changes.contents:
                out.append(NUMEL.pack(content.nbytes // itemsizes.get(key, 1)))
            out.append_contents((content,), progress)
        out.append_range(self._source, self._save.end, self._source.size - self._save.end, progress)
        return out.position

    def _content(self, storage: Storage) -> Content:
        """Return the new bytes of a storage, or the old ones together with the number of elements before them."""
        content = self._changes.contents.get(storage)
        if content is not None:
            return content
        begin, nbytes = self._save.places[storage.key]
        nbytes += NUMEL.size
        return Content(nbytes, extents=[Extent(self._source, begin - NUMEL.size, nbytes)])

    def _keys(self) -> bytes:
        """The pickle of the sorted keys, as it was where they are as they were."""
        if not self._rekeyed:
            keys = pickle_at(self._source, self._save.begin + self._save.graph.nbytes)
            return self._source.read(self._save.begin + self._save.graph.nbytes, keys.nbytes)
        written = bytearray()
        write_pickle(list(self._storages), b"", written.extend)
        return bytes(written)

    def _itemsizes(self) -> dict[str, int]:
        """Bytes of an element of each storage, of its class."""
        found: dict[str, int] = {}
        for reference, key, storage in self._edited.references():
            pid = referred(reference).pid
            if isinstance(pid, tuple) and isinstance(pid[4], int) and pid[4]:
                found.setdefault(key, storage.nbytes // pid[4])
        return found

    def verify(self, path: str) -> None:
        """Read the new file back, and compare its pickle with the one that was meant."""
        with reading_back(path, self._open_copy) as copy:
            if not isinstance(copy.document, Graph) or copy.format != LEGACY:
                raise MalformedError("it is not a legacy stream")
            entries = [entry for entry in copy.entries if not entry.name.startswith("[")]
            self._edited.verify(copy.document, entries)
            if len(copy.entries) - len(entries) != len(self._others):
                raise MalformedError("the saves after the first are others")
