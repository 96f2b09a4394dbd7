"""Results as JSON, in the stable shapes that docs/json.md documents: keys may be added, none is renamed.

NaN and infinities, which JSON lacks, are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Entry, Opaque, Tensor, Value
from ckpt_cli.render.text import value_text

if TYPE_CHECKING:
    from ckpt_cli.edits.convert_options import Conversion
    from ckpt_cli.edits.plan import EditResult
    from ckpt_cli.ops.aliasing import Group
    from ckpt_cli.ops.check.run import Report
    from ckpt_cli.ops.diff import Change, Diff
    from ckpt_cli.ops.hash import Hashes
    from ckpt_cli.ops.hash import Verdict as HashVerdict
    from ckpt_cli.ops.info import Summary
    from ckpt_cli.ops.ls import Listing, Waste
    from ckpt_cli.ops.ls_fold import Fold
    from ckpt_cli.ops.scan import Scan
    from ckpt_cli.ops.stats import Row, Stats
    from ckpt_cli.ops.ties import Ties, Verdict

_TIES = 4_000_000
"""Names that `tied_with` spells out in all."""

_ITEMS = 100
"""Items of a list that are turned into text at a time."""


def line(answer: object) -> str:
    """An answer as one line of JSON."""
    return json.dumps(answer, allow_nan=False) + "\n"


def listing_json(listing: Listing, rows: Sequence[Entry | Fold]) -> Iterator[str]:
    """Yield the output of `ls --json`, one entry per line."""
    if sum(len(listing.tied.get(row.name, ())) for row in rows) > _TIES:
        raise UnsupportedError(
            "too many names are tied to list each with all the others",
            hint="ckpt ties FILE lists each group once",
        )
    yield f'{{"path": {json.dumps(listing.path)}, "format": {json.dumps(listing.format)}, "entries": ['
    separator = "\n"
    for row in rows:
        yield separator
        yield from value_row(row) if isinstance(row, Value) else [json.dumps(_row(row, listing.tied), allow_nan=False)]
        separator = ",\n"
    yield f'], "tensors": {listing.tensors}, "parameters": {listing.parameters}, "nbytes": {listing.nbytes}}}\n'


def _row(row: Tensor | Fold, tied: Mapping[str, list[str]]) -> dict[str, object]:
    if isinstance(row, Tensor):
        return tensor_json(row, tied)
    return {
        **tensor_json(row.first, {}),
        "name": row.name,
        "numel": row.first.numel * row.count,
        "nbytes": row.nbytes,
        "storage": None,
        "storage_offset": None,
        "count": row.count,
    }


def tensor_json(tensor: Tensor, tied: Mapping[str, list[str]]) -> dict[str, object]:
    """One tensor's facts; what it has not is null."""
    return {
        "name": tensor.name,
        "type": "tensor",
        "kind": tensor.kind,
        "dtype": tensor.dtype.name,
        "shape": None if tensor.shape is None else list(tensor.shape),
        "numel": tensor.numel,
        "nbytes": tensor.nbytes,
        "stride": list(tensor.stride),
        "storage": None if tensor.storage is None else tensor.storage.key,
        "storage_offset": tensor.storage_offset,
        "requires_grad": tensor.requires_grad,
        "device": tensor.device,
        "tied_with": [name for name in tied.get(tensor.name, ()) if name != tensor.name],
        "layout": tensor.layout,
        "python_type": tensor.python_type,
        "parts": [tensor_json(part, {}) for part in tensor.parts],
        "details": _details(tensor),
    }


def _details(tensor: Tensor) -> dict[str, object]:
    """Return the facts that only some layouts have: quantization, stored elements, sharding."""
    details: dict[str, object] = {}
    if tensor.quantizer is not None:
        of_all = tensor.quantizer.axis is None
        details["scheme"] = tensor.quantizer.scheme
        details["axis"] = tensor.quantizer.axis
        details["scale"] = _finite(tensor.quantizer.scale) if of_all else None
        details["zero_point"] = tensor.quantizer.zero_point if of_all else None
    if tensor.nnz is not None:
        details["nnz"] = tensor.nnz
        details["coalesced"] = tensor.coalesced
    if tensor.sharding is not None:
        details["mesh"] = tensor.sharding.mesh
        details["placements"] = tensor.sharding.placements
        details["offsets"] = [list(offset) for offset in tensor.sharding.offsets]
    return details


def value_row(row: Value) -> Iterator[str]:
    """Yield a non-tensor entry; a long list of long texts takes several times its memory as JSON, so in pieces."""
    head = json.dumps({"name": row.name, "type": "value"})[:-1] + ', "value": '
    if not isinstance(row.value, list | tuple) or len(row.value) <= _ITEMS:
        yield f"{head}{json.dumps(value_json(row.value), allow_nan=False)}}}"
        return
    separator = head + "["
    for at in range(0, len(row.value), _ITEMS):
        yield separator + json.dumps(value_json(row.value[at : at + _ITEMS]), allow_nan=False)[1:-1]
        separator = ", "
    yield "]}"


