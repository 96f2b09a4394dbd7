"""The conversion of all that the folder of a training run has: `convert RUN OUT --all`, to torch.save or a DCP folder.

The result has a dict with each part under its name: of a file that torch.save wrote its objects as they are, of other
files of tensors a dict of these, of JSON its data, of distributed checkpoints and the files of ranks what they are of.
A distributed checkpoint has the leaves of all that.
"""

from __future__ import annotations

from dataclasses import field, replace

from ckpt_cli.arrays.cast import Losses
from ckpt_cli.edits.convert_contents import Casting, check_items, pack_plain
from ckpt_cli.edits.convert_nested import check_bytes, leaves_of_dcp, leaves_of_pickle, whole_value
from ckpt_cli.edits.convert_options import ConvertOptions, ConvertPlan, Job, NewFiles, stem_of
from ckpt_cli.errors import listed
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.dcp.paths import Path, nest
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.runs.json_values import JsonFile
from ckpt_cli.formats.runs.read import MODEL, RunFiles, RunPart
from ckpt_cli.formats.sharded.rewrite import TOTALS
from ckpt_cli.formats.targets import Target
from ckpt_cli.formats.torch_zip.write import nested
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.pickles.edit.apply import node_of
from ckpt_cli.pickles.graph import Dict, Graph

_BY_PARAMETER = "optimizer.state."
"""Begins the names of states in the files of ranks, before that of the parameter."""


def plan_run(checkpoint: Checkpoint, target: Target, output: str, options: ConvertOptions) -> ConvertPlan | None:
    """Plan one checkpoint with all of a run; None for what is not a run, or has parts that it cannot hold.

    A new dtype is that of the model, as where a run is cast.
    """
    container = checkpoint.container
    if not isinstance(container, RunFiles):
        return None
    gathered = _Gathered(container, options, is_flat=target.is_folder)
    if not all(map(gathered.take, container.parts)):
        return None
    check_bytes(checkpoint, gathered.tensors, gathered.values)
    check_items(checkpoint, target, len(gathered.paths))
    casting = Casting(options.dtype, Losses(), options.executor)
    of_model = [tensor for tensor in gathered.tensors if tensor.name.startswith(f"{MODEL}.")]
    packed, contents = pack_plain(checkpoint, of_model, casting, tied=not target.is_folder)
    others = [tensor for tensor in gathered.tensors if not tensor.name.startswith(f"{MODEL}.")]
    kept, more = pack_plain(checkpoint, others, replace(casting, dtype=None), tied=not target.is_folder)
    contents |= more
    new = NewCheckpoint(
        [*packed, *kept], contents, values=gathered.values, paths=gathered.paths,
        mode_of=checkpoint.container.files[0].path, stem=stem_of(output),
    )  # fmt: skip
    strings = [key for key in checkpoint.metadata if key not in ("format", *TOTALS)]
    not_kept = (*checkpoint.unread, *gathered.not_kept())
    if strings:
        not_kept += (f"metadata of the model ({', '.join(strings[:3])})",)
    job: Job = NewFiles(new, target)
    if not target.is_folder:
        job = nested(new, nest, open_checkpoint, target.object_writer().write_object)
    return ConvertPlan(job, len(checkpoint.tensors), casting.losses, contents, not_kept=not_kept)


