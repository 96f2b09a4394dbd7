"""The warning that a checkpoint, which was opened without running it, names something dangerous."""

from __future__ import annotations

from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.pickles.graph import Global, Graph
from ckpt_cli.scanner.judge import dangerous


def dangerous_of(checkpoint: Checkpoint) -> str | None:
    """Return the first dangerous name in the pickles that were read, or None."""
    document = checkpoint.document
    if isinstance(document, Graph):
        names = list(document.globals)
    else:
        names = [Global(*name.rpartition(".")[::2]) for name in checkpoint.objects]
    node = next(dangerous(names), None)
    return None if node is None else node.qualified
