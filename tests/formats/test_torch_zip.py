"""Torch's zip files: the builder against torch's writer, and our reader against torch's and Python's zipfile."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pt
from builders.pickles import Ops, call, named, ordered_dict, parameter, pickled, tensor, tensor_v3
from builders.pt import DEFLATED, Record, archive, torch_records
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.errors import (
    CkptError,
    LimitError,
    MalformedError,
    TruncatedError,
    UnknownFormatError,
    UnsupportedError,
)
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.torch_zip import read as zip_file
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint
from tests.support.counting import counted_reads

ROOT = {"a": tensor("0", (2, 3)), "b": parameter(tensor("1", (4,))), "c": tensor("0", (6,)), "n": 7}
FIRST, SECOND = torch.arange(6.0), torch.arange(4.0) - 2
STORAGES = {"0": FIRST.numpy().tobytes(), "1": SECOND.numpy().tobytes()}
STATE = {"a": FIRST.reshape(2, 3), "b": SECOND, "c": FIRST}


def records(**options: Any) -> list[Record]:
    """A sound file's."""
    return torch_records(ROOT, STORAGES, **options)


def changed(name: str, of: list[Record] | None = None, **fields: Any) -> list[Record]:
    """A sound file's records, some fields of one changed."""
    return [replace(record, **fields) if record.name == f"archive/{name}" else record for record in of or records()]


def opened(folder: Path, content: bytes) -> Checkpoint:
    """A file of that content, opened."""
    path = folder / "archive.pt"
    path.write_bytes(content)
    return open_checkpoint(str(path))


def holds_state(checkpoint: Checkpoint) -> None:
    """Compare every tensor with what was built."""
    assert [entry.name for entry in checkpoint.entries] == ["a", "b", "c", "n"]
    for mine in checkpoint.tensors:
        assert values_of(checkpoint, mine).tolist() == STATE[mine.name].tolist()


def test_the_builder_writes_what_torch_writes(tmp_path: Path) -> None:
    for number, item in enumerate([{"a": torch.ones(3), "b": torch.empty(0)}, [1, 2], {"x": torch.zeros(1000)}]):
        path = tmp_path / f"by.torch.{number}.pt"
        torch.save(item, path)
        with zipfile.ZipFile(path) as theirs:
            names = [info.filename.split("/", 1) for info in theirs.infolist()]
            contents = {name: theirs.read(f"{prefix}/{name}") for prefix, name in names}
        storages = {name[5:]: content for name, content in contents.items() if name.startswith("data/")}
        mine = archive(
            torch_records(contents["data.pkl"], storages, prefix=f"by.torch.{number}",
                          serialization_id=contents[".data/serialization_id"])
        )  # fmt: skip
        assert mine == path.read_bytes()


