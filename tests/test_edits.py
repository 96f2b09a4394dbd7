"""Structural edits of safetensors files and shard sets, and what every edit refuses; the libraries are the oracles."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from contract import quietly
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

State = dict[str, torch.Tensor]

ONE_LINE = re.compile(r"ckpt: [^\n]+\n(hint: [^\n]+\n)?")
KEYS = ["path", "output", "changed", "also_changed", "bytes_written", "in_place", "dry_run", "backup", "backups",
        "verb", "patched", "renamed", "removed"]  # fmt: skip


class Net(nn.Module):
    """A network with a tied layer and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 2)


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, in its order."""
    raw = path.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def data_of(path: Path) -> bytes:
    """What follows the header."""
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def write_raw(path: Path, header: dict[str, Any], data: bytes, room: int = 0) -> None:
    """A safetensors file of any header."""
    raw = json.dumps(header).encode() + b" " * room
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def metadata_of(path: Path) -> dict[str, str]:
    """The strings of a safetensors file, as the library reads them."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def assert_states(found: State, wanted: State) -> None:
    """Equal names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def told(ckpt: Ckpt, *args: object) -> dict[str, Any]:
    """What an edit says of itself with --json."""
    answer = ckpt(*args, "--json")
    assert (answer.code, answer.err) == (0, "")
    found: dict[str, Any] = json.loads(answer.out)
    assert list(found) == KEYS
    return found


def refused(ckpt: Ckpt, text: str, *args: object) -> None:
    """An edit that is refused in one line, and changes nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    answer = ckpt(*args)
    assert answer.code == 2, args
    assert ONE_LINE.fullmatch(answer.err), answer.err
    assert text in answer.err
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def st(here: Path) -> Path:
    """A safetensors file with two aliases, as `save_model` writes it."""
    save_model(Net(), "a.safetensors", metadata={"format": "pt"})
    return here / "a.safetensors"


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_a_rename_that_fits_changes_the_header_alone(st: Path, ckpt: Ckpt) -> None:
    old, size, data = load_file(st), st.stat().st_size, data_of(st)
    inode = st.stat().st_ino
    done = told(ckpt, "rename", st, "c", "d")
    assert (done["patched"], done["in_place"], done["changed"]) == (True, True, ["c.bias", "c.weight"])
    assert done["renamed"] == {"c.bias": "d.bias", "c.weight": "d.weight"}
    assert (st.stat().st_size, st.stat().st_ino, data_of(st)) == (size, inode, data)
    assert_states(load_file(st), {name.replace("c.", "d."): tensor for name, tensor in old.items()})


def test_a_rename_that_does_not_fit_writes_the_file_anew_with_room_for_the_next(st: Path, ckpt: Ckpt) -> None:
    old, data = load_file(st), data_of(st)
    first = told(ckpt, "rename", st, "--add", "a.very.long.prefix")
    assert (first["patched"], first["bytes_written"]) == (False, st.stat().st_size)
    assert data_of(st) == data
    second = told(ckpt, "rename", st, "--add", "and.another.one")
    assert second["patched"]
    assert_states(load_file(st), {f"and.another.one.a.very.long.prefix.{k}": v for k, v in old.items()})


def test_aliases_follow_a_rename_of_either_name(st: Path, ckpt: Ckpt) -> None:
    told(ckpt, "rename", st, "a", "x")
    told(ckpt, "rename", st, "b", "y")
    found = {key: value for key, value in metadata_of(st).items() if key != "format"}
    assert {frozenset(pair) for pair in found.items()} == {
        frozenset({"x.weight", "y.weight"}),
        frozenset({"x.bias", "y.bias"}),
    }
    assert ckpt("ties", st, "x.weight", "y.weight").code == 0


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (("--strip", "c"), {"c.weight": "weight", "c.bias": "bias"}),
        (("--strip", "c."), {"c.weight": "weight", "c.bias": "bias"}),
        (("--sub", r"^c\.(w|b)", r"head.\1"), {"c.weight": "head.weight", "c.bias": "head.bias"}),
        (("--map", "map.json"), {"c.weight": "head.w", "c.bias": "d.bias"}),
        (("c.weight", "c.w", "--sub", "^c", "d"), {"c.weight": "d.w", "c.bias": "d.bias"}),
    ],
)
def test_every_way_to_rename_gives_the_names_that_it_says(
    st: Path, ckpt: Ckpt, options: tuple[str, ...], change: dict[str, str]
) -> None:
    Path("map.json").write_text('{"c.weight": "head.w", "c.": "d."}')
    old = load_file(st)
    assert told(ckpt, "rename", st, *options)["renamed"] == change
    assert_states(load_file(st), {change.get(name, name): tensor for name, tensor in old.items()})


