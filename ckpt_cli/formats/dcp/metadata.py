"""The content of the `.metadata` of a distributed checkpoint, from its pickle, which is not run.

The classes are those of torch/distributed/checkpoint/metadata.py, and `_StorageInfo` of filesystem.py there; only the
fields of their states are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import is_plain_name
from ckpt_cli.formats.dcp.boxes import Box
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph
from ckpt_cli.pickles.tensors.arguments import counts, sizes, text_of

_FIELDS = 16
"""Fields that the state of one of these classes may have; they have five at most."""

_COUNT_END = 1 << 63


@dataclass(frozen=True, slots=True)
class ItemPlace:
    """The place of one item of a checkpoint."""

    file: str
    """A name in the checkpoint's folder, never a path."""
    offset: int
    """Its first byte."""
    nbytes: int
    """Its bytes: of a torch.save file, or in a safetensors file at that offset, of its elements alone."""
    transforms: tuple[str, ...] = ()
    """The transforms that it was sent through on the way to the file, such as `stream.zstd/1`."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One entry of the checkpoint."""

    name: str
    """Its fully qualified name."""
    dtype: DType | None
    """None for a pickled value."""
    shape: tuple[int, ...] = ()
    layout: str = "strided"
    requires_grad: bool = False
    boxes: tuple[Box, ...] = ()
    """The chunks, by their first element."""
    places: tuple[ItemPlace | None, ...] = ()
    """The place of each chunk, or of the value; None where nothing says so."""


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """A `.metadata`, read."""

    entries: Sequence[Saved]
    version: str
    """Of the layout, such as `1.0.0`; empty before torch 2.8."""
    top_level: Sequence[str]
    """The outermost keys of the state that was saved."""
    files: Sequence[str]
    """The files that hold its items, sorted."""
    paths: Mapping[str, object]
    """By name, what the planner noted of each entry's place in the state that was saved; nothing is checked."""
    places: Sequence[ItemPlace]
    """The places of all items, also of those that no entry has."""


_Found = dict[str, list[tuple[tuple[int, ...], ItemPlace]]]
"""By name, where each chunk is, by its offsets."""


def metadata_of(graph: Graph) -> DcpMetadata:
    """Read a `.metadata`; raises MalformedError or LimitError if it is not one or contradicts itself."""
    root = fields_of(graph.root)
    listed = root.get("state_dict_metadata")
    if not isinstance(listed, Dict):
        raise MalformedError("its pickle is not a Metadata of torch.distributed.checkpoint: it lists no entries")
    budget = WalkBudget(graph.nbytes)
    found = _storage_data(root.get("storage_data"), budget)
    budget.steps(20 * len(listed.pairs))
    entries: list[Saved] = []
    chunks = 0
    seen: set[str] = set()
    for name, node in named_pairs(listed):
        if name in seen:
            raise MalformedError(f"it has two entries called {describe(name)}")
        seen.add(name)
        budget.name(name)
        entry = _entry(name, node, found.get(name, []), budget)
        chunks += len(entry.boxes)
        if chunks > limits.CHUNKS:
            raise LimitError(f"its tensors have more than {limits.CHUNKS} chunks")
        entries.append(entry)
        if not len(entries) & 0xFFF:
            budget.check(len(entries))
    places = [place for each in found.values() for _, place in each]
    files = sorted({place.file for place in places})
    if len(files) > limits.RANK_FILES:
        raise LimitError(f"it names {len(files)} files")
    version = text_of(root.get("version")) or ""
    paths = _planned(root.get("planner_data"), budget)
    return DcpMetadata(entries, version, _top_level(paths, entries), files, paths, places)


def fields_of(node: object) -> dict[str, Any]:
    """The fields of an instance, from its state; no fields for what has none."""
    state = node.states[-1] if isinstance(node, Call) and node.states else None
    if not isinstance(state, Dict):
        return {}
    if len(state.pairs) > 2 * _FIELDS:
        raise MalformedError(f"it has an object of {len(state.pairs) // 2} fields, which is not one of a checkpoint's")
    return dict(named_pairs(state))


def named_pairs(node: Dict) -> Iterator[tuple[str, object]]:
    """Yield the keys of a dict, which are names, with their values; raises MalformedError for another key."""
    for key, value in zip(node.pairs[::2], node.pairs[1::2], strict=True):
        name = text_of(key)
        if name is None:
            raise MalformedError(f"it has {describe(key)} where a name should be")
        yield name, value


def _storage_data(node: object, budget: WalkBudget) -> _Found:
    """The places of items, by name; the keys are objects (MetadataIndex), compared by what they say."""
    found: _Found = {}
    if not isinstance(node, Dict):
        raise MalformedError("it does not say where its items are (storage_data)")
    budget.steps(30 * len(node.pairs))
    for key, value in zip(node.pairs[::2], node.pairs[1::2], strict=True):
        index = fields_of(key)
        name = text_of(index.get("fqn"))
        if name is None:
            raise MalformedError(f"it says where {describe(key)} is, which is not an entry")
        offset = index.get("offset")
        found.setdefault(name, []).append((counts(name, offset) if offset is not None else (), place_of(name, value)))
    return found


