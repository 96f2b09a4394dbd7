"""What a state_dict notes about modules beside its tensors: its `_metadata` (torch/nn/modules/module.py).

It is an attribute of the OrderedDict: {prefix of a module: {"version": number}}, by which a module's class tells what
older versions of it saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ckpt_cli.pickles.graph import Call, Dict, nodes_of
from ckpt_cli.pickles.tensors.arguments import text_of


def has_notes(root: object) -> bool:
    """Whether any state_dict in a pickle has them."""
    return any(pairs for node in nodes_of(root) for pairs in notes_of(node))


def notes_of(holder: object) -> Iterable[list[object]]:
    """The pairs of a state_dict's `_metadata`."""
    for state in holder.states if isinstance(holder, Call) else ():
        if isinstance(state, Dict):
            for key, value in zip(state.pairs[::2], state.pairs[1::2], strict=True):
                pairs = value.pairs if isinstance(value, Call | Dict) else None
                if text_of(key) == "_metadata" and isinstance(pairs, list):
                    yield pairs


def tend_notes(pairs: list[object], prefix: str, rename: Callable[[str], str] | None, gone: set[str]) -> None:
    """Rename the modules in some pairs, and drop those that are gone."""
    found: dict[str, tuple[object, object]] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        module = text_of(key)
        if module is None or f"{prefix}{module}" in gone:
            continue
        new = _module_name(module, prefix, rename)
        if new in found and new == module:
            continue  # another module took its place: a wrapper gives way to what it wraps
        found[new] = (key if new == module else new, value)
    pairs[:] = [item for pair in found.values() for item in pair]


def _module_name(module: str, prefix: str, rename: Callable[[str], str] | None) -> str:
    """What a module is called once the names in it are changed."""
    if rename is None or not module:
        return module
    dotted = rename(f"{prefix}{module}.")
    if not dotted.startswith(prefix) or not (dotted.endswith(".") or dotted == prefix):
        return module
    return dotted[len(prefix) :].removesuffix(".")


def modules_of(name: str) -> Iterable[str]:
    """Every prefix of a name: the modules that it lies in."""
    end = name.rfind(".")
    while end > 0:
        yield name[:end]
        end = name.rfind(".", 0, end)