# name: the file, and whether torch loads it too
SOUND: dict[str, tuple[Callable[[], bytes], bool]] = {
    "as torch writes it": (lambda: archive(records()), True),
    "of older torch": (lambda: archive(records(layout=False, byteorder=None, serialization_id=None)), True),
    "a prefix with dots": (lambda: archive(records(prefix="epoch=1.step=2.ckpt")), True),
    "a prefix that is no ASCII": (lambda: archive(records(prefix="modèle 😀")), True),
    "records in another order": (lambda: archive([records()[0], *records()[:0:-1]]), True),
    "the pickle last": (lambda: archive([*records()[1:], records()[0]]), True),
    "CRCs not computed": (lambda: archive([replace(r, crc=0) for r in records()]), True),
    "CRCs that are wrong": (lambda: archive([replace(r, crc=7) for r in records()]), True),
    "no descriptors": (lambda: archive([replace(r, described=False) for r in records()]), True),
    "zip64 fields": (lambda: archive([replace(r, zip64=True) for r in records()]), True),
    "no zip64 end record": (lambda: archive(records(), end64=False), True),
    "not aligned": (lambda: archive(records(), alignment=1), True),
    "comments": (lambda: archive([replace(r, comment=b"hello") for r in records()], comment=b"and this"), True),
    "a comment of 60 KB": (lambda: archive(records(), comment=b"c" * 60_000), True),
    "junk at the end": (lambda: archive(records()) + b"junk" * 100, True),
    "a deflated pickle": (lambda: archive(changed("data.pkl", method=DEFLATED)), True),
    "deflated storages": (
        lambda: archive(changed("data/0", changed("data/1", method=DEFLATED), method=DEFLATED)),
        True,
    ),
    "all deflated": (lambda: archive([replace(r, method=DEFLATED) for r in records()]), True),
    "big-endian that is little": (lambda: archive(records(byteorder=b"little")), True),
    "a record that is longer": (lambda: archive(changed("data/0", content=STORAGES["0"] + b"more")), False),
    "no version": (lambda: archive(records(version=None)), False),
    "a stray record": (lambda: archive([*records(), Record("elsewhere/x", b"x")]), False),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_is_read_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    build, torch_too = SOUND[name]
    checkpoint = opened(tmp_path, build())
    holds_state(checkpoint)
    assert checkpoint.format == "zip"
    assert checkpoint.tensors[0].storage is checkpoint.tensors[2].storage
    if torch_too:
        theirs = torch.load(checkpoint.path)
        assert all(torch.equal(theirs[name], expected) for name, expected in STATE.items())
    else:
        with pytest.raises(RuntimeError):
            torch.load(checkpoint.path)


def test_the_version_is_told(tmp_path: Path) -> None:
    assert opened(tmp_path, archive(records())).version == "torch.save zip, version 3"
    assert opened(tmp_path, archive(records(version=None))).version == "torch.save zip, version not given"


def test_big_endian_bytes_are_swapped_as_torch_swaps_them(tmp_path: Path) -> None:
    wide = torch.tensor([1.5, -2.0, 3.0])
    small, new = torch.arange(3, dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint16)
    complexes = torch.tensor([1 + 2j, 3 - 4j, 0.5j])
    storages = {
        "0": wide.numpy().astype(">f4").tobytes(),
        "1": small.numpy().tobytes(),
        "2": new.numpy().tobytes(),
        "3": complexes.numpy().astype(">c8").tobytes(),
    }
    root = {"wide": tensor("0", (3,)), "small": tensor("1", (3,), "Byte"), "new": tensor_v3("2", (3,), "uint16", 6),
            "complexes": tensor("3", (3,), "ComplexFloat")}  # fmt: skip
    checkpoint = opened(tmp_path, archive(torch_records(root, storages, byteorder=b"big")))
    theirs = torch.load(checkpoint.path, weights_only=False)
    for mine in checkpoint.tensors:
        assert values_of(checkpoint, mine).tolist() == theirs[mine.name].tolist()
    assert [mine.big_endian for mine in checkpoint.tensors] == [True, False, False, True]


@pytest.mark.parametrize("method", [pt.STORED, DEFLATED])
def test_ranges_of_a_storage_are_those_of_its_content(method: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * 20
    root = {"a": tensor("0", (len(content),), "Byte")}
    of = torch_records(root, {"0": content})
    storage = opened(tmp_path, archive(changed("data/0", of, method=method))).tensors[0].storage
    assert storage is not None
    assert storage.nbytes == len(content)
    for begin, length in [(0, 0), (0, 10), (5000, 120), (4000, 20), (4010, 5), (0, len(content)), (len(content), 0)]:
        assert bytes(storage.view(begin, length)) == content[begin : begin + length]


def test_an_extent_is_where_the_bytes_are(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, archive(records()))
    raw = Path(checkpoint.path).read_bytes()
    for mine in checkpoint.tensors:
        assert mine.storage is not None
        (extent,) = mine.storage.extents(0, mine.storage.nbytes)
        assert raw[extent.offset : extent.offset + extent.nbytes] == STORAGES[mine.storage.key]
        assert extent.offset % 64 == 0


def test_a_compressed_storage_has_no_extent(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, archive(changed("data/1", method=DEFLATED)))
    storage = checkpoint.tensors[1].storage
    assert storage is not None
    with pytest.raises(UnsupportedError, match="storage '1' is compressed"):
        storage.extents(0, 1)


# --- what is refused, at once or when the bytes are asked for --------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], bytes], type[CkptError], str]] = {
    "a storage without record": (lambda: archive([r for r in records() if r.name != "archive/data/1"]),
                                 MalformedError, "storage '1' has no record 'archive/data/1'"),
    "a record that is shorter": (lambda: archive(changed("data/1", content=bytes(15))), MalformedError,
                                 "storage '1' should have 16 bytes, its record has 15"),
    "a record twice": (lambda: archive([*records(), Record("archive/data/0", bytes(24))]), MalformedError,
                       "two records called 'archive/data/0'; readers differ"),
    "another prefix than the first": (lambda: archive([Record("other/x"), *records()]), UnknownFormatError,
                                      "a zip file, but not one of torch.save's: it has no other/data.pkl"),
    "no prefix": (lambda: archive([Record("data.pkl", pickled(ROOT))]), UnknownFormatError, "it has no data.pkl"),
    "an odd byteorder": (lambda: archive(records(byteorder=b"middle")), MalformedError,
                         "its byteorder record says b'middle'"),
    "a long byteorder": (lambda: archive(records(byteorder=b"little" + bytes(70_000))), MalformedError,
                         "its byteorder record has 70006 bytes"),
    "an empty pickle": (lambda: archive(changed("data.pkl", content=b"")), TruncatedError, "ends before its STOP"),
    "a pickle that is none": (lambda: archive(changed("data.pkl", content=b"hello")), MalformedError, "the pickle"),
    "an encrypted record": (lambda: archive(changed("data/0", flags=0x809)), UnsupportedError, "is encrypted"),
    "bzip2": (lambda: archive(changed("data/0", method=12)), MalformedError, "(method 12) that torch never writes"),
    "no records": (lambda: archive([], end64=False), MalformedError, "a zip file without records"),
    "no end": (lambda: archive(records())[:-22], TruncatedError, "the write or the download was cut short"),
    "junk in front of the directory": (lambda: archive(records(), directory_offset=7), MalformedError, "no record at"),
    "a count that lies": (lambda: archive(records(), count=3), MalformedError, "goes on after the last"),
    "a spelled-out zip64 without its end": (lambda: archive(records(), count=0xFFFF, end64=False), MalformedError,
                                            "points to a zip64 end record that is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_sound_one_is_refused(name: str, tmp_path: Path) -> None:
    build, kind, words = REFUSED[name]
    with pytest.raises(kind) as refused:
        opened(tmp_path, build())
    assert words in str(refused.value)
    assert refused.value.path == str(tmp_path / "archive.pt")


LATE: dict[str, tuple[Callable[[], list[Record]], str]] = {
    "another name": (lambda: changed("data/0", local_name="archive/data/9"), "is called 'archive/data/9' in its local"),
    "another method": (lambda: changed("data/0", local_method=DEFLATED), "has another local header"),
    "bytes of the next record": (lambda: changed("data/0", stored=90, nbytes=90), "reaches into the next one"),
    "a stream that ends early": (lambda: changed("data/0", method=DEFLATED, data=pt.deflated(b"short"), nbytes=24),
                                 "inflates to 5 bytes only"),
    "a stream that is none": (lambda: changed("data/0", method=DEFLATED, data=b"\xff" * 30, nbytes=24),
                              "does not inflate"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_a_storage_whose_header_lies_is_refused_when_it_is_read(name: str, tmp_path: Path) -> None:
    build, words = LATE[name]
    checkpoint = opened(tmp_path, archive(build()))
    with pytest.raises(CkptError) as refused:
        values_of(checkpoint, checkpoint.tensors[0])
    assert words in str(refused.value)
    assert refused.value.path == checkpoint.path


def test_a_long_compressed_range_is_not_inflated_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_AT_ONCE", 1000)
    of = torch_records({"a": tensor("0", (2000,), "Byte")}, {"0": bytes(2000)})
    checkpoint = opened(tmp_path, archive(changed("data/0", of, method=DEFLATED)))
    storage = checkpoint.tensors[0].storage
    assert storage is not None
    assert len(storage.view(500, 1000)) == 1000
    with pytest.raises(LimitError):
        storage.view(0, 1001)


def test_a_storage_is_what_its_first_reference_says(tmp_path: Path) -> None:
    for first, second, words in [
        (tensor("0", (2,)), tensor("0", (4,)), "has 8 bytes in one place and 16 in another"),
        (tensor("0", (4,)), tensor("0", (4,), "Int"), "is float32 in one place and int32 in another"),
    ]:
        with pytest.raises(MalformedError, match=words):
            opened(tmp_path, archive(torch_records([first, second], STORAGES)))
    checkpoint = opened(tmp_path, archive(torch_records([tensor("0", (4,)), tensor("0", (2,))], STORAGES)))
    assert checkpoint.tensors[0].storage is checkpoint.tensors[1].storage


def test_a_record_beyond_4_gb_is_found(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():  # which leaves holes that take no room
        torch.save({"far": torch.empty(5 << 28), "last": torch.empty(3)}, path)
    checkpoint = open_checkpoint(str(path))
    last = checkpoint.tensors[1]
    assert last.storage is not None
    (extent,) = last.storage.extents(0, last.storage.nbytes)
    assert extent.offset > 5 << 30
    with path.open("r+b") as file:
        file.seek(extent.offset)
        file.write(FIRST[3:].numpy().tobytes())
    assert values_of(checkpoint, last).tolist() == [3, 4, 5]
    assert torch.load(path, mmap=True)["last"].tolist() == [3, 4, 5]


# --- records against zipfile -----------------------------------------------------------------------------------------

RECORDS = st.lists(
    st.builds(
        Record,
        name=st.text(st.characters(codec="utf-8", exclude_characters="\0\\"), min_size=1, max_size=8),
        content=st.binary(max_size=40),
        method=st.sampled_from([pt.STORED, DEFLATED]),
        zip64=st.booleans(),
        comment=st.binary(max_size=5).filter(lambda comment: b"PK" not in comment),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda record: record.name,
)


@settings(max_examples=most(150), deadline=None)
@given(RECORDS, st.booleans(), st.sampled_from([b"", b"bye", b"x" * 300]), st.sampled_from([1, 64]))
def test_records_are_those_that_zipfile_finds(
    tmp_path_factory: pytest.TempPathFactory, made: list[Record], end64: bool, comment: bytes, alignment: int
) -> None:
    content = archive(made, end64=end64, comment=comment, alignment=alignment)
    path = tmp_path_factory.getbasetemp() / "random.zip"
    path.write_bytes(content)
    with LocalFile(str(path)) as file, zipfile.ZipFile(io.BytesIO(content)) as theirs:
        mine = ZipRecords(file)
        assert list(mine.by_name) == [info.filename for info in theirs.infolist()]
        for info in theirs.infolist():
            assert bytes(mine.read(info.filename, 1 << 20)) == theirs.read(info)


def test_a_python_zip_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("readme.txt", "hello")
    with pytest.raises(UnknownFormatError, match=r"a zip file, but not one of torch\.save's"):
        opened(tmp_path, buffer.getvalue())


def test_a_file_that_zipfile_wrote_again_is_read(tmp_path: Path) -> None:
    """As people do who repair a file: other flags, names, times and CRCs in the local headers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for record in records():
            made.writestr(str(record.name), record.content)
    checkpoint = opened(tmp_path, buffer.getvalue())
    holds_state(checkpoint)
    assert torch.equal(torch.load(checkpoint.path)["a"], STATE["a"])


def test_only_the_directory_and_the_pickle_are_read_to_open_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted_reads(monkeypatch)
    content = archive(torch_records({"a": tensor("0", (1 << 20,), "Byte")}, {"0": bytes(1 << 20)}))
    path = tmp_path / "archive.pt"
    path.write_bytes(content)
    with LocalFile(str(path)) as file:
        zip_file.read(file)
        assert 0 < sum(counts) < 2000


def test_a_call_that_is_no_tensor_reads_no_storage(tmp_path: Path) -> None:
    """A persistent id that no tensor refers to is not looked up: what it says is harmless."""
    root = {"a": call("lab.made", Ops(b"(" + named("torch.FloatStorage") + b"tQ")), "b": ordered_dict()}
    checkpoint = opened(tmp_path, archive(torch_records(root, {})))
    assert [entry.name for entry in checkpoint.entries] == ["a", "b"]
