"""The metadata of a safetensors file or set as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckpt_cli.edits.meta import PlacedStrings
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import escaped, name_text


def metadata_text(metadata: Mapping[str, str], style: str) -> Iterator[str]:
    """Yield one row per key; on a terminal, a sentence if there are none."""
    if not metadata and style == "table":
        return iter(["no metadata\n"])
    cells = ([name_text(key), escaped(value)] for key, value in metadata.items())
    return table_text((Column("key"), Column("value")), cells, style)


def set_metadata_text(rows: Sequence[tuple[str, str, str]], style: str) -> Iterator[str]:
    """Yield a row for each key and place of the metadata of a set."""
    if not rows and style == "table":
        return iter(["no metadata\n"])
    cells = ([name_text(key), escaped(value), escaped(place)] for key, value, place in rows)
    return table_text((Column("key"), Column("value"), Column("in")), cells, style)


def to_json(found: Mapping[str, str], strings: PlacedStrings | None) -> dict[str, object]:
    """Return the strings; for a set of shards also, under `shards` and `index`, which file has which of them."""
    if strings is None:
        return dict(found)
    index = None if strings.index is None else {key: strings.index[key] for key in found if key in strings.index}
    shards = {name: {key: own[key] for key in found if key in own} for name, own in strings.shards.items()}
    return {**found, "shards": shards, "index": index}
