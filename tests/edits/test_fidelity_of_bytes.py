"""Where an edit puts the bytes of a pickled checkpoint: records, computed offsets, storages shared or apart."""

from __future__ import annotations

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from builders.pt import archive, torch_records
from conftest import Ckpt
from same_objects import assert_same, load, net, odd, training


def test_computed_offsets_agree_with_where_the_bytes_are(tmp_path: Path, ckpt: Ckpt) -> None:
    """With `.format_version` torch computes offsets; FakeTensorMode and `map_location="meta"` rely on it."""
    path = tmp_path / "a.pt"
    torch.save(odd() | training(), path)
    edits = (["rm", "a.shared", "optimizer"], ["rename", "--add", "prefix"], ["cast", "bf16"], ["compact"])
    for edit in (*edits, ["rename", "--strip", "prefix"]):
        done = ckpt(edit[0], path, *edit[1:])
        assert done.code == 0
        assert ("in place" in done.err) == (edit[0] == "rename")
        reader = torch._C.PyTorchFileReader(str(path))
        with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
            computed = torch.load(path, weights_only=False)
        assert_same(computed, load(path))
        keys = [name for name in reader.get_all_records() if name.startswith("data/")]
        assert keys == [f"data/{number}" for number in range(len(keys))]


def test_a_tie_is_one_storage_and_untie_takes_it_apart(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3)}, path)
    assert ckpt("tie", path, "a", "b").code == 0
    found = load(path)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    refused = ckpt("tie", path, "a", "c")
    assert (refused.code, "different values" in refused.err) == (2, True)
    assert ckpt("tie", path, "a", "c", "--force").code == 0
    assert load(path)["c"].eq(1).all()
    assert ckpt("untie", path, "b").code == 0
    found = load(path)
    assert found["a"].data_ptr() == found["c"].data_ptr() != found["b"].data_ptr()
    assert ckpt("untie", path, "b").code == 2


def test_compact_keeps_every_value_and_sharing_and_drops_the_rest(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save(odd(), path)
    before = path.stat().st_size
    answer = ckpt("compact", path)
    assert answer.code == 0, answer.err
    found, wanted = load(path), odd()
    assert_same(found, wanted)
    assert found["a.shared"].data_ptr() == found["b.shared"].data_ptr()
    assert found["b.view"].data_ptr() == found["b.shared"].data_ptr() + 12
    assert path.stat().st_size < before
    assert ckpt("ls", "--waste", path).out == ""
    assert ckpt("compact", path).code == 2


def test_a_whole_module_is_edited_without_its_class(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "net.pt"
    torch.save(net(), path)
    assert ckpt("cast", path, "bfloat16").code == 0
    found = load(path)
    wanted = net().bfloat16()
    assert_same(found.state_dict(), wanted.state_dict())
    assert found[0] is found[2]
    assert ckpt("set", path, "3.eps=0.5").code == 0
    assert load(path)[3].eps == 0.5
    assert ckpt("untie", path, "2.weight").code == 2  # it is one module, not two tied ones
    old = path.read_bytes()
    refused = ckpt("rename", path, "2.weight", "2.w")
    assert (refused.code, "several names are kept in one object" in refused.err) == (2, True)
    assert path.read_bytes() == old


def test_a_shorter_pickle_goes_into_the_room_before_the_first_storage(tmp_path: Path, ckpt: Ckpt) -> None:
    """So that a rename of any file costs what its pickle costs, through the journal, checksums included."""
    path = tmp_path / "a.pt"
    state = {f"module.layers.{number}.weight": torch.full((300,), float(number)) for number in range(50)}
    torch.save(state, path)
    before = path.stat()
    told = json.loads(ckpt("rename", path, "--strip", "module", "--json").out)
    assert (told["in_place"], told["patched"]) == (True, True)
    assert told["bytes_written"] < 20_000
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    wanted = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for options in ({}, {"mmap": True}):
        assert_same(torch.load(path, **options), wanted)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert ckpt("set", path, "layers.3.weight[0]=100").code == 0
    assert load(path)["layers.3.weight"][0] == 100
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        assert load(path)["layers.49.weight"][0] == 49
    assert json.loads(ckpt("rename", path, "--add", "module", "--json").out)["patched"]  # the room is there again
    assert_same(load(path)["module.layers.1.weight"], state["module.layers.1.weight"])


def test_a_longer_pickle_goes_behind_the_storages_and_stays_there(tmp_path: Path, ckpt: Ckpt) -> None:
    """So that no name costs a copy of the file; the record is grown and cut where it is from then on."""
    path = tmp_path / "a.pt"
    state = {f"layers.{number}.weight": torch.full((3000,), float(number)) for number in range(150)}
    state["tied"] = state["layers.3.weight"]
    torch.save(state, path)
    before = path.stat()
    prefixes = ["", "a.very.long.prefix.that.nobody.would.leave.room.for", "shorter", "x" * 900, "y"]
    for old, new in pairwise(prefixes):
        edit = ["--add", new] if not old else [old, new]
        planned = json.loads(ckpt("rename", path, *edit, "--json", "--dry-run").out)
        told = json.loads(ckpt("rename", path, *edit, "--json").out)
        assert told["patched"]
        assert told["bytes_written"] == planned["bytes_written"] < 400_000 < path.stat().st_size
        assert path.stat().st_ino == before.st_ino
        wanted = {f"{new}.{name}": tensor for name, tensor in state.items()}
        for options in ({}, {"mmap": True}):
            assert_same(torch.load(path, **options), wanted)
        with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
            assert_same(torch.load(path), wanted)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert (ckpt("check", "--deep", path).code, ckpt("scan", path).code) == (0, 0)
    assert path.stat().st_size < before.st_size + 40_000
    assert ckpt("set", path, "y.layers.3.weight[0]=100", "epoch=3", "--new").code == 0
    found = load(path)
    assert (found["y.tied"][0], found["epoch"]) == (100, 3)
    compacted = ckpt("compact", path, "-o", tmp_path / "b.pt")
    assert (compacted.code, compacted.err.splitlines()[0]) == (0, f"{path}: compacted it")
    torch.save(found, tmp_path / "c.pt")
    names = [zipfile.ZipFile(tmp_path / name).namelist() for name in ("b.pt", "c.pt")]
    assert [name.split("/", 1)[1] for name in names[0]] == [name.split("/", 1)[1] for name in names[1]]
    assert ckpt("convert", path, tmp_path / "d.pt", "--json").code == 0
    assert not [name for name in zipfile.ZipFile(tmp_path / "d.pt").namelist() if "room" in name]


def test_the_end_of_a_file_with_a_comment_is_left_as_it_is(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of somebody"
    told = json.loads(ckpt("rename", path, "--add", "n" * 7_000, "--json").out)
    assert not told["patched"]
    assert_same(load(path), {"n" * 7_000 + ".w": torch.ones(3)})


def test_an_archive_whose_name_is_no_utf_8_takes_a_longer_pickle_too(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive(torch_records({"w": 1, "v": 2}, prefix="caf\udce9")))
    done = ckpt("rename", path, "w", "a.longer.name" * 9)
    assert (done.code, "in place" in done.err) == (0, True), done.err
    assert load(path) == {"a.longer.name" * 9: 1, "v": 2}