@dataclass(slots=True)
class _Gathered:
    """The tensors and values of the parts of a run, each with its path in the result."""

    run: RunFiles
    options: ConvertOptions
    is_flat: bool
    """True if the result has leaves only, as a distributed checkpoint."""
    paths: dict[str, Path] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    values: list[SavedValue] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    """The names of objects in the files of ranks, whose pickles cannot be taken alone."""
    notes: list[str] = field(default_factory=list)

    def not_kept(self) -> list[str]:
        """Return what the result does not have, in words."""
        return [*self.notes, *([f"objects ({listed(self.objects, 3)})"] if self.objects else [])]

    def take(self, part: RunPart) -> bool:
        """Take a part; False for one that the result cannot hold."""
        alone = part.checkpoint
        if isinstance(alone.container, JsonFile):
            self._add_value(SavedValue(part.prefix, _node(alone.container.data), b""), (part.prefix,))
        elif isinstance(alone.document, Graph) and "[1]" not in alone.top_level:
            self._take_pickle(part, alone.document)
        elif format_of(alone).is_distributed:
            self._take_distributed(part)
        elif alone.fixed:
            self._take_joined(part)
        elif part.prefix and _is_of_tensors(alone):
            self._take_tensors(part)
        else:
            return False
        return True

    def _take_pickle(self, part: RunPart, graph: Graph) -> None:
        """Take what torch.save wrote: its objects as they are, or its leaves where the result has only such."""
        alone = part.checkpoint
        leaves = leaves_of_pickle(alone, graph, "") if self.is_flat else None
        if leaves is not None:
            self.notes += leaves.not_kept
            for tensor in leaves.tensors:
                path = leaves.paths[tensor.name]
                self._add_tensor(replace(tensor, name=part.outer(tensor.name)), (part.prefix, *path))
            for value in leaves.values:
                self._add_value(replace(value, name=part.outer(value.name)), (part.prefix, *leaves.paths[value.name]))
        elif self.options.dtype is not None and part.prefix == MODEL and _is_of_tensors(alone):
            self._take_tensors(part)
        else:
            self._add_value(whole_value(alone, graph, part.prefix), (part.prefix,))

    def _take_distributed(self, part: RunPart) -> None:
        """Take the leaves of a distributed checkpoint, where its planner noted them to be."""
        leaves = leaves_of_dcp(part.checkpoint, "")
        above = (part.prefix,) if part.prefix else ()
        known = {entry.name: entry for entry in self.run.entries_of(part)}
        for tensor in leaves.tensors:
            entry = known[part.outer(tensor.name)]
            if isinstance(entry, Tensor):
                self._add_tensor(entry, (*above, *leaves.paths[tensor.name]))
        for value in leaves.values:
            self._add_value(replace(value, name=part.outer(value.name)), (*above, *leaves.paths[value.name]))

    def _take_joined(self, part: RunPart) -> None:
        """Take what the files of ranks are joined to: the model by its own names, states by those of parameters."""
        for entry in self.run.entries_of(part):
            if isinstance(entry, Tensor):
                self._add_tensor(entry, _path_of(entry.name))
            elif isinstance(entry.value, Opaque):
                self.objects.append(entry.name)
            else:
                self._add_value(SavedValue(entry.name, node_of(entry.value), b""), _path_of(entry.name))

    def _take_tensors(self, part: RunPart) -> None:
        for entry in self.run.entries_of(part):
            if isinstance(entry, Tensor):
                self._add_tensor(entry, (part.prefix, part.inner(entry.name)))

    def _add_tensor(self, tensor: Tensor, path: Path) -> None:
        self.tensors.append(tensor)
        self.paths[tensor.name] = path

    def _add_value(self, value: SavedValue, path: Path) -> None:
        self.values.append(value)
        self.paths[value.name] = path


def _is_of_tensors(checkpoint: Checkpoint) -> bool:
    """True if a checkpoint has nothing but plain tensors."""
    return all(isinstance(entry, Tensor) and entry.layout == "strided" for entry in checkpoint.entries)


def _path_of(name: str) -> Path:
    """Return the path of an entry of the files of ranks: names of parameters stay whole, items of lists are numbers."""
    if name.startswith(f"{MODEL}."):
        return MODEL, name[len(MODEL) + 1 :]
    if name.startswith(_BY_PARAMETER):
        parameter, _, key = name[len(_BY_PARAMETER) :].rpartition(".")
        return (*_BY_PARAMETER.rstrip(".").split("."), parameter, key) if parameter else ("optimizer", "state", key)
    return tuple(_key(part) for part in name.split("."))


def _key(part: str) -> str | int:
    return int(part) if part.isdecimal() and len(part) < _DIGITS else part


_DIGITS = 6
"""Digits of the number of an item at most."""


def _node(data: object) -> object:
    """Return JSON data as the nodes of a pickle, whose scalars and lists are those of Python."""
    if isinstance(data, dict):
        return Dict([node for key, value in data.items() for node in (key, _node(value))])
    return [_node(item) for item in data] if isinstance(data, list) else data
