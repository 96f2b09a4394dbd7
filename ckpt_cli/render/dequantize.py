"""The report of `dequantize` as text and JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.edits import beside_lines
from ckpt_cli.render.text import brief_name, count_text, escaped

if TYPE_CHECKING:
    from ckpt_cli.edits.dequantize import Dequantized

_NAMED = 3
"""Names of a list that are spelled out."""


def to_json(done: Dequantized) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    return {
        "path": done.path,
        "output": done.derived.output,
        "dequantized": [
            {
                "name": plain.name,
                "stored": plain.stored,
                "scheme": plain.scheme,
                "dtype": plain.dtype,
                "shape": list(plain.shape),
            }
            for plain in done.plain
        ],
        "dropped": list(done.dropped),
        "edited": list(done.edited),
        "bytes_written": done.derived.bytes_written,
        "dry_run": done.derived.dry_run,
    }


def dequantized_text(done: Dequantized) -> str:
    """Return a line for the output, and one for each scheme and each fact that is not plain from the command line."""
    new = done.derived
    would = "would become" if new.dry_run else "became"
    what, nbytes = count_text(len(done.plain), "weight"), count_text(new.bytes_written, "byte")
    lines = [f"{what} {would} plain floats in {escaped(new.output)}, {nbytes}"]
    for (scheme, dtype), count in Counter((plain.scheme, plain.dtype) for plain in done.plain).items():
        lines.append(f"  {escaped(scheme)}: {count:,} to {dtype}")
    if done.dropped:
        lines.append(f"  gone: {listed(done.dropped, _NAMED, brief_name)}")
    if done.edited:
        lines.append(f"  without what they said of the quantization: {listed(done.edited, _NAMED)}")
    if new.left_out:
        lines.append(f"  left out: {listed([item.name for item in new.left_out], _NAMED, brief_name)}")
    lines += [f"  {escaped(note)}" for note in new.notes]
    lines += beside_lines(new.beside, dry_run=new.dry_run)
    return "\n".join(lines) + "\n"