def test_names_can_be_swapped(st: Path, ckpt: Ckpt) -> None:
    save_file({"x": torch.ones(2), "y": torch.zeros(2)}, st)
    Path("map.json").write_text('{"x": "y", "y": "x"}')
    told(ckpt, "rename", st, "--map", "map.json")
    assert_states(load_file(st), {"y": torch.ones(2), "x": torch.zeros(2)})


def test_removing_the_stored_name_of_a_tie_leaves_the_tensor_to_its_alias(st: Path, ckpt: Ckpt) -> None:
    old, aliases = load_file(st), metadata_of(st)
    alias = next(key for key in aliases if key.endswith("weight"))
    told(ckpt, "rm", st, aliases[alias])
    assert torch.equal(load_file(st)[alias], old[aliases[alias]])
    assert alias not in metadata_of(st)
    assert set(metadata_of(st)) == {key for key in aliases if key != alias}


def test_the_last_of_a_tie_takes_the_bytes_with_it(st: Path, ckpt: Ckpt) -> None:
    told(ckpt, "keep", st, "c")
    assert list(load_file(st)) == ["c.bias", "c.weight"]
    assert metadata_of(st) == {"format": "pt"}
    assert len(data_of(st)) == 40


def test_untie_and_tie_are_each_others_inverse(st: Path, ckpt: Ckpt) -> None:
    aliases = metadata_of(st)
    dropped = next(key for key in aliases if key.endswith("weight"))
    kept = aliases[dropped]
    told(ckpt, "untie", st, dropped)
    state = load_file(st)
    assert torch.equal(state[dropped], state[kept])
    assert dropped not in metadata_of(st)
    told(ckpt, "tie", st, kept, dropped)
    assert metadata_of(st) == aliases
    net = Net()
    assert load_model(net, st) == (set(), [])


def test_a_tie_keeps_the_name_that_was_given_first(here: Path, ckpt: Ckpt) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, "a.safetensors")
    refused(ckpt, "different values", "tie", "a.safetensors", "b", "a")
    told(ckpt, "tie", "a.safetensors", "b", "a", "--force")
    assert_states(load_file("a.safetensors"), {"b": torch.zeros(2)})
    assert metadata_of(here / "a.safetensors") == {"a": "b"}


def test_a_cast_keeps_every_tensor_aligned_and_tied(here: Path, ckpt: Ckpt) -> None:
    state = {f"t{number}": torch.randn(3) for number in range(4)} | {"i": torch.arange(3), "e": torch.empty(0, 2)}
    save_file(state, "a.safetensors", metadata={"alias": "t1"})
    told(ckpt, "cast", "a.safetensors", "float16", "t0", "t2", "e")
    wanted = {name: tensor.half() if name in ("t0", "t2", "e") else tensor for name, tensor in state.items()}
    assert_states(load_file("a.safetensors"), wanted)
    for name, info in header_of(here / "a.safetensors").items():
        if name != "__metadata__":
            assert info["data_offsets"][0] % wanted[name].itemsize == 0
    assert told(ckpt, "cast", "a.safetensors", "bf16", "t1")["changed"] == ["t1"]
    assert ckpt("ties", "a.safetensors", "t1", "alias").code == 0


