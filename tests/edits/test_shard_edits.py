"""Structural edits of sets of shards: index, sizes and files in step, judged by the readers of the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from contract import contents
from run_edit import State, assert_refused, assert_states, edited, edited_as_told
from safetensors import safe_open
from safetensors.torch import save_file
from shard_sets import KINDS, assert_holds, held, index_of, read_shard, renamed, save, state, without


@pytest.fixture(params=KINDS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that huggingface_hub wrote."""
    return save(state(), tmp_path / "set", request.param)


EDITS: dict[str, tuple[list[str], Callable[[], State], int]] = {
    "rename one": (["rename", "m.a", "m.first"], lambda: renamed(lambda n: {"m.a": "m.first"}.get(n, n)), 1),
    "add a prefix": (["rename", "--add", "net"], lambda: renamed(lambda n: f"net.{n}"), 3),
    "remove from a shard": (["rm", "n.d"], lambda: without("n.d"), 1),
    "remove a shard": (["rm", "m.a"], lambda: without("m.a"), 0),
    "keep one": (["keep", "m.b", "n.e"], lambda: without("m.a", "m.c", "n.d"), 1),
    "keep the root": (["keep", "--root", "n"],
                      lambda: {n[2:]: t for n, t in state().items() if n.startswith("n.")}, 2),
    "cast": (["cast", "bfloat16"],
             lambda: {n: t.bfloat16() if t.is_floating_point() else t for n, t in state().items()}, 3),
    "cast one": (["cast", "float16", "m.c"],
                 lambda: {n: t.half() if n == "m.c" else t for n, t in state().items()}, 1),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_set_keeps_index_sizes_and_shards_in_step(shards: Path, ckpt: Ckpt, edit: str) -> None:
    arguments, wanted, touched = EDITS[edit]
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards.iterdir()}
    command, *rest = arguments
    done = edited_as_told(ckpt, command, shards, *rest)
    assert_holds(shards, wanted())
    written = [path for path in shards.iterdir() if path.stat().st_mtime_ns != before[path.name][1]]
    assert len(written) == touched + 1  # and the index
    replaced = [path for path in written if path.stat().st_ino != before[path.name][0]]
    assert len(replaced) == (0 if done["patched"] else len(written))
    size = sum(path.stat().st_size for path in written)
    assert 0 < done["bytes_written"] < size if done["patched"] else done["bytes_written"] == size
    is_pickled = any(shards.glob("*.bin"))
    assert done["patched"] == (edit == "rename one" or (edit == "add a prefix" and is_pickled))
    assert set(done["removed"]) == before.keys() - {path.name for path in shards.iterdir()}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_set_to_a_new_folder_leaves_the_set(tmp_path: Path, shards: Path, ckpt: Ckpt, edit: str) -> None:
    arguments, wanted, _ = EDITS[edit]
    before = contents(shards)
    out = tmp_path / "out"
    command, *rest = arguments
    done = edited_as_told(ckpt, command, shards, *rest, "-o", out)
    assert contents(shards) == before
    assert_holds(out, wanted())
    assert done["bytes_written"] == sum(path.stat().st_size for path in out.iterdir())
    assert_refused(ckpt, shards, "must go to a folder that is new or empty", command, *rest, "-o", out)


def test_a_shard_of_which_nothing_is_left_is_told(shards: Path, ckpt: Ckpt) -> None:
    gone = index_of(shards)["weight_map"]["m.a"]
    assert f"{gone} would be removed, as nothing is left in it\n" in ckpt("rm", shards, "m.a", "-n").err
    assert f"{gone} removed, as nothing is left in it\n" in ckpt("rm", shards, "m.a").err


def test_a_backup_of_a_set_keeps_every_file_that_is_replaced_or_goes(shards: Path, ckpt: Ckpt) -> None:
    before = contents(shards)
    done = edited(ckpt, "rm", shards, "m.a", "n.d", "--backup")
    assert len(done["backups"]) == 3
    for path in map(Path, done["backups"]):
        assert path.read_bytes() == before[path.name.removesuffix(".bak")]
    assert_holds(shards, without("m.a", "n.d"))


def test_one_shard_of_a_set_is_not_changed_behind_the_back_of_its_index(
    tmp_path: Path, shards: Path, ckpt: Ckpt
) -> None:
    shard = shards / index_of(shards)["weight_map"]["m.b"]
    for command, *rest in (("rename", "m.b", "x"), ("rm", "m.b"), ("cast", "bf16")):
        assert_refused(ckpt, shard, "is one shard of", command, *rest)
        assert "index.json" in ckpt(command, shard, *rest).err.splitlines()[1]
    edited(ckpt, "rename", shard, "m.b", "x", "-o", tmp_path / "alone")
    assert read_shard(tmp_path / "alone", shard.suffix).keys() == {"x", "m.c", "n.d"}
    assert ckpt("set", shard, "m.b[0,0]=1").code == 0  # values are no business of the index


