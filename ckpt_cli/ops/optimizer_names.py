"""States of optimizers under the names of their parameters, so that those of several checkpoints can be compared."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.optimizer_pairing import KNOWN, pairings_of
from ckpt_cli.ops.optimizer_states import has_optimizer

_NUMBERED = re.compile(r"(?:^|\.)state\.\d")
"""In a NAME, the number of a parameter in an optimizer: what has it is meant as the file has it."""


class ByParameter:
    """Checkpoints in which equal names of states become those of equal parameters.

    Each of them is seen first. They stay as they are unless optimizers number their parameters otherwise, and it is
    known of all of them which these are. Then a state is called `optimizer.state.PARAMETER.exp_avg`, as
    torch.distributed does.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """For a comparison of what NAMEs select, all without one."""
        self._is_possible = not any(map(_NUMBERED.search, names))
        self._common: Collection[str] | None = None
        """The prefixes of the optimizers that all of them have."""
        self._differing: set[str] = set()
        self._new: dict[str, str] = {}
        self._old: dict[str, str] = {}

    def see(self, checkpoint: Checkpoint) -> None:
        """Look at one of the checkpoints."""
        if not self._is_possible:
            return
        found = _new_names(checkpoint) if has_optimizer(checkpoint) else {}
        common = found.keys() if self._common is None else [prefix for prefix in self._common if prefix in found]
        for prefix in common:
            for old, new in found[prefix].items():
                if self._new.setdefault(old, new) != new or self._old.setdefault(new, old) != old:
                    self._differing.add(prefix)
        self._common = list(common)
        self._is_possible = bool(self._common)

    def named(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return one of them with the names by which it is compared."""
        differing = self._differing.intersection(self._common or ()) if self._is_possible else ()
        if not differing:
            return checkpoint
        found = _new_names(checkpoint)
        names = {old: new for prefix in differing for old, new in found.get(prefix, {}).items()}
        return _renamed(checkpoint, names)


def _new_names(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return, for each optimizer whose parameters are known, the names of its states by those that they have."""
    found: dict[str, dict[str, str]] = {}
    for pairing in pairings_of(checkpoint):
        if pairing.how in KNOWN:
            found[pairing.optimizer.prefix] = {
                entry.name: pairing.optimizer.path("state", pairing.name_of(tensor), key)
                for slot, tensor in pairing.pairs
                if tensor is not None
                for key, entry in slot.states.items()
            }
    return found


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint with other names, unless two entries would have one."""
    entries = [replace(entry, name=names.get(entry.name, entry.name)) for entry in checkpoint.entries]
    if len({entry.name for entry in entries}) < len(checkpoint.names):
        return checkpoint
    return replace(checkpoint, entries=entries)
