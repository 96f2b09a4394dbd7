"""Findings as SARIF 2.1.0, the format of static analysis results that code hosts take (OASIS, sarif-v2.1.0)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ckpt_cli import __version__
from ckpt_cli.ops.accepted import place_in_file
from ckpt_cli.render import weights_only

if TYPE_CHECKING:
    from ckpt_cli.ops.check.finding import Finding
    from ckpt_cli.ops.check.run import Report
    from ckpt_cli.ops.scan import Scan

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_LEVELS = {"error": "error", "warning": "warning", "note": "note"}

_LINE = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}
"""The region of every result: code hosts require one, and a checkpoint has no lines."""


SCAN_CODES = {
    "broken-pickle": "A pickle that breaks before its end",
    "broken-tar": "A tar file with a header that makes no sense",
    "broken-zip": "A zip file that is broken",
    "changes-import": "A pickle that changes an object which it did not make",
    "computed-call": "A pickle that calls something that it computes",
    "computed-name": "A pickle that imports a name that it computes",
    "dangerous-global": "A pickle that imports a name which runs code or reaches other files",
    "duplicate-record": "A record that occurs more than once in a zip file",
    "extension": "A pickle that imports a name by a code of copyreg",
    "extra-pickle": "A pickle that no loader of the format reads",
    "extra-stream": "A pickle after the first one",
    "header-mismatch": "A zip file whose two headers of a record differ",
    "hidden-pickle": "A pickle where there should be none",
    "keras-lambda": "A Keras model with code in a Lambda layer",
    "leading-data": "Bytes before the beginning of a zip file",
    "limit": "A pickle beyond the limits of the scan",
    "missing-shard": "A shard that the index names and that is not there",
    "nested-pickle": "A string that is a pickle",
    "not-searched": "A part that was not searched",
    "odd-storages": "Storages that are not where the pickle says",
    "outside-folder": "A shard that is not beside its index",
    "several-zips": "Several zip files in one",
    "too-many": "More findings than are listed",
    "trailing-data": "Bytes after the end of all that a file should have",
    "two-formats": "A file that is a pickle and a zip file",
    "unknown-global": "A pickle that imports a name which is not known",
    "unlisted-data": "Data in a zip file that its directory does not list",
    "unlisted-record": "A record that the directory of a zip file does not list",
    "unusual-global": "A pickle that imports a part of Python which no checkpoint needs",
}
"""The codes of `scan` and their meanings; those of `check` are in its tables."""


def to_sarif(found: Scan | Report, command: str, meanings: Mapping[str, str]) -> dict[str, object]:
    """Return the findings as one run of a SARIF log; `meanings` are those of the command's codes."""
    codes = list(dict.fromkeys(finding.code for finding in found.findings))
    run = {
        "tool": {"driver": _driver(command, [_rule(code, meanings) for code in codes])},
        "invocations": [{"executionSuccessful": True}],
        "results": [_result(finding, codes, found.path) for finding in found.findings],
        "columnKind": "unicodeCodePoints",
        "properties": {
            "allowed": found.allowed,
            "known": found.known,
            "weights_only": weights_only.to_json(found.weights_only),
        },
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def merged(command: str, logs: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Return one log with one run of the logs of several files; a failure is a `path` and an `error` instead.

    Code hosts take one run of a tool for each upload.
    """
    runs = [log["runs"][0] for log in logs if "runs" in log]
    failures = [log for log in logs if "runs" not in log]
    rules: dict[str, object] = {}
    for run in runs:
        rules.update((rule["id"], rule) for rule in run["tool"]["driver"]["rules"])
    places = {code: place for place, code in enumerate(rules)}
    results = [{**result, "ruleIndex": places[result["ruleId"]]} for run in runs for result in run["results"]]
    failed = [
        {
            "level": "error",
            "message": {"text": _text(log["error"])},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri_of(log["path"])}}}],
        }
        for log in failures
    ]
    invocation = {"executionSuccessful": not failures, **({"toolExecutionNotifications": failed} if failed else {})}
    files = [run["properties"] for run in runs]
    run = {
        "tool": {"driver": _driver(command, list(rules.values()))},
        "invocations": [invocation],
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": {
            "allowed": sum(each["allowed"] for each in files),
            "known": sum(each["known"] for each in files),
            "weights_only": [each["weights_only"] for each in files],
        },
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _driver(command: str, rules: Sequence[object]) -> dict[str, object]:
    return {"name": f"ckpt {command}", "version": __version__, "semanticVersion": __version__, "rules": rules}


def _rule(code: str, meanings: Mapping[str, str]) -> dict[str, object]:
    words = code.replace("-", " ")
    text = meanings.get(code) or words
    return {"id": code, "name": words.title().replace(" ", ""), "shortDescription": {"text": text}}


def _result(finding: Finding, codes: Sequence[str], path: str) -> dict[str, object]:
    place = place_in_file(finding.where, path)
    known = "\0".join((finding.code, place, finding.message))
    message = f"{finding.message}. {finding.hint}" if finding.hint else finding.message
    return {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": _LEVELS[finding.severity],
        "message": {"text": _text(message)},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri_of(finding.file or path)}, "region": _LINE},
                "logicalLocations": [{"fullyQualifiedName": _text(finding.where)}],
            }
        ],
        "partialFingerprints": {"ckptFinding/v1": hashlib.sha256(known.encode("utf-8", "replace")).hexdigest()},
    }


def uri_of(path: str) -> str:
    """Return a file as a URI: relative for one below the current folder, else absolute with `file://`."""
    if re.match(r"[a-z][a-z0-9+.-]+://", path):
        return path
    below = os.path.normpath(path)
    if os.path.isabs(below) or below.split(os.sep, 1)[0] == os.pardir:
        return "file://" + quote(os.fsencode(os.path.abspath(path)))
    return quote(os.fsencode(below.replace(os.sep, "/")))


def _text(text: str) -> str:
    """Text that every reader of JSON takes: bytes of a name that are not UTF-8 are replaced."""
    return text.encode("utf-8", "replace").decode()
