"""The torch.nn modules of a graph: their classes, settings and children, read without the classes.

A module is pickled as an object whose state has `_parameters`, `_buffers` and `_modules` (torch/nn/modules/module.py);
TorchScript's is an object of a class below `__torch__` whose attributes are all of these at once.

A state_dict notes about modules what its `_metadata` has: an attribute of the OrderedDict, {prefix of a module:
{"version": number}}, by which a module's class knows what older versions of it saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.containers import Containers
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, callee, nodes_of
from ckpt_cli.pickles.tensors.arguments import text_of

_TABLES = {"_parameters", "_buffers", "_modules"}
"""The attributes that the state of a module always has."""

_SCRIPT = "__torch__."
"""The beginning of the names of TorchScript's classes."""

_MANGLED = re.compile(r"\.?___torch_mangle_\d+")
"""The part that torch/csrc/jit/frontend/name_mangler.cpp puts in where two classes have one name."""

_MAKERS = ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__", "copy_reg.__newobj__")
"""Functions whose first argument is the class of what they make."""

_STATES = 4
"""The number of an object's BUILDs that are looked at; picklers write one."""


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One module, as its pickle says."""

    qualified: str
    """The dotted name of its class, such as `torch.nn.modules.linear.Linear`."""
    scripted: bool
    """True if TorchScript wrote it: then few of its settings are there."""
    settings: Mapping[str, object]
    """Its attributes that are neither tensors nor modules: nodes by name."""
    registered: Mapping[str, object]
    """Its parameters and buffers: nodes by name, None for one that it could have and has not."""
    children: Mapping[str, object]
    """Its modules: nodes by name, None for one that it could have and has not."""

    @property
    def name(self) -> str:
        """The name of its class without the module that this is defined in."""
        return self.qualified.rpartition(".")[2]


def module_of(node: object, opener: Containers) -> Module | None:
    """The module that a node is, or None for anything else."""
    if type(node) is not Call:
        return None
    state = next(filter(None, map(opener.state, node.states[:_STATES])), None)
    if state is None:
        return None
    opener.budget.steps(len(state.pairs))
    kind = class_of(node)
    if kind is not None and kind.qualified.startswith(_SCRIPT):
        return _scripted(kind, state)
    named = _named(state)
    if not named.keys() >= _TABLES:
        return None
    tensors = {**_table(opener, named["_parameters"]), **_table(opener, named["_buffers"])}
    return Module(
        qualified="" if kind is None else kind.qualified,
        scripted=False,
        settings={name: value for name, value in named.items() if name not in _TABLES},
        registered=tensors,
        children=_table(opener, named["_modules"]),
    )


def class_of(node: Call) -> Global | None:
    """The class of an object; the legacy format refers to those of modules by persistent ids, their source beside."""
    func = node.func
    if isinstance(func, Global) and func.qualified in _MAKERS and isinstance(node.args, tuple) and node.args:
        func = node.args[0]
    func = callee(func)
    return func if isinstance(func, Global) else None


def _scripted(kind: Global, state: Dict) -> Module | None:
    """A module of TorchScript: its modules are the attributes that are objects of such classes themselves."""
    named = _named(state)
    if "training" not in named:  # a class of torch.jit.script that is no module
        return None
    children = {name: value for name, value in named.items() if _is_scripted(value)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Call) and name not in children}
    return Module(
        qualified=_MANGLED.sub("", kind.qualified.removeprefix(_SCRIPT)),
        scripted=True,
        settings={name: value for name, value in named.items() if name not in children},
        registered={**{name: None for name, value in named.items() if value is None}, **tensors},
        children=children,
    )


def _is_scripted(node: object) -> bool:
    kind = class_of(node) if isinstance(node, Call) else None
    return kind is not None and kind.qualified.startswith(_SCRIPT)


def _named(state: Dict) -> dict[str, object]:
    """The attributes of a state by their names; Python 2 wrote these as bytes."""
    pairs = zip(state.pairs[::2], state.pairs[1::2], strict=False)
    return {name: value for name, value in ((text_of(key), value) for key, value in pairs) if name is not None}


def _table(opener: Containers, node: object) -> dict[str, object]:
    """Return the nodes that a module has registered, by name."""
    return {key: value for key, value, _ in opener.children(node, "tensor") or ()}


# --- settings as text ------------------------------------------------------------------------------------------------

_CHARACTERS = 200
"""Characters of a setting that is text."""

_ITEMS = 64
"""Items of a setting that is a tuple or list."""


def setting_text(node: object, *, quoted: bool = False) -> str:
    """A setting as `str` would show it, or as `repr` where it is to be `quoted`."""
    text = text_of(node)
    if text is not None and not quoted:
        return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"
    if isinstance(node, Call) and isinstance(node.func, Global) and node.func.qualified == "torch.Size":
        items = node.args[0] if isinstance(node.args, tuple) and node.args else ()
        return f"torch.Size({setting_text(list(items))})" if isinstance(items, list | tuple) else describe(node)
    if type(node) in (list, tuple) and 1 < len(node) <= _ITEMS:  # type: ignore[arg-type]  # len of a list or tuple
        texts = ", ".join(map(describe, node))  # type: ignore[call-overload]  # likewise
        return f"[{texts}]" if isinstance(node, list) else f"({texts})"
    return describe(node)


def is_scalar(node: object) -> bool:
    """True if a setting is shown for a class that is not known: a number or text."""
    return isinstance(node, bool | int | float) or text_of(node) is not None


# --- `_metadata` of a state_dict -----------------------------------------------------------------------------------


def has_notes(root: object) -> bool:
    """True if any state_dict in a pickle has `_metadata`."""
    return any(pairs for node in nodes_of(root, within_rows=False) for pairs in notes_of(node))


def notes_of(holder: object) -> Iterable[list[object]]:
    """The pairs of a state_dict's `_metadata`."""
    for state in holder.states if isinstance(holder, Call) else ():
        if isinstance(state, Dict):
            for key, value in zip(state.pairs[::2], state.pairs[1::2], strict=True):
                pairs = value.pairs if isinstance(value, Call | Dict) else None
                if text_of(key) == "_metadata" and isinstance(pairs, list):
                    yield pairs


def tend_notes(
    pairs: list[object], prefix: str, rename: Callable[[str], str] | None, is_gone: Callable[[str], bool]
) -> None:
    """Rename the modules in some pairs, and drop those that are gone."""
    found: dict[str, tuple[object, object]] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        module = text_of(key)
        if module is None or is_gone(f"{prefix}{module}"):
            continue
        new = _module_name(module, prefix, rename)
        if new in found and new == module:
            continue  # another module took its place: a wrapper gives way to what it wraps
        found[new] = (key if new == module else new, value)
    pairs[:] = [item for pair in found.values() for item in pair]


def _module_name(module: str, prefix: str, rename: Callable[[str], str] | None) -> str:
    """Return the name of a module once the names in it are changed."""
    if rename is None or not module:
        return module
    dotted = rename(f"{prefix}{module}.")
    if not dotted.startswith(prefix) or not (dotted.endswith(".") or dotted == prefix):
        return module
    return dotted[len(prefix) :].removesuffix(".")
