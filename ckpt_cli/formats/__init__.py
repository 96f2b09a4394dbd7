"""Containers: a folder a family, and the registry that tells them apart by content."""

from ckpt_cli.formats.registry import Rewriter, open_checkpoint, rewriting
from ckpt_cli.formats.verify import verify_copy

__all__ = ["Rewriter", "open_checkpoint", "rewriting", "verify_copy"]
