"""Text about the files beside a model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.text import count_text, escaped, name_text

if TYPE_CHECKING:
    from ckpt_cli.edits.files_beside import Beside

_MOST = 5
"""Names that are spelled out."""


def beside_lines(beside: Beside | None, *, dry_run: bool) -> list[str]:
    """Return a line for the files that were copied, for those that were not, and for a config that is wrong now."""
    if beside is None:
        return []
    lines = []
    if beside.copied:
        copied = "would be copied" if dry_run else "copied"
        names = [name_text(name) for name in beside.copied]
        lines.append(f"  {count_text(len(names), 'other file')} {copied}: {listed(names, _MOST)}")
    if beside.left:
        left = [f"{name_text(item.name)} ({item.why})" for item in beside.left]
        lines.append(f"  not copied: {listed(left, _MOST)}")
    if beside.stale:
        lines.append(f"  {escaped(beside.stale)}")
    return lines
