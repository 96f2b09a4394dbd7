"""Count the bytes that a test's local files read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_cli.files.source import LocalFile

if TYPE_CHECKING:
    import pytest


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the bytes of each read from now on; mapped ranges are not counted."""
    counts: list[int] = []
    read = LocalFile.read

    def counted(file: LocalFile, offset: int, nbytes: int) -> bytes:
        data = read(file, offset, nbytes)
        counts.append(nbytes)
        return data

    monkeypatch.setattr(LocalFile, "read", counted)
    return counts