def place_of(name: str, node: object) -> ItemPlace:
    """Return the place of an item of an entry; raises MalformedError where that is not one."""
    fields = fields_of(node)
    file = text_of(fields.get("relative_path"))
    offset: Any = fields.get("offset")
    nbytes: Any = fields.get("length")
    if file is None or not _is_count(offset) or not _is_count(nbytes):
        raise MalformedError(f"entry {describe(name)}: where it is, is {describe(node)}")
    if not is_plain_name(file):
        raise MalformedError(f"entry {describe(name)} is in {describe(file)}, which is not a file of the folder")
    transforms = fields.get("transform_descriptors") or ()
    if not isinstance(transforms, list | tuple) or len(transforms) > _FIELDS:
        raise MalformedError(f"entry {describe(name)} was transformed by {describe(transforms)}")
    return ItemPlace(file, offset, nbytes, tuple(text_of(each) or describe(each) for each in transforms))


def _is_count(node: Any) -> bool:
    return type(node) is int and 0 <= node < _COUNT_END


def _entry(name: str, node: object, found: list[tuple[tuple[int, ...], ItemPlace]], budget: WalkBudget) -> Saved:
    kind = node.func.name if isinstance(node, Call) and isinstance(node.func, Global) else ""
    if kind == "BytesStorageMetadata":
        return Saved(name, None, places=tuple(place for _, place in found[:1]) or (None,))
    if kind != "TensorStorageMetadata":
        raise MalformedError(f"entry {describe(name)} is neither a tensor nor a pickled value, but {describe(node)}")
    fields = fields_of(node)
    dtype, layout, requires_grad = _properties(name, fields.get("properties"))
    shape = sizes(name, fields.get("size"))
    if dtype.bits % 8 == 0 and dtype.nbytes(_numel(shape)) >= _COUNT_END:
        raise MalformedError(f"tensor {describe(name)} has more bytes than 64 bits can count")
    boxes = _boxes(name, fields.get("chunks"), shape, budget)
    return Saved(name, dtype, shape, layout, requires_grad, tuple(boxes), tuple(_places(name, boxes, found)))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _properties(name: str, node: object) -> tuple[DType, str, bool]:
    """Dtype, layout and requires_grad, from the tuple that TensorProperties is pickled as."""
    state = node.states[-1] if isinstance(node, Call) and node.states else None
    if not isinstance(state, tuple) or len(state) < 3:
        raise MalformedError(f"tensor {describe(name)}: its properties are {describe(state)}")
    dtype = BY_NAME.get(state[0].name) if isinstance(state[0], Global) and state[0].module == "torch" else None
    if dtype is None:
        raise MalformedError(f"tensor {describe(name)}: its dtype is {describe(state[0])}, not one of torch's")
    layout = state[1]  # torch.serialization._get_layout("torch.strided"), once for all
    if isinstance(layout, Call) and isinstance(layout.args, tuple) and layout.args:
        layout = layout.args[0]
    spelled = layout.name if isinstance(layout, Global) else text_of(layout) or ""
    if dtype.category == "quantized":
        spelled = "quantized"
    return dtype, spelled.removeprefix("torch.")[:40], state[2] is True


def _boxes(name: str, node: object, shape: tuple[int, ...], budget: WalkBudget) -> list[Box]:
    """A tensor's chunks, by their offsets, each within the tensor."""
    if not isinstance(node, list):
        raise MalformedError(f"tensor {describe(name)}: its chunks are {describe(node)}")
    budget.steps((20 + len(shape)) * len(node))
    boxes: list[Box] = []
    for chunk in node:
        fields = fields_of(chunk)
        box = Box(counts(name, fields.get("offsets")), counts(name, fields.get("sizes")))
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            raise MalformedError(f"tensor {describe(name)} of shape {shape} has a chunk of shape {box.sizes}")
        if any(begin + size > whole for begin, size, whole in zip(box.offsets, box.sizes, shape, strict=True)):
            raise MalformedError(
                f"tensor {describe(name)} of shape {shape} has a chunk at {box.offsets} of shape {box.sizes}, "
                "which reaches beyond it"
            )
        boxes.append(box)
    boxes.sort(key=lambda box: (box.offsets, box.sizes))
    return boxes


def _places(name: str, boxes: list[Box], found: list[tuple[tuple[int, ...], ItemPlace]]) -> Iterator[ItemPlace | None]:
    """Yield the place of each chunk.

    Both are ordered by offsets, of which no two are the same unless one has no elements.
    """
    ordered = sorted(found, key=lambda each: each[0])
    for (one, _), (other, _) in itertools.pairwise(ordered):
        if one == other:
            raise MalformedError(f"tensor {describe(name)} has two places for its chunk at {one}")
    position = 0
    for box in boxes:
        while position < len(ordered) and ordered[position][0] < box.offsets:
            position += 1
        is_there = position < len(ordered) and ordered[position][0] == box.offsets
        yield ordered[position][1] if is_there else None


def _planned(planner_data: object, budget: WalkBudget) -> dict[str, object]:
    """Return the path that the planner noted for each name; nothing where it did not flatten the state."""
    if not isinstance(planner_data, Dict):
        return {}
    budget.steps(len(planner_data.pairs))
    named = ((text_of(key), path) for key, path in zip(planner_data.pairs[::2], planner_data.pairs[1::2], strict=True))
    return {name: path for name, path in named if name is not None}


def _top_level(paths: Mapping[str, object], entries: Sequence[Saved]) -> list[str]:
    """The first keys of the paths that the planner noted; of names where it did not flatten the state."""
    found: dict[str, None] = {}
    for entry in entries:
        path = paths.get(entry.name)
        first = text_of(path[0]) if isinstance(path, tuple) and path else None
        found[first or entry.name.partition(".")[0]] = None
    return list(found)
