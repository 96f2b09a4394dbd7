"""Structural edits of safetensors files, with the reference library as the judge of every result."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import st
from conftest import Ckpt
from run_edit import (
    assert_refused,
    assert_senseless,
    assert_states,
    edited,
    edited_as_told,
    odd_requests,
    senseless,
)
from safetensors.torch import load_file, save_file
from safetensors_parts import assert_aligned, metadata, parts, state


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file as the library writes it: a header without room."""
    path = tmp_path / "a.safetensors"
    save_file(state(), path, metadata={"format": "pt", "z": "last", "a": "first"})
    return path


# --- names -----------------------------------------------------------------------------------------------------------

RENAMINGS = {
    "one": (["module.a.bias", "module.a.offset"], {"module.a.bias": "module.a.offset"}),
    "prefix": (["module.a", "x.y"], {"module.a.weight": "x.y.weight", "module.a.bias": "x.y.bias"}),
    "strip": (["--strip", "module"],
              {"module.b.weight": "b.weight", "module.a.weight": "a.weight", "module.a.bias": "a.bias"}),
    "strip with its dot": (["--strip", "other."], {"other.half": "half", "other.flag": "flag"}),
    "add": (["--add", "net."], {name: f"net.{name}" for name in state()}),
    "sub": (["--sub", r"^module\.(\w)", r"\1.m"],
            {"module.b.weight": "b.m.weight", "module.a.weight": "a.m.weight", "module.a.bias": "a.m.bias"}),
    "one, then sub": (["other.half", "other.h", "--sub", "^other", "o"], {"other.half": "o.h", "other.flag": "o.flag"}),
    "map": (["--map", "map.json"],
            {"module.a.weight": "first.weight", "module.a.bias": "second.offset", "other.half": "rest.half",
             "other.flag": "rest.flag"}),
    "swap": (["--map", "swap.json"], {"other.half": "other.flag", "other.flag": "other.half"}),
    "unicode": (["other.half", "später.½"], {"other.half": "später.½"}),
}  # fmt: skip

MAPS = {
    "map.json": {"module.a": "first", "module.a.bias": "second.offset", "other.": "rest."},
    "swap.json": {"other.half": "other.flag", "other.flag": "other.half"},
}


@pytest.mark.parametrize("case", RENAMINGS)
def test_a_renaming_gives_the_same_bytes_other_names(here: Path, ckpt: Ckpt, plain: Path, case: str) -> None:
    for name, names_of_map in MAPS.items():
        Path(name).write_text(json.dumps(names_of_map))
    arguments, names = RENAMINGS[case]
    header, data = parts(plain)
    done = edited_as_told(ckpt, "rename", plain, *arguments)
    assert_states(load_file(plain), {names.get(name, name): tensor for name, tensor in state().items()})
    found, rest = parts(plain)
    assert rest == data
    assert list(found) == [names.get(name, name) for name in header]
    assert list(found["__metadata__"].items()) == list(header["__metadata__"].items())
    assert done["renamed"] == names
    assert sorted(done["changed"]) == sorted(names)
    assert done["in_place"] is True


def test_a_shorter_name_is_a_change_of_the_header_alone(ckpt: Ckpt, plain: Path) -> None:
    data, size, inode = parts(plain)[1], plain.stat().st_size, plain.stat().st_ino
    done = edited_as_told(ckpt, "rename", plain, "--strip", "module")
    assert (plain.stat().st_ino, plain.stat().st_size, parts(plain)[1]) == (inode, size, data)
    assert done["patched"] is True
    assert_states(load_file(plain), {name.removeprefix("module."): tensor for name, tensor in state().items()})


def test_a_header_that_does_not_fit_is_written_with_room_for_the_next_edit(ckpt: Ckpt, plain: Path) -> None:
    data, size = parts(plain)[1], plain.stat().st_size
    done = edited_as_told(ckpt, "rename", plain, "--add", "a.long.prefix")
    assert done["patched"] is False
    assert plain.stat().st_size == done["bytes_written"]
    assert plain.stat().st_size > size
    assert parts(plain)[1] == data
    inode = plain.stat().st_ino
    assert edited(ckpt, "rename", plain, "--add", "another")["patched"] is True
    assert plain.stat().st_ino == inode
    assert_states(load_file(plain), {f"another.a.long.prefix.{name}": tensor for name, tensor in state().items()})