REFUSED = [
    (["rename", "m.a", "m.b"], "would both be called"),
    (["rename", "gone", "x"], "nothing is called 'gone'"),
    (["rm", "*"], "nothing would be left"),
    (["rm", "gone*"], "nothing is called"),
    (["set", "--new", "epoch=1"], "cannot be set in a set of shards"),
    (["tie", "m.a", "m.b"], "different values"),
    (["untie", "m.a"], "shares its bytes with no other name"),
    (["rm", "m.a", "-o", "S"], "must go to a folder that is new or empty"),
    (["meta", "total_size=1"], "'total_size' follows from the shards"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_cannot_be_done_to_a_set_is_refused(shards: Path, ckpt: Ckpt, arguments: list[str], told: str) -> None:
    command, *rest = [str(shards) if argument == "S" else argument for argument in arguments]
    assert_refused(ckpt, shards, told, command, *rest)


@pytest.mark.parametrize("which", ["*", "*-00001-of-*", "*.json"])
def test_what_is_a_link_in_a_set_is_not_replaced_by_a_file(
    tmp_path: Path, shards: Path, ckpt: Ckpt, which: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in sorted(shards.glob(which)):
        path.symlink_to(path.rename(elsewhere / path.name))
    assert_refused(ckpt, shards, "is a symbolic link", "rename", "--add", "x")
    edited(ckpt, "rename", shards, "--add", "x", "-o", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_holds(tmp_path / "out", renamed(lambda name: f"x.{name}"))


def test_a_cached_set_is_not_edited(tmp_path: Path, shards: Path, ckpt: Ckpt) -> None:
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(shards.iterdir())):
        path.symlink_to(path.rename(tmp_path / "blobs" / f"{number:064x}"))
    assert_refused(ckpt, shards, "Hugging Face hub's cache", "rename", "m", "x")


# --- metadata, and sets that are odd ---------------------------------------------------------------------------------


def test_a_note_of_the_index_is_changed_there_and_whatever_else_it_has_stays(shards: Path, ckpt: Ckpt) -> None:
    index = index_of(shards)
    index["metadata"] |= {"nested": {"a": [1, 2]}, "note": "old"}
    index["more"] = 7
    (path,) = shards.glob("*.index.json")
    path.write_text(json.dumps(index))
    before = contents(shards)
    edited(ckpt, "meta", shards, "note=hi")
    assert index_of(shards) == {**index, "metadata": {**index["metadata"], "note": "hi"}}
    assert [name for name, content in contents(shards).items() if content != before[name]] == [path.name]
    done = edited(ckpt, "meta", shards, 'nested=["you"]', "-d", "note")
    assert done["placed"] == {"nested": "the index", "note": "the index"}
    del index["metadata"]["note"]
    assert index_of(shards) == {**index, "metadata": {**index["metadata"], "nested": ["you"]}}
    assert_refused(ckpt, shards, "holds JSON", "meta", "nested=[")


def test_a_set_without_an_index_is_edited_shard_by_shard(shards: Path, ckpt: Ckpt) -> None:
    (index,) = shards.glob("*.index.json")
    index.unlink()
    edited(ckpt, "rename", shards, "m", "x")
    assert_refused(ckpt, shards, "belongs to an index, and the set has none", "meta", "total_size=7")
    edited(ckpt, "rm", shards, "n.e")  # the last of its shard, which must stay to be counted
    assert [sorted(tensors) for tensors in held(shards).values()] == [["x.a"], ["n.d", "x.b", "x.c"], []]
    found = {name: tensor for tensors in held(shards).values() for name, tensor in tensors.items()}
    assert_states(found, {name.replace("m.", "x."): tensor for name, tensor in without("n.e").items()})
    assert ckpt("ls", shards).code == 0


def test_a_shard_without_an_index_has_metadata_of_its_own(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = save(state(), tmp_path / "set", "safetensors")
    (folder / "model.safetensors.index.json").unlink()
    shard = next(folder.iterdir())
    edited(ckpt, "meta", shard, "k=v")
    with safe_open(shard, "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "v"}


def test_an_empty_shard_stays_when_nothing_was_taken_from_it(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number, tensors in enumerate(({"a": torch.ones(2)}, {}, {"b": torch.ones(2)}), 1):
        torch.save(tensors, folder / f"pytorch_model-{number:05}-of-00003.bin")
    edited(ckpt, "rename", folder, "a", "c")
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_no_shard_has_stay_and_of_two_copies_the_one_that_counts_is_cast(
    tmp_path: Path, ckpt: Ckpt, kind: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    names = first, second = [f"m-{number:05}-of-00002.{kind}" for number in (1, 2)]
    for name, tensors in zip(names, ({"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.ones(1)}), strict=True):
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / name)
    index = {"metadata": {"total_size": 12, "total_parameters": 3, "by": ["me"]},
             "weight_map": {"a": first, "b": second, "lost": second}}  # fmt: skip
    path = folder / f"m.{kind}.index.json"
    path.write_text(json.dumps(index))
    edited(ckpt, "rename", path, "a", "x")
    edited(ckpt, "cast", path, "float16", "x")
    assert index_of(folder)["weight_map"] == {"x": first, "b": second, "lost": second}
    assert index_of(folder)["metadata"] == {"total_size": 8, "total_parameters": 3, "by": ["me"]}
    assert_states(read_shard(folder / first), {"x": torch.ones(2).half()})
    assert_states(read_shard(folder / second), {"x": torch.zeros(2), "b": torch.ones(1)})


def test_a_renamed_tensor_is_looked_for_where_it_is_although_the_index_was_wrong(shards: Path, ckpt: Ckpt) -> None:
    (path,) = shards.glob("*.index.json")
    index = index_of(shards)
    right = dict(index["weight_map"])
    wrong = {"m.b": right["m.a"], "n.d": right["n.e"]}
    path.write_text(json.dumps(index | {"weight_map": right | wrong}))
    edited(ckpt, "rename", shards, "m.b", "m.second")
    found = index_of(shards)["weight_map"]
    assert found.pop("m.second") == right.pop("m.b")
    assert found == {**right, "n.d": wrong["n.d"]}  # what was not asked for stays
    path.write_text(json.dumps(index_of(shards) | {"weight_map": {**found, "m.second": right["m.a"]}}))
    edited(ckpt, "rename", shards, "--add", "net")
    assert_holds(shards, renamed(lambda name: {"m.b": "net.m.second"}.get(name, f"net.{name}")))