def test_what_a_cast_would_lose_is_counted_and_refused_and_so_it_is_in_a_dry_run(here: Path, ckpt: Ckpt) -> None:
    save_file({"a": torch.tensor([1e6, -1e6, 1e-9, 0.5])}, "a.safetensors")
    for flags in ((), ("-n",)):
        refused(ckpt, "2 values would become infinite, 1 value would become zero in float16", "cast", "a.safetensors",
                "float16", *flags)  # fmt: skip
        refused(ckpt, "2 values would become the largest there is", "cast", "a.safetensors", "float8_e4m3fn", *flags)
    told(ckpt, "cast", "a.safetensors", "float16", "--lossy")
    assert load_file("a.safetensors")["a"].tolist() == [float("inf"), float("-inf"), 0.0, 0.5]


def test_the_order_of_the_header_and_fields_that_nobody_knows_are_kept(here: Path, ckpt: Ckpt) -> None:
    header = {
        "z": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8], "note": {"by": ["me"]}},
        "__metadata__": {"k": "v", "a": "ü\n"},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
    }
    path = here / "a.safetensors"
    for room in (200, 0):
        write_raw(path, header, bytes(range(11)), room)
        name = "b" * (20 if room else 200)
        done = told(ckpt, "rename", path, "b", name)
        assert done["patched"] == bool(room)
        found = header_of(path)
        assert found.pop("__metadata__") == header["__metadata__"]
        assert list(found) == ["z", name, "a"]
        assert found["z"] == header["z"]
        assert data_of(path) == bytes(range(11))


def test_a_removal_leaves_what_follows_aligned(here: Path, ckpt: Ckpt) -> None:
    fields = {"a": ("U8", 3, 0, 3), "b": ("U8", 5, 3, 8), "c": ("F64", 1, 8, 16)}
    header = {name: {"dtype": d, "shape": [n], "data_offsets": [i, j]} for name, (d, n, i, j) in fields.items()}
    write_raw(here / "a.safetensors", header, bytes(8) + np.float64(1.5).tobytes())
    told(ckpt, "rm", "a.safetensors", "a")
    assert load_file("a.safetensors")["c"].item() == 1.5
    assert list(header_of(here / "a.safetensors")) == ["b", "c"]


def test_metadata_is_shown_set_and_removed_in_the_header_alone(st: Path, ckpt: Ckpt) -> None:
    told(ckpt, "rename", st, "--add", "room")
    before = metadata_of(st)
    assert ckpt("meta", st, "format").out == "format\tpt\n"
    done = told(ckpt, "meta", st, "format=np", "licence=MIT=x", "empty=")
    assert (done["changed"], done["patched"], done["verb"]) == (["format", "licence", "empty"], True, "changed")
    assert metadata_of(st) == before | {"format": "np", "licence": "MIT=x", "empty": ""}
    assert json.loads(ckpt("meta", st, "licence", "--json").out) == {"licence": "MIT=x"}
    told(ckpt, "meta", st, "-d", "licence", "-d", "empty", "format=pt")
    assert metadata_of(st) == before
    assert told(ckpt, "meta", st, "format=pt")["bytes_written"] == 0


def test_metadata_that_would_tell_of_a_tie_is_refused(st: Path, ckpt: Ckpt) -> None:
    refused(ckpt, "would tell of a tie", "meta", st, "c.bias=x")
    refused(ckpt, "would then tell of a tie", "meta", st, "note=c.bias")
    told(ckpt, "meta", st, "note=d.bias")
    refused(ckpt, "would then tell of a tie", "rename", st, "c", "d")
    refused(ckpt, "nothing is called 'none'", "meta", st, "-d", "none")


