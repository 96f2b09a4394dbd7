"""The table of all functions that rebuild tensors, from which a `Rebuilder` is made."""

from __future__ import annotations

from ckpt_cli.dtypes import BY_STORAGE
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.tensors.layouts import LAYOUTS
from ckpt_cli.pickles.tensors.rebuild import Calls
from ckpt_cli.pickles.tensors.strided import STRIDED
from ckpt_cli.pickles.tensors.subclasses import SUBCLASSES

CALLS: Calls = {**STRIDED, **LAYOUTS, **SUBCLASSES}
"""Each function by the module and name of what a pickle calls."""

_BESIDES = frozenset({("collections", "OrderedDict"), ("torch", "UntypedStorage"), ("torch.storage", "UntypedStorage")})


def has_tensors_alone(graph: Graph) -> bool:
    """True if a pickle names only what makes tensors, storages and state_dicts, none of which runs anything."""
    return all(
        (name.module, name.name) in CALLS
        or (name.module, name.name) in _BESIDES
        or (name.module == "torch" and name.name.removesuffix("Storage") in BY_STORAGE)
        for name in graph.globals
    )
