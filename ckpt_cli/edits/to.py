"""The plan of `to`: another device for what torch.load makes of a pickled checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.runs.read import RunFiles, apart
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Tensor, Value
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.ops.select import close_names
from ckpt_cli.pickles.edit.relocate import META, locations_of
from ckpt_cli.pickles.graph import Graph

_TYPES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "npu", "privateuseone")
"""The types of devices that torch, or a package that registers itself with it, puts storages on."""

_DEVICE = re.compile(r"([a-z]+)(?::(0|[1-9][0-9]{0,2}))?")

_VALUE = re.compile(r"torch\.device\('([a-z]+)'(?:, ([0-9]+))?\)")
"""The text of a value that is a device."""


def device_named(text: str) -> str:
    """Return a device as torch writes it into a file; raises UsageError for what is not one that keeps values."""
    match = _DEVICE.fullmatch(text.removeprefix("torch."))
    if text == META:
        raise UsageError("'meta' keeps no values: torch.load would drop them all")
    if match is None or match[1] not in _TYPES:
        close = close_names(text.partition(":")[0], _TYPES)
        raise UsageError(
            f"{text!r} is not a device",
            hint=f"did you mean {close[0]}?" if close else "cpu, cuda:0, mps, ...",
        )
    return "cpu" if match[1] == "cpu" else match[0]


def plan_to(checkpoint: Checkpoint, device: str) -> EditPlan:
    """Have torch.load put every tensor on a device without being asked: no values change.

    Raises UnsupportedError for a format that records no devices, RefusedError where all are there already.
    """
    pickled = _pickled(checkpoint)
    graphs = [part.document for part in pickled if isinstance(part.document, Graph)]
    if not any(locations_of(graph) - {device} for graph in graphs):
        raise RefusedError(f"torch.load puts every tensor of it on {device} already", path=checkpoint.path)
    changed = [tensor.name for tensor in _tensors_of(checkpoint, pickled) if _is_elsewhere(tensor, device)]
    left = [entry.name for entry in checkpoint.entries if _names_another(entry, device)]
    return EditPlan(Verb("moved", "move"), changed, changes=Changes(device=device), left=left)


def _pickled(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the checkpoint, or those of its shards, that torch.save wrote."""
    parts = apart(checkpoint)
    found = [part for part in parts if format_of(part).is_torch_save]
    if not found:
        raise UnsupportedError(
            f"a checkpoint of format {parts[0].format if parts else checkpoint.format} records no devices that can be "
            "changed: whoever loads it says where its tensors go",
            path=checkpoint.path,
        )
    return found


def _tensors_of(checkpoint: Checkpoint, pickled: Sequence[Checkpoint]) -> list[Tensor]:
    """Return the tensors of a checkpoint, of a run those in files that torch.save wrote."""
    container = checkpoint.container
    if not isinstance(container, RunFiles):
        return checkpoint.tensors
    own = {id(each) for each in pickled}
    parts = [part for part in container.parts if any(id(each) in own for each in apart(part.checkpoint))]
    return [entry for part in parts for entry in container.entries_of(part) if isinstance(entry, Tensor)]


def _is_elsewhere(tensor: Tensor, device: str) -> bool:
    """True if loading puts the bytes of a tensor on another device."""
    storages = [view.storage for view in all_strided([tensor]) if view.storage is not None]
    return any(storage.location not in (device, META) for storage in storages)


def _names_another(entry: Tensor | Value, device: str) -> bool:
    """True for a torch.device that is a value by itself, and for a tensor that is placed on a mesh of devices."""
    kind = device.partition(":")[0]
    if isinstance(entry, Tensor):
        mesh = entry.sharding.mesh if entry.sharding is not None else ""
        return any(f"'{other}'" in mesh for other in _TYPES if other != kind)
    match = _VALUE.fullmatch(entry.value.text) if isinstance(entry.value, Opaque) else None
    named = "" if match is None else f"{match[1]}:{match[2]}" if match[2] else match[1]
    return named not in ("", META, device)
