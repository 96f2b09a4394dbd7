"""The report of an average as text and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.edits import beside_lines
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt_cli.edits.avg import Average
    from ckpt_cli.edits.derive import Derived

_NAMED = 5
"""Names of a list that are spelled out."""


def to_json(done: Average) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    return {
        "output": done.derived.output,
        "inputs": [{"path": path, "weight": weight} for path, weight in done.inputs],
        "averaged": done.averaged,
        "copied": list(done.copied),
        "from": done.source,
        "warnings": list(done.warnings),
        "bytes_written": done.derived.bytes_written,
        "dry_run": done.derived.dry_run,
    }


def avg_text(done: Average) -> str:
    """Return a line for the output, and one for each fact that is not plain from the command line."""
    new = done.derived
    would = "would be averaged" if new.dry_run else "averaged"
    what, of = count_text(done.averaged, "tensor"), count_text(len(done.inputs), "checkpoint")
    nbytes = count_text(new.bytes_written, "byte")
    lines = [f"{what} of {of} {would} into {escaped(new.output)}, {nbytes}; the rest is that of {escaped(done.source)}"]
    lines += further_lines(new, done.copied, done.warnings)
    return "\n".join(lines) + "\n"


def further_lines(new: Derived, copied: Sequence[str], warnings: Sequence[str]) -> list[str]:
    """Return the lines on what was copied or left out, and those on the files beside a new folder."""
    lines = []
    if copied:
        lines.append(f"  copied: {listed(copied, _NAMED, brief_name)}")
    if new.left_out:
        lines.append(f"  left out: {listed([item.name for item in new.left_out], _NAMED, brief_name)}")
    lines += [f"  {escaped(warning)}" for warning in warnings]
    return [*lines, *beside_lines(new.beside, dry_run=new.dry_run)]
