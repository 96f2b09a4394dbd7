"""The words in which folders of rank files are refused: what is the matter, and what else can be done."""

from __future__ import annotations

from ckpt_cli.errors import UnsupportedError, quoted

FIXED = "its tensors are joined from the files of several ranks, so none can be edited"
"""The reason why a joined checkpoint cannot be edited."""


def as_files(path: str) -> str:
    """Return the hint that says how to look at the files themselves."""
    return f"ckpt ls --files {quoted(path)} lists the files as they are"


def tensor_parallel(problem_path: str, path: str) -> UnsupportedError:
    """Return the error for a model whose tensors are cut over ranks in ways that only its code knows."""
    return UnsupportedError(
        "tensor parallel: each rank has a part of some tensors, and no file says along which dimension they are cut",
        path=problem_path,
        hint=f"the model's own tools merge it (Megatron: tools/checkpoint/convert.py); {as_files(path)}",
    )
