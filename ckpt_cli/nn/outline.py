"""The bare tree of a checkpoint: which module or container lies within which, without descriptions.

It is grown from a pickle's graph where there is one, and from dotted names where there are only these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import LimitError
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, Value
from ckpt_cli.pickles.containers import Containers
from ckpt_cli.pickles.graph import Call, Dict, Graph
from ckpt_cli.pickles.nn_module import Module, class_of, module_of

MODULE, STATE, HOLDER, NOTHING, AGAIN = "module", "state", "holder", "nothing", "again"
"""The kinds of a draft: a pickled module, a part of a state_dict, another container, a None in a module's place, a
module within itself."""

_OPTIMIZERS = ("optimizer", "optim", "optimizers", "optimizer_state_dict", "optimizer_states")
"""Names of the containers of an optimizer's state, where only names identify them."""

_Children = Iterator[tuple[str, object]]


class Draft:
    """One node of the tree while it grows."""

    __slots__ = (
        "children",
        "depth",
        "identity",
        "key",
        "kind",
        "label",
        "module",
        "parent",
        "path",
        "plain",
        "tensors",
    )

    def __init__(self, kind: str, key: str, path: str, parent: Draft | None) -> None:
        self.kind = kind
        self.key = key
        """Its name within its parent."""
        self.path = path
        """Its dotted name within the checkpoint."""
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.label = ""
        """The class of what holds others without being a module: `dict`, `list`, …"""
        self.module: Module | None = None
        self.identity: object = None
        """The pickle's node; two drafts of one node are one module."""
        self.plain = False
        """True if its tensors do not belong to layers, like those of an optimizer."""
        self.tensors: dict[str, Tensor] = {}
        """Its own tensors by their names within it."""
        self.children: dict[str, Draft] = {}


def grow(checkpoint: Checkpoint) -> Draft:
    """The tree of a checkpoint.

    Raises LimitError where it is deeper or has more nodes than any network.
    """
    graph = checkpoint.document
    grower = _Grower(
        checkpoint.tensors, WalkBudget(graph.nbytes if isinstance(graph, Graph) else 50 * len(checkpoint.tensors))
    )
    if isinstance(graph, Graph):
        return grower.from_graph(graph)
    root = grower.draft(STATE, "", None)
    values = any(isinstance(entry, Value) for entry in checkpoint.entries)
    return grower.from_names(root, holds_values=values, weights=checkpoint.weights)


