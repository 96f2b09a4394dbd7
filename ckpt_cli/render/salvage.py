"""What is lost of a file that was cut short, as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli.errors import some_of
from ckpt_cli.render.json import LongList
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from ckpt_cli.formats.salvage.found import Lost, Salvaged

_MOST = 1000
"""Names that are spelled out."""


def lost_to_json(lost: Sequence[Lost]) -> LongList:
    """Return what is lost as docs/json.md describes it."""
    return LongList(lambda: ([{"name": item.name or None, "why": item.why}] for item in lost))


def lost_text(cut: Salvaged) -> str:
    """Return a line about a cut file, and one for each entry that is lost."""
    path, whole = escaped(cut.checkpoint.path), len(cut.checkpoint.tensors)
    lines = [f"{path}: {escaped(cut.problem)}"]
    if not cut.lost:
        lines.append(f"  all of its {count_text(whole, 'tensor')} are whole")
        return "\n".join(lines) + "\n"
    lines.append(f"  {count_text(whole, 'tensor')} whole")
    return "\n".join([*lines, *lost_lines(cut.lost)]) + "\n"


def lost_lines(lost: Sequence[Lost]) -> list[str]:
    """Return a line for each entry that is lost, after one with their number."""
    if not lost:
        return []
    lines = [f"{brief_name(item.name) if item.name else '…'}: {escaped(item.why)}" for item in lost]
    return [f"  lost ({len(lost)}):", *(f"    {line}" for line in some_of(lines, _MOST))]
