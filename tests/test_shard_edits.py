"""Structural edits of sets of shards: index, sizes and files in step, judged by the readers of their libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from contract import contents
from huggingface_hub import load_torch_model, save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

State = dict[str, torch.Tensor]


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


KINDS = ["safetensors", "bin"]


@pytest.fixture(params=KINDS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that huggingface_hub wrote."""
    folder = tmp_path / "set"
    save(state(), folder, request.param)
    return folder


def save(tensors: State, folder: Path, kind: str) -> None:
    """Write shards of at most 450 bytes."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=450, safe_serialization=kind == "safetensors")


def index_of(folder: Path) -> dict[str, Any]:
    """The index as it stands in the file."""
    (path,) = folder.glob("*.index.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def kind_of(folder: Path) -> str:
    """Which kind of set it is."""
    return "safetensors" if list(folder.glob("*.safetensors")) else "bin"


def read_shard(path: Path) -> State:
    """What a shard's own library reads from it."""
    found: State = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    return found


def assert_holds(folder: Path, wanted: State) -> None:
    """Every name is where the index says, nowhere else, and all of it adds up."""
    index = index_of(folder)
    held = {path.name: read_shard(path) for path in folder.iterdir() if not path.name.endswith(".json")}
    assert {name: shard for shard, tensors in held.items() for name in tensors} == index["weight_map"]
    assert index["weight_map"].keys() == wanted.keys()
    for name, tensor in wanted.items():
        found = held[index["weight_map"][name]][name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    model = holder(wanted)
    load_torch_model(model, folder, strict=True, safe=kind_of(folder) == "safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name])


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


def without(*names: str) -> State:
    """The tensors without some."""
    return {name: tensor for name, tensor in state().items() if name not in names}


EDITS: dict[str, tuple[list[str], Callable[[], State], int]] = {
    "rename one": (["rename", "S", "m.a", "m.first"], lambda: renamed(lambda n: {"m.a": "m.first"}.get(n, n)), 1),
    "add a prefix": (["rename", "S", "--add", "net"], lambda: renamed(lambda n: f"net.{n}"), 3),
    "remove from a shard": (["rm", "S", "n.d"], lambda: without("n.d"), 1),
    "remove a shard": (["rm", "S", "m.a"], lambda: without("m.a"), 0),
    "keep one": (["keep", "S", "m.b", "n.e"], lambda: without("m.a", "m.c", "n.d"), 1),
    "keep the root": (["keep", "S", "--root", "n"],
                      lambda: {n[2:]: t for n, t in state().items() if n.startswith("n.")}, 2),
    "cast": (["cast", "S", "bfloat16"],
             lambda: {n: t.bfloat16() if t.is_floating_point() else t for n, t in state().items()}, 3),
    "cast one": (["cast", "S", "float16", "m.c"],
                 lambda: {n: t.half() if n == "m.c" else t for n, t in state().items()}, 1),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_set_keeps_index_sizes_and_shards_in_step(shards: Path, ckpt: Ckpt, edit: str) -> None:
    arguments, wanted, touched = EDITS[edit]
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards.iterdir()}
    call = [str(shards) if argument == "S" else argument for argument in arguments]
    dry = json.loads(ckpt(*call, "-n", "--json").out)
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards.iterdir()} == before
    answer = ckpt(*call, "--json")
    assert answer.code == 0, answer.err
    done = json.loads(answer.out)
    assert {**dry, "dry_run": False} == done
    assert_holds(shards, wanted())
    written = [path for path in shards.iterdir() if path.stat().st_mtime_ns != before[path.name][1]]
    assert len(written) == touched + 1  # and the index
    replaced = [path for path in written if path.stat().st_ino != before[path.name][0]]
    assert len(replaced) == (0 if done["patched"] else len(written))
    assert done["patched"] or done["bytes_written"] == sum(path.stat().st_size for path in written)
    is_pickled = any(shards.glob("*.bin"))
    assert done["patched"] == (edit == "rename one" or (edit == "add a prefix" and is_pickled))
    assert set(done["removed"]) == before.keys() - {path.name for path in shards.iterdir()}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_set_to_a_new_folder_leaves_the_set(tmp_path: Path, shards: Path, ckpt: Ckpt, edit: str) -> None:
    arguments, wanted, _ = EDITS[edit]
    before = contents(shards)
    out = tmp_path / "out"
    answer = ckpt(*[str(shards) if argument == "S" else argument for argument in arguments], "-o", out, "--json")
    assert answer.code == 0, answer.err
    assert contents(shards) == before
    assert_holds(out, wanted())
    assert json.loads(answer.out)["bytes_written"] == sum(path.stat().st_size for path in out.iterdir())
    assert ckpt(*[str(shards) if argument == "S" else argument for argument in arguments], "-o", out).code == 2


def test_a_backup_of_a_set_keeps_every_file_that_is_replaced(shards: Path, ckpt: Ckpt) -> None:
    before = contents(shards)
    done = json.loads(ckpt("rm", shards, "m.a", "n.d", "--backup", "--json").out)
    assert len(done["backups"]) == 3
    for path in map(Path, done["backups"]):
        assert path.read_bytes() == before[path.name.removesuffix(".bak")]


def test_one_shard_of_a_set_is_not_changed_behind_the_back_of_its_index(
    tmp_path: Path, shards: Path, ckpt: Ckpt
) -> None:
    shard = shards / index_of(shards)["weight_map"]["m.a"]
    before = contents(shards)
    for arguments in (["rename", shard, "m.a", "x"], ["cast", shard, "bf16"]):
        answer = ckpt(*arguments)
        assert answer.code == 2
        assert "one shard of" in answer.err
        assert "index.json" in answer.err.splitlines()[1]
    assert contents(shards) == before
    assert ckpt("rename", shard, "m.a", "x", "-o", tmp_path / "alone").code == 0
    assert read_shard_at(tmp_path / "alone", shard.suffix).keys() == {"x"}
    assert ckpt("set", shard, "m.a[0,0]=1").code == 0  # values are no business of the index


def read_shard_at(path: Path, suffix: str) -> State:
    """The shard at a path without a suffix."""
    return load_file(path) if suffix == ".safetensors" else torch.load(path)


REFUSED = [
    (["rename", "S", "m.a", "m.b"], "would both be called"),
    (["rename", "S", "gone", "x"], "nothing is called 'gone'"),
    (["rm", "S", "*"], "nothing would be left"),
    (["rm", "S", "gone*"], "nothing is called"),
    (["set", "S", "--new", "epoch=1"], "cannot be set in a set of shards"),
    (["tie", "S", "m.a", "m.b"], "different values"),
    (["untie", "S", "m.a"], "shares its bytes with no other name"),
    (["rm", "S", "m.a", "-o", "S"], "must go to a folder that is new or empty"),
    (["meta", "S", "total_size=1"], "follows from the shards"),
]


@pytest.mark.parametrize(("arguments", "told"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_cannot_be_done_to_a_set_is_refused(shards: Path, ckpt: Ckpt, arguments: list[str], told: str) -> None:
    before = contents(shards)
    for dry in ([], ["-n"]):
        answer = ckpt(*[str(shards) if argument == "S" else argument for argument in arguments], *dry)
        assert (answer.code, told in answer.err) == (2, True), answer.err
    assert contents(shards) == before


def test_a_set_of_links_is_not_replaced_by_files(tmp_path: Path, shards: Path, ckpt: Ckpt) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in shards.iterdir():
        (linked / path.name).symlink_to(path)
    before = contents(shards)
    answer = ckpt("rename", linked, "m", "x")
    assert (answer.code, "symbolic link" in answer.err) == (2, True)
    assert contents(shards) == before
    assert ckpt("rename", linked, "m", "x", "-o", tmp_path / "out").code == 0


def test_a_cached_set_is_not_edited(tmp_path: Path, shards: Path, ckpt: Ckpt) -> None:
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(shards.iterdir())):
        blob = tmp_path / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(blob)
    answer = ckpt("rename", shards, "m", "x")
    assert (answer.code, "Hugging Face hub's cache" in answer.err) == (2, True)


# --- ties ------------------------------------------------------------------------------------------------------------


def tied_set(folder: Path) -> None:
    """What huggingface_hub writes of tied tensors: one of them, and a note in the index."""
    tensors = state()
    tensors["z.tied"] = tensors["z.more"] = tensors["m.a"]
    save(tensors, folder, "safetensors")


def aliases(folder: Path) -> dict[str, str]:
    """The aliases that the index records."""
    index = index_of(folder)
    return {k: v for k, v in index["metadata"].items() if isinstance(v, str) and v in index["weight_map"]}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A safetensors set with three names for one tensor."""
    folder = tmp_path / "tied"
    tied_set(folder)
    assert aliases(folder) == {"z.tied": "m.a", "z.more": "m.a"}
    return folder


def real(folder: Path) -> State:
    """Every tensor that a shard has."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_aliases_in_the_index_follow_a_renaming(tied: Path, ckpt: Ckpt) -> None:
    assert ckpt("rename", tied, "--sub", "^", "net.").code == 0
    assert aliases(tied) == {"net.z.tied": "net.m.a", "net.z.more": "net.m.a"}
    assert ckpt("ties", tied, "net.z.tied", "net.z.more").code == 0
    assert ckpt("rename", tied, "net.z", "y").code == 0
    assert aliases(tied) == {"y.tied": "net.m.a", "y.more": "net.m.a"}


def test_removing_the_tensor_of_aliases_gives_its_bytes_to_one_of_them(tied: Path, ckpt: Ckpt) -> None:
    value = real(tied)["m.a"]
    assert ckpt("rm", tied, "m.a").code == 0
    (alias,) = aliases(tied).items()
    assert set(alias) == {"z.tied", "z.more"}
    assert torch.equal(real(tied)[alias[1]], value)
    assert index_of(tied)["weight_map"].keys() == real(tied).keys()
    assert ckpt("rm", tied, alias[1]).code == 0
    assert aliases(tied) == {}
    assert torch.equal(real(tied)[alias[0]], value)
    assert ckpt("rm", tied, alias[0]).code == 0
    assert index_of(tied)["weight_map"].keys() == real(tied).keys() == without("m.a").keys()


def test_removing_an_alias_of_the_index_leaves_every_tensor(tied: Path, ckpt: Ckpt) -> None:
    before = real(tied)
    assert ckpt("rm", tied, "z.tied").code == 0
    assert aliases(tied) == {"z.more": "m.a"}
    assert all(torch.equal(tensor, before.pop(name)) for name, tensor in real(tied).items())
    assert not before


@pytest.mark.parametrize("name", ["z.tied", "m.a"])
def test_untie_in_a_set_writes_a_tensor_into_its_shard(tied: Path, ckpt: Ckpt, name: str) -> None:
    value = real(tied)["m.a"]
    answer = ckpt("untie", tied, name)
    assert answer.code == 0, answer.err
    found = real(tied)
    assert torch.equal(found[name], value)
    assert index_of(tied)["weight_map"].keys() == found.keys()
    assert len(found) == 6
    assert len(aliases(tied)) == 1
    assert index_of(tied)["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert ckpt("ties", tied, "m.a", "z.tied").code == 1


def test_a_cast_of_a_tied_tensor_keeps_its_aliases(tied: Path, ckpt: Ckpt) -> None:
    answer = ckpt("cast", tied, "float16", "z.tied", "--json")
    assert json.loads(answer.out)["changed"] == ["z.tied"]
    assert sorted(json.loads(answer.out)["also_changed"]) == ["m.a", "z.more"]
    assert real(tied)["m.a"].dtype == torch.float16
    assert aliases(tied) == {"z.tied": "m.a", "z.more": "m.a"}


def test_tie_across_shards_is_an_alias_in_the_index(tmp_path: Path, ckpt: Ckpt) -> None:
    tensors = state() | {"m.b": state()["m.a"].clone()}
    folder = tmp_path / "set"
    save(tensors, folder, "safetensors")
    assert index_of(folder)["weight_map"]["m.a"] != index_of(folder)["weight_map"]["m.b"]
    answer = ckpt("tie", folder, "m.b", "m.a", "--json")
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["removed"]) == 1
    assert aliases(folder) == {"m.a": "m.b"}
    assert_holds_real(folder, without("m.a"))
    assert ckpt("ties", folder, "m.a", "m.b").code == 0


def assert_holds_real(folder: Path, wanted: State) -> None:
    """The shards have these tensors and the index says so."""
    assert real(folder).keys() == wanted.keys() == index_of(folder)["weight_map"].keys()
    assert index_of(folder)["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())


def test_tie_across_pickled_shards_is_refused_and_within_one_it_is_a_shared_storage(tmp_path: Path, ckpt: Ckpt) -> None:
    tensors = state() | {"m.b": state()["m.a"].clone(), "n.d": state()["m.c"].clone()}
    folder = tmp_path / "set"
    save(tensors, folder, "bin")
    before = contents(folder)
    for dry in ([], ["-n"]):
        answer = ckpt("tie", folder, "m.a", "m.b", *dry)
        assert (answer.code, "tensor of another shard" in answer.err) == (2, True)
    assert contents(folder) == before
    assert ckpt("tie", folder, "m.c", "n.d").code == 0
    shard = torch.load(folder / index_of(folder)["weight_map"]["n.d"])
    assert shard["m.c"].data_ptr() == shard["n.d"].data_ptr()


# --- metadata, and sets that are odd ---------------------------------------------------------------------------------


def test_metadata_changes_where_it_is_and_a_new_string_goes_to_the_index(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "set"
    save(state(), folder, "safetensors")
    index = index_of(folder)
    index["metadata"]["nested"] = {"a": [1, 2]}
    index["more"] = 7
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ckpt("meta", folder, "note=hi").code == 0
    now = index_of(folder)
    assert now == {**index, "metadata": {**index["metadata"], "note": "hi"}}
    assert ckpt("meta", folder, "-d", "note").code == 0
    assert index_of(folder) == index
    refused = ckpt("meta", folder, "-d", "format")
    assert (refused.code, "not in the index but in its shards" in refused.err) == (2, True)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_set_without_an_index_is_edited_shard_by_shard(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "set"
    save(state(), folder, "safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert ckpt("rename", folder, "m", "x").code == 0
    assert real(folder).keys() == {"x.a", "x.b", "x.c", "n.d", "n.e"}
    refused = ckpt("meta", folder, "k=v")
    assert (refused.code, "without an index has no metadata of its own" in refused.err) == (2, True)
    shard = next(iter(folder.glob("*.safetensors")))
    assert ckpt("meta", shard, "k=v").code == 0
    with safe_open(shard, "pt") as file:
        assert file.metadata()["k"] == "v"


def test_an_empty_shard_stays_when_nothing_was_taken_from_it(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number, tensors in enumerate(({"a": torch.ones(2)}, {}, {"b": torch.ones(2)}), 1):
        torch.save(tensors, folder / f"pytorch_model-{number:05}-of-00003.bin")
    assert ckpt("rename", folder, "a", "c").code == 0
    assert len(list(folder.iterdir())) == 3


def test_a_name_that_two_shards_have_is_changed_in_the_one_that_counts(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "set"
    save(state(), folder, "bin")
    index = index_of(folder)
    other = folder / index["weight_map"]["m.b"]
    torch.save({**torch.load(other), "m.a": torch.zeros(1)}, other)
    answer = ckpt("cast", folder, "float16", "m.a")
    assert answer.code == 0, answer.err
    assert torch.load(folder / index["weight_map"]["m.a"])["m.a"].dtype == torch.float16
    assert os.path.exists(other)
