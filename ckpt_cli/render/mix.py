"""The report of a mix as text and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.render.avg import further_lines
from ckpt_cli.render.text import count_text, escaped

if TYPE_CHECKING:
    from ckpt_cli.edits.mix import Mix


def to_json(done: Mix) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    return {
        "output": done.derived.output,
        "method": done.method,
        "base": done.base,
        "inputs": [{"path": path, "weight": weight} for path, weight in done.models],
        "mixed": done.mixed,
        "copied": list(done.copied),
        "warnings": list(done.warnings),
        "bytes_written": done.derived.bytes_written,
        "dry_run": done.derived.dry_run,
    }


def mix_text(done: Mix) -> str:
    """Return a line for the output, and one for each fact that is not plain from the command line."""
    new = done.derived
    would = "would be mixed" if new.dry_run else "mixed"
    what, of = count_text(done.mixed, "tensor"), count_text(len(done.models), "model")
    nbytes = count_text(new.bytes_written, "byte")
    base = escaped(done.base)
    lines = [f"{what} of {base} and {of} {would} into {escaped(new.output)}, {nbytes}; the rest is that of {base}"]
    lines += further_lines(new, done.copied, done.warnings)
    return "\n".join(lines) + "\n"