@pytest.mark.parametrize("room", [200, 0])
def test_the_order_of_the_header_and_fields_that_mean_nothing_are_kept(tmp_path: Path, ckpt: Ckpt, room: int) -> None:
    fields = {
        "late": st.info("U8", [3], 8, 11) | {"note": {"by": ["me", None, 1.5]}},
        "__metadata__": {"k": "v", "a": "ü\n"},
        "middle": st.info("F32", [1], 4, 8),
        "early": st.info("U8", [4], 0, 4),
    }
    data = bytes(range(11))
    path = st.write(tmp_path / "odd.safetensors", json.dumps(fields).encode() + b" " * room, data)
    name = "n" * 100
    assert edited(ckpt, "rename", path, "middle", name)["patched"] is bool(room)
    found, rest = parts(path)
    assert rest == data
    assert found.pop("__metadata__") == fields["__metadata__"]
    assert list(found) == ["late", name, "early"]
    assert found["late"] == fields["late"]
    less = tmp_path / "less.safetensors"
    edited(ckpt, "rm", path, "early", "-o", less)
    found, rest = parts(less)
    assert [key for key in found if key != "__metadata__"] == ["late", name]
    assert found["late"]["note"] == {"by": ["me", None, 1.5]}
    assert {key: tensor.view(torch.uint8).tolist() for key, tensor in load_file(less).items()} == {
        "late": [8, 9, 10], name: [4, 5, 6, 7],
    }  # fmt: skip


def test_a_removal_leaves_what_follows_aligned(tmp_path: Path, ckpt: Ckpt) -> None:
    fields = {"a": st.info("U8", [3], 0, 3), "b": st.info("U8", [5], 3, 8), "c": st.info("F64", [1], 8, 16)}
    path = st.write(tmp_path / "a.safetensors", fields, bytes(8) + np.float64(1.5).tobytes())
    edited(ckpt, "rm", path, "a")
    assert load_file(path)["c"].item() == 1.5
    assert list(parts(path)[0]) == ["b", "c"]


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_a_cast_puts_wider_elements_first_as_the_library_does(ckpt: Ckpt, plain: Path) -> None:
    done = edited_as_told(ckpt, "cast", plain, "bf16", "module")
    assert sorted(done["changed"]) == ["module.a.weight", "module.b.weight"]
    assert done["bytes_written"] == plain.stat().st_size
    wanted = {
        name: tensor.bfloat16() if name.startswith("module.") and tensor.is_floating_point() else tensor
        for name, tensor in state().items()
    }
    assert_states(load_file(plain), wanted)
    assert_aligned(plain)


def test_a_cast_of_some_keeps_those_without_elements_and_ties(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"t{number}": torch.randn(3) for number in range(4)} | {"i": torch.arange(3), "e": torch.empty(0, 2)}
    save_file(tensors, path, metadata={"alias": "t1"})
    edited(ckpt, "cast", path, "float16", "t0", "t2", "e")
    assert_states(load_file(path), {k: v.half() if k in ("t0", "t2", "e") else v for k, v in tensors.items()})
    assert_aligned(path)
    done = edited(ckpt, "cast", path, "bf16", "t1")
    assert (done["changed"], done["also_changed"]) == (["t1"], ["alias"])
    assert ckpt("ties", path, "t1", "alias").code == 0


def test_a_cast_that_loses_values_is_refused_and_counted(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.tensor([1e30, -1e30, 1e-30, 1.0, float("inf")])}, path)
    assert_refused(ckpt, path, "2 values would become infinite, 1 value would become zero in float16",
                   "cast", "float16")  # fmt: skip
    assert_refused(ckpt, path, "1 value would become zero, 2 values would become the largest there is in float8",
                   "cast", "float8_e4m3fn")  # fmt: skip
    edited_as_told(ckpt, "cast", path, "float16", "--lossy")
    assert load_file(path)["a"].tolist() == [float("inf"), float("-inf"), 0.0, 1.0, float("inf")]


# --- metadata --------------------------------------------------------------------------------------------------------