class _Grower:
    """One tree in the making."""

    def __init__(self, tensors: list[Tensor], budget: WalkBudget) -> None:
        self._tensors: Mapping[str, Tensor] = {tensor.name: tensor for tensor in reversed(tensors)}
        self._ordered = tensors
        self._budget = budget
        self._opener = Containers(budget)
        self._holders: list[Draft] = []
        self._modules: dict[int, Module | None] = {}
        """The result for each node, so that a shared one is read once."""
        self.drafts = 0

    def draft(self, kind: str, key: str, parent: Draft | None, path: str | None = None) -> Draft:
        """A new node, paid for."""
        self.drafts += 1
        if self.drafts > limits.TREE_NODES:
            raise LimitError(f"its tree has more than {limits.TREE_NODES} modules")
        if path is None:
            path = _joined(parent.path if parent else "", key)
        self._budget.name(path)
        draft = Draft(kind, key, path, parent)
        if draft.depth > limits.NESTING:
            raise LimitError(f"its modules nest deeper than {limits.NESTING}", fixed=True)
        return draft

    # --- from names --------------------------------------------------------------------------------------------------

    def from_names(self, root: Draft, *, holds_values: bool, weights: str = "") -> Draft:
        """The tree that dotted names make; only those below `weights` are of modules, where that is not empty."""
        root.tensors = {tensor.name: tensor for tensor in reversed(self._ordered)}
        root.tensors = {tensor.name: root.tensors[tensor.name] for tensor in self._ordered}
        self._split(root)
        for key, child in root.children.items():
            if key in _OPTIMIZERS or weights not in ("", key):
                child.plain, child.kind, child.label = True, HOLDER, "dict"
        if (
            root.children
            and not root.tensors
            and (holds_values or any(child.plain for child in root.children.values()))
        ):
            root.kind, root.label = HOLDER, "dict"
        return root

    def _split(self, root: Draft) -> None:
        """Make modules of the dotted names of a state_dict's tensors, and of those of what else it holds."""
        tensors, others = root.tensors, root.children
        root.tensors, root.children, root.kind = {}, {}, STATE
        for name, tensor in tensors.items():
            *parts, role = name.split(".")
            self._descend(root, parts).tensors[role] = tensor
        for name, child in others.items():
            *parts, key = name.split(".")
            parent = self._descend(root, parts)
            self._adopt(parent, key if key not in parent.children else name, child)

    def _descend(self, draft: Draft, parts: list[str]) -> Draft:
        self._budget.steps(len(parts))
        for part in parts:
            child = draft.children.get(part)
            if child is None:
                child = draft.children[part] = self.draft(STATE, part, draft)
            draft = child
        return draft

    def _adopt(self, parent: Draft, key: str, child: Draft) -> None:
        child.key, child.parent = key, parent
        parent.children[key] = child

    # --- from a graph ------------------------------------------------------------------------------------------------

    def from_graph(self, graph: Graph) -> Draft:
        """The tree that a pickle's containers and modules make."""
        root, children = self._open("", graph.root, None)
        if "" in self._tensors:  # the whole pickle is one tensor
            root.kind, root.tensors[""] = STATE, self._tensors[""]
        frames = [(root, children)]
        open_nodes = {id(graph.root)}
        while frames:
            draft, children = frames[-1]
            for key, node in children:
                below = self._met(draft, key, node, open_nodes)
                if below is not None:
                    open_nodes.add(id(node))
                    frames.append(below)
                    break
            else:
                frames.pop()
                open_nodes.discard(id(draft.identity))
        for holder in self._holders:  # parents first
            inherited = holder.parent is not None and holder.parent.plain
            holder.plain = inherited or holder.children.keys() >= {"state", "param_groups"}
        for holder in reversed(self._holders):  # what lies within a state_dict before that itself
            _prune(holder)
            if holder.kind == HOLDER and _is_state_dict(holder):
                self._split(holder)
        _redeepen(root)
        return root

    def _met(self, draft: Draft, key: str, node: object, open_nodes: set[int]) -> tuple[Draft, _Children] | None:
        """Take in one child; what there is to look at below it."""
        if draft.kind == MODULE and node is None:
            draft.children[key] = self.draft(NOTHING, key, draft)
            return None
        if isinstance(node, Call):
            tensor = self._tensors.get(_joined(draft.path, key))
            if tensor is not None and draft.kind != MODULE:
                draft.tensors[key] = tensor
                return None
        elif not isinstance(node, Dict | list | tuple):
            return None
        if id(node) in open_nodes:
            if draft.kind == MODULE:
                draft.children[key] = self.draft(AGAIN, key, draft)
            return None
        child, below = self._open(key, node, draft)
        draft.children[key] = child
        return child, below

    def _open(self, key: str, node: object, parent: Draft | None) -> tuple[Draft, _Children]:
        """The draft of a node and what lies below it."""
        if id(node) not in self._modules:
            self._modules[id(node)] = module_of(node, self._opener)
        module = self._modules[id(node)]
        draft = self.draft(HOLDER if module is None else MODULE, key, parent)
        draft.identity = node
        if module is None:
            draft.label = _label(node)
            self._holders.append(draft)
            return draft, ((below, child) for below, child, _ in self._opener.children(node, "tensor") or ())
        draft.module = module
        self._budget.steps(len(module.registered))
        for name in module.registered:
            tensor = self._tensors.get(_joined(draft.path, name))
            if tensor is not None:
                draft.tensors[name] = tensor
        return draft, iter(module.children.items())


def _joined(prefix: str, key: str) -> str:
    """A dotted name, made as the entries' names are."""
    return f"{prefix}.{key}" if prefix and key else prefix or key


def _label(node: object) -> str:
    if isinstance(node, list | tuple):
        return type(node).__name__
    if isinstance(node, Call):
        kind = class_of(node)
        if kind is not None and not kind.qualified.endswith("Dict") and not node.pairs:
            return kind.name.rpartition(".")[2]
    return "dict"


def _is_state_dict(holder: Draft) -> bool:
    """True if a mapping names the tensors of modules: not if it has tensors beside other mappings of tensors."""
    if holder.label != "dict" or not holder.tensors or holder.plain:
        return False
    others = any(child.kind in (MODULE, STATE) or child.label == "dict" for child in holder.children.values())
    return not others or any("." in name for name in holder.tensors)


def _prune(draft: Draft) -> None:
    """Cut off the containers in which there are neither tensors nor modules."""
    draft.children = {
        key: child for key, child in draft.children.items() if child.kind != HOLDER or child.children or child.tensors
    }


def _redeepen(root: Draft) -> None:
    """Set depths right after the splitting of names; raises LimitError where they pass the limit now."""
    stack = [root]
    while stack:
        draft = stack.pop()
        for child in draft.children.values():
            child.depth = draft.depth + 1
            if child.depth > limits.NESTING:
                raise LimitError(f"its modules nest deeper than {limits.NESTING}", fixed=True)
            stack.append(child)
