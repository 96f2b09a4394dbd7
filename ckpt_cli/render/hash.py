"""Hashes, and differences from a manifest of them, as text and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.render.screen import paint
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import count_text, name_text

if TYPE_CHECKING:
    from ckpt_cli.ops.hash import Hashes, Verdict

_COLUMNS = (Column("hash"), Column("name"))
_DIFFERENCES = (Column("what"), Column("name"))


def to_json(hashes: Hashes) -> dict[str, object]:
    """Return the hashes as docs/json.md describes them; this is the manifest that `--verify` takes."""
    return asdict(hashes)


def verdict_to_json(path: str, verdict: Verdict) -> dict[str, object]:
    """Return the result of `hash --verify` on the checkpoint at `path`."""
    return {"path": path, "ok": verdict.ok, **asdict(verdict)}


def hashes_block(hashes: Hashes) -> Block:
    """Return a row for each tensor, and one for the whole checkpoint last."""
    rows = [[digest, name_text(name)] for name, digest in hashes.tensors.items()]
    totals = f"{count_text(len(rows), 'tensor')}, {hashes.algorithm}"
    return Block(_COLUMNS, [*rows, [hashes.checkpoint, "(checkpoint)"]], f"{paint(totals, 'heading')}\n")


def verdict_block(verdict: Verdict) -> Block:
    """Return a row for each tensor that differs from the manifest; nothing if none does."""
    rows = [
        [what, name_text(name)]
        for what, names in (("differs", verdict.differ), ("missing", verdict.missing), ("new", verdict.new))
        for name in names
    ]
    return Block(_DIFFERENCES, rows, headed=False)
