"""Containers: a folder a family, and the registry that tells them apart by content."""

from ckpt_cli.formats.open import open_checkpoint
from ckpt_cli.formats.registry import Rewriter, rewriting
from ckpt_cli.formats.verify import verify_copy

__all__ = ["Rewriter", "open_checkpoint", "rewriting", "verify_copy"]
