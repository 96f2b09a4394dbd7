"""A harmful pickle, a harmless one, what a scan finds in some bytes, and the codes of its findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.pickles import Ops, call, pickled, value

from ckpt_cli.ops.scan import Scan, scan

HARMFUL = pickled(call("os.system", "echo hi"))


def stacked(module: str, name: str, *args: Any) -> bytes:
    """A protocol-4 pickle that calls a name, dots and all."""
    func = Ops(value(module) + value(name) + b"\x93")
    return pickled(Ops(func + value(args) + b"R"), 4)


def scanned(path: Path, content: bytes) -> Scan:
    path.write_bytes(content)
    return scan(str(path))


def codes(found: Scan, *severities: str) -> set[str]:
    return {finding.code for finding in found.findings if finding.severity in (severities or ("error", "warning"))}


HARMLESS = pickled({"a": 1})


def scan_or_refuse(path: Path, content: bytes) -> None:
    from ckpt_cli.errors import CkptError

    path.write_bytes(content)
    try:
        scan(str(path))
    except CkptError:
        return
