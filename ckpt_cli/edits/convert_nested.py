"""Conversions from and to distributed checkpoints that keep nested dicts and lists, and the values in them.

As torch.distributed.checkpoint.format_utils has it: `dcp_to_torch_save`, `torch_save_to_dcp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.edits.convert_contents import Casting, check_items, pack_plain
from ckpt_cli.edits.convert_options import ConvertOptions, ConvertPlan, Job, LeftOut, NewFiles, stem_of
from ckpt_cli.edits.folded import reason_lines
from ckpt_cli.errors import LimitError, RefusedError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.dcp.container import Composed
from ckpt_cli.formats.dcp.paths import Path, below, dotted, nest, new_path, path_of, renamed_path
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.targets import Target
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.model.changes import Changes, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.nn.state_dict import node_at
from ckpt_cli.pickles.containers import Containers, key_text
from ckpt_cli.pickles.edit.apply import node_of
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, RawString
from ckpt_cli.pickles.references import storage_references
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.write import write_pickle


@dataclass(slots=True)
class Leaves:
    """The tensors and values of a state, each with its path."""

    paths: dict[str, Path] = field(default_factory=dict)
    """In the order of the state, by the names that a distributed checkpoint gives them."""
    tensors: list[Tensor] = field(default_factory=list)
    values: list[SavedValue] = field(default_factory=list)
    not_kept: list[str] = field(default_factory=list)
    """The facts about the state that a distributed checkpoint cannot hold, in words."""


def plan_nested(
    checkpoint: Checkpoint,
    target: Target,
    output: str,
    options: ConvertOptions,
    dropped: frozenset[str],
    made: Changes,
) -> ConvertPlan | None:
    """Plan a conversion that keeps containers and values; None where the one of flat names does as well.

    The entries of the names in `dropped` are left out; `made` has new, renamed and dropped tensors.
    Raises RefusedError for tensors that would be lost, MalformedError or LimitError for paths that cannot be.
    """
    if options.tensors_only or not target.keeps_nesting:
        return None
    prefix = options.select.removesuffix(".")
    inside = f"{prefix}." if prefix else ""
    if format_of(checkpoint).is_distributed:
        leaves = leaves_of_dcp(checkpoint, prefix)
    elif target.is_folder and isinstance(checkpoint.document, Graph) and _is_one_save(checkpoint):
        found = leaves_of_pickle(checkpoint, checkpoint.document, prefix)
        if found is None:
            return None
        leaves = found
    else:
        return None
    leaves = _without(leaves, {name.removeprefix(inside) for name in dropped | made.dropped})
    _change(leaves, inside, made)
    return _planned(checkpoint, leaves, target, output, options)


def _without(leaves: Leaves, names: set[str]) -> Leaves:
    """Return the leaves whose names are not among some."""
    return replace(
        leaves,
        paths={name: path for name, path in leaves.paths.items() if name not in names},
        tensors=[tensor for tensor in leaves.tensors if tensor.name not in names],
        values=[value for value in leaves.values if value.name not in names],
    )


def _change(leaves: Leaves, inside: str, made: Changes) -> None:
    """Change the leaves below a prefix: new tensors in the places of old ones, new names, tensors that are added."""
    new = {name.removeprefix(inside): tensor for name, tensor in made.tensors.items()}
    names = {old.removeprefix(inside): name.removeprefix(inside) for old, name in made.names.items()}
    added = [replace(tensor, name=name.removeprefix(inside)) for name, tensor in made.new_tensors.items()]
    paths = list(leaves.paths.values()) if made.added else []
    leaves.paths = {
        names.get(name, name): renamed_path(path, names[name]) if name in names else path
        for name, path in leaves.paths.items()
    }
    values = {name.removeprefix(inside): value for name, value in made.added.items() if not isinstance(value, Tensor)}
    leaves.paths |= {name: new_path(name, paths) for name in (*(tensor.name for tensor in added), *values)}
    leaves.tensors = [
        replace(new.get(tensor.name, tensor), name=names.get(tensor.name, tensor.name)) for tensor in leaves.tensors
    ]
    leaves.tensors += added
    others = {name.removeprefix(inside): value for name, value in made.values.items()}
    leaves.values = [
        replace(value, name=names.get(value.name, value.name)) for value in leaves.values if value.name not in others
    ]
    plain = {**{names.get(name, name): value for name, value in others.items()}, **values}
    leaves.values += [SavedValue(name, node_of(value), b"") for name, value in plain.items()]


def _is_one_save(checkpoint: Checkpoint) -> bool:
    """True for one pickle whose tensors have their bytes outside; a stream may have several saves."""
    return format_of(checkpoint).is_torch_save and "[1]" not in checkpoint.top_level


def _planned(
    checkpoint: Checkpoint, leaves: Leaves, target: Target, output: str, options: ConvertOptions
) -> ConvertPlan:
    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.edits.convert_plan import not_kept_of, separated, why_not

    lost = [LeftOut(t.name, why) for t in leaves.tensors if (why := why_not(t, target, options.dtype))]
    if lost:
        raise RefusedError(
            f"{len(lost)} of its entries cannot be written to {target.what}",
            details=reason_lines([(item.name, item.why) for item in lost]),
            hint="--tensors-only leaves them out",
        )
    check_bytes(checkpoint, leaves.tensors, leaves.values)
    check_items(checkpoint, target, len(leaves.paths))
    casting = Casting(options.dtype, Losses(), options.executor)
    tensors, contents = pack_plain(checkpoint, leaves.tensors, casting, tied=False)
    new = NewCheckpoint(
        tensors,
        contents,
        values=leaves.values,
        paths=leaves.paths,
        mode_of=checkpoint.container.files[0].path,
        stem=stem_of(output),
    )
    kept = (*not_kept_of(checkpoint, leaves.tensors, target, options.select, kept=False), *leaves.not_kept)
    apart = tuple(separated(leaves.tensors, tied=False))
    job: Job = NewFiles(new, target)
    if not target.is_folder:
        from ckpt_cli.formats.torch_zip.write import nested

        job = nested(new, nest, open_checkpoint, target.object_writer().write_object)
    return ConvertPlan(job, len(tensors), casting.losses, contents, separated=apart, not_kept=kept)


def check_bytes(checkpoint: Checkpoint, tensors: Sequence[Tensor], values: Sequence[SavedValue]) -> None:
    """Raise LimitError for far more bytes to be written than there are, as many entries may be at one place."""
    from ckpt_cli.arrays.indexing import Region
    from ckpt_cli.budget import require_bounded

    for tensor in tensors:
        if tensor.storage is not None and tensor.shape is not None:
            require_bounded(tensor, Region.of(tensor))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    nbytes += sum(content.nbytes for value in values for content in value.contents.values())
    if nbytes > _most_bytes(checkpoint):
        raise LimitError(f"its entries come to {nbytes:,} bytes, far more than its files have: many are at one place")


def _most_bytes(checkpoint: Checkpoint) -> int:
    return limits.READ_TIMES * sum(file.size for file in checkpoint.container.files) + limits.READ_AGAIN


def leaves_of_dcp(checkpoint: Checkpoint, prefix: str) -> Leaves:
    """The entries of a distributed checkpoint below a prefix, where its planner noted them to be."""
    from ckpt_cli.formats.dcp.read import saved_values

    container = checkpoint.container
    noted: Mapping[str, object] = container.paths if isinstance(container, Composed) else {}
    leaves = Leaves()
    values = []
    for entry in checkpoint.entries:
        path = path_of(entry.name, noted.get(entry.name))
        if prefix:
            if not entry.name.startswith(f"{prefix}."):
                continue
            path = below(path, prefix) or (entry.name[len(prefix) + 1 :],)
        leaves.paths[entry.name] = path
        if isinstance(entry, Tensor):
            leaves.tensors.append(entry)
        else:
            values.append(entry)
    leaves.values = list(saved_values(values))
    return _renamed(leaves) if prefix else leaves


def _renamed(leaves: Leaves) -> Leaves:
    """Leaves of a part of a state, by the names that they have in it."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for old, path in leaves.paths.items():
        names[old] = dotted(path)
        if names[old] in taken:
            raise RefusedError(f"several entries are called {names[old]!r}, and only one can be in the new checkpoint")
        taken.add(names[old])
    return Leaves(
        {names[name]: path for name, path in leaves.paths.items()},
        [replace(tensor, name=names[tensor.name]) for tensor in leaves.tensors],
        [replace(value, name=names[value.name]) for value in leaves.values],
        leaves.not_kept,
    )


