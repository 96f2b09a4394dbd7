"""Tensors that are spread over processes, as far as the file of one process describes them.

Sources: torch/distributed/tensor (`DTensor`, `DTensorSpec`, placement_types.py), torch/distributed/device_mesh.py
(`__getstate__`, `__repr__`), torch/distributed/_shard/sharded_tensor/api.py (`__getstate__`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from ckpt_cli.model.checkpoint import Sharding, Tensor
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Global
from ckpt_cli.pickles.tensors.arguments import counts, is_count, text_of
from ckpt_cli.pickles.tensors.rebuild import Rebuilder

_MESH_DIMENSIONS = 16
"""Dimensions of a mesh that are looked at; torch's have one to four."""


def sharding_of(r: Rebuilder, spec: object, whole: tuple[int, ...], parts: Sequence[Tensor]) -> Sharding:
    """Return what a DTensor's spec says; the local part's place in the whole where that follows from it."""
    said = _state(r, spec)
    mesh = _state(r, said.get("mesh"))
    given = said.get("placements")
    placements = [
        (_class_of(node), _state(r, node)) for node in (given[:_MESH_DIMENSIONS] if isinstance(given, tuple) else ())
    ]
    texts = [_placement_text(kind, state) for kind, state in placements]
    sizes = _mesh_sizes(r, mesh)
    offset = _local_offset(placements, sizes, mesh.get("_coordinate_on_dim"), whole, parts)
    return Sharding(
        mesh=_mesh_text(r, mesh, sizes),
        placements=f"({', '.join(texts)}{',' if len(texts) == 1 else ''})",
        offsets=() if offset is None else (offset,),
    )


def sharded(r: Rebuilder, tensor: Tensor, shards: list[object]) -> Tensor:
    """A ShardedTensor with its local shards as parts, `shard0`, `shard1`…, each with its place in the whole."""
    parts: list[Tensor] = []
    offsets: list[tuple[int, ...]] = []
    for node in shards:
        said = _state(r, node)
        part = r.part(f"shard{len(parts)}", said.get("tensor"))
        if part is not None:
            begin = _state(r, said.get("metadata")).get("shard_offsets")
            offsets.append(counts(tensor.name, begin) if begin is not None else ())
            parts.append(part)
    placed = all(len(offset) == len(tensor.shape or ()) for offset in offsets)
    sharding = Sharding(offsets=tuple(offsets) if placed else ())
    return replace(tensor, parts=tuple(parts), sharding=sharding)


def _state(r: Rebuilder, node: object) -> dict[str, object]:
    """An object's attributes by name."""
    return dict(r.attributes(node.states[0])) if isinstance(node, Call) and node.states else {}


def _class_of(node: object) -> str:
    func = node.func if isinstance(node, Call) else None
    return func.name if isinstance(func, Global) else ""


# --- a DTensor's spec -------------------------------------------------------------------------------------------------


def _placement_text(kind: str, state: dict[str, object]) -> str:
    """A placement as torch prints it."""
    if kind == "Replicate":
        return "Replicate()"
    if kind == "Shard":
        return f"Shard(dim={describe(state.get('dim'))})"
    if kind == "_StridedShard":
        return f"_StridedShard(dim={describe(state.get('dim'))}, sf={describe(state.get('split_factor'))})"
    if kind == "Partial":
        return f"Partial({text_of(state.get('reduce_op')) or '?'})"
    return f"{kind or '?'}()"


def _axes(r: Rebuilder, mesh: dict[str, object]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The sizes and strides of a mesh's dimensions, each of which may have been flattened from several."""
    axes = _state(r, mesh.get("_layout")).get("axes")
    found = []
    for axis in axes[:_MESH_DIMENSIONS] if isinstance(axes, tuple) else ():
        said = _state(r, axis)
        found.append((counts("mesh", said.get("shape")), counts("mesh", said.get("stride"))))
    return found


def _mesh_sizes(r: Rebuilder, mesh: dict[str, object]) -> tuple[int, ...]:
    """The sizes of a mesh's dimensions: torch before 2.10 had its ranks in a tensor of that shape."""
    axes = _axes(r, mesh)
    if axes or "mesh" not in mesh:
        return tuple(prod(shape) for shape, _ in axes)
    ranks = r.part("mesh", mesh["mesh"])
    return (ranks.shape or ())[:_MESH_DIMENSIONS] if ranks is not None else ()


def _mesh_text(r: Rebuilder, mesh: dict[str, object], sizes: tuple[int, ...]) -> str:
    """A mesh as torch prints it."""
    names = mesh.get("_mesh_dim_names", mesh.get("mesh_dim_names"))
    device = text_of(mesh.get("_device_type", mesh.get("device_type"))) or "?"
    shape = str(sizes)
    if isinstance(names, tuple) and names:
        shape = f"({', '.join(f'{text_of(name)}={size}' for name, size in zip(names, sizes, strict=False))})"
    strides = tuple(stride[0] if len(stride) == 1 else stride for _, stride in _axes(r, mesh))
    return f"DeviceMesh({shape}, '{device}'{f', stride={strides}' if strides else ''})"


def _local_offset(
    placements: Sequence[tuple[str, dict[str, object]]],
    sizes: tuple[int, ...],
    coordinates: object,
    whole: tuple[int, ...],
    parts: Sequence[Tensor],
) -> tuple[int, ...] | None:
    """Return the index at which the local part begins in the whole; None where it is not known, or for a summand.

    Dimensions are cut as torch.chunk cuts them, one dimension of the mesh after another
    (torch/distributed/tensor/_utils.py `compute_local_shape_and_global_offset`).
    """
    coordinates = list(coordinates) if isinstance(coordinates, list | tuple) else []
    if not parts or len(placements) != len(sizes) or not all(map(is_count, coordinates)):
        return None
    shape, offset = list(whole), [0] * len(whole)
    for number, (kind, state) in enumerate(placements):
        dim = state.get("dim")
        if kind == "Replicate":
            continue
        if kind != "Shard" or type(dim) is not int or not 0 <= dim < len(whole) or number >= len(coordinates):
            return None
        chunk = -(-shape[dim] // max(sizes[number], 1))
        begin = min(coordinates[number] * chunk, shape[dim])
        offset[dim] += begin
        shape[dim] = min(chunk, shape[dim] - begin)
    return tuple(offset) if parts[0].shape == tuple(shape) else None
