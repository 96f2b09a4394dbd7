"""Distributed checkpoints whose metadata contradicts itself or is hostile are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dcp_files import CUTS, QUARTERS, WHOLE, Writer, values
from set_elements import edit
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.dcp.boxes import Box, Chunks


def _rename_file(name: str) -> Any:
    def change(writer: Writer) -> None:
        for info in writer.stored.values():
            info.relative_path = name

    return change


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    def change(writer: Writer) -> None:
        writer.listed["w"].chunks[0] = ChunkStorageMetadata(offsets, sizes)  # type: ignore[arg-type]

    return change


def _every(**fields: object) -> Any:
    def change(writer: Writer) -> None:
        for info in writer.stored.values():
            vars(info).update(fields)

    return change


def _listed(**fields: object) -> Any:
    return lambda writer: vars(writer.listed["w"]).update(fields)


CONTRADICTIONS = {
    "path-up": (_rename_file("../x"), "which is not a file of the folder"),
    "path-absolute": (_rename_file("/etc/passwd"), "which is not a file of the folder"),
    "path-dots": (_rename_file(".."), "which is not a file of the folder"),
    "path-nul": (_rename_file("a\0b"), "which is not a file of the folder"),
    "path-number": (_every(relative_path=3), "where it is, is"),
    "offset-negative": (_every(offset=-1), "where it is, is"),
    "offset-huge": (_every(offset=1 << 70), "where it is, is"),
    "length-bool": (_every(length=True), "where it is, is"),
    "length-beyond": (_every(length=1 << 40), "should be at bytes"),
    "transforms": (_every(transform_descriptors=3), "was transformed by 3"),
    "chunk-negative": (_chunk((-1, 0, 0), (4, 5, 3)), "shape or stride holds -1"),
    "chunk-beyond": (_chunk((5, 0, 0), (4, 5, 3)), "which reaches beyond it"),
    "chunk-overflow": (_chunk((1 << 63, 0, 0), (4, 5, 3)), "shape or stride holds"),
    "chunk-dims": (_chunk((0, 0), (4, 5)), "has a chunk of shape"),
    "size-overflow": (_listed(size=(1 << 40, 1 << 40)), "more elements than 64 bits can count"),
    "size-bytes-overflow": (_listed(size=(1 << 61, 2)), "more bytes than 64 bits can count"),
    "size-text": (_listed(size="abc"), "not a tuple of integers"),
    "chunks-none": (_listed(chunks=None), "its chunks are None"),
    "properties-none": (_listed(properties=None), "its properties are None"),
    "entry-none": (lambda writer: writer.listed.update(w=None), "neither a tensor nor a pickled value"),
    "key-number": (lambda writer: writer.listed.update({3: 4}), "where a name should be"),
    "index-number": (lambda writer: writer.stored.update({3: 4}), "is not an entry"),
    "listed-none": (lambda writer: setattr(writer, "listed", None), "lists no entries"),
    "stored-none": (lambda writer: setattr(writer, "stored", None), "does not say where its items are"),
}


@pytest.mark.parametrize(("change", "problem"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_metadata_that_contradicts_itself_is_refused_at_once(tmp_path: Path, change: Any, problem: str) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS)
    change(writer)
    path = writer.write()
    with pytest.raises((MalformedError, TruncatedError), match=problem) as refused:
        open_checkpoint(str(path))
    assert refused.value.path in (str(path / ".metadata"), str(path / "__0_0.distcp"))


def _without_place(writer: Writer) -> None:
    del writer.stored[MetadataIndex("w", (4, 1, 0))]


def _swapped(writer: Writer) -> None:
    one, other = MetadataIndex("w", (0, 0, 0)), MetadataIndex("w", (4, 1, 0))
    writer.stored[one], writer.stored[other] = writer.stored[other], writer.stored[one]


def _no_tensor(writer: Writer) -> None:
    writer.stored[MetadataIndex("w", (0, 0, 0))] = writer.item({"a": torch.ones(2)})


LATE = {
    "hole": (lambda writer: writer.listed["w"].chunks.pop(), "its chunks have 102 of its 144 elements"),
    "no-chunks": (lambda writer: writer.listed["w"].chunks.clear(), "its chunks have 0 of its 144 elements"),
    "overlap": (lambda writer: writer.listed["w"].chunks.append(writer.listed["w"].chunks[0]), "two of its chunks"),
    "overlap-and-hole": (_chunk((0, 4, 0), (4, 4, 3)), "two of its chunks overlap"),
    "no-place": (_without_place, r"nothing says where its chunk at \[4, 1, 0\] is"),
    "swapped": (_swapped, r"should be float64 of shape \[4, 5, 3\], it is float64 of shape \[2, 7, 3\]"),
    "no-tensor": (_no_tensor, "its item is not a tensor"),
    "into-it": (_every(offset=3), "begins neither a torch.save file nor safetensors"),
    "dtype": (
        lambda writer: setattr(writer.listed["w"].properties, "dtype", torch.int64), "should be int64 of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), LATE.values(), ids=LATE)
def test_chunks_that_are_not_as_they_should_be_are_told_when_asked_for(
    tmp_path: Path, change: Any, problem: str
) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS)
    change(writer)
    writer.data += bytes(64)
    path = writer.write()
    assert [tensor.name for tensor in open_checkpoint(str(path)).tensors] == ["w"]
    with pytest.raises(MalformedError, match=problem) as refused:
        values(path)
    assert "\n" not in str(refused.value)


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS)
    writer.listed["x"] = writer.listed["w"]
    path = writer.write()
    data = (path / ".metadata").read_bytes()
    assert data.count(b"\x8c\x01x") == 1
    (path / ".metadata").write_bytes(data.replace(b"\x8c\x01x", b"\x8c\x01w"))
    with pytest.raises(MalformedError, match="two entries called 'w'"):
        open_checkpoint(str(path))


def _state(fields: bytes) -> bytes:
    """A pickled `Metadata` with the given pairs as its state."""
    head = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93)\x81}("
    assert len("torch.distributed.checkpoint.metadata") == 0x25
    return head + fields + b"ub."


SD, ST = b"\x8c\x13state_dict_metadata", b"\x8c\x0cstorage_data"
TENSOR = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x15TensorStorageMetadata\x93)\x81"

HOSTILE = {
    "cyclic": _state(SD + b"}\x94(\x8c\x01ah\x00u" + ST + b"}"),
    "deep": _state(SD + b"}(\x8c\x01a" + b"]" * 50_000 + b"a" * 49_999 + b"u" + ST + b"}"),
    "no-fields": _state(SD + b"}(\x8c\x01a" + TENSOR + b"u" + ST + b"}"),
    "a-call-as-metadata": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x06system\x93\x8c\x02ls\x85R.",
    "wide-state": _state(SD + b"}" + ST + b"}" + b"".join(b"\x8c\x03%03dN" % n for n in range(100))),
    "odd-state": _state(SD + b"}" + ST + b"}" + b"K\x01K\x02"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CkptError) as refused:
        open_checkpoint(str(tmp_path))
    assert len(str(refused.value)) < 1000
    assert refused.value.path == str(tmp_path / ".metadata")


def test_chunks_shared_by_all_tensors_are_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNKS", 10_000)
    writer = Writer(tmp_path / "d")
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))
    shared = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([8]), [chunk] * 2000)
    writer.listed = {f"w{number}": shared for number in range(2000)}
    with pytest.raises(LimitError):
        open_checkpoint(str(writer.write()))


def test_comparing_chunks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_PAIRS", 1000)
    boxes = [Box((0, 0), (100, 1)), *(Box((row, 1), (100 - row, 1)) for row in range(100))]
    with pytest.raises((LimitError, MalformedError)):
        Chunks((100, 200), boxes).meeting(0, 1)


def test_a_grid_of_many_chunks_is_checked_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_PAIRS", 100 * 100 * 100)
    grid = Chunks((100, 100), [Box((row, column), (1, 1)) for row in range(100) for column in range(100)])
    assert grid.meeting(205, 206) == range(205, 206)
    columns = Chunks((2, 10_000), [Box((0, column), (2, 1)) for column in range(10_000)])
    assert 17 in columns.meeting(17, 18)


def test_elements_scattered_without_end_are_not_set_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Writer(tmp_path / "d").tensor("w", WHOLE, CUTS["last"]).write()
    monkeypatch.setattr(limits, "SCATTERED", 50)
    old = (path / "__0_0.distcp").read_bytes()
    with pytest.raises(UnsupportedError, match="in so many pieces"):
        edit(path, "w=1")
    assert (path / "__0_0.distcp").read_bytes() == old
    edit(path, "w[0]=1")
