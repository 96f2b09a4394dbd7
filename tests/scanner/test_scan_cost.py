"""A small file costs a scan little, however it multiplies: what is counted is counted, and no more is done."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from builders.pickles import pickled
from builders.pt import Record, archive
from scanning import codes, scanned

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.scanner import packed


def overlapping(name: str, content: bytes, count: int, *, deflated: bool = False) -> bytes:
    """A zip file whose directory lists the same record over and over."""
    stored = zlib.compress(content, 9)[2:-4] if deflated else content
    method, raw = 8 if deflated else 0, name.encode()
    sizes = (zlib.crc32(content), len(stored), len(content), len(raw))
    head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, method, 0, 0, *sizes, 0) + raw + stored
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, method, 0, 0, *sizes, *[0] * 6) + raw
    return (
        head + entry * count + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(entry) * count, len(head), 0)
    )


@pytest.mark.parametrize("name", ["a/data.pkl", "a.json", "a.py", "a.txt", "a"])
@pytest.mark.parametrize("deflated", [False, True])
def test_records_that_share_their_bytes_are_not_read_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, deflated: bool
) -> None:
    monkeypatch.setattr(limits, "SCAN_STORED_FLOOR", 0)
    content = {"a/data.pkl": pickled([1] * 3000), "a.py": b"torch.relu(x)\n" * 600}.get(name, bytes(9000))
    content = json.dumps(["x" * 30] * 300).encode() if name == "a.json" else content
    whole = overlapping(name, content, 300, deflated=deflated)
    found = scanned(tmp_path / "m.zip", whole)
    assert any("said to be at one place" in finding.message for finding in found.findings) or deflated
    assert not found.ok


def test_a_directory_of_sixty_thousand_empty_records_is_gone_through_once(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for number in range(3000):
            file.writestr(zipfile.ZipInfo(str(number)), b"")
    inner = buffer.getvalue()
    budget = ScanBudget(records=10_000)
    from ckpt_cli.files.memory import MemorySource
    from ckpt_cli.scanner.tolerant_zip import zips_within

    for _ in range(6):
        list(zips_within(MemorySource(inner), budget))
    assert budget.records == 0


def test_small_files_may_have_fewer_opcodes_than_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCAN_OPCODES_FLOOR", 100_000)
    many = b"\x80\x02" + b"N0" * 400_000 + b"N."
    assert codes(scanned(tmp_path / "m.pkl", many)) == set()
    assert codes(scanned(tmp_path / "m.pt", archive([Record("a/data.pkl", many, 8, data=_deflated(many))]))) == {
        "limit"
    }


def _deflated(content: bytes) -> bytes:
    return zlib.compress(content, 9)[2:-4]


def test_each_text_that_is_decoded_is_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = packed.decodings
    monkeypatch.setattr(packed, "decodings", lambda text: seen.append(text) or plain(text))
    monkeypatch.setattr(limits, "SCAN_OPCODES_FLOOR", 0)
    texts = pickled([f"{number:030}" for number in range(20_000)])
    scanned(tmp_path / "m.zip", archive([Record("a.pkl", texts, 8, data=_deflated(texts))]))
    assert len(seen) < 20_000
