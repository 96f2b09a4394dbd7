"""Pending patches, against a bytearray that is simply written."""

from __future__ import annotations

import tempfile
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli.files import crc32
from ckpt_cli.files import patches as overlay_module
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile

SIZE = 200

writes = st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=60)), max_size=12)


def over(content: bytes, folder: str) -> Overlay:
    """An overlay over a file of some content."""
    path = Path(folder) / "a"
    path.write_bytes(content)
    return Overlay([LocalFile(str(path))])


@settings(max_examples=most(300), deadline=None)
@given(st.binary(min_size=SIZE, max_size=SIZE), writes, st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)))
def test_reads_see_every_write_and_the_patches_bring_it_about(
    content: bytes, edits: list[tuple[int, bytes]], span: tuple[int, int]
) -> None:
    model = bytearray(content)
    with tempfile.TemporaryDirectory() as folder:
        overlay = over(content, folder)
        for offset, data in edits:
            piece = data[: SIZE - offset]
            overlay.write(overlay.files[0], offset, piece)
            model[offset : offset + len(piece)] = piece
        begin, end = min(span), max(span)
        assert overlay.read(overlay.files[0], begin, end - begin) == model[begin:end]
        patches = overlay.patches(overlay.files[0])
        assert all(a.end <= b.offset for a, b in pairwise(patches))
        applied = bytearray(content)
        for patch in patches:
            applied[patch.offset : patch.end] = overlay.new_bytes(patch)
            assert overlay.old_bytes(overlay.files[0], patch) == content[patch.offset : patch.end]
        assert applied == model
        assert overlay.nbytes == sum(patch.nbytes for patch in patches)


def test_writing_what_stands_there_makes_no_patch(tmp_path: Path) -> None:
    overlay = over(b"abcdef", str(tmp_path))
    overlay.write(overlay.files[0], 1, b"bcd")
    assert not overlay
    overlay.write(overlay.files[0], 1, b"bXd")
    assert overlay


def test_much_data_goes_to_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay_module, "IN_MEMORY", 1000)
    monkeypatch.setattr(overlay_module, "CHUNK", 300)
    overlay = over(bytes(5000), str(tmp_path))
    data = bytes(range(1, 251)) * 20
    overlay.write(overlay.files[0], 0, data)
    assert max(patch.nbytes for patch in overlay.patches(overlay.files[0])) == 300
    assert overlay.read(overlay.files[0], 0, 5000) == data
    overlay.write(overlay.files[0], 2500, b"\0" * 100)
    assert overlay.read(overlay.files[0], 2400, 300) == data[2400:2500] + bytes(100) + data[2600:2700]
    overlay.close()


@settings(max_examples=most(200), deadline=None)
@given(st.binary(max_size=300), st.binary(min_size=1, max_size=50), st.binary(max_size=300), st.data())
def test_a_crc_changes_by_what_the_patch_alone_tells(
    before: bytes, old: bytes, after: bytes, data: st.DataObject
) -> None:
    new = data.draw(st.binary(min_size=len(old), max_size=len(old)))
    whole, patched = zlib.crc32(before + old + after), zlib.crc32(before + new + after)
    assert whole ^ crc32.change(old, new, len(after)) == patched


def test_a_crc_of_100_gb_takes_no_longer() -> None:
    far = 100 * 10**9
    near = crc32.change(b"old!", b"new!", 1000)
    assert crc32.change(b"old!" + bytes(1000), b"new!" + bytes(1000), 0) == near
    first = crc32.change(b"a", b"b", far)
    assert crc32.change(b"a" + b"zz", b"b" + b"zz", far - 2) == first
    with pytest.raises(ValueError, match="the number of bytes"):
        crc32.change(b"a", b"bc", 0)
