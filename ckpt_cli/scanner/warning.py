"""The warning that a checkpoint that was opened, and so not run, names something that should not be run."""

from __future__ import annotations

from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.pickles.graph import Global, Graph
from ckpt_cli.scanner.judge import dangerous


def dangerous_of(checkpoint: Checkpoint) -> str | None:
    """The first name known to be dangerous in the pickles that were read; None where there is no such name."""
    document = checkpoint.document
    if isinstance(document, Graph):
        names = list(document.globals)
    else:
        names = [Global(*name.rpartition(".")[::2]) for name in checkpoint.objects]
    node = next(dangerous(names), None)
    return None if node is None else node.qualified
