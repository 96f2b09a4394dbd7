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
    """Return checkpoints in which equal names of states are those of equal parameters.

    They are the same ones unless optimizers number their parameters otherwise, and it is known of all of them which
    these are. Then a state is called `optimizer.state.PARAMETER.exp_avg`, as torch.distributed does.
    """
    if len(checkpoints) < 2 or any(map(_NUMBERED.search, names)) or not all(map(has_optimizer, checkpoints)):
        return list(checkpoints)
    found = [_new_names(checkpoint) for checkpoint in checkpoints]
    common = [prefix for prefix in found[0] if all(prefix in each for each in found)]
    differing = [prefix for prefix in common if not _agree([each[prefix] for each in found])]
    if not differing:
        return list(checkpoints)
    renamings = [{old: new for prefix in differing for old, new in each[prefix].items()} for each in found]
    return [_renamed(*pair) for pair in zip(checkpoints, renamings, strict=True)]


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


def _agree(files: Sequence[Mapping[str, str]]) -> bool:
    """True if no state of one file has a name that another file has for the state of another parameter."""
    known: dict[str, str] = {}
    own: dict[str, str] = {}
    for names in files:
        for old, new in names.items():
            if known.setdefault(old, new) != new or own.setdefault(new, old) != old:
                return False
    return True


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint with other names, unless two entries would have one."""
    entries = [replace(entry, name=names.get(entry.name, entry.name)) for entry in checkpoint.entries]
    if len({entry.name for entry in entries}) < len(checkpoint.names):
        return checkpoint
    return replace(checkpoint, entries=entries)
