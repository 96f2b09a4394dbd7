"""The devices in a pickle: those that storages are put on when it is loaded, read and changed.

Each reference to a storage has the location that the storage was saved from (torch/serialization.py, `location_tag`),
and torch.load puts it there. Tensors without storages of their own have a device among the arguments of the call that
rebuilds them (torch/_utils.py). Any other torch.device of a pickle belongs to whoever put it there.
"""

from __future__ import annotations

from collections.abc import Callable

from ckpt_cli.pickles.graph import Call, Global, Graph, PersistentId, nodes_of
from ckpt_cli.pickles.references import is_storage, referred
from ckpt_cli.pickles.tensors.arguments import text_of

META = "meta"
"""The device of tensors without values, which stay there."""

_DEVICE_AT = {
    "_rebuild_device_tensor_from_numpy": 2,
    "_rebuild_device_tensor_from_cpu_tensor": 2,
    "_rebuild_xla_tensor": 2,
    "_rebuild_wrapper_subclass": 6,
}
"""The argument of each call that is a device: a text, or a torch.device."""


def locations_of(graph: Graph) -> set[str]:
    """Return every device that loading puts tensors on; not `meta`, where there are no values."""
    found: set[str] = set()

    def note(location: str) -> str:
        found.add(location)
        return location

    _walk(graph.root, note)
    return found - {META}


def relocate(root: object, device: str) -> None:
    """Have loading put every tensor of a graph on a device, but for those on `meta`; the graph is changed."""
    _walk(root, lambda location: location if location == META else device)


def _walk(root: object, change: Callable[[str], str]) -> None:
    """Replace each device by what the function returns for it; where that is the same, nothing is touched."""
    for node in nodes_of(root, within_rows=False):
        if type(node) is Call and node.row is not None:
            row: object = node.row
            location = text_of(row.location)  # type: ignore[attr-defined]  # all rows have one
            after = change(location or "")
            if after != location:
                row.location = after  # type: ignore[attr-defined]  # of all calls that have the row
        elif type(node) is PersistentId:
            _relocate_reference(node, change)
        elif type(node) is Call and isinstance(node.func, Global) and isinstance(node.args, tuple):
            node.args = _arguments(node.func, node.args, change)


def _relocate_reference(node: PersistentId, change: Callable[[str], str]) -> None:
    pid = referred(node).pid
    if not is_storage(node) or not isinstance(pid, tuple):
        return
    location = text_of(pid[3])
    if location is not None and (after := change(location)) != location:
        node.pid = (*pid[:3], after, *pid[4:])


def _arguments(func: Global, args: tuple[object, ...], change: Callable[[str], str]) -> tuple[object, ...]:
    """Return the arguments of a call, with another device where they have one."""
    if func.name == "_rebuild_from_type_v2" and len(args) == 4 and isinstance(args[2], tuple):
        inner = _arguments(args[0], args[2], change) if isinstance(args[0], Global) else args[2]
        return args if inner is args[2] else (*args[:2], inner, args[3])
    at = _DEVICE_AT.get(func.name)
    if at is None or len(args) <= at or not func.module.startswith("torch"):
        return args
    before = device_text(args[at])
    if before is None or (after := change(before)) == before:
        return args
    node = args[at]
    device = Call(node.opcode, node.func, _parts(after)) if isinstance(node, Call) else after
    return (*args[:at], device, *args[at + 1 :])


def device_text(node: object) -> str | None:
    """Return a device as torch spells it, `cuda:0`, of its name or of a torch.device; None for anything else."""
    text = text_of(node)
    if text is not None:
        return text
    if not isinstance(node, Call) or not isinstance(node.func, Global) or node.func.qualified != "torch.device":
        return None
    args = node.args if isinstance(node.args, tuple) else ()
    name = text_of(args[0]) if args else None
    return f"{name}:{args[1]}" if name is not None and len(args) > 1 and type(args[1]) is int else name


def _parts(device: str) -> tuple[object, ...]:
    """Return the arguments of torch.device for a device, as it is pickled."""
    name, _, number = device.partition(":")
    return (name, int(number)) if number else (name,)
