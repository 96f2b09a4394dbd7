"""The findings of `scan` as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.render import weights_only
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import count_text, escaped, short

if TYPE_CHECKING:
    from ckpt_cli.ops.scan import Scan

_COLUMNS = (Column("severity"), Column("code"), Column("where"), Column("message"))

_FINDING = ("severity", "code", "where", "message", "name")
"""The facts of a finding in JSON; a hint is only that of `check`."""

_MESSAGE = 160
"""Characters of a message in a table."""

_CALLED = 80
"""Characters of a call in a table."""


def to_json(scan: Scan) -> dict[str, object]:
    """Return the scan as docs/json.md describes it."""
    findings = [{key: getattr(finding, key) for key in _FINDING} for finding in scan.findings]
    names = [asdict(named) for named in scan.globals]
    return {
        "path": scan.path,
        "ok": scan.ok,
        "pickles": scan.pickles,
        "findings": findings,
        "globals": names,
        "weights_only": weights_only.to_json(scan.weights_only),
        "allowed": scan.allowed,
        "known": scan.known,
    }


def scan_block(scan: Scan, style: str, *, every: bool) -> Block:
    """Return a row for each finding, with `every` for each harmless name too; a table ends with the counts."""
    after = f"{_totals(scan)}{weights_only.weights_only_text(scan.weights_only)}"
    return Block(_COLUMNS, _rows(scan, every=every, human=style == "table"), after)


def _rows(scan: Scan, *, every: bool, human: bool) -> Iterator[list[str]]:
    for finding in scan.findings:
        message = escaped(finding.message)
        yield [
            finding.severity,
            finding.code,
            escaped(finding.where),
            short(message, _MESSAGE) if human else message,
        ]
    if not every:
        return
    for named in scan.globals:
        if named.verdict in ("allowed", "harmless"):
            text = escaped(named.call or named.name)
            yield ["ok", named.verdict, escaped(named.where), short(text, _CALLED) if human else text]


def _totals(scan: Scan) -> str:
    held = f"{count_text(scan.pickles, 'pickle')}, {count_text(len(scan.globals), 'global')}"
    return f"{held}: {weights_only.counts_text(scan)}\n"