@pytest.mark.parametrize(
    "arguments",
    [
        ("rename", "c", "a.much.longer.name"),
        ("rename", "c", "d"),
        ("rm", "c"),
        ("keep", "a", "b.weight"),
        ("keep", "--root", "c"),
        ("cast", "bfloat16"),
        ("untie", "*"),
        ("meta", "licence=MIT"),
        ("meta", f"licence={'M' * 2000}"),
    ],
    ids=" ".join,
)
def test_a_dry_run_changes_nothing_and_tells_the_bytes_that_the_edit_writes(
    st: Path, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    before = st.read_bytes()
    for output in ((), ("-o", "new.safetensors")):
        told_before = told(ckpt, command, st, *rest, "-n", *output)
        assert (st.read_bytes(), os.listdir()) == (before, [st.name])
        assert told_before["dry_run"]
        assert told(ckpt, command, st, *rest, *output) == told_before | {"dry_run": False}
        if output:
            assert os.stat("new.safetensors").st_size == told_before["bytes_written"]
            assert st.read_bytes() == before
            os.unlink("new.safetensors")
        st.write_bytes(before)


def test_a_backup_is_the_old_file_whether_it_is_patched_or_replaced(st: Path, ckpt: Ckpt) -> None:
    for new, patched in (("d", True), ("a.much.longer.name", False)):
        before = st.read_bytes()
        done = told(ckpt, "rename", st, "c" if patched else "d", new, "--backup")
        assert (done["patched"], done["backup"]) == (patched, f"{st}.bak")
        assert Path(f"{st}.bak").read_bytes() == before
    refused(ckpt, "--backup is for edits in place", "rm", st, "a", "--backup", "-o", "x.safetensors")


def test_an_edit_through_a_symbolic_link_changes_the_file_and_keeps_the_link(st: Path, ckpt: Ckpt) -> None:
    st.chmod(0o640)
    os.symlink(st.name, "link.safetensors")
    told(ckpt, "rm", "link.safetensors", "c.weight")
    assert Path("link.safetensors").is_symlink()
    assert "c.weight" not in load_file(st)
    assert st.stat().st_mode & 0o777 == 0o640


def test_a_file_in_a_cache_is_refused_by_every_edit(st: Path, ckpt: Ckpt) -> None:
    blob = Path("hub/blobs") / ("0123456789abcdef" * 4)
    blob.parent.mkdir(parents=True)
    shutil.move(st, blob)
    os.symlink(blob, "link.safetensors")
    for command in (("rename", "c", "d"), ("rm", "c"), ("meta", "a=b"), ("cast", "float16")):
        refused(ckpt, "the Hugging Face hub's cache", command[0], "link.safetensors", *command[1:])
    told(ckpt, "rename", "link.safetensors", "c", "d", "-o", "out.safetensors")


# --- shard sets ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["safetensors", "bin"])
def shards(request: pytest.FixtureRequest, here: Path) -> Path:
    """A set of three shards in either format, with ties within the first, as huggingface_hub writes it."""
    folder = here / "set"
    folder.mkdir()
    save_torch_state_dict(
        {**Net().state_dict(), "d.weight": torch.ones(4, 4), "d.bias": torch.zeros(4)},
        str(folder), max_shard_size=100, safe_serialization=request.param == "safetensors",
    )  # fmt: skip
    assert len(list(folder.iterdir())) == 4
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    """The one index of a folder."""
    (path,) = folder.glob("*.index.json")
    index: dict[str, Any] = json.loads(path.read_text())
    return index


def held_by(folder: Path) -> dict[str, State]:
    """What huggingface_hub reads from each shard."""
    return {
        path.name: load_state_dict_from_file(path, safe=path.suffix != ".bin", weights_only=True)
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".bin")
    }


