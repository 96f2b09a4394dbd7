"""The report of a merge as text and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.edits import beside_lines
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from ckpt_cli.edits.merge import Merged

_NAMED = 5
"""Names of a list that are spelled out."""


def to_json(done: Merged) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    return {
        "output": done.derived.output,
        "inputs": [{"path": path, "tensors": count} for path, count in done.inputs],
        "equal": list(done.equal),
        "preferred": [{"name": name, "path": path} for name, path in done.preferred],
        "skipped": [{"name": name, "path": path} for name, path in done.skipped],
        "bytes_written": done.derived.bytes_written,
        "dry_run": done.derived.dry_run,
    }


def merge_text(done: Merged) -> str:
    """Return a line for the output, one for each checkpoint, and one for each fact that is not plain from these."""
    new = done.derived
    would = "would be merged" if new.dry_run else "merged"
    total = count_text(sum(count for _, count in done.inputs), "tensor")
    lines = [f"{total} {would} into {escaped(new.output)}, {count_text(new.bytes_written, 'byte')}"]
    lines += [f"  {count_text(count, 'tensor')} of {escaped(path)}" for path, count in done.inputs]
    if done.equal:
        lines.append(f"  the same in several: {listed(done.equal, _NAMED, brief_name)}")
    if done.preferred:
        names = [f"{brief_name(name)} of {escaped(path)}" for name, path in done.preferred]
        lines.append(f"  different, taken: {listed(names, _NAMED, str)}")
    if done.skipped:
        names = [f"{brief_name(name)} of {escaped(path)}" for name, path in done.skipped]
        lines.append(f"  left out: {listed(names, _NAMED, str)}")
    if new.left_out:
        lines.append(f"  left out: {listed([item.name for item in new.left_out], _NAMED, brief_name)}")
    lines += [f"  {escaped(note)}" for note in new.notes]
    lines += beside_lines(new.beside, dry_run=new.dry_run)
    return "\n".join(lines) + "\n"
