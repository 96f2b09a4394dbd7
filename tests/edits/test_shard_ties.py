"""Ties in sets of shards: notes in the index, or one storage in a pickled shard."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Ckpt
from run_edit import assert_refused, edited
from shard_sets import KINDS, aliases, assert_holds, index_of, save, state, tied_state, ties_of, without


@pytest.fixture(params=KINDS)
def tied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What huggingface_hub writes of tied tensors: one of them and notes in the index, or all of them in one shard."""
    folder = save(tied_state(), tmp_path / "tied", request.param)
    assert ties_of(folder) == [["m.a", "z.more", "z.tied"]]
    assert aliases(folder) == ({"z.tied": "m.a", "z.more": "m.a"} if request.param == "safetensors" else {})
    return folder


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
