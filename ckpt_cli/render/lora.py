"""What the commands of `lora` did, as text and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.edits import beside_lines
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from ckpt_cli.edits.lora_merge import LoraMerge

_NAMED = 5
"""Names of a list that are spelled out."""


def merge_json(done: LoraMerge) -> dict[str, object]:
    """Return the report of a merge as docs/json.md describes it."""
    return {
        "path": done.path,
        "output": done.derived.output,
        "adapters": [{"path": one.path, "layout": one.layout, "scale": one.scale} for one in done.adapters],
        "merged": [
            {
                "name": one.name,
                "adapter": one.adapter,
                "rank": one.rank,
                "alpha": one.alpha,
                "scaling": one.scaling,
                "dora": one.dora,
            }
            for one in done.merged
        ],
        "replaced": list(done.replaced),
        "unmatched": list(done.unmatched),
        "warnings": list(done.warnings),
        "bytes_written": done.derived.bytes_written,
        "dry_run": done.derived.dry_run,
    }


def merge_text(done: LoraMerge) -> str:
    """Return a line for the output, and one for each fact that is not plain from the command line."""
    new = done.derived
    changed = len({one.name for one in done.merged})
    would = "would be merged" if new.dry_run else "merged"
    what, of = count_text(changed, "tensor"), count_text(len(done.adapters), "adapter")
    lines = [f"{of} {would} into {what}: {escaped(new.output)}, {count_text(new.bytes_written, 'byte')}"]
    ranks = sorted({one.rank for one in done.merged})
    scalings = sorted({one.scaling for one in done.merged})
    if ranks:
        lines.append(f"  rank {listed(ranks, _NAMED)}, times {listed(scalings, _NAMED, '{:g}'.format)}")
    for title, names in (("replaced", done.replaced), ("not in the model", done.unmatched)):
        if names:
            lines.append(f"  {title}: {listed(names, _NAMED, brief_name)}")
    if new.left_out:
        lines.append(f"  left out: {listed([item.name for item in new.left_out], _NAMED, brief_name)}")
    lines += [f"  {escaped(warning)}" for warning in done.warnings]
    lines += beside_lines(new.beside, dry_run=new.dry_run)
    return "\n".join(lines) + "\n"
