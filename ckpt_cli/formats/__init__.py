"""Containers: one file each, and the registry that tells them apart by content."""

from ckpt_cli.formats.registry import open_checkpoint

__all__ = ["open_checkpoint"]
