"""Distributed checkpoints: what `.metadata` says, chunks, items, and what a hostile one gets."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import dcp_formats
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_cli import limits, load
from ckpt_cli.arrays.codec import values_of
from ckpt_cli.cli.main import run
from ckpt_cli.edits.patching import Edit, edit_values
from ckpt_cli.edits.set_tensors import Changes, assign
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError, UnsupportedError
from ckpt_cli.files.patches import Overlay
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.dcp.boxes import Box, Chunks, boxes_of_range
from ckpt_cli.formats.dcp.items import Items
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Value
from ckpt_cli.ops.ls import list_entries

Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and sizes of a chunk."""


def edit(path: Path, *assignments: str, output: Path | None = None) -> Edit:
    """What `ckpt set` does."""

    def plan(checkpoint: Checkpoint, overlay: Overlay) -> Changes:
        return assign(checkpoint, overlay, assignments)

    return edit_values(str(path), plan, output=None if output is None else str(output))


def values(path: Path, name: str = "w") -> torch.Tensor:
    """What `ckpt` reads."""
    checkpoint = open_checkpoint(str(path))
    (tensor,) = [tensor for tensor in checkpoint.tensors if tensor.name == name]
    found = torch.from_numpy(values_of(checkpoint, tensor).copy())
    checkpoint.close()
    return found


class Writer:
    """Writes one `.metadata` and one file of items, each as torch's classes and torch.save write them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: dict[str, Any] = {}
        self.stored: dict[MetadataIndex, _StorageInfo] = {}
        self.data = b""
        self.planner_data: Any = {}

    def item(self, value: object) -> _StorageInfo:
        """Where an object is saved from now on."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        info = _StorageInfo("__0_0.distcp", len(self.data), len(buffer.getvalue()))
        self.data += buffer.getvalue()
        return info

    def tensor(self, name: str, whole: torch.Tensor, cuts: list[Cut]) -> Writer:
        """Add a tensor in chunks."""
        chunks = []
        for offsets, sizes in cuts:
            box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
            self.stored[MetadataIndex(name, offsets)] = self.item(whole[box].clone())
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self.listed[name] = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
        return self

    def write(self) -> Path:
        """Write both files."""
        self.path.mkdir(exist_ok=True)
        meta = StorageMeta()
        metadata = Metadata(self.listed, self.planner_data, self.stored, meta, "1.0.0")
        (self.path / ".metadata").write_bytes(pickle.dumps(metadata, 4))
        (self.path / "__0_0.distcp").write_bytes(self.data)
        return self.path


WHOLE = torch.arange(6 * 8 * 3, dtype=torch.float64).reshape(6, 8, 3)
QUARTERS: list[Cut] = [
    ((0, 0, 0), (4, 5, 3)), ((0, 5, 0), (4, 3, 3)), ((4, 0, 0), (2, 1, 3)), ((4, 1, 0), (2, 7, 3)),
]  # fmt: skip
CUTS: dict[str, list[Cut]] = {
    "one": [((0, 0, 0), (6, 8, 3))],
    "rows": [((0, 0, 0), (1, 8, 3)), ((1, 0, 0), (5, 8, 3))],
    "columns": [((0, 0, 0), (6, 3, 3)), ((0, 3, 0), (6, 5, 3))],
    "last": [((0, 0, 0), (6, 8, 1)), ((0, 0, 1), (6, 8, 2))],
    "quarters": QUARTERS,
    "empty": [*QUARTERS, ((6, 8, 3), (0, 0, 0))],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.complex128], ids=str)
def test_chunks_of_any_cut_are_one_tensor(tmp_path: Path, cuts: list[Cut], dtype: torch.dtype) -> None:
    whole = WHOLE.to(dtype)
    path = Writer(tmp_path / "d").tensor("w", whole, cuts).write()
    assert torch.equal(values(path), whole)
    assert torch.equal(dcp_formats.read(path)["w"], whole)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_every_range_of_bytes_is_gathered_and_found(tmp_path: Path, cuts: list[Cut]) -> None:
    checkpoint = open_checkpoint(str(Writer(tmp_path / "d").tensor("w", WHOLE, cuts).write()))
    (tensor,) = checkpoint.tensors
    storage = tensor.storage
    assert storage is not None
    assert storage.composed == (len(cuts) > 1)
    raw = WHOLE.numpy().tobytes()
    container = checkpoint.container
    for begin in range(0, len(raw), 37):
        for end in range(begin, len(raw) + 1, 53):
            assert bytes(storage.view(begin, end - begin)) == raw[begin:end]
            extents = container.extents(storage, begin, end - begin)
            with_files = b"".join(container.files[e.file].read(e.offset, e.nbytes) for e in extents)
            assert with_files == raw[begin:end]


