"""Tar files of every age that Python's tarfile reads are opened by scan, alone and in a folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from builders.pickles import pickled
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli.ops.scan import scan


def _v7(members: dict[str, bytes], kind: bytes = b"0", *, signed: bool = False) -> bytes:
    """A tar file from before POSIX: no magic, only the checksum says what it is."""
    out = b""
    for name, content in members.items():
        header = bytearray(512)
        raw = name.encode()
        header[: len(raw)] = raw
        header[100:124] = b"0000644\0" + b"0000000\0" * 2
        header[124:148] = b"%011o\0" % len(content) + b"00000000000\0"
        header[148:156] = b" " * 8
        header[156:157] = kind
        total = sum(header) - (256 * sum(byte > 127 for byte in header) if signed else 0)
        header[148:156] = b"%06o\0 " % total
        out += bytes(header) + content + bytes(-len(content) % 512)
    return out + bytes(1024)


@pytest.mark.parametrize("kind", [b"0", b"\0", b"7", b"S", b"Z"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_tar_without_a_magic_is_opened(tmp_path: Path, kind: bytes, signed: bool) -> None:
    content = _v7({"pickle\xe9" if signed else "pickle": HARMFUL, "b.pkl": HARMFUL}, kind, signed=signed)
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        assert len(file.getmembers()) == 2
    assert "dangerous-global" in codes(scanned(tmp_path / "old.pt", content))
    (tmp_path / "good.pkl").write_bytes(HARMLESS)
    assert "dangerous-global" in codes(scan(str(tmp_path)))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_today_are_opened(tmp_path: Path, kind: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as file:
        info = tarfile.TarInfo("b.pkl")
        info.size = len(HARMFUL)
        file.addfile(info, io.BytesIO(HARMFUL))
    assert codes(scanned(tmp_path / "m.tar", buffer.getvalue())) == {"dangerous-global"}


def test_an_old_tar_without_harm_is_clean(tmp_path: Path) -> None:
    assert scanned(tmp_path / "old.pt", _v7({"a.pkl": pickled({"a": 1}), "b.txt": b"text"})).ok


@pytest.mark.parametrize("at", [0, 20, 124, 150])
def test_a_block_with_another_checksum_is_not_a_tar(tmp_path: Path, at: int) -> None:
    content = bytearray(_v7({"pickle": HARMFUL}))
    content[at] ^= 1
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.bin").write_bytes(content)
    (tmp_path / "d" / "good.pkl").write_bytes(HARMLESS)
    assert scan(str(tmp_path / "d")).findings == []