def test_meta_shows_strings(ckpt: Ckpt, plain: Path) -> None:
    assert sorted(ckpt("meta", plain).lines) == ["a\tfirst", "format\tpt", "z\tlast"]
    assert ckpt("meta", plain, "z").lines == ["z\tlast"]
    assert json.loads(ckpt("meta", plain, "--json", "z", "a").out) == {"z": "last", "a": "first"}


def test_meta_sets_and_removes_strings_in_the_header_alone(ckpt: Ckpt, plain: Path) -> None:
    size, inode = plain.stat().st_size, plain.stat().st_ino
    done = edited_as_told(ckpt, "meta", plain, "z=", "e=1=2", "-d", "a")
    assert (done["changed"], done["patched"], done["verb"]) == (["z", "e", "a"], True, "changed")
    assert (plain.stat().st_size, plain.stat().st_ino) == (size, inode)
    assert metadata(plain) == {"format": "pt", "z": "", "e": "1=2"}
    edited(ckpt, "meta", plain, "note=" + "x" * 500)
    assert metadata(plain) == {"format": "pt", "z": "", "e": "1=2", "note": "x" * 500}
    assert edited(ckpt, "meta", plain, "format=pt")["bytes_written"] == 0
    edited(ckpt, "meta", plain, "-d", "format", "-d", "z", "-d", "note", "-d", "e")
    assert metadata(plain) == {}
    assert_states(load_file(plain), state())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gone"], "nothing is called 'gone'"),
        (["-d", "gone"], "nothing is called 'gone'"),
        (["=x"], "'=x' is not KEY=VALUE"),
        (["z=1", "y"], "'y' is not KEY=VALUE"),
        (["other.half=x"], "would record a tie"),
        (["k=\udcff"], "metadata is text, and that is not UTF-8"),
    ],
    ids=ascii,
)
def test_metadata_that_cannot_be_is_refused(ckpt: Ckpt, plain: Path, arguments: list[str], told: str) -> None:
    assert_refused(ckpt, plain, told, "meta", *arguments)


# --- what is refused, and what an edit says --------------------------------------------------------------------------


@senseless
def test_what_makes_no_sense_is_refused_in_one_line(here: Path, ckpt: Ckpt, arguments: tuple[str, ...]) -> None:
    path = here / "a.safetensors"
    save_file(odd_requests(), path)
    assert_senseless(ckpt, path, arguments)


def test_a_value_that_is_no_tensor_is_refused(ckpt: Ckpt, plain: Path) -> None:
    assert_refused(ckpt, plain, "holds tensors and strings only", "set", "--new", "epoch=1")


def test_a_backup_is_the_old_file_whether_it_is_patched_or_replaced(plain: Path, ckpt: Ckpt) -> None:
    edits = (("other", "o", True, f"{plain}.bak"), ("o", "a.much.longer.name", False, f"{plain}.bak.2"))
    for old, new, patched, kept in edits:
        before = plain.read_bytes()
        done = edited(ckpt, "rename", plain, old, new, "--backup")
        assert (done["patched"], done["backup"]) == (patched, kept)
        assert Path(kept).read_bytes() == before


def test_an_edit_through_a_link_changes_the_file_and_keeps_the_link(plain: Path, ckpt: Ckpt) -> None:
    plain.chmod(0o640)
    link = plain.with_name("link.safetensors")
    link.symlink_to(plain.name)
    edited(ckpt, "rm", link, "other.half")
    assert link.is_symlink()
    assert "other.half" not in load_file(plain)
    assert plain.stat().st_mode & 0o777 == 0o640


def test_a_file_in_a_cache_is_refused_by_every_edit(plain: Path, ckpt: Ckpt) -> None:
    blob = plain.parent / "hub" / "blobs" / ("0123456789abcdef" * 4)
    blob.parent.mkdir(parents=True)
    os.rename(plain, blob)
    plain.symlink_to(blob)
    for command, *rest in (("rename", "other", "d"), ("rm", "other"), ("meta", "a=b"), ("cast", "float16")):
        assert_refused(ckpt, plain, "the Hugging Face hub's cache", command, *rest)
    edited(ckpt, "rename", plain, "other", "d", "-o", plain.with_name("out.safetensors"))
