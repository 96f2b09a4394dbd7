"""New folders of torch.distributed.checkpoint: one file with a torch.save of each entry, and what says where each is.

As FileSystemWriter writes them with one rank (torch/distributed/checkpoint/filesystem.py): `__0_0.distcp` is torch.save
zip files back to back, `.metadata` a pickled `Metadata` (torch/distributed/checkpoint/metadata.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.files.copy import Progress
from ckpt_cli.files.places import join, open_file
from ckpt_cli.files.source import Window
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.sharded.write import Create
from ckpt_cli.formats.torch_zip.write import spelled as torch_spells
from ckpt_cli.formats.torch_zip.write import write_pickled
from ckpt_cli.formats.writing import OpenCopy
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.graph import Call, Dict
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.references import number_storages
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.make import Maker
from ckpt_cli.pickles.write import write_pickle

DATA, METADATA = "__0_0.distcp", ".metadata"

_FACTS = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_VERSION = "1.0.0"
"""`CURRENT_DCP_VERSION`."""


def spelled(dtype: DType) -> str | None:
    """Return torch's spelling of a dtype; None for one that it does not have."""
    return torch_spells(dtype)


def write_folder(new: NewCheckpoint, create: Create, progress: Progress) -> int:
    """Write both files; returns their bytes."""
    target = create(DATA)
    places: dict[str, tuple[int, int]] = {}
    pickles = ItemPickles()
    begin = 0
    for tensor in new.tensors:
        own = (tensor.storage,) if tensor.storage is not None else ()
        nbytes = write_pickled(pickles.of(tensor), own, new, target, progress, base=begin)
        places[tensor.name] = (begin, nbytes)
        begin += nbytes
    for value in new.values:
        pickle, storages = pickled_value(value)
        nbytes = write_pickled(pickle, storages, replace(new, contents=value.contents), target, progress, base=begin)
        places[value.name] = (begin, nbytes)
        begin += nbytes
    notes = create(METADATA)
    facts = bytearray()
    write_pickle(_metadata(new, places), b"", facts.extend)
    if notes is not None:
        write_all(notes.fd, bytes(facts), 0)
    return begin + len(facts)


