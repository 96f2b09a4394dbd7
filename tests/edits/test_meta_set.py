"""Strings of sharded checkpoints: `meta` changes them where they stand, judged by the safetensors library."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ckpt
from contract import contents
from run_edit import assert_refused, edited, edited_as_told
from shard_strings import INDEX, notes_in, shards_of, strings_in


@pytest.mark.parametrize("value", ["pt", "x" * 3000])
def test_a_new_key_goes_into_every_shard_and_the_report_says_so(tmp_path: Path, ckpt: Ckpt, value: str) -> None:
    folder = shards_of(tmp_path / "set", [None, {"a": "1"}, None], {"total_size": 24})
    before = (folder / INDEX).read_bytes()
    done = edited_as_told(ckpt, "meta", folder, f"format={value}")
    assert strings_in(folder) == [{"format": value}, {"a": "1", "format": value}, {"format": value}]
    assert (folder / INDEX).read_bytes() == before
    assert done["placed"] == {"format": "all 3 shards"}
    assert "format: in all 3 shards" in ckpt("meta", folder, "format=y").err


def test_headers_with_room_are_patched_in_place(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [{"format": "pt"}, {"format": "pt"}], {"total_size": 16})
    edited(ckpt, "meta", folder, "note=a long one, so that the headers are written anew")
    inodes = [path.stat().st_ino for path in sorted(folder.iterdir())]
    assert edited(ckpt, "meta", folder, "note=short")["patched"]
    assert [path.stat().st_ino for path in sorted(folder.iterdir())] == inodes
    assert strings_in(folder) == [{"format": "pt", "note": "short"}] * 2


def test_a_key_of_both_shards_and_index_changes_in_both(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [{"by": "a"}, None], {"total_size": 16, "by": "b"})
    assert edited(ckpt, "meta", folder, "by=c")["placed"] == {"by": "all 2 shards and the index"}
    assert strings_in(folder) == [{"by": "c"}, {"by": "c"}]
    assert notes_in(folder) == {"total_size": 16, "by": "c"}


def test_a_key_is_removed_from_every_shard_that_has_it(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [{"k": "1", "format": "pt"}, {"format": "pt"}], {"total_size": 16})
    edited(ckpt, "meta", folder, "-d", "k", "-d", "format", "new=1")
    assert strings_in(folder) == [{"new": "1"}, {"new": "1"}]
    assert_refused(ckpt, folder, "nothing is called 'k'", "meta", "-d", "k")
    assert_refused(ckpt, folder, "'total_size' follows from the shards", "meta", "-d", "total_size")


def test_a_key_of_the_index_stays_in_the_index(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [None, None], {"total_size": 1, "note": "a"})
    before = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    edited(ckpt, "meta", folder, "note=b", "total_size=16")  # the size that is right, in place of a wrong one
    assert notes_in(folder) == {"total_size": 16, "note": "b"}
    assert [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))] == before


def test_a_total_that_the_index_lacks_goes_there_if_it_is_right(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [None, None], {})
    assert_refused(ckpt, folder, "follows from the shards: it is 16, not 7", "meta", "total_size=7")
    edited(ckpt, "meta", folder, "total_size=16")
    assert notes_in(folder) == {"total_size": 16}
    assert strings_in(folder) == [None, None]


def test_strings_of_shards_and_of_the_index_are_shown_apart(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [{"format": "pt", "n": "1"}, {"format": "pt"}], {"total_size": 16})
    first = "model-00001-of-00002.safetensors"
    shown = ckpt("meta", folder).lines  # the library writes the strings of a shard in any order
    assert sorted(shown) == ["format\tpt\tshards", f"n\t1\t{first}", "total_size\t16\tindex"]
    assert ckpt("meta", folder, "total_size").lines == ["total_size\t16\tindex"]
    found = json.loads(ckpt("meta", folder, "--json").out)
    assert (found["format"], found["total_size"], found["index"]) == ("pt", "16", {"total_size": "16"})
    assert found["shards"][first] == {"format": "pt", "n": "1"}


def test_a_set_without_an_index_has_the_strings_of_its_shards(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [None, None])
    edited(ckpt, "meta", folder, "k=v")
    assert strings_in(folder) == [{"k": "v"}, {"k": "v"}]


def test_a_new_folder_has_the_strings_and_the_old_one_stays(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "set", [None, {"a": "1"}], {"total_size": 16})
    before = contents(folder)
    edited(ckpt, "meta", folder, "format=pt", "-o", tmp_path / "out")
    assert contents(folder) == before
    assert strings_in(tmp_path / "out") == [{"format": "pt"}, {"a": "1", "format": "pt"}]


@pytest.mark.parametrize("notes", [None, {"total_size": 16}])
def test_a_string_that_would_read_as_a_tie_across_shards_is_refused(
    tmp_path: Path, ckpt: Ckpt, notes: dict[str, object] | None
) -> None:
    folder = shards_of(tmp_path / "set", [None, None], notes)
    assert_refused(ckpt, folder, "would then record a tie", "meta", "note=t1")


def test_shards_and_containers_without_strings_refuse_them(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    name = "pytorch_model-00001-of-00001.bin"
    torch.save({"a": torch.ones(2)}, folder / name)
    index = {"metadata": {"total_size": 8, "note": "x"}, "weight_map": {"a": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_refused(ckpt, folder, "torch.save files have no metadata of strings", "meta", "format=pt")
    edited(ckpt, "meta", folder, "note=y")
    assert ckpt("meta", folder).lines == ["total_size\t8\tindex", "note\ty\tindex"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_refused(ckpt, tmp_path / "dcp", "a distributed checkpoint has no metadata of strings", "meta", "k=v")
