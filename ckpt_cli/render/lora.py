"""What the commands of `lora` did, as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.edits import beside_lines
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import brief_name, count_text, escaped, name_text, shape_text

if TYPE_CHECKING:
    from ckpt_cli.edits.lora_extract import LoraExtract
    from ckpt_cli.edits.lora_merge import LoraMerge
    from ckpt_cli.edits.lora_resize import LoraResize
    from ckpt_cli.ops.lora import LoraInfo, ModuleFacts

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


_COLUMNS = (
    Column("name"),
    Column("kind"),
    Column("shape"),
    Column("rank", right=True),
    Column("alpha", right=True),
    Column("scaling", right=True),
    Column("dora"),
    Column("tensor"),
)


def info_text(found: LoraInfo, style: str) -> Iterator[str]:
    """Yield a row for each module; a table ends with a line about the adapter."""
    yield from table_text(_COLUMNS, map(_row, found.modules), style)
    if style == "table":
        yield info_summary(found)


def info_summary(found: LoraInfo) -> str:
    """Return lines about the whole of an adapter."""
    adapter = found.adapter
    modules, parameters = count_text(len(found.modules), "module"), count_text(found.parameters, "parameter")
    kinds = [name for name, on in (("DoRA", adapter.settings.use_dora), ("rsLoRA", adapter.settings.rslora)) if on]
    lines = [", ".join([f"{adapter.layout}: {modules}, {parameters}", *kinds])]
    for title, names in (
        ("whole tensors", list(adapter.whole)),
        ("copies of the model's", list(adapter.copies)),
        ("not in the model", found.unmatched),
    ):
        if names:
            lines.append(f"  {title}: {listed(names, _NAMED, brief_name)}")
    return "\n".join(lines) + "\n"


def _row(facts: ModuleFacts) -> list[str]:
    low = facts.low
    return [
        name_text(low.module),
        low.kind,
        shape_text(low.shape),
        str(low.rank),
        f"{low.alpha:g}",
        f"{low.scaling:.6g}",
        "dora" if low.magnitude is not None else "",
        name_text(facts.target) if facts.target is not None else "",
    ]


def info_json(found: LoraInfo) -> dict[str, object]:
    """Return the facts of an adapter as docs/json.md describes them."""
    adapter = found.adapter
    return {
        "path": adapter.path,
        "layout": adapter.layout,
        "dora": adapter.settings.use_dora,
        "rslora": adapter.settings.rslora,
        "fan_in_fan_out": adapter.settings.fan_in_fan_out,
        "parameters": found.parameters,
        "modules": [
            {
                "name": facts.low.module,
                "kind": facts.low.kind,
                "shape": list(facts.low.shape),
                "rank": facts.low.rank,
                "alpha": facts.low.alpha,
                "scaling": facts.low.scaling,
                "dora": facts.low.magnitude is not None,
                "tensor": facts.target,
            }
            for facts in found.modules
        ],
        "whole": list(adapter.whole),
        "copies": list(adapter.copies),
        "base": found.base,
        "unmatched": list(found.unmatched),
    }


def extract_json(done: LoraExtract) -> dict[str, object]:
    """Return the report of an extraction as docs/json.md describes it."""
    return {
        "base": done.base,
        "tuned": done.tuned,
        "output": done.output,
        "rank": done.rank,
        "svd": done.svd,
        "seed": done.seed,
        "modules": [{"name": one.name, "rank": one.rank, "residual": one.residual} for one in done.modules],
        "whole": list(done.whole),
        "residual": done.residual,
        "bytes_written": done.bytes_written,
        "dry_run": done.dry_run,
    }


def extract_text(done: LoraExtract) -> str:
    """Return a line for the output, and one for each fact that is not plain from the command line."""
    would = "would be extracted" if done.dry_run else "extracted"
    what, nbytes = count_text(len(done.modules), "module"), count_text(done.bytes_written, "byte")
    lines = [
        f"{what} {would} into {escaped(done.output)}, {nbytes}",
        f"  {_residual(done.residual)} of the differences",
    ]
    if done.whole:
        lines.append(f"  whole: {listed(done.whole, _NAMED, brief_name)}")
    return "\n".join(lines) + "\n"


def resize_json(done: LoraResize) -> dict[str, object]:
    """Return the report of a resizing as docs/json.md describes it."""
    return {
        "path": done.path,
        "output": done.output,
        "layout": done.layout,
        "rank": done.rank,
        "modules": [
            {"name": one.name, "old_rank": one.old, "rank": one.rank, "residual": one.residual} for one in done.modules
        ],
        "residual": done.residual,
        "bytes_written": done.bytes_written,
        "dry_run": done.dry_run,
    }


def resize_text(done: LoraResize) -> str:
    """Return a line for the output and one for what is left out."""
    would = "would be resized" if done.dry_run else "resized"
    what, nbytes = count_text(len(done.modules), "module"), count_text(done.bytes_written, "byte")
    first = f"{what} {would} to rank {done.rank} in {escaped(done.output)}, {nbytes}"
    return f"{first}\n  {_residual(done.residual)} of the products\n"


def _residual(part: float) -> str:
    """Say which part of a norm is left out."""
    return f"residual: {part:.3g} of the norm"
