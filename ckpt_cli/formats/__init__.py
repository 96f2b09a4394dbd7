"""Containers: a folder a family, and the registry that identifies them by content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.formats import registry
from ckpt_cli.formats.open import open_checkpoint, open_salvaged

if TYPE_CHECKING:
    from ckpt_cli.model.changes import Changes
    from ckpt_cli.model.checkpoint import Checkpoint

__all__ = ["open_checkpoint", "open_salvaged", "rewriting", "verify_copy"]


def rewriting(checkpoint: Checkpoint, changes: Changes) -> Any:
    """The work of writing a checkpoint again in its own format: a `Rewriter`, or of a set one of several files.

    Raises UnsupportedError where that cannot be done.
    """
    return registry.rewriting(checkpoint, changes, open_checkpoint)


def verify_copy(original: Checkpoint, path: str, output: str) -> None:
    """Open a patched copy again before it becomes `output`; raises CkptError where it is not what was meant."""
    from ckpt_cli.formats.writing import verify_copy as verify

    verify(original, path, output, open_checkpoint)
