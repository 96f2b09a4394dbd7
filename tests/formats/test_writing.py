"""What all writers share: contents are appended by one class, and a new file is read back."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckpt_cli.formats.writing
from ckpt_cli.errors import CkptError, MalformedError
from ckpt_cli.files.source import Extent, LocalFile
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.writing import Appender, reading_back
from ckpt_cli.formats.zip.write import ZipWriter
from ckpt_cli.model.changes import Content

OLD = bytes(range(256)) * 16


def contents() -> list[Content]:
    """Ranges that follow each other, made bytes, and ranges that do not."""
    return [
        Content(12, extents=[Extent(0, 0, 5), Extent(0, 5, 7)]),
        Content(8, extents=[Extent(0, 12, 8)]),
        Content(6, make=lambda write: (write(b"abc"), write(b"def"))),
        Content(0, extents=()),
        Content(4, extents=[Extent(0, 100, 4)]),
    ]


WRITTEN = OLD[:20] + b"abcdef" + OLD[100:104]


@pytest.fixture
def old(tmp_path: Path) -> LocalFile:
    (tmp_path / "old").write_bytes(OLD)
    return LocalFile(str(tmp_path / "old"))


def test_contents_are_appended_and_ranges_that_follow_each_other_go_as_one(
    tmp_path: Path, old: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[int, int]] = []
    copy = ckpt_cli.formats.writing.copy_range

    def counted(source: LocalFile, begin: int, nbytes: int, target: LocalFile, at: int, progress: object) -> None:
        copied.append((begin, nbytes))
        copy(source, begin, nbytes, target, at, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(ckpt_cli.formats.writing, "copy_range", counted)
    done: list[int] = []
    with LocalFile(str(tmp_path / "new"), write=True, create=True) as target:
        out = Appender(target)
        out.append(b"head")
        out.append_contents(contents(), (old,), done.append)
        assert (out.position, target.size) == (4 + len(WRITTEN), 4 + len(WRITTEN))
    assert (tmp_path / "new").read_bytes() == b"head" + WRITTEN
    assert (copied, sum(done)) == ([(0, 20), (100, 4)], len(WRITTEN))


def test_without_a_file_the_same_bytes_are_counted_and_none_is_made(old: LocalFile) -> None:
    out = Appender(None)
    out.append_contents([*contents(), Content(1 << 40, make=lambda _: pytest.fail("made"))], (old,))
    assert out.position == len(WRITTEN) + (1 << 40)


@pytest.mark.parametrize("writer", [Appender, ZipWriter])
def test_made_bytes_that_are_too_few_are_an_error(tmp_path: Path, writer: type[Appender]) -> None:
    with (
        LocalFile(str(tmp_path / "new"), write=True, create=True) as target,
        pytest.raises(CkptError, match="came to 2"),
    ):
        writer(target).append_contents([Content(3, make=lambda write: write(b"ab"))], ())


def test_a_difference_that_is_found_while_reading_back_says_that_nothing_was_replaced(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "a.npy", np.zeros(3))
    with (
        pytest.raises(CkptError, match="did not read back as it should, so nothing was replaced: it is odd"),
        reading_back(str(tmp_path / "a.npy"), open_checkpoint),
    ):
        raise MalformedError("it is odd")
