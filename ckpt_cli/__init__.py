"""Look into and edit PyTorch checkpoints without loading or running them.

import ckpt_cli

with ckpt_cli.open("model.pt") as checkpoint:
    for name, entry in checkpoint.items(): ...
    checkpoint["0.weight"].numpy()

state_dict = ckpt_cli.load("model.safetensors")  # torch tensors, ties kept, memory-mapped
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_cli.api.checkpoint import Checkpoint, View, load, open  # noqa: A004
    from ckpt_cli.api.combine import avg, delta_apply, delta_create, graft, merge, mix
    from ckpt_cli.api.edits import (
        apply,
        cast,
        compact,
        index,
        keep,
        meta,
        rename,
        resize,
        rm,
        set,  # noqa: A004
        tie,
        to,
        undo,
        untie,
    )
    from ckpt_cli.api.lora import lora_extract, lora_info, lora_merge, lora_resize
    from ckpt_cli.api.new_checkpoints import convert, dequantize
    from ckpt_cli.api.questions import check, diff, hash, match, scan, series  # noqa: A004
    from ckpt_cli.api.tensor import Tensor
    from ckpt_cli.errors import CkptError

__version__ = "0.1.0"
__all__ = [
    "Checkpoint", "CkptError", "Tensor", "View", "apply", "avg", "cast", "check", "compact", "convert", "delta_apply",
    "delta_create", "dequantize", "diff", "graft", "hash", "index", "keep", "load", "lora_extract", "lora_info",
    "lora_merge", "lora_resize", "match", "merge", "meta", "mix", "open", "rename", "resize", "rm", "scan", "series",
    "set", "tie", "to", "undo", "untie",
]  # fmt: skip

_MODULES = {
    "ckpt_cli.errors": ("CkptError",),
    "ckpt_cli.api.checkpoint": ("Checkpoint", "View", "load", "open"),
    "ckpt_cli.api.tensor": ("Tensor",),
    "ckpt_cli.api.edits": (
        "apply",
        "cast",
        "compact",
        "index",
        "keep",
        "meta",
        "rename",
        "resize",
        "rm",
        "set",
        "tie",
        "to",
        "undo",
        "untie",
    ),
    "ckpt_cli.api.lora": ("lora_extract", "lora_info", "lora_merge", "lora_resize"),
    "ckpt_cli.api.combine": ("avg", "delta_apply", "delta_create", "graft", "merge", "mix"),
    "ckpt_cli.api.new_checkpoints": ("convert", "dequantize"),
    "ckpt_cli.api.questions": ("check", "diff", "hash", "match", "scan", "series"),
}
"""The module that each public name is imported from."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line starts without them."""
    for module, names in _MODULES.items():
        if name in names:
            import importlib

            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not: what Tab offers in a notebook."""
    return sorted({*globals(), *__all__})
