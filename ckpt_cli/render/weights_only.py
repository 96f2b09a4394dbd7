"""Text and JSON that `scan` and `check` share: the answer of torch's weights_only loader, and findings taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render.screen import paint
from ckpt_cli.render.text import count_text, escaped, short

if TYPE_CHECKING:
    from ckpt_cli.ops.check.run import Report
    from ckpt_cli.ops.scan import Scan
    from ckpt_cli.scanner.weights_only import WeightsOnly

_CALL = "torch.load(weights_only=True)"

_MOST = 8
"""Names that are spelled out."""


def to_json(found: WeightsOnly) -> dict[str, object] | None:
    """Return the answer as docs/json.md describes it; None where no file is one of torch.save."""
    if not found.files:
        return None
    problems = [{"where": verdict.where, "message": verdict.problem} for verdict in found.problems]
    return {
        "loads": found.loads,
        "safe_globals": found.safe_globals,
        "dangerous": found.dangerous,
        "problems": problems,
    }


def weights_only_text(found: WeightsOnly) -> str:
    """Return one line, or an empty string where no file is one of torch.save."""
    if not found.files:
        return ""
    colour = "ok" if found.loads else "error" if found.problems or found.dangerous else "warning"
    return f"{_CALL} {paint(_answer(found), colour)}\n"


def counts_text(found: Scan | Report) -> str:
    """Return how many findings of each severity there are, and how many were taken out."""
    counts = [(severity, found.count(severity)) for severity in ("error", "warning", "note")]
    texts = [paint(count_text(count, severity), severity if count else "") for severity, count in counts]
    text = ", ".join(texts)
    return (text if any(count for _, count in counts) else paint(text, "ok")) + accepted_text(found)


def accepted_text(found: Scan | Report) -> str:
    """Return what the totals add for findings that were taken out: `, 2 allowed, 1 known`."""
    counts = ((found.allowed, "allowed"), (found.known, "known"))
    return "".join(f", {count} {word}" for count, word in counts if count)


def aside(found: Scan | Report, style: str) -> str:
    """Return notes for stderr where stdout has bare rows: findings taken out, and a file that torch refuses."""
    if style in ("table", "json", "sarif"):
        return ""
    path = escaped(found.path)
    accepted = accepted_text(found).removeprefix(", ")
    lines = [f"note: {path}: {accepted}\n"] if accepted else []
    if not found.weights_only.loads:
        lines.append(f"note: {path}: {weights_only_text(found.weights_only)}")
    return "".join(lines)


def _answer(found: WeightsOnly) -> str:
    problems, names, bad = found.problems, found.safe_globals, found.dangerous
    if found.loads:
        return "takes it" if len(found.files) == 1 else f"takes all {len(found.files)} files"
    if problems:
        first = problems[0]
        place = f"{escaped(first.where)}: " if len(found.files) > 1 else ""
        more = f", and {count_text(len(problems) - 1, 'more file')}" if len(problems) > 1 else ""
        return f"refuses it: {place}{escaped(first.problem)}{more}"
    if bad:
        return f"refuses it: it would need {listed(bad, _MOST, _name)}, which nobody should allow"
    return f"needs torch.serialization.add_safe_globals([{listed(names, _MOST, _name)}])"


def _name(name: str) -> str:
    return short(escaped(name))
