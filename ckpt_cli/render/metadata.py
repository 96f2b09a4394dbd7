"""What `meta` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import escaped, name_text


def metadata_text(metadata: Mapping[str, str], style: str) -> Iterator[str]:
    """One row a key; a person is told when there is none."""
    if not metadata and style == "table":
        return iter(["no metadata\n"])
    cells = ([name_text(key), escaped(value)] for key, value in metadata.items())
    return table_text((Column("key"), Column("value")), cells, style)
