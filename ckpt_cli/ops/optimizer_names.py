"""States of optimizers under the names of their parameters, so that those of several checkpoints can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.optimizer_pairing import KNOWN, pairings_of
from ckpt_cli.ops.optimizer_states import has_optimizer

_NUMBERED = re.compile(r"(?:^|\.)state\.\d")
"""In a NAME, the number of a parameter in an optimizer: what has it is meant as the file has it."""


def by_parameter(checkpoints: Sequence[Checkpoint], names: Sequence[str] = ()) -> list[Checkpoint]:
    """Return checkpoints in which equal names of states are those of equal parameters, as `StateNames` has them."""
    known = StateNames(names)
    for checkpoint in checkpoints:
        known.look(checkpoint)
    return [known.of(checkpoint) for checkpoint in checkpoints]


class StateNames:
    """The names of the states of some checkpoints, which are looked at one after the other.

    They stay as they are unless optimizers number their parameters otherwise, and it is known of all checkpoints which
    these are. Then a state is called `optimizer.state.PARAMETER.exp_avg`, as torch.distributed does.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """`names` are those that were asked for."""
        self._is_known = not any(map(_NUMBERED.search, names))
        """True as long as all checkpoints have optimizers."""
        self._common: set[str] | None = None
        """The prefixes of optimizers whose parameters are known in all checkpoints; None before the first."""
        self._differing: set[str] = set()
        self._new: dict[tuple[str, str], str] = {}
        self._old: dict[tuple[str, str], str] = {}

    def look(self, checkpoint: Checkpoint) -> None:
        """Note the names of a checkpoint."""
        self._is_known = self._is_known and has_optimizer(checkpoint)
        if not self._is_known:
            return
        found = _new_names(checkpoint)
        self._common = {*found} if self._common is None else self._common & {*found}
        for prefix in self._common:
            for old, new in found[prefix].items():
                if self._new.setdefault((prefix, old), new) != new or self._old.setdefault((prefix, new), old) != old:
                    self._differing.add(prefix)

    @property
    def differing(self) -> set[str]:
        """The prefixes of the optimizers whose states get other names, once all checkpoints were looked at."""
        return (self._common or set()) & self._differing if self._is_known else set()

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint in which equal names of states are those of equal parameters, once all were looked at."""
        differing = self.differing
        if not differing:
            return checkpoint
        found = _new_names(checkpoint)
        return _renamed(checkpoint, {old: new for prefix in differing for old, new in found.get(prefix, {}).items()})


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