# --- leaves of a pickle ----------------------------------------------------------------------------------------------


def leaves_of_pickle(checkpoint: Checkpoint, graph: Graph, prefix: str) -> Leaves | None:
    """Return the leaves of the mapping at a prefix of a pickle, as torch flattens it; None if it is not a mapping."""
    root = node_at(graph.root, prefix, Containers(WalkBudget(graph.nbytes)))
    if not _is_mapping(root):
        return None
    return _Traversal(checkpoint, graph).leaves(root)


def whole_value(checkpoint: Checkpoint, graph: Graph, name: str) -> SavedValue:
    """Return all that a pickle has as one value, with the bytes of its storages."""
    return _Traversal(checkpoint, graph).value(name, graph.root)


_Pairs = Iterator[tuple["str | int", object]]


class _Traversal:
    """One walk over the containers of a pickle (torch/distributed/checkpoint/_traverse.py)."""

    def __init__(self, checkpoint: Checkpoint, graph: Graph) -> None:
        from ckpt_cli.formats.plain import KnownStorages
        from ckpt_cli.formats.torch_zip.write import unwrap_classes

        self._checkpoint = checkpoint
        self._data = graph.data
        self._budget = WalkBudget(graph.nbytes)
        self._finder: Any = KnownStorages(checkpoint.tensors)
        container = checkpoint.container
        if isinstance(container, ZipStorages):  # which has those too that only objects refer to
            self._finder = SavedPickle(container, container.records, prefix_of(container.records))
        self._left = _most_bytes(checkpoint)
        unwrap_classes(graph.root)
        self._rebuilder = Rebuilder(CALLS, graph, self._finder, self._budget)
        self._leaves = Leaves()
        self._empty: list[str] = []
        self._retyped = 0

    def leaves(self, root: object) -> Leaves:
        """Every tensor and value below a mapping, in order."""
        frames: list[tuple[Path, _Pairs, int]] = [((), self._children(root), id(root))]
        open_nodes = {id(root)}
        while frames:
            path, children, identity = frames[-1]
            for key, node in children:
                here = (*path, key)
                self._budget.steps(len(here))
                if not self._opens(node):
                    self._add(here, node)
                    continue
                if id(node) in open_nodes:
                    raise UnsupportedError(f"{dotted(here)!r} is a container that contains itself")
                if len(frames) >= limits.NESTING:
                    raise LimitError(f"its containers nest deeper than {limits.NESTING}", fixed=True)
                if _is_empty(node):
                    self._empty.append(dotted(here))
                    continue
                open_nodes.add(id(node))
                frames.append((here, self._children(node), id(node)))
                break
            else:
                frames.pop()
                open_nodes.discard(identity)
        leaves = self._leaves
        if self._empty:
            leaves.not_kept.append(f"empty dicts ({', '.join(self._empty[:3])}{', …' if len(self._empty) > 3 else ''})")
        if self._retyped:
            leaves.not_kept.append(f"the types of {self._retyped:,} keys, which become strings")
        return leaves

    def _opens(self, node: object) -> bool:
        """True for a mapping, and for a list that a mapping or a tensor is in."""
        return _is_mapping(node) or (type(node) is list and self._has_more(node))

    def _has_more(self, node: list[object]) -> bool:
        """True if a mapping or a tensor is in a list or the lists within it."""
        agenda: list[object] = [node]
        seen: set[int] = set()
        while agenda:
            current = agenda.pop()
            if type(current) is list:
                if id(current) in seen:
                    continue
                seen.add(id(current))
                self._budget.steps(len(current))
                agenda.extend(item for item in current if type(item) in (list, Dict, Call))
            elif current is not node and (_is_mapping(current) or self._tensor("", current) is not None):
                return True
        return False

    def _children(self, node: object) -> _Pairs:
        """Return the children of a container, by the keys that a distributed checkpoint gives them."""
        if type(node) is list:
            self._budget.steps(len(node))
            yield from enumerate(node)
            return
        pairs = node.pairs if isinstance(node, Dict | Call) else ()
        self._budget.steps(len(pairs))
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | RawString):
                self._retyped += 1
            yield key_text(key), value

    def _tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a node is; an array of numpy's, or a storage by itself, is a value to torch."""
        tensor = self._rebuilder.tensor(name, node) if isinstance(node, Call) else None
        return None if tensor is None or tensor.layout == "array" else tensor

    def _add(self, path: Path, node: object) -> None:
        """Take a leaf."""
        name = dotted(path)
        self._budget.name(name)
        if name in self._leaves.paths:
            raise RefusedError(f"several entries are called {name!r}, and only one can be in the new checkpoint")
        tensor = self._tensor(name, node)
        self._leaves.paths[name] = path
        if not len(self._leaves.paths) & 0xFFF:
            self._budget.check(len(self._leaves.paths))
        if tensor is not None:
            self._leaves.tensors.append(tensor)
        else:
            self._leaves.values.append(self.value(name, node))

    def value(self, name: str, node: object) -> SavedValue:
        """A leaf that is not a tensor, with the storages of tensors within it."""
        references = storage_references(node) if not isinstance(node, _SCALARS) else []
        if references and self._finder.big_endian:
            raise UnsupportedError(f"value {name!r} holds tensors that were saved big-endian")
        storages = {id(reference): self._rebuilder.storages.of(reference, bare=True)[0] for reference in references}
        contents = {
            storage: content_of(storage, files=self._checkpoint.container.files) for storage in storages.values()
        }
        self._left -= _ITEM_COST + sum(content.nbytes for content in contents.values())
        write_pickle(node, self._data, self._pay)
        return SavedValue(name, node, self._data, storages, contents)

    def _pay(self, piece: bytes | memoryview) -> None:
        """Pay for the bytes of a value, which many names may have in common."""
        self._left -= len(piece)
        if self._left < 0:
            raise LimitError("its values are far more than its file has: many names have one")


_ITEM_COST = 1500
"""Bytes of a torch.save file beside its pickle and its storages."""

_SCALARS = (str, int, float, bool, type(None))

_MAPPINGS = ("OrderedDict", "defaultdict", "Counter")
"""Classes of mappings, which have no pairs where they are empty."""


def _is_empty(node: object) -> bool:
    return isinstance(node, Dict | Call) and not node.pairs


def _is_mapping(node: object) -> bool:
    """True for a dict and for what is filled as one."""
    if isinstance(node, Call):
        return bool(node.pairs) or (isinstance(node.func, Global) and node.func.name in _MAPPINGS)
    return isinstance(node, Dict)
