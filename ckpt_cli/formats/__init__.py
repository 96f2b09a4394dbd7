"""Containers: a folder a family, and the registry that tells them apart by content."""

from typing import Any

from ckpt_cli.formats import registry
from ckpt_cli.formats.open import open_checkpoint
from ckpt_cli.formats.registry import Rewriter
from ckpt_cli.formats.verify import verify_copy
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint

__all__ = ["Rewriter", "open_checkpoint", "rewriting", "verify_copy"]


def rewriting(checkpoint: Checkpoint, changes: Changes) -> Any:
    """The work of writing a checkpoint again in its own format: a `Rewriter`, or of a set one of several files.

    Raises UnsupportedError where that cannot be done.
    """
    return registry.rewriting(checkpoint, changes, open_checkpoint)