def test_boxes_of_a_range_are_its_elements_in_order() -> None:
    shape = (3, 1, 4, 2)
    index = torch.arange(24).reshape(shape)
    for begin in range(25):
        for end in range(begin, 25):
            boxes = boxes_of_range(shape, begin, end)
            assert len(boxes) <= 2 * len(shape)
            got = [
                index[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].flatten()
                for box in boxes
            ]
            assert torch.equal(torch.cat([*got, index.new_empty(0)]), torch.arange(begin, end))


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_set_writes_through_chunks_and_keeps_every_checksum(tmp_path: Path, cuts: list[Cut]) -> None:
    path = Writer(tmp_path / "d").tensor("w", WHOLE, cuts).tensor("v", WHOLE, CUTS["one"]).write()
    edit(path, "w[1:5,2:7,1]=-1", "w[0]*=2")
    expected = WHOLE.clone()
    expected[1:5, 2:7, 1] = -1
    expected[0] *= 2
    assert torch.equal(values(path), expected)
    assert torch.equal(dcp_formats.read(path)["w"], expected)
    assert torch.equal(dcp_formats.read(path)["v"], WHOLE)
    check_checksums(path)


def check_checksums(path: Path) -> None:
    """Have zipfile verify every record of every item."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        data = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            assert opened.testzip() is None


def test_a_transposed_tensor_that_torch_saved_is_in_order(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3).t()
    dcp_formats.save({"w": whole}, tmp_path / "d")
    assert torch.equal(values(tmp_path / "d"), whole)
    edit(tmp_path / "d", "w[2,0]=9")
    assert dcp_formats.read(tmp_path / "d")["w"][2, 0] == 9
    check_checksums(tmp_path / "d")


@pytest.mark.parametrize("options", [{"single_file_per_rank": False}, {"thread_count": 2}], ids=str)
def test_many_files_of_one_rank_are_one_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    state = {"a": torch.ones(3), "b": {"c": torch.arange(4)}, "epoch": 3}
    dcp_formats.save(state, tmp_path / "d", **options)
    assert torch.equal(values(tmp_path / "d", "b.c"), torch.arange(4))
    edit(tmp_path / "d", "a=5", "b.c[1]=7")
    found = dcp_formats.read(tmp_path / "d")
    assert (found["a"].tolist(), found["b"]["c"].tolist(), found["epoch"]) == ([5, 5, 5], [0, 7, 2, 3], 3)


def test_a_mesh_of_four_ranks_is_one_checkpoint(tmp_path: Path) -> None:
    state = {"0.weight": torch.randn(6, 4), "4.columns": torch.arange(35).reshape(5, 7), "3.scale": torch.randn(4)}
    dcp_formats.save_ranks(state, tmp_path / "d", 4)
    for name, tensor in state.items():
        assert torch.equal(values(tmp_path / "d", name), tensor)
    edit(tmp_path / "d", "4.columns=-1")
    assert dcp_formats.read(tmp_path / "d")["4.columns"].eq(-1).all()
    check_checksums(tmp_path / "d")


def test_values_are_plain_data_or_their_text(tmp_path: Path) -> None:
    state = {
        "epoch": 3, "lr": [0.1, 0.2], "name": "run", "none": None, "odd": {1, 2}, "pair": (1, {"a": 2}),
        "w": torch.nn.Parameter(torch.ones(2)), "groups": [{"lr": 0.5, "params": [0, 1]}],
    }  # fmt: skip
    dcp_formats.save(state, tmp_path / "d")
    checkpoint = open_checkpoint(str(tmp_path / "d"))
    found = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert found["epoch"] == 3
    assert found["lr"] == [0.1, 0.2]
    assert found["name"] == "run"
    assert found["none"] is None
    assert found["odd"] == Opaque("__builtin__.set([1, 2])")
    assert found["pair"] == Opaque("(1, {'a': 2})")
    assert found["groups.0.lr"] == 0.5
    assert found["groups.0.params"] == [0, 1]
    (tensor,) = checkpoint.tensors
    assert tensor.requires_grad
    assert list(checkpoint.top_level) == list(state)
    assert checkpoint.version == "torch.distributed.checkpoint 1.0.0, 1 rank"
    assert not checkpoint.objects


def test_what_the_metadata_would_import_beyond_torchs_own_is_told(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS)
    writer.planner_data = {"w": print}
    assert list(open_checkpoint(str(writer.write())).objects) == ["builtins.print"]


def test_a_tree_is_that_of_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp_formats.save({"fc": {"weight": torch.ones(4, 3), "bias": torch.ones(4)}}, tmp_path / "d")
    assert run(["tree", str(tmp_path / "d")]) == 0
    assert "(fc): Linear(in_features=3, out_features=4, bias=True)" in capsys.readouterr().out


def test_load_joins_chunks(tmp_path: Path) -> None:
    assert torch.equal(load(str(Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).write()))["w"], WHOLE)


def test_listed_values_outlive_the_open_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp_formats.save({"epoch": 3, "w": torch.ones(2)}, tmp_path / "d")
    assert run(["ls", "-a", str(tmp_path / "d")]) == 0
    assert "epoch\tint" in capsys.readouterr().out


def test_a_large_value_is_not_read(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "d")
    writer.listed["blob"] = BytesStorageMetadata()
    writer.stored[MetadataIndex("blob")] = writer.item("x" * (limits.ITEM_BYTES + 1))
    (entry,) = open_checkpoint(str(writer.write())).entries
    assert isinstance(entry, Value)
    assert isinstance(entry.value, Opaque)
    assert entry.value.text.endswith(" bytes>")


def test_values_at_one_place_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ITEMS_READ", 10_000)
    writer = Writer(tmp_path / "d")
    info = writer.item([0.5] * 100)
    for number in range(1000):
        writer.listed[f"v{number}"] = BytesStorageMetadata()
        writer.stored[MetadataIndex(f"v{number}")] = info
    checkpoint = open_checkpoint(str(writer.write()))
    (first, *_) = checkpoint.entries
    assert isinstance(first, Value)
    assert all(first.value == [0.5] * 100 for _ in range(1000))
    with pytest.raises(LimitError, match="many are said to be at one place"):
        list_entries(checkpoint, values=True)


def test_a_pickle_that_inflates_is_not_read(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "d")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 1_000_000 + b"N.")
    writer.data = buffer.getvalue()
    writer.listed["v"] = BytesStorageMetadata()
    writer.stored[MetadataIndex("v")] = _StorageInfo("__0_0.distcp", 0, len(writer.data))
    with pytest.raises(LimitError, match="has a pickle of 2000004 bytes"):
        list_entries(open_checkpoint(str(writer.write())), values=True)


def test_listing_opens_no_item_and_reads_only_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path / "d")
    cuts: list[Cut] = [((rank,), (1,)) for rank in range(8)]
    info = writer.item(torch.ones(1))
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in cuts]
    for number in range(1000):
        name = f"layers.{number}.weight"
        writer.listed[name] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([8]), chunks)
        writer.stored.update({MetadataIndex(name, offsets): info for offsets, _ in cuts})
    path = writer.write()

    def never(*_: object) -> None:
        raise AssertionError("an item was opened")

    monkeypatch.setattr(Items, "tensor", never)
    monkeypatch.setattr(Items, "value", never)
    checkpoint = open_checkpoint(str(path))
    listing = list_entries(checkpoint)
    assert (listing.tensors, listing.parameters) == (1000, 8000)
    assert sum(file.bytes_read for file in checkpoint.container.files) < 600 + (path / ".metadata").stat().st_size


def test_the_metadata_itself_can_be_named(tmp_path: Path) -> None:
    path = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).write()
    assert torch.equal(values(path / ".metadata"), WHOLE)
    edit(path / ".metadata", "w=0", output=tmp_path / "out")
    assert values(tmp_path / "out").eq(0).all()


def test_one_file_of_items_points_to_its_folder(tmp_path: Path) -> None:
    path = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).write()
    with pytest.raises(CkptError) as refused:
        open_checkpoint(str(path / "__0_0.distcp"))
    assert refused.value.hint == f"this is one rank's part of a checkpoint: name its folder, {path}"


def test_a_folder_without_collectives_says_what_to_name(tmp_path: Path) -> None:
    path = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).write()
    (path / ".metadata").rename(path / "__0.metadata")
    with pytest.raises(UnsupportedError, match="without collectives"):
        open_checkpoint(str(path))
    assert torch.equal(values(path / "__0.metadata"), WHOLE)


def test_a_missing_file_is_told_when_its_bytes_are_asked_for(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS)
    writer.listed["epoch"] = BytesStorageMetadata()
    writer.stored[MetadataIndex("epoch")] = writer.item(3)
    path = writer.write()
    (path / "__0_0.distcp").unlink()
    checkpoint = open_checkpoint(str(path))
    assert list(checkpoint.notes) == ["1 of its 1 files are missing"]
    found = list_entries(checkpoint, values=True).entries[-1]
    assert isinstance(found, Value)
    assert found.value == Opaque("<in __0_0.distcp, which is missing>")
    with pytest.raises(MalformedError, match=r"'w' has a chunk in __0_0.distcp, which is missing") as refused:
        values(path)
    assert refused.value.path == str(path)


def test_compressed_items_are_listed_and_refused_in_one_line(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS)
    writer.listed["epoch"] = BytesStorageMetadata()
    writer.stored[MetadataIndex("epoch")] = writer.item(3)
    for info in writer.stored.values():
        info.transform_descriptors = ["stream.zstd/1"]
    path = writer.write()
    found = list_entries(open_checkpoint(str(path)), values=True).entries
    assert found[-1] == Value("epoch", Opaque("<written through stream.zstd/1>"))
    with pytest.raises(UnsupportedError, match=r"'w' was written through stream.zstd/1, which is not read"):
        values(path)


# --- what contradicts itself -----------------------------------------------------------------------------------------


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
    "path-up": (_rename_file("../x"), "which is no file of the folder"),
    "path-absolute": (_rename_file("/etc/passwd"), "which is no file of the folder"),
    "path-dots": (_rename_file(".."), "which is no file of the folder"),
    "path-nul": (_rename_file("a\0b"), "which is no file of the folder"),
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
    "size-text": (_listed(size="abc"), "no tuple of integers"),
    "chunks-none": (_listed(chunks=None), "its chunks are None"),
    "properties-none": (_listed(properties=None), "its properties are None"),
    "entry-none": (lambda writer: writer.listed.update(w=None), "neither a tensor nor a pickled value"),
    "key-number": (lambda writer: writer.listed.update({3: 4}), "where a name should be"),
    "index-number": (lambda writer: writer.stored.update({3: 4}), "is no entry"),
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
    "no-tensor": (_no_tensor, "its item is no tensor"),
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


# --- safetensors of ranks --------------------------------------------------------------------------------------------


def hf_folder(path: Path, cuts: list[Cut], whole: torch.Tensor = WHOLE) -> Path:
    """What HuggingFaceStorageWriter leaves that saves a file a rank and does not consolidate them."""
    path.mkdir()
    for number, (offsets, sizes) in enumerate(cuts, start=1):
        box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        info = {"w": {"saved_offsets": list(offsets)}}
        save_file(
            {"w": whole[box].contiguous()},
            path / f"shard-{number:05}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"},
        )
    return path


@pytest.mark.parametrize("name", ["one", "rows", "columns", "last", "quarters"])
def test_safetensors_of_ranks_are_joined_as_torch_consolidates_them(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    path = hf_folder(tmp_path / "d", CUTS[name])
    assert open_checkpoint(str(path)).format == "dcp"
    edit(path, "w[1,2:7]=-1")
    (tmp_path / "whole").mkdir()
    consolidate_safetensors_files(str(path), str(tmp_path / "whole"), {"w": 1})
    (whole,) = (tmp_path / "whole").glob("*.safetensors")
    expected = WHOLE.clone()
    expected[1, 2:7] = -1
    assert torch.equal(load_file(whole)["w"], expected)
    assert torch.equal(values(path), expected)


def test_safetensors_of_ranks_without_one_rank_are_told(tmp_path: Path) -> None:
    path = hf_folder(tmp_path / "d", QUARTERS)
    (path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(MalformedError, match="a rank did not save its own"):
        values(path)


@pytest.mark.parametrize("info", ["[", "[]", "{}x", '{"w": 3}', '{"w": {"saved_offsets": [0, -1, 0]}}', "[" * 90_000])
def test_bad_sharding_info_is_refused_in_one_line(tmp_path: Path, info: str) -> None:
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"w": WHOLE}, path, metadata={"DCP_SHARDING_INFO": info})
    with pytest.raises(MalformedError, match="DCP_SHARDING_INFO") as refused:
        open_checkpoint(str(tmp_path))
    assert refused.value.path == str(path)