def joined(folder: Path) -> State:
    """The state of a whole set, aliases of the index included; the index and the shards must be in step."""
    index, shards = index_of(folder), held_by(folder)
    assert set(index["weight_map"].values()) == set(shards)
    assert index["weight_map"] == {name: shard for shard, state in shards.items() for name in state}
    state = {name: tensor for held in shards.values() for name, tensor in held.items()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    assert index["metadata"]["total_size"] == sum(storages.values())
    for name, kept in index["metadata"].items():
        if kept in state:
            state[name] = state[kept]
    return state


def mapped(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without(state: State, names: Iterable[str]) -> State:
    """A state without some names."""
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_a_rename_in_a_set_keeps_index_and_shards_in_step_and_touches_no_other_shard(shards: Path, ckpt: Ckpt) -> None:
    old, files = joined(shards), mapped(shards)
    done = told(ckpt, "rename", shards, "c", "head")
    assert_states(joined(shards), {name.replace("c.", "head."): tensor for name, tensor in old.items()})
    changed = [name for name, content in mapped(shards).items() if content != files.get(name)]
    assert len(changed) == 2
    assert done["patched"]
    assert done["bytes_written"] < 2_000
    assert list(index_of(shards)["weight_map"])[2:4] != ["c.weight", "c.bias"]


def test_aliases_of_the_index_follow_a_rename(shards: Path, ckpt: Ckpt) -> None:
    old = joined(shards)
    told(ckpt, "rename", shards, "--add", "model")
    assert_states(joined(shards), {f"model.{name}": tensor for name, tensor in old.items()})


def test_the_stored_name_of_a_tie_in_a_set_goes_and_its_alias_stays(shards: Path, ckpt: Ckpt) -> None:
    old = joined(shards)
    for name in ("a.weight", "b.bias"):
        told(ckpt, "rm", shards, name)
        old = without(old, [name])
        assert_states(joined(shards), old)


def test_a_shard_of_which_nothing_is_left_goes(shards: Path, ckpt: Ckpt) -> None:
    old = joined(shards)
    (gone,) = {shard for name, shard in index_of(shards)["weight_map"].items() if name.startswith("d.")}
    told(ckpt, "rm", shards, "d", "--backup")
    assert_states(joined(shards), without(old, ["d.weight", "d.bias"]))
    assert not (shards / gone).exists()
    assert (shards / f"{gone}.bak").exists()


def test_untie_and_tie_within_a_shard_of_a_set(shards: Path, ckpt: Ckpt) -> None:
    old = joined(shards)
    size = index_of(shards)["metadata"]["total_size"]
    told(ckpt, "untie", shards, "b.weight")
    assert_states(joined(shards), old)
    assert index_of(shards)["metadata"]["total_size"] == size + 64
    told(ckpt, "tie", shards, "a.weight", "b.weight")
    assert_states(joined(shards), old)
    assert index_of(shards)["metadata"]["total_size"] == size
    assert ckpt("ties", shards, "a.weight", "b.weight").code == 0


def test_a_tie_across_shards_is_an_alias_in_the_index_of_safetensors_and_refused_elsewhere(
    shards: Path, ckpt: Ckpt
) -> None:
    old = joined(shards)
    if any(shards.glob("*.bin")):
        refused(ckpt, "of another shard", "tie", shards, "a.weight", "d.weight", "--force")
        return
    told(ckpt, "tie", shards, "a.weight", "d.weight", "--force")
    assert_states(joined(shards), {**old, "d.weight": old["a.weight"]})
    assert "d.weight" not in index_of(shards)["weight_map"]
    assert ckpt("ties", shards, "b.weight", "d.weight").code == 0
    told(ckpt, "untie", shards, "d.weight")
    assert_states(joined(shards), {**old, "d.weight": old["a.weight"]})
    assert ckpt("ties", shards, "b.weight", "d.weight").code == 1


def test_a_cast_of_a_set_to_a_new_folder_leaves_the_old_one(shards: Path, ckpt: Ckpt) -> None:
    old, files = joined(shards), mapped(shards)
    dry = told(ckpt, "cast", shards, "bf16", "c", "-o", "out", "-n")
    done = told(ckpt, "cast", shards, "bf16", "c", "-o", "out")
    assert done["bytes_written"] == dry["bytes_written"] == sum(path.stat().st_size for path in Path("out").iterdir())
    assert mapped(shards) == files
    wanted = {name: tensor.bfloat16() if name.startswith("c.") else tensor for name, tensor in old.items()}
    assert_states(joined(Path("out")), wanted)
    refused(ckpt, "new or empty", "cast", shards, "bf16", "-o", "out")


def test_the_metadata_of_a_set_is_that_of_its_index(shards: Path, ckpt: Ckpt) -> None:
    old, files = joined(shards), mapped(shards)
    told(ckpt, "meta", shards, "licence=MIT")
    assert index_of(shards)["metadata"]["licence"] == "MIT"
    assert_states(joined(shards), old)
    assert len([name for name, content in mapped(shards).items() if content != files[name]]) == 1
    refused(ckpt, "'total_size' follows from the shards", "meta", shards, "total_size=3")
    refused(ckpt, "would then tell of a tie", "meta", shards, "note=c.bias")
    told(ckpt, "meta", shards, "-d", "licence")
    assert joined(shards).keys() == old.keys()
    assert "licence" not in index_of(shards)["metadata"]


def test_one_shard_alone_is_not_edited_behind_its_index(shards: Path, ckpt: Ckpt) -> None:
    shard = next(path for path in sorted(shards.iterdir()) if "00003-of" in path.name)
    name = next(iter(held_by(shards)[shard.name]))
    for command in (("rename", name, "x"), ("rm", name), ("cast", "float16")):
        refused(ckpt, "is one shard of", command[0], shard, *command[1:])
    told(ckpt, "rename", shard, name, "x", "-o", "one")
    assert "x" in ckpt("ls", "one").out


def test_a_set_without_an_index_keeps_a_shard_that_is_empty_now(shards: Path, ckpt: Ckpt) -> None:
    old = {name: tensor for held in held_by(shards).values() for name, tensor in held.items()}
    (index,) = shards.glob("*.index.json")
    index.unlink()
    refused(ckpt, "without an index has no metadata", "meta", shards, "a=b")
    told(ckpt, "rm", shards, "d")
    assert_states(
        {name: tensor for held in held_by(shards).values() for name, tensor in held.items()},
        without(old, ["d.weight", "d.bias"]),
    )
    assert ckpt("ls", shards).code == 0


def test_a_shard_that_is_a_link_or_may_not_be_written_is_not_replaced(
    shards: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = next(path for path in sorted(shards.iterdir()) if "00001-of" in path.name)
    shutil.move(shard, "elsewhere")
    os.symlink(Path("elsewhere").absolute(), shard)
    refused(ckpt, "is a symbolic link", "rename", shards, "--add", "x")
    told(ckpt, "rename", shards, "--add", "x", "-o", "out")
    assert not any(path.is_symlink() for path in Path("out").iterdir())


def test_names_that_the_index_has_and_no_shard_stay_and_a_second_copy_changes_along(here: Path, ckpt: Ckpt) -> None:
    for number, state in enumerate([{"a": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.ones(1)}], 1):
        save_file(state, f"m-{number:05}-of-00002.safetensors")
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    index = {"metadata": {"total_size": 12, "total_parameters": 3, "by": ["me"]},
             "weight_map": {"a": first, "b": second, "lost": second}}  # fmt: skip
    Path("m.safetensors.index.json").write_text(json.dumps(index))
    told(ckpt, "rename", "m.safetensors.index.json", "a", "x")
    told(ckpt, "cast", "m.safetensors.index.json", "float16", "x")
    assert index_of(here)["weight_map"] == {"x": first, "b": second, "lost": second}
    assert index_of(here)["metadata"] == {"total_size": 8, "total_parameters": 3, "by": ["me"]}
    assert load_file(first)["x"].dtype == torch.float16
    assert load_file(second)["x"].dtype == torch.float32
    told(ckpt, "meta", "m.safetensors.index.json", 'by=["you"]')
    assert index_of(here)["metadata"]["by"] == ["you"]
    refused(ckpt, "holds JSON", "meta", "m.safetensors.index.json", "by=[")


# --- what is refused -------------------------------------------------------------------------------------------------


NO_MATCH = [("rename", "zz", "y"), ("rename", "--strip", "zz"), ("rename", "--sub", "zz", "y"), ("rm", "zz"),
            ("keep", "zz"), ("keep", "--root", "zz"), ("cast", "half", "zz"), ("tie", "a", "zz"), ("untie", "zz*"),
            ("rename", "--map", "map.json"), ("rename", "--strip", "zz", "--add", "x"), ("rm", "a", "zz")]  # fmt: skip


@pytest.mark.parametrize("arguments", NO_MATCH, ids=" ".join)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_pattern_that_matches_nothing_is_an_error(
    here: Path, ckpt: Ckpt, arguments: tuple[str, ...], suffix: str
) -> None:
    state = {"a": torch.ones(2), "b": torch.zeros(2)}
    (torch.save if suffix == "pt" else save_file)(state, f"m.{suffix}")
    Path("map.json").write_text('{"a": "x", "zz": "y"}')
    refused(ckpt, "zz", arguments[0], f"m.{suffix}", *arguments[1:])


SENSELESS = {
    ("rename", "a", "b"): "'a' and 'b' would both be called 'b'",
    ("rename", "--sub", ".+", "x"): "would both be called 'x'",
    ("rename", "a", ""): "which is no name",
    ("rename", "a", ".x"): "which is no name",
    ("rename", "--sub", "(", "x"): "is no substitution",
    ("rename", "--sub", "a", r"\9"): "is no substitution",
    ("rename", "--map", "list.json"): "a map of names is a JSON object",
    ("rename", "--map", "gone.json"): "No such file",
    ("rename", "a"): "OLD NEW",
    ("rename",): "say what to rename",
    ("rename", "a", "a"): "no name would change",
    ("rm", "*"): "nothing would be left",
    ("rm", "a[0]"): "a part of a tensor",
    ("keep", "*"): "keeps all of it",
    ("keep",): "keep takes names",
    ("keep", "a", "--root", "a"): "keep takes names",
    ("cast", "int8"): "no floating dtype",
    ("cast", "float33"): "no floating dtype",
    ("cast", "float32"): "no floating tensor is of another dtype",
    ("cast", "half", "a[0]"): "a part of a tensor",
    ("tie", "a"): "two names at least",
    ("tie", "a", "c"): "cannot be one tensor",
    ("tie", "a", "b[0]"): "whole single ones",
    ("untie", "a"): "no other name",
    ("untie", "a[0]"): "a part of a tensor",
    ("compact",): "no storage is larger",
}


@pytest.mark.parametrize("arguments", SENSELESS, ids=" ".join)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_makes_no_sense_is_refused_in_one_line(
    here: Path, ckpt: Ckpt, arguments: tuple[str, ...], suffix: str
) -> None:
    state = {"a": torch.ones(2), "b": torch.zeros(2), "c": torch.ones(3)}
    (torch.save if suffix == "pt" else save_file)(state, f"m.{suffix}")
    Path("list.json").write_text("[1]")
    refused(ckpt, SENSELESS[arguments], arguments[0], f"m.{suffix}", *arguments[1:])


@pytest.mark.parametrize(
    "arguments", [("rename", "--add", "x"), ("cast", "half"), ("rm", "w"), ("set", "e=1", "--new")]
)
def test_other_formats_are_refused_with_the_command_that_converts_them(
    here: Path, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.ones(2)))
    module.register_parameter("v", nn.Parameter(torch.ones(2)))
    with quietly():
        torch.jit.script(module).save("script.pt")
    np.savez("arrays.npz", w=np.ones(2), v=np.ones(2))
    Path("bare.pkl").write_bytes(pickle.dumps({"w": torch.ones(2), "v": torch.ones(2)}))
    for name in ("script.pt", "arrays.npz", "bare.pkl"):
        refused(ckpt, f"hint: ckpt convert {name} OUT.pt", arguments[0], name, *arguments[1:])
        refused(ckpt, "no metadata of strings", "meta", name, "a=b")


STRANGE: dict[tuple[str, ...], str] = {
    ("rename", "0", "x"): "two entries are called '0'",
    ("rm", "0"): "several entries are called '0'",
    ("rename", "model.w", "other.w"): "would leave what it is kept in ('model')",
    ("rename", "model.w", "w"): "would leave what it is kept in ('model')",
    ("rename", "list.0", "list.x"): "called by its place in a list",
    ("rm", "list.0"): "called by its place in a list",
    ("rm", "pair.0"): "called by its place in a list",
    ("rename", "pair.0", "pair.x"): "called by its place in a list",
    ("rm", "sparse.values"): "a part of a tensor",
    ("untie", "sparse"): "made of others",
    ("cast", "half", "epoch"): "no tensor",
    ("cast", "half", "steps"): "not floating",
    ("tie", "model.w", "epoch"): "names 0 tensors",
}


@pytest.mark.parametrize("arguments", STRANGE, ids=" ".join)
def test_what_a_pickle_cannot_say_is_refused_in_one_line(here: Path, ckpt: Ckpt, arguments: tuple[str, ...]) -> None:
    torch.save(
        {
            0: torch.ones(1), "0": torch.ones(2), "model": {"w": torch.ones(2), "v": torch.ones(2)}, "epoch": 3,
            "list": [torch.ones(1), torch.zeros(1)], "pair": (torch.ones(1), torch.zeros(1)),
            "sparse": torch.eye(2).to_sparse(), "steps": torch.tensor(1), "": torch.ones(1), "other": {"n": 1},
        },
        "m.pt",
    )  # fmt: skip
    refused(ckpt, STRANGE[arguments], arguments[0], "m.pt", *arguments[1:])


def test_odd_names_beside_those_that_change_do_no_harm(here: Path, ckpt: Ckpt) -> None:
    torch.save({"": torch.ones(1), ".x": torch.ones(2), (1, 2): torch.ones(3), True: torch.ones(4), "a.b": 1}, "m.pt")
    told(ckpt, "rename", "m.pt", "True", "yes")
    told(ckpt, "rename", "m.pt", "(1, 2)", "three")
    told(ckpt, "rm", "m.pt", "a.b")
    assert list(torch.load("m.pt")) == ["", ".x", "three", "yes"]


def test_one_entry_of_a_container_does_not_rename_the_container(here: Path, ckpt: Ckpt) -> None:
    torch.save({"model": {"a.w": torch.ones(2), "b.w": torch.zeros(2)}}, "m.pt")
    refused(ckpt, "would leave what it is kept in ('model')", "rename", "m.pt", "model.a", "other.a")
    told(ckpt, "rename", "m.pt", "model", "other")
    assert list(torch.load("m.pt")["other"]) == ["a.w", "b.w"]


def test_a_container_of_which_every_entry_goes_stays_empty(here: Path, ckpt: Ckpt) -> None:
    model = nn.Linear(2, 2).state_dict()
    torch.save({"model": model, "list": [torch.ones(1)], "epoch": 1}, "m.pt")
    told(ckpt, "rm", "m.pt", "model.weight", "model.bias", "list.0")
    found = torch.load("m.pt")
    assert (type(found["model"]), dict(found["model"]), found["list"]) == (type(model), {}, [])
    told(ckpt, "rm", "m.pt", "model", "list")
    assert torch.load("m.pt") == {"epoch": 1}


def test_a_shared_module_is_edited_as_one_or_not_at_all(here: Path, ckpt: Ckpt) -> None:
    torch.save(nn.Sequential(*[nn.Linear(2, 2)] * 2, nn.Linear(2, 1)), "m.pt")
    refused(ckpt, "", "rename", "m.pt", "0.weight", "0.w")
    refused(ckpt, "several names are kept in one object", "untie", "m.pt", "0.weight")
    told(ckpt, "rename", "m.pt", "0", "first")
    told(ckpt, "rm", "m.pt", "2")
    found = torch.load("m.pt", weights_only=False)
    assert list(found._modules) == ["first", "1"]
    assert found._modules["first"] is found._modules["1"]


@pytest.mark.parametrize(
    "arguments",
    [("rename", "a", "some.long.name" * 40), ("rm", "a"), ("cast", "half"), ("untie", "t"), ("set", "e=1", "--new"),
     ("compact",), ("keep", "a", "t"), ("tie", "a", "b")],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_dry_run_on_a_zip_file_tells_the_bytes_that_the_edit_writes(
    here: Path, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    shared = torch.ones(5)
    state = {"a": torch.ones(3), "b": torch.ones(3), "t": shared, "u": shared, "part": torch.zeros(100)[:7]}
    torch.save(state, "m.pt")
    command, *rest = arguments
    before = Path("m.pt").read_bytes()
    for output in (("-o", "new.pt"), ()):
        dry = told(ckpt, command, "m.pt", *rest, "-n", *output)
        assert Path("m.pt").read_bytes() == before
        assert told(ckpt, command, "m.pt", *rest, *output) == dry | {"dry_run": False}
    assert torch.load("new.pt").keys() == torch.load("m.pt").keys()
