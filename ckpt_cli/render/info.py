"""The facts of a checkpoint as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

from ckpt_cli.render.table import Column, facts_text, table_text
from ckpt_cli.render.text import bytes_text, count_text, escaped, name_text, short

if TYPE_CHECKING:
    from ckpt_cli.ops.info import Summary

_LINE = 400
"""Characters of a fact."""

_METADATA = 1000
"""Entries of the metadata that are shown."""


def to_json(summary: Summary) -> dict[str, object]:
    """Return the facts as docs/json.md describes them."""
    return asdict(summary)


def summary_text(summary: Summary, style: str) -> Iterator[str]:
    """Yield a row for each fact."""
    if style == "table":
        yield from facts_text(_facts(summary, human=True))
    else:
        yield from table_text((Column("fact"), Column("value")), _facts(summary, human=False), style)


def _format(summary: Summary) -> str:
    """Return the format's name with the version that the container states."""
    version = escaped(summary.version)
    return version if version.startswith(summary.format) else f"{summary.format} ({version})"


def _facts(summary: Summary, *, human: bool) -> list[tuple[str, str]]:
    """Return the label and the text of every fact that the checkpoint has."""
    sizes = bytes_text if human else str
    counts = (lambda number: f"{number:,}") if human else str
    facts = [
        ("path", escaped(summary.path)),
        ("format", _format(summary)),
        ("file size", sizes(summary.file_nbytes)),
        ("shards", counts(summary.shards)),
        ("tensors", counts(summary.tensors)),
        ("parameters", counts(summary.parameters)),
        ("tensor bytes", sizes(summary.nbytes)),
    ]
    facts += [
        (f"dtype {name}", f"{count_text(share.tensors, 'tensor')}, {count_text(share.numel, 'parameter')}")
        for name, share in summary.dtypes.items()
    ]
    if summary.values:
        facts.append(("other entries", counts(summary.values)))
    names = _some_names if human else _all_names
    if summary.top_level:
        facts.append(("top level", names(summary.top_level)))
    if summary.ties:
        facts.append(("ties", f"{count_text(summary.ties, 'group')}, {sizes(summary.tie_nbytes)} saved"))
    if summary.waste_nbytes:
        facts.append(("waste", f"{sizes(summary.waste_nbytes)} that no tensor uses"))
    facts += _metadata_facts(summary) if human else _whole_metadata(summary)
    if summary.objects:
        facts.append(("objects", names(summary.objects)))
    return facts


def _metadata_facts(summary: Summary) -> list[tuple[str, str]]:
    """Return the first strings of the metadata, each as far as it fits on a line."""
    facts = [
        (f"metadata {name_text(key[:_LINE])}", short(escaped(text[: _LINE + 1]), _LINE))
        for key, text in islice(summary.metadata.items(), _METADATA)
    ]
    if len(summary.metadata) > _METADATA:
        facts.append(("metadata", f"{len(summary.metadata) - _METADATA} more"))
    return facts


def _whole_metadata(summary: Summary) -> list[tuple[str, str]]:
    """Return all strings of the metadata as they are: what is not for a terminal is not cut."""
    return [(f"metadata {name_text(key)}", escaped(text)) for key, text in summary.metadata.items()]


def _all_names(names: Sequence[str]) -> str:
    """Return all names."""
    return " ".join(map(name_text, names))


def _some_names(names: Sequence[str]) -> str:
    """Return the first names that fit on a line."""
    return short(" ".join(name_text(name[:_LINE]) for name in names[:_LINE]), _LINE)
