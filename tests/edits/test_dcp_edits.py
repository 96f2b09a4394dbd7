"""Structural edits of distributed checkpoints, as torch.distributed.checkpoint reads them afterwards."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import dcp_formats
import pytest
import torch
from conftest import Ckpt
from dcp_files import QUARTERS, WHOLE, Writer
from fault_forks import KILLED, Apart, steps_of
from reference_readers import read_dcp
from run_edit import assert_refused, assert_states, everything
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_cli.formats import open_checkpoint


def state() -> dict[str, Any]:
    """What a trainer saves: dicts and lists that the planner flattens, and values."""
    torch.manual_seed(0)
    model = {"0.weight": torch.randn(6, 4), "0.bias": torch.arange(4.0), "2.weight": torch.randn(4, 6)}
    optimizer = {"state": {"0": {"exp_avg": torch.ones(6, 4), "step": torch.tensor(7.0)}}, "lr": 0.5}
    return {"model": model, "optimizer": optimizer, "epoch": 3, "tag": "x", "losses": [torch.ones(1), torch.zeros(2)]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The state in a folder."""
    dcp_formats.save(state(), tmp_path / "d")
    return tmp_path / "d"


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Tensors that four ranks saved, sharded over a mesh of two dimensions."""
    dcp_formats.save_ranks(sharded(), tmp_path / "ranks", 4)
    return tmp_path / "ranks"


def sharded() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"0.weight": torch.randn(7, 5), "4.columns": torch.arange(35.0).reshape(5, 7), "3.scale": torch.randn(4)}


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of what torch reads, by dotted names."""
    if not isinstance(tree, dict | list):
        return {name: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {dotted: leaf for key, each in pairs for dotted, leaf in flat(each, f"{name}.{key}".strip(".")).items()}


def assert_same(path: Path, wanted: dict[str, Any]) -> None:
    """What torch reads are these leaves, and `check` has nothing to say."""
    found = flat(dcp_formats.read(path))
    tensors = {name: leaf for name, leaf in wanted.items() if isinstance(leaf, torch.Tensor)}
    assert_states({name: found[name] for name in found if isinstance(found[name], torch.Tensor)}, tensors)
    assert {name: leaf for name, leaf in found.items() if name not in tensors} == {
        name: leaf for name, leaf in wanted.items() if name not in tensors
    }
    check_checksums(path)
    names = {entry.name for entry in open_checkpoint(str(path)).entries}
    assert names == set(wanted)


def check_checksums(path: Path) -> None:
    """Have zipfile verify every record of every item."""
    for info in pickle.loads((path / ".metadata").read_bytes()).storage_data.values():
        data = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        with zipfile.ZipFile(BytesIO(data)) as opened:
            assert opened.testzip() is None


def done(ckpt: Ckpt, *arguments: object) -> dict[str, Any]:
    """The report of an edit, of which `check --deep` finds nothing wrong afterwards."""
    answer = ckpt(*arguments, "--json")
    assert (answer.code, answer.err) == (0, "")
    report: dict[str, Any] = json.loads(answer.out)
    if not report["dry_run"]:
        assert ckpt("check", "--deep", report["output"]).code == 0
    return report


def test_a_renamed_entry_is_where_torch_looks_for_it(path: Path, ckpt: Ckpt) -> None:
    before = {each.name: each.read_bytes() for each in path.iterdir() if each.name != ".metadata"}
    report = done(ckpt, "rename", path, "model", "net")
    assert (report["in_place"], report["bytes_written"]) == (True, (path / ".metadata").stat().st_size)
    assert {each.name: each.read_bytes() for each in path.iterdir() if each.name != ".metadata"} == before
    wanted = {name.replace("model.", "net."): leaf for name, leaf in flat(state()).items()}
    assert_same(path, wanted)
    assert list(dcp_formats.read(path)) == ["net", "optimizer", "epoch", "tag", "losses"]
    assert set(dcp_formats.read(path)["net"]) == {"0.weight", "0.bias", "2.weight"}
    like = {name: leaf for name, leaf in wanted.items() if isinstance(leaf, torch.Tensor)}
    assert_states(read_dcp(path, like), like)


def test_a_stripped_prefix_leaves_names_at_the_top(path: Path, ckpt: Ckpt) -> None:
    done(ckpt, "rename", path, "--strip", "model")
    found = dcp_formats.read(path)
    assert torch.equal(found["0.weight"], state()["model"]["0.weight"])
    assert_same(path, {name.removeprefix("model."): leaf for name, leaf in flat(state()).items()})


def test_items_of_lists_keep_their_places(path: Path, ckpt: Ckpt) -> None:
    done(ckpt, "rename", path, "losses", "history")
    assert [each.tolist() for each in dcp_formats.read(path)["history"]] == [[1], [0, 0]]
    assert_refused(ckpt, path, "contradicts another entry's", "rename", "history.1", "history.x")
    assert_refused(ckpt, path, "contradicts another entry's", "rename", "epoch", "model")


@pytest.mark.parametrize("new", ["0", "tag", "losses"])
def test_a_name_that_would_lie_in_another_entry_is_refused(tmp_path: Path, ckpt: Ckpt, new: str) -> None:
    dcp_formats.save(
        {"0": {"bias": torch.ones(1), "w": torch.ones(2)}, "tag": "x", "losses": [torch.ones(1)]}, tmp_path / "d"
    )
    answer = ckpt("rename", tmp_path / "d", "0.w", new)
    assert answer.code == 2
    assert answer.err.count("\n") == 1


def test_what_is_removed_stays_in_the_file_until_it_is_compacted(path: Path, ckpt: Ckpt) -> None:
    sizes = {each.name: each.stat().st_size for each in path.iterdir()}
    report = done(ckpt, "rm", path, "optimizer")
    assert path.joinpath("__0_0.distcp").stat().st_size == sizes["__0_0.distcp"]
    wanted = {name: leaf for name, leaf in flat(state()).items() if not name.startswith("optimizer")}
    assert_same(path, wanted)
    unreferenced = report["unreferenced"]
    assert json.loads(ckpt("ls", "--waste", path, "--json").out)["waste"][0]["nbytes"] == unreferenced
    said = ckpt("rm", path, "tag", "-n").err
    assert f"ckpt compact {path} frees them" in said
    report = done(ckpt, "compact", path)
    assert "unreferenced" not in report
    assert path.joinpath("__0_1.distcp").stat().st_size == sizes["__0_0.distcp"] - unreferenced
    assert not path.joinpath("__0_0.distcp").exists()
    assert_same(path, wanted)
    assert_refused(ckpt, path, "no storage is larger", "compact")


def test_a_file_of_which_nothing_is_left_goes(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "d"
    dcp_formats.save({"a": torch.ones(3), "b": torch.zeros(2), "n": 3}, path, single_file_per_rank=False)
    assert len(list(path.glob("*.distcp"))) == 3
    report = done(ckpt, "rm", path, "a")
    assert (len(report["removed"]), len(list(path.glob("*.distcp")))) == (1, 2)
    assert_same(path, {"b": torch.zeros(2), "n": 3})


def test_keep_root_makes_a_nested_state_the_whole(path: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    before = everything(path)
    report = done(ckpt, "keep", path, "--root", "model", "-o", tmp_path / "out")
    assert everything(path) == before
    assert_same(tmp_path / "out", state()["model"])
    assert report["bytes_written"] == sum(each.stat().st_size for each in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "__0_0.distcp").stat().st_size < (path / "__0_0.distcp").stat().st_size


def test_cast_writes_new_items_and_the_ranks_files_stay(ranks: Path, ckpt: Ckpt) -> None:
    before = {each.name: each.read_bytes() for each in ranks.glob("*.distcp")}
    report = done(ckpt, "cast", ranks, "bfloat16", "4.columns")
    after = {each.name: each.read_bytes() for each in ranks.glob("*.distcp")}
    assert {name: after[name] for name in before if name not in report["removed"]}.items() <= before.items()
    wanted = sharded() | {"4.columns": sharded()["4.columns"].bfloat16()}
    assert_same(ranks, wanted)
    done(ckpt, "cast", ranks, "float16", "--lossy")
    assert {each.name for each in ranks.glob("*.distcp")}.isdisjoint(before)
    assert_same(ranks, {name: each.to(torch.float16) for name, each in wanted.items()})


@pytest.mark.parametrize("arguments", [("cast", "float64"), ("rm", "3.scale"), ("rename", "--add", "net")], ids=str)
def test_a_new_folder_has_the_edit_and_no_bytes_that_nothing_refers_to(
    ranks: Path, tmp_path: Path, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    before = everything(ranks)
    command, *rest = arguments
    report = done(ckpt, command, ranks, *rest, "-o", tmp_path / "out")
    assert everything(ranks) == before
    wanted = {
        "cast": {name: each.double() for name, each in sharded().items()},
        "rm": {name: each for name, each in sharded().items() if name != "3.scale"},
        "rename": {f"net.{name}": each for name, each in sharded().items()},
    }[command]
    assert_same(tmp_path / "out", wanted)
    assert {each.name for each in (tmp_path / "out").iterdir()} <= {each.name for each in ranks.iterdir()}
    assert not json.loads(ckpt("ls", "--waste", tmp_path / "out", "--json").out)["waste"]
    assert report["output"] == str(tmp_path / "out")


def test_values_are_set_as_torch_saves_them(path: Path, ckpt: Ckpt) -> None:
    done(ckpt, "set", path, "epoch=4", "tag=other", "optimizer.lr*=0.5")
    assert_same(path, flat(state()) | {"epoch": 4, "tag": "other", "optimizer.lr": 0.25})
    assert_refused(ckpt, path, "'epoch' is of type int", "set", "epoch=1.5")
    done(ckpt, "set", path, "epoch=1", "model.0.bias=1")
    done(ckpt, "set", path, "model.0.bias[1]=9")
    found = dcp_formats.read(path)
    assert (found["epoch"], found["model"]["0.bias"].tolist()) == (1, [1, 9, 1, 1])


def test_new_entries_are_added(path: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    import numpy as np

    np.save(tmp_path / "v.npy", np.arange(6.0).reshape(2, 3))
    done(ckpt, "set", path, "--new", f"scale=@{tmp_path / 'v.npy'}", "note=[1, 2]")
    found = dcp_formats.read(path)
    assert found["note"] == [1, 2]
    assert torch.equal(found["scale"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    assert_refused(ckpt, path, "nothing can lie in it", "set", "--new", "tag.x=1")


def test_a_tensor_in_chunks_of_any_cut_is_cast_whole(tmp_path: Path, ckpt: Ckpt) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).tensor("v", WHOLE, QUARTERS)
    writer.planner_data = None  # of a planner that does not flatten
    path = writer.write()
    done(ckpt, "cast", path, "float32", "w")
    done(ckpt, "rename", path, "v", "u.v")
    assert_same_flat(path, {"w": WHOLE.float(), "u.v": WHOLE})


def assert_same_flat(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """What torch loads into tensors of the same names."""
    assert_states(read_dcp(path, wanted), wanted)


def test_a_backup_brings_the_old_folder_back(path: Path, ckpt: Ckpt) -> None:
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    for arguments in (("cast", path, "bfloat16"), ("rm", path, "optimizer"), ("set", path, "epoch=9")):
        done(ckpt, *arguments, "--backup")
        assert ckpt("undo", path).code == 0
        assert {each.name: each.read_bytes() for each in path.iterdir()} == before


def test_ties_are_refused_as_they_are_not_recorded(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "e")
    assert_refused(ckpt, tmp_path / "e", "which a distributed checkpoint does not record", "tie", "a", "b")
    assert_refused(ckpt, tmp_path / "e", "shares its bytes with no other name", "untie", "a")


def test_entries_of_safetensors_are_removed_but_not_renamed(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "d"
    dcp_formats.save_safetensors({"a": torch.ones(2), "b": torch.zeros(3)}, path)
    assert_refused(ckpt, path, "its entries cannot be renamed", "rename", "a", "c")
    assert ckpt("rm", path, "a").code == 0
    assert ckpt("ls", path).out.split("\t")[0] == "b"
    assert ckpt("cast", path, "float16", "-o", tmp_path / "o").code == 0
    assert torch.equal(read_dcp(tmp_path / "o", {"b": torch.ones(3).half()})["b"], torch.zeros(3).half())


def test_transformed_items_stay_as_they_are(tmp_path: Path, ckpt: Ckpt) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).tensor("v", WHOLE, QUARTERS)
    for index, info in writer.stored.items():
        if index.fqn == "w":
            writer.stored[index] = _StorageInfo(info.relative_path, info.offset, info.length, ("stream.zstd/1",))
    path = writer.write()
    before = {index.offset: info for index, info in writer.stored.items() if index.fqn == "w"}
    assert_refused(ckpt, path, "was written through stream.zstd/1", "set", "w=1")
    assert ckpt("rename", path, "w", "u").code == 0
    found = pickle.loads((path / ".metadata").read_bytes()).storage_data
    assert {index.offset: info for index, info in found.items() if index.fqn == "u"} == before
    assert ckpt("rm", path, "v", "-o", tmp_path / "o").code == 0
    data, new = (path / "__0_0.distcp").read_bytes(), (tmp_path / "o" / "__0_0.distcp").read_bytes()
    moved = pickle.loads((tmp_path / "o" / ".metadata").read_bytes()).storage_data
    for index, info in moved.items():
        old = before[index.offset]
        assert new[info.offset : info.offset + info.length] == data[old.offset : old.offset + old.length]
        assert info.transform_descriptors == ("stream.zstd/1",)


def facts(path: Path) -> dict[object, bytes]:
    """The bytes of the item of each entry, as torch finds them by `.metadata` alone."""
    stored = pickle.loads((path / ".metadata").read_bytes()).storage_data
    return {
        (index.fqn, index.offset): (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        for index, info in stored.items()
    }


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    process = Apart()
    yield process
    process.close()


@pytest.mark.parametrize(
    "line", ["cast d bfloat16", "rm d optimizer", "rename d --add net", "compact d", "set d epoch=7"]
)
def test_a_kill_at_any_step_leaves_torch_the_old_or_the_new_state(
    tmp_path: Path, path: Path, ckpt: Ckpt, apart: Apart, line: str
) -> None:
    command = tuple(line.split())
    if command[0] == "compact":
        assert ckpt("rm", path, "tag").code == 0
    old, copies = facts(path), tmp_path / "copies"
    for name in ("imports", "0"):
        shutil.copytree(path, copies / name / "d")
    assert apart.run(copies / "imports", command, "import").code == 0
    steps = apart.run(copies / "0", command).steps
    new = facts(copies / "0" / "d")
    for at in steps_of("kill", steps):
        shutil.copytree(path, copies / f"{at}" / "d")
        assert apart.run(copies / f"{at}", command, "kill", at).code == KILLED
        assert facts(copies / f"{at}" / "d") in (old, new), steps[at - 1]


def test_a_folder_is_edited_from_within_by_its_metadata(
    path: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path)
    assert ckpt("rename", ".metadata", "model", "net").code == 0
    assert ckpt("set", ".metadata", "epoch=4", "--backup").code == 0
    assert ckpt("set", ".metadata", "net.0.bias=7").code == 0
    assert ckpt("rm", ".metadata", "optimizer", "-o", tmp_path / "out").code == 0
    for folder in (path, tmp_path / "out"):
        found = dcp_formats.read(folder)
        assert (found["epoch"], found["net"]["0.bias"].tolist()) == (4, [7, 7, 7, 7])
    assert "optimizer" not in found


def test_places_that_a_planner_of_its_own_noted_stay(tmp_path: Path, ckpt: Ckpt) -> None:
    writer = Writer(tmp_path / "d").tensor("w", WHOLE, QUARTERS).tensor("v", WHOLE, QUARTERS)
    writer.planner_data = {"w": "anything", "v": 3, "more": [1]}
    path = writer.write()
    assert ckpt("rm", path, "v").code == 0
    assert pickle.loads((path / ".metadata").read_bytes()).planner_data == {"w": "anything", "more": [1]}
    assert_refused(ckpt, path, "its place in the state that was saved is 'anything'", "rename", "w", "x")


def test_the_metadata_of_torch_has_no_strings_and_an_entry_takes_their_place(path: Path, ckpt: Ckpt) -> None:
    fields = {each.name for each in dataclasses.fields(Metadata)}
    assert fields == {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
    assert ckpt("meta", path).out == ""
    before = (path / ".metadata").read_bytes()
    refused = ckpt("meta", path, "author=me")
    assert (refused.code, "no metadata of strings" in refused.err) == (2, True)
    assert f"ckpt set {path} --new KEY=VALUE" in refused.err
    assert (path / ".metadata").read_bytes() == before
    assert ckpt("set", path, "--new", "author=me").code == 0
    assert dcp_formats.read(path)["author"] == "me"
