"""The reports of `delta` as text and JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.avg import further_lines
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from ckpt_cli.edits.delta import Delta
    from ckpt_cli.edits.delta_apply import Applied

_NAMED = 5
"""Names of a list that are spelled out."""


def to_json(done: Delta) -> dict[str, object]:
    """Return the report of `delta create` as docs/json.md describes it."""
    return {
        "output": done.output,
        "base": done.base,
        "tuned": done.tuned,
        "equal": done.equal,
        "changed": dict(done.changed),
        "removed": list(done.removed),
        "left_out": list(done.left_out),
        "bytes_written": done.bytes_written,
        "dry_run": done.dry_run,
    }


def delta_text(done: Delta) -> str:
    """Return a line for the output, and one for each fact that is not plain from it."""
    would = "would be " if done.dry_run else ""
    counts = Counter(done.changed.values())
    kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in sorted(counts))
    what = count_text(len(done.changed), "changed tensor") + (f" ({kinds})" if kinds else "")
    nbytes = count_text(done.bytes_written, "byte")
    lines = [f"{what} {would}in {escaped(done.output)}, {nbytes}; {done.equal:,} are the same"]
    if done.removed:
        lines.append(f"  removed: {listed(done.removed, _NAMED, brief_name)}")
    if done.left_out:
        lines.append(f"  not plain, so left out: {listed(done.left_out, _NAMED, brief_name)}")
    return "\n".join(lines) + "\n"


def applied_json(done: Applied) -> dict[str, object]:
    """Return the report of `delta apply` as docs/json.md describes it."""
    return {
        "output": done.derived.output,
        "base": done.base,
        "delta": done.delta,
        "changed": list(done.changed),
        "removed": list(done.removed),
        "bytes_written": done.derived.bytes_written,
        "dry_run": done.derived.dry_run,
    }


def applied_text(done: Applied) -> str:
    """Return a line for the output, and one for each fact that is not plain from the command line."""
    new = done.derived
    would = "would be changed" if new.dry_run else "changed"
    what = count_text(len(done.changed), "tensor")
    nbytes = count_text(new.bytes_written, "byte")
    lines = [f"{what} of {escaped(done.base)} {would} in {escaped(new.output)}, {nbytes}"]
    if done.removed:
        lines.append(f"  removed: {listed(done.removed, _NAMED, brief_name)}")
    lines += further_lines(new, (), new.notes)
    return "\n".join(lines) + "\n"
