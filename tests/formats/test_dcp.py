"""Distributed checkpoints: what `.metadata` says, chunks of any cut, items read when they are asked for."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import dcp_formats
import pytest
import torch
from dcp_files import CUTS, QUARTERS, WHOLE, Cut, Writer, values
from set_elements import edit
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_cli import limits, load
from ckpt_cli.cli.main import run
from ckpt_cli.errors import CkptError, LimitError, MalformedError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.dcp.boxes import boxes_of_range
from ckpt_cli.formats.dcp.container import Items
from ckpt_cli.model.checkpoint import Opaque, Value
from ckpt_cli.ops.ls import list_entries
from tests.support.counting import counted_reads


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
    for begin in range(0, len(raw), 37):
        for end in range(begin, len(raw) + 1, 53):
            assert bytes(storage.view(begin, end - begin)) == raw[begin:end]
            extents = storage.extents(begin, end - begin)
            with_files = b"".join(e.file.read(e.offset, e.nbytes) for e in extents)
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
    counts = counted_reads(monkeypatch)
    checkpoint = open_checkpoint(str(path))
    listing = list_entries(checkpoint)
    assert (listing.tensors, listing.parameters) == (1000, 8000)
    assert 0 < sum(counts) < 600 + (path / ".metadata").stat().st_size


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