def value_json(value: object) -> object:
    """Return a non-tensor value: as JSON where JSON has it, else its short repr."""
    if isinstance(value, Opaque):
        return value.text
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, list | tuple):
        return [value_json(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4096:
        return value_text(value)
    return value


def _finite(value: float) -> object:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def waste_json(path: str, rows: Sequence[Waste]) -> str:
    """Return the output of `ls --waste --json`."""
    return line({"path": path, "waste": [{**asdict(row), "waste": row.nbytes - row.used} for row in rows]})


def summary_json(summary: Summary) -> str:
    """Return the output of `info --json`."""
    return line(asdict(summary))


def ties_json(ties: Ties) -> str:
    """Return the output of `ties --json`."""
    answer = {
        "path": ties.path,
        "tied": [_group(group) for group in ties.tied],
        "overlapping": [_group(group) for group in ties.overlapping],
        "co_stored": [_group(group) for group in ties.co_stored],
        "aliases": dict(ties.aliases),
        "equal": [{"names": list(group.names), "nbytes": group.nbytes} for group in ties.equal],
        "claim": ties.claim,
    }
    return line(answer)


def _group(group: Group) -> dict[str, object]:
    answer: dict[str, object] = {"names": list(group.names), "storage": group.storage, "nbytes": group.nbytes}
    if group.view is not None:
        shape = list(group.view.shape or ())
        answer |= {"dtype": group.view.dtype.name, "shape": shape, "saved": group.saved}
    return answer


def verdict_json(verdict: Verdict) -> str:
    """Return the output of `ties FILE A B --json`."""
    return line(asdict(verdict))


def scan_json(scan: Scan) -> str:
    """Return the output of `scan --json`."""
    findings = [asdict(finding) for finding in scan.findings]
    names = [asdict(named) for named in scan.globals]
    return line({"path": scan.path, "ok": scan.ok, "pickles": scan.pickles, "findings": findings, "globals": names})


def check_json(report: Report) -> str:
    """Return the output of `check --json`."""
    findings = [asdict(finding) for finding in report.findings]
    return line({"path": report.path, "ok": report.ok, "deep": report.deep, "findings": findings})


def stats_json(stats: Stats) -> Iterator[str]:
    """Yield the output of `stats --json`, one tensor per line."""
    yield '{"tensors": ['
    separator = "\n"
    for row in stats.rows:
        yield separator + json.dumps(_stats_row(row), allow_nan=False)
        separator = ",\n"
    total = "null" if stats.total is None else json.dumps(_stats_row(stats.total), allow_nan=False)
    yield f'], "total": {total}}}\n'


def _stats_row(row: Row) -> dict[str, object]:
    """One row; where there are no values, or no finite ones, numbers of them are null."""
    found = row.moments
    return {
        "name": row.name,
        "dtype": row.dtype,
        "shape": None if row.shape is None else list(row.shape),
        "numel": row.numel,
        "min": found and value_json(found.least),
        "max": found and value_json(found.most),
        "mean": found and (value_json(found.mean) if found.count else None),
        "std": found and (_finite(found.std) if found.count else None),
        "norm": found and _finite(found.norm),
        "zeros": found and found.zeros,
        "nan": found and found.nan,
        "inf": found and found.inf,
        "histogram": {"edges": [value_json(edge) for edge in row.edges], "counts": list(row.counts)} if found else None,
        "note": row.note or None,
    }


def diff_json(diff: Diff) -> str:
    """Return the output of `diff --json`."""
    answer = {
        "equal": diff.equal,
        "only_a": list(diff.only_a),
        "only_b": list(diff.only_b),
        "changed": [_change(change) for change in diff.changed],
        "values": [{"name": fact.name, "a": value_json(fact.a), "b": value_json(fact.b)} for fact in diff.values],
        "ties": [{"names": list(tie.names), "a": tie.a, "b": tie.b} for tie in diff.ties],
        "metadata": [{"key": fact.name, "a": fact.a, "b": fact.b} for fact in diff.metadata],
    }
    return line(answer)


def _change(change: Change) -> dict[str, object]:
    return {
        "name": change.name,
        "what": change.what,
        "differing": change.differing,
        "numel": change.numel,
        "max_abs": value_json(change.max_abs),
        "max_rel": value_json(change.max_rel),
        "first": [list(index) for index in change.first],
        "a": _element(change.a),
        "b": _element(change.b),
    }


def _element(value: object) -> object:
    """Values at some places, or a fact; complex numbers as pairs."""
    if isinstance(value, list):
        return [_element(item) for item in value]
    if isinstance(value, complex):
        return [_finite(value.real), _finite(value.imag)]
    return value_json(value)


def hash_json(hashes: Hashes) -> str:
    """Return the output of `hash --json`."""
    return line(asdict(hashes))


def verified_json(path: str, verdict: HashVerdict) -> str:
    """Return the output of `hash --verify --json`."""
    return line({"path": path, "ok": verdict.ok, **asdict(verdict)})


def edit_json(edit: EditResult) -> str:
    """Return the output of an edit with `--json`."""
    facts: dict[str, object] = {}
    for name, value in asdict(edit).items():
        if name == "backups":
            facts["backup"] = edit.backup
        facts[name] = edit.verb.past if name == "verb" else value
    return line(facts)


def conversion_json(done: Conversion) -> str:
    """Return the output of `convert --json`."""
    return line(asdict(done))
