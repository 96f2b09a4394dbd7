"""The report of a conversion as text and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.edits.convert_options import NOT_STATE, NOT_WEIGHTS
from ckpt_cli.edits.folded import reason_lines
from ckpt_cli.errors import listed
from ckpt_cli.render.edits import beside_lines
from ckpt_cli.render.salvage import lost_lines, lost_to_json
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt_cli.edits.convert_options import Conversion, LeftOut

_MOST = 20
"""Names that are spelled out."""

_NAMED = 3
"""Names of attributes that are spelled out on one line."""


def to_json(done: Conversion) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    report = asdict(done)
    if done.is_cut:
        report["lost"] = lost_to_json(done.lost)
    else:
        del report["problem"], report["lost"]
    return report


def conversion_text(done: Conversion) -> str:
    """Return a line for the output, a line for each entry that was left out, and one for names that were separated."""
    would = "would be written" if done.dry_run else "written"
    files = f", {count_text(len(done.files), 'file')}" if done.files else ""
    tensors, nbytes = count_text(done.tensors, "tensor"), count_text(done.bytes_written, "byte")
    lines = [f"{escaped(done.path)}: {tensors} {would} to {escaped(done.output)} as {done.what}, {nbytes}{files}"]
    attributes = [item for item in done.left_out if item.why == NOT_STATE]
    behind = [item for item in done.left_out if item.why == NOT_WEIGHTS]
    lost = [item for item in done.left_out if item.why not in (NOT_STATE, NOT_WEIGHTS)]
    if lost:
        lines.append(f"  left out ({len(lost)}):")
        lines += [f"    {line}" for line in reason_lines([(brief_name(item.name), item.why) for item in lost])]
    if attributes:
        what = count_text(len(attributes), "attribute")
        lines.append(f"  {what} of modules left out, which a state_dict does not have{_tensors_of(attributes)}")
    if behind:
        what = "1 entry" if len(behind) == 1 else f"{len(behind):,} entries"
        lines.append(f"  {what} of the run left out, which --all takes{_tensors_of(behind)}")
    lines += _plain_lines(done)
    if done.left:
        lines.append(f"  left as they are: {listed(done.left, _MOST, brief_name)}")
    if done.not_kept:
        lines.append(f"  not kept: {', '.join(map(escaped, done.not_kept))}")
    if done.added:
        lines.append(f"  added: {', '.join(map(escaped, done.added))}")
    if done.separated:
        lines.append(f"  {listed(done.separated, _MOST, brief_name)}: shared bytes, each has its own now")
    if done.is_cut:
        lines += [f"  the source was cut: {escaped(done.problem)}", *lost_lines(done.lost)]
    lines += beside_lines(done.beside, dry_run=done.dry_run)
    return "\n".join(lines) + "\n"


def _tensors_of(items: Sequence[LeftOut]) -> str:
    """Return the number and the first names of the tensors among what was left out, in parentheses."""
    kept = [item.name for item in items if item.is_tensor]
    named = ", ".join(map(brief_name, kept[:_NAMED])) + (", …" if len(kept) > _NAMED else "")
    return f" ({count_text(len(kept), 'tensor')}: {named})" if kept else ""


def _plain_lines(done: Conversion) -> list[str]:
    """Return a line for each of the first values that became plain."""
    if not done.plain:
        return []
    shown = [f"    {brief_name(each.name) or '(all)'}: {escaped(each.was)} → {each.now}" for each in done.plain[:_MOST]]
    more = [f"    and {len(done.plain) - _MOST} more"] if len(done.plain) > _MOST else []
    return [f"  made plain ({len(done.plain)}):", *shown, *more]