class ItemPickles:
    """The pickles of single tensors: those that differ in nothing but name and bytes have one, which is made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], bytes] = {}

    def of(self, tensor: Tensor) -> bytes:
        """Return what torch.save pickles of a tensor."""
        storage = tensor.storage
        place = (storage.nbytes, storage.location) if storage is not None else ()
        view = (tensor.dtype.name, tensor.shape, tensor.stride, tensor.storage_offset)
        key = (*view, tensor.requires_grad, tensor.conj, tensor.neg, *place)
        found = self._made.get(key)
        if found is None:
            pickle = bytearray()
            write_pickle(Maker().tensor(tensor), b"", pickle.extend)
            if len(self._made) >= _KEPT:
                self._made.clear()
            found = self._made[key] = bytes(pickle)
        return found


_KEPT = 4096
"""Pickles of tensors that are kept at once, of some 400 bytes each."""


def pickled_value(value: SavedValue) -> tuple[bytes, Sequence[Storage]]:
    """Return what torch.save pickles of a value, and the storages that it refers to, by their numbers."""
    storages = number_storages(value.root, value.storages)
    pickle = bytearray()
    write_pickle(value.root, value.data, pickle.extend)
    return bytes(pickle), storages


class MetadataMaker(Maker):
    """Makes the objects of a `.metadata`."""

    def __init__(self) -> None:
        super().__init__()
        self._layout = Call("reduce", self.name("torch.serialization", "_get_layout"), (self.text("torch.strided"),))
        self._memory = Call("reduce", self.name(_FACTS, "_MEM_FORMAT_ENCODING"), (0,))

    def facts(self, tensor: Tensor) -> Call:
        """Return the metadata of a tensor: one chunk that is all of it."""
        dtype = self.name("torch", tensor.dtype.name)
        state = (dtype, self._layout, tensor.requires_grad, self._memory, False)
        properties = self.instance(_FACTS, "TensorProperties", state)
        size = self.size(tensor.shape or ())
        fields = {"properties": properties, "size": size, "chunks": [self._whole(tensor)]}
        return self.instance(_FACTS, "TensorStorageMetadata", fields)

    def facts_of_bytes(self) -> Call:
        """Return the metadata of a pickled value."""
        return self.instance(_FACTS, "BytesStorageMetadata", {})

    def _whole(self, tensor: Tensor) -> Call:
        shape = tensor.shape or ()
        chunk = {"offsets": self.size((0,) * len(shape)), "sizes": self.size(shape)}
        return self.instance(_FACTS, "ChunkStorageMetadata", chunk)

    def recast(self, node: object, tensor: Tensor) -> Call:
        """Return the metadata of a tensor that has another dtype and is one chunk now; all else is as it was."""
        properties = next(value for key, value in _pairs(node) if text_of(key) == "properties")
        state = properties.states[-1] if isinstance(properties, Call) else ()
        kind = Call(properties.opcode, properties.func, properties.args) if isinstance(properties, Call) else None
        if kind is None or not isinstance(state, tuple):
            return self.facts(tensor)
        kind.states = [(self.name("torch", tensor.dtype.name), *state[1:])]
        return self.changed(node, properties=kind, chunks=[self._whole(tensor)])

    def index(self, name: str, shape: Sequence[int] | None) -> Call:
        """Return the key of an item: a whole tensor of a shape, or a value."""
        index: dict[str, object] = {"fqn": self.text(name), "index": None}
        if shape is not None:
            index |= {"index": 0, "offset": self.size((0,) * len(shape))}
        return self.instance(_FACTS, "MetadataIndex", index)

    def place(self, file: str, begin: int, nbytes: int) -> Call:
        """Return the place of an item."""
        where = {"relative_path": self.text(file), "offset": begin, "length": nbytes}
        return self.instance(_FILES, "_StorageInfo", where)

    def path(self, path: Sequence[str | int]) -> tuple[object, ...]:
        """Return the place of an entry in the state that was saved."""
        return tuple(self.text(key) if isinstance(key, str) else key for key in path)

    def changed(self, node: object, **fields: object) -> Call:
        """Return a copy of an object with other values of some of its attributes."""
        if not isinstance(node, Call):
            raise CkptError("it has something else where an object should be")
        left = dict(fields)
        pairs = [item for key, value in _pairs(node) for item in (key, left.pop(text_of(key) or "", value))]
        pairs += [item for key, value in left.items() for item in (self.text(key), value)]
        made = Call(node.opcode, node.func, node.args, node.kwargs)
        made.states = [*node.states[:-1], Dict(pairs)]
        return made


def _metadata(new: NewCheckpoint, places: dict[str, tuple[int, int]]) -> Call:
    """The object that says of each tensor and value what it is and where."""
    maker = MetadataMaker()
    facts: dict[str, object] = {}
    stored: list[object] = []
    for tensor in new.tensors:
        facts[tensor.name] = maker.facts(tensor)
        stored += (maker.index(tensor.name, tensor.shape or ()), maker.place(DATA, *places[tensor.name]))
    for value in new.values:
        facts[value.name] = maker.facts_of_bytes()
        stored += (maker.index(value.name, None), maker.place(DATA, *places[value.name]))
    paths = new.paths or {name: (name,) for name in facts}
    listed: list[object] = []
    planned: list[object] = []
    for fqn, path in paths.items():
        name = maker.text(fqn)
        listed += (name, facts[fqn])
        planned += (name, maker.path(path))
    whole: dict[str, object] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    return maker.instance(
        _FACTS,
        "Metadata",
        {
            "state_dict_metadata": Dict(listed),
            "planner_data": Dict(planned),
            "storage_data": Dict(stored),
            "storage_meta": maker.instance(_FACTS, "StorageMeta", whole),
            "version": _VERSION,
        },
    )


def verify_folder(new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> None:  # noqa: ARG001 - as all have it
    """Read the new files back, the notes and each of the zip files, and compare them with what was meant."""
    names = [*(tensor.name for tensor in new.tensors), *(value.name for value in new.values)]
    try:
        with (
            closing(open_file(join(folder, METADATA))) as notes,
            closing(open_file(join(folder, DATA))) as data,
        ):
            raw = notes.read(0, notes.size)
            root = read_pickle(raw).root
            places = dict(zip(names, _places(root), strict=True))
            same = same_graphs(_metadata(new, places), b"", root, raw)
            pickles = ItemPickles()
            for tensor in new.tensors if same else ():
                same &= is_saved_tensor(tensor, pickles.of(tensor), Window(data, *places[tensor.name]), new)
            for value in new.values if same else ():
                same &= is_saved_value(value, Window(data, *places[value.name]))
    except (FormatError, ValueError) as error:
        raise CkptError(f"the new folder did not read back as it should, so it was not kept: {error}") from None
    if not same:
        raise CkptError("the new folder did not read back as it should, so it was not kept")


def verifier(new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> None:
    """Return None: what says where the tensors are is verified together with them."""


def is_saved_value(value: SavedValue, window: Window) -> bool:
    """True if a part of the file is a torch.save of the value."""
    records = ZipRecords(window)
    pickle, storages = pickled_value(value)
    sizes = [records.by_name[f"archive/data/{number}"].nbytes for number in range(len(storages))]
    wanted = [value.contents[storage].nbytes for storage in storages]
    return sizes == wanted and records.read("archive/data.pkl", limits.PICKLE_INFLATED) == pickle


def _places(root: object) -> Iterator[tuple[int, int]]:
    """The begin and the length of each item, as the notes say them."""
    stored = _state(root).get("storage_data")
    pairs = stored.pairs[1::2] if isinstance(stored, Dict) else ()
    for info in pairs:
        begin, nbytes = (_state(info).get(key) for key in ("offset", "length"))
        if isinstance(begin, int) and isinstance(nbytes, int):
            yield begin, nbytes


def _state(node: object) -> dict[str, object]:
    """The attributes of an object that we made."""
    return {text_of(key) or "": value for key, value in _pairs(node)}


def _pairs(node: object) -> Iterator[tuple[object, object]]:
    """Yield the attributes of an object, with their values."""
    state = node.states[-1] if isinstance(node, Call) and node.states else None
    if isinstance(state, Dict):
        yield from zip(state.pairs[::2], state.pairs[1::2], strict=True)


def is_saved_tensor(tensor: Tensor, pickle: bytes, window: Window, new: NewCheckpoint) -> bool:
    """True if a part of the file is a torch.save of the tensor, which has this pickle."""
    records = ZipRecords(window)
    data = records.by_name.get("archive/data/0")
    same = records.read("archive/data.pkl", limits.PICKLE_INFLATED) == pickle
    return same and data is not None and data.nbytes == new.content(tensor).nbytes
