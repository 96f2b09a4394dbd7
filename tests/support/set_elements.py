"""`ckpt set` as a function of the library, and states of tensors compared bit for bit."""

from __future__ import annotations

from pathlib import Path

from contract import State, bits

from ckpt_cli.edits.patching import Edit, edit_values
from ckpt_cli.edits.set_tensors import Changes, assign
from ckpt_cli.files.patches import Overlay
from ckpt_cli.model.checkpoint import Checkpoint


def edit(path: Path, *assignments: str, output: Path | None = None, backup: bool = False) -> Edit:
    """What `ckpt set` does."""

    def plan(checkpoint: Checkpoint, overlay: Overlay) -> Changes:
        return assign(checkpoint, overlay, assignments)

    return edit_values(str(path), plan, output=None if output is None else str(output), backup=backup)


def same_states(a: State, b: State) -> bool:
    """Whether two states are equal name by name, NaN and sign of zero included."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]) == bits(b[name])
        for name in a
    )
