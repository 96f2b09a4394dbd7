"""What edits say of themselves, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.render.text import count_text, escaped, name_text

if TYPE_CHECKING:
    from ckpt_cli.ops.edit import Edit

_MOST = 20
"""Names that are spelled out."""


def edit_text(edit: Edit) -> str:
    """One line for what was changed, one for what changed along, one for what was written."""
    verb = "would set" if edit.dry_run else "set"
    lines = [f"{escaped(edit.path)}: {verb} {_names(edit.changed)}"]
    if edit.also_changed:
        along = "would change along" if edit.dry_run else "changed along"
        lines.append(f"  {_names(edit.also_changed)} {along}, being the same bytes")
    written = count_text(edit.bytes_written, "byte")
    if not edit.bytes_written:
        lines.append("  it is so already" if edit.dry_run else "  it was so already")
    elif edit.dry_run:
        lines.append(f"  {written} would be written {'in place' if edit.in_place else 'to ' + escaped(edit.output)}")
    elif edit.in_place:
        kept = f", the old file is {escaped(edit.backup)}" if edit.backup else ""
        lines.append(f"  {written} changed in place{kept}")
    else:
        lines.append(f"  written to {escaped(edit.output)}, {written}")
    return "\n".join(lines) + "\n"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(name_text, names[:_MOST])) + more
