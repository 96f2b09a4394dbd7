"""The findings of `check` as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_cli.render import weights_only
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import count_text, escaped, short

if TYPE_CHECKING:
    from ckpt_cli.ops.check.run import Report

_COLUMNS = (Column("severity"), Column("code"), Column("where"), Column("message"), Column("what to do"))

_FINDING = ("severity", "code", "where", "message", "hint")
"""The facts of a finding in JSON."""

_WIDTH = 120
"""Characters of a cell in a table."""


def to_json(report: Report) -> dict[str, object]:
    """Return the report as docs/json.md describes it."""
    findings = [{key: getattr(finding, key) for key in _FINDING} for finding in report.findings]
    return {
        "path": report.path,
        "ok": report.ok,
        "deep": report.deep,
        "findings": findings,
        "weights_only": weights_only.to_json(report.weights_only),
        "allowed": report.allowed,
        "known": report.known,
    }


def check_block(report: Report, style: str) -> Block:
    """Return a row for each finding; a table ends with the counts."""
    after = f"{_totals(report)}{weights_only.weights_only_text(report.weights_only)}"
    return Block(_COLUMNS, _rows(report, human=style == "table"), after)


def _rows(report: Report, *, human: bool) -> Iterator[list[str]]:
    for finding in report.findings:
        cells = [escaped(cell) for cell in (finding.where, finding.message, finding.hint)]
        yield [finding.severity, finding.code, *(short(cell, _WIDTH) if human else cell for cell in cells)]


def _totals(report: Report) -> str:
    counts = weights_only.counts_text(report)
    looked = f"{count_text(report.files, 'file')}, {count_text(report.tensors, 'tensor')}"
    return f"{looked}, {'every byte read' if report.deep else 'values not read'}: {counts}\n"
