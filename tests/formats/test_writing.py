"""What all writers share: contents are appended by one class, and a new file is read back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckpt_cli.formats.writing
from ckpt_cli.errors import CkptError, MalformedError
from ckpt_cli.files.copy import no_progress
from ckpt_cli.files.source import Extent, LocalFile
from ckpt_cli.formats import open_checkpoint, rewriting
from ckpt_cli.formats.writing import Appender, reading_back
from ckpt_cli.formats.zip.write import ZipWriter
from ckpt_cli.model.changes import Changes, Content

OLD = bytes(range(256)) * 16


def contents(old: LocalFile) -> list[Content]:
    """Ranges that follow each other, made bytes, and ranges that do not."""
    return [
        Content(12, extents=[Extent(old, 0, 5), Extent(old, 5, 7)]),
        Content(8, extents=[Extent(old, 12, 8)]),
        Content(6, make=lambda write: (write(b"abc"), write(b"def"))),
        Content(0, extents=()),
        Content(4, extents=[Extent(old, 100, 4)]),
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
        out.append_contents(contents(old), done.append)
        assert (out.position, target.size) == (4 + len(WRITTEN), 4 + len(WRITTEN))
    assert (tmp_path / "new").read_bytes() == b"head" + WRITTEN
    assert (copied, sum(done)) == ([(0, 20), (100, 4)], len(WRITTEN))


def test_without_a_file_the_same_bytes_are_counted_and_none_is_made(old: LocalFile) -> None:
    out = Appender(None)
    out.append_contents([*contents(old), Content(1 << 40, make=lambda _: pytest.fail("made"))])
    assert out.position == len(WRITTEN) + (1 << 40)


@pytest.mark.parametrize("writer", [Appender, ZipWriter])
def test_made_bytes_that_are_too_few_are_an_error(tmp_path: Path, writer: type[Appender]) -> None:
    with (
        LocalFile(str(tmp_path / "new"), write=True, create=True) as target,
        pytest.raises(CkptError, match="came to 2"),
    ):
        writer(target).append_contents([Content(3, make=lambda write: write(b"ab"))])


def test_a_difference_that_is_found_while_reading_back_says_that_nothing_was_replaced(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "a.npy", np.zeros(3))
    with (
        pytest.raises(CkptError, match="did not read back as it should, so nothing was replaced: it is odd"),
        reading_back(str(tmp_path / "a.npy"), open_checkpoint),
    ):
        raise MalformedError("it is odd")


_FAULTS = {
    "a dtype": ('"dtype":"F32"', '"dtype":"I32"', "'b' is int32"),
    "a shape": ('"shape":[2,3]', '"shape":[3,2]', "'b' is float32 (3, 2)"),
    "a name": ('"b":', '"c":', "its names"),
    "the places of bytes": ('"data_offsets":[24,48]', '"data_offsets":[0,24]', "elsewhere"),
}


@pytest.mark.parametrize("kind", _FAULTS)
def test_a_new_safetensors_file_that_differs_from_what_was_meant_replaces_nothing(kind: str, tmp_path: Path) -> None:
    old, new, problem = _FAULTS[kind]
    zeros = np.zeros((2, 3), np.float32)
    path, copy = str(tmp_path / "old.safetensors"), tmp_path / "new.safetensors"
    save_file({"a": zeros, "b": zeros, "z": zeros}, path)
    with closing(open_checkpoint(path)) as checkpoint:
        work = rewriting(checkpoint, Changes(names={"z": "y"}, rewrite=True))
        with LocalFile(str(copy), write=True, create=True) as target:
            work.write(target, no_progress)
        work.verify(str(copy))
        head, tail = copy.read_bytes().split(b'"b":')
        changed = (b'"b":' + tail).replace(old.encode(), new.encode(), 1)
        if kind == "the places of bytes":  # of two that change places
            head = head.replace(b"[0,24]", b"[24,48]")
        copy.write_bytes(head + changed)
        with pytest.raises(CkptError, match="nothing was replaced") as error:
            work.verify(str(copy))
    assert problem in str(error.value)
