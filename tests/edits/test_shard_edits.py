"""Structural edits of sets of shards: index, sizes and files in step, judged by the readers of their libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from contract import contents
from huggingface_hub import load_torch_model, save_torch_state_dict
from run_edit import State, assert_refused, assert_states, edited, edited_as_told
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def state() -> State:
    """Tensors for three shards: a, then b, c and d, then e."""
    torch.manual_seed(0)
    return {
        "m.a": torch.randn(20, 5),
        "m.b": torch.randn(20, 5),
        "m.c": torch.randn(3),
        "n.d": torch.arange(4),
        "n.e": torch.randn(2, dtype=torch.float64),
    }


def tied_state() -> State:
    """The same with three names for one tensor."""
    tensors = state()
    return tensors | {"z.tied": tensors["m.a"], "z.more": tensors["m.a"]}


KINDS = ["safetensors", "bin"]


@pytest.fixture(params=KINDS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that huggingface_hub wrote."""
    return save(state(), tmp_path / "set", request.param)


@pytest.fixture(params=KINDS)
def tied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What huggingface_hub writes of tied tensors: one of them and notes in the index, or all of them in one shard."""
    folder = save(tied_state(), tmp_path / "tied", request.param)
    assert ties_of(folder) == [["m.a", "z.more", "z.tied"]]
    assert aliases(folder) == ({"z.tied": "m.a", "z.more": "m.a"} if request.param == "safetensors" else {})
    return folder


def save(tensors: State, folder: Path, kind: str) -> Path:
    """Write shards of at most 450 bytes."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=450, safe_serialization=kind == "safetensors")
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    """The index as it stands in the file."""
    (path,) = folder.glob("*.index.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def aliases(folder: Path) -> dict[str, str]:
    """The aliases that the index records."""
    index = index_of(folder)
    return {k: v for k, v in index["metadata"].items() if isinstance(v, str) and v in index["weight_map"]}


def kind_of(folder: Path) -> str:
    """Which kind of set it is."""
    return "safetensors" if list(folder.glob("*.safetensors")) else "bin"


def read_shard(path: Path, suffix: str = "") -> State:
    """What a shard's own library reads from it; the suffix is for a path that has none."""
    found: State = load_file(path) if (path.suffix or suffix) == ".safetensors" else torch.load(path)
    return found


def held(folder: Path) -> dict[str, State]:
    """What each shard has."""
    return {path.name: read_shard(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")}


def whole(folder: Path) -> State:
    """Every tensor of a set, with the aliases of its index; every name is where the index says, and nowhere else."""
    index, shards = index_of(folder), held(folder)
    assert {name: shard for shard, tensors in shards.items() for name in tensors} == index["weight_map"]
    assert set(index["weight_map"].values()) == set(shards)
    stored = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in stored.values()}
    assert index["metadata"]["total_size"] == sum(storages.values())
    assert not aliases(folder).keys() & stored.keys()
    return stored | {name: stored[kept] for name, kept in aliases(folder).items()}


def ties_of(folder: Path) -> list[list[str]]:
    """The names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in sorted(whole(folder).items()):
        names.setdefault(tensor.data_ptr(), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def assert_holds(folder: Path, wanted: State) -> None:
    """These tensors and no others, which its own library loads into a module."""
    assert_states(whole(folder), wanted)
    model = holder({name: wanted[name] for name in index_of(folder)["weight_map"]})
    load_torch_model(model, folder, strict=True, safe=kind_of(folder) == "safetensors")
    assert_states(model.state_dict(), {name: wanted[name] for name in model.state_dict()})


def holder(wanted: State) -> nn.Module:
    """A module whose state_dict has just these names."""
    root = nn.Module()
    for name, tensor in wanted.items():
        *outer, last = name.split(".")
        at = root
        for part in outer:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_buffer(last, torch.zeros_like(tensor))
    return root


def renamed(change: Callable[[str], str]) -> State:
    """The tensors under other names."""
    return {change(name): tensor for name, tensor in state().items()}


def without(*names: str, of: State | None = None) -> State:
    """The tensors without some."""
    return {name: tensor for name, tensor in (of or state()).items() if name not in names}


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


# --- ties ------------------------------------------------------------------------------------------------------------


def test_ties_follow_a_renaming(tied: Path, ckpt: Ckpt) -> None:
    edited(ckpt, "rename", tied, "--sub", "^", "net.")
    assert_holds(tied, {f"net.{name}": tensor for name, tensor in tied_state().items()})
    assert ties_of(tied) == [["net.m.a", "net.z.more", "net.z.tied"]]
    assert ckpt("ties", tied, "net.z.tied", "net.z.more").code == 0
    edited(ckpt, "rename", tied, "net.z", "y")
    assert ties_of(tied) == [["net.m.a", "y.more", "y.tied"]]


def test_removing_the_stored_name_of_a_tie_gives_its_bytes_to_another(tied: Path, ckpt: Ckpt) -> None:
    edited(ckpt, "rm", tied, "m.a")
    assert_holds(tied, without("m.a", of=tied_state()))
    assert ties_of(tied) == [["z.more", "z.tied"]]
    first, last = sorted(("z.more", "z.tied"), key=lambda name: name in aliases(tied))
    edited(ckpt, "rm", tied, first)
    assert_holds(tied, without("m.a", first, of=tied_state()))
    assert aliases(tied) == {}
    edited(ckpt, "rm", tied, last)
    assert_holds(tied, without("m.a"))


def test_removing_another_name_of_a_tie_leaves_every_tensor(tied: Path, ckpt: Ckpt) -> None:
    edited(ckpt, "rm", tied, "z.tied")
    assert_holds(tied, without("z.tied", of=tied_state()))
    assert ties_of(tied) == [["m.a", "z.more"]]


def test_ties_of_shards_that_do_not_change_come_along_to_a_new_folder(tied: Path, ckpt: Ckpt) -> None:
    out = tied.with_name("out")
    edited(ckpt, "cast", tied, "float16", "m.c", "-o", out)
    assert_holds(out, {name: tensor.half() if name == "m.c" else tensor for name, tensor in tied_state().items()})
    assert ties_of(out) == [["m.a", "z.more", "z.tied"]]
    assert ckpt("ties", out, "m.a", "z.tied").code == 0


@pytest.mark.parametrize("name", ["z.tied", "m.a"])
def test_untie_writes_a_tensor_into_its_shard_and_tie_takes_it_out_again(tied: Path, ckpt: Ckpt, name: str) -> None:
    size = index_of(tied)["metadata"]["total_size"]
    edited(ckpt, "untie", tied, name)
    assert_holds(tied, tied_state())
    assert ties_of(tied) == [sorted({"m.a", "z.more", "z.tied"} - {name})]
    assert index_of(tied)["metadata"]["total_size"] == size + 400
    assert ckpt("ties", tied, "m.a", "z.tied").code == 1
    edited(ckpt, "tie", tied, "z.more", name)
    assert_holds(tied, tied_state())
    assert ties_of(tied) == [["m.a", "z.more", "z.tied"]]
    assert index_of(tied)["metadata"]["total_size"] == size
    assert ckpt("ties", tied, "m.a", "z.tied").code == 0


def test_a_cast_of_a_tied_tensor_keeps_its_ties(tied: Path, ckpt: Ckpt) -> None:
    done = edited(ckpt, "cast", tied, "float16", "z.tied")
    assert done["changed"] == ["z.tied"]
    assert sorted(done["also_changed"]) == ["m.a", "z.more"]
    assert_holds(tied, {n: t.half() if n in ("m.a", "z.more", "z.tied") else t for n, t in tied_state().items()})
    assert ties_of(tied) == [["m.a", "z.more", "z.tied"]]


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["equal", "forced"])
def test_tie_across_shards_is_an_alias_in_the_index(tmp_path: Path, ckpt: Ckpt, force: list[str]) -> None:
    tensors = state() if force else state() | {"m.b": state()["m.a"].clone()}
    folder = save(tensors, tmp_path / "set", "safetensors")
    assert index_of(folder)["weight_map"]["m.a"] != index_of(folder)["weight_map"]["m.b"]
    done = edited(ckpt, "tie", folder, "m.b", "m.a", *force)
    assert len(done["removed"]) == 1
    assert aliases(folder) == {"m.a": "m.b"}
    assert_holds(folder, {**tensors, "m.a": tensors["m.b"]})
    assert ckpt("ties", folder, "m.a", "m.b").code == 0
    edited(ckpt, "untie", folder, "m.a")
    assert aliases(folder) == {}
    assert_holds(folder, {**tensors, "m.a": tensors["m.b"]})
    assert ckpt("ties", folder, "m.a", "m.b").code == 1


def test_tie_across_pickled_shards_is_refused_and_within_one_it_is_a_shared_storage(tmp_path: Path, ckpt: Ckpt) -> None:
    tensors = state() | {"m.b": state()["m.a"].clone(), "n.d": state()["m.c"].clone()}
    folder = save(tensors, tmp_path / "set", "bin")
    for force in ([], ["--force"]):
        assert_refused(ckpt, folder, "tensor of another shard", "tie", "m.a", "m.b", *force)
    edited(ckpt, "tie", folder, "m.c", "n.d")
    assert_holds(folder, tensors)
    assert ties_of(folder) == [["m.c", "n.d"]]


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
