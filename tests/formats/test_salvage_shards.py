"""Sets of which shards are cut or missing: all tensors that are whole, under their values, and the list of the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file
from shard_sets import KINDS, index_of, save, tied_state

from ckpt_cli.arrays.to_torch import torch_tensor
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_salvaged
from ckpt_cli.formats.salvage.found import Salvaged

State = dict[str, torch.Tensor]

STATE: State = {f"layers.{number}": torch.arange(100.0) + 1000 * number for number in range(6)}
"""Two tensors for each of three shards."""


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, here: Path) -> Path:
    """A set of three shards, as huggingface_hub writes it."""
    from huggingface_hub import save_torch_state_dict

    (here / "model").mkdir()
    save_torch_state_dict(STATE, "model", max_shard_size=850, safe_serialization=request.param == "safetensors")
    assert len(shards_of(here / "model")) == 3
    return here / "model"


def shards_of(folder: Path) -> list[Path]:
    """The shards in their order."""
    return sorted(path for path in folder.iterdir() if "-of-" in path.name)


def held_by(folder: Path, shard: Path) -> set[str]:
    """The names that the index has for a shard."""
    return {name for name, file in index_of(folder)["weight_map"].items() if file == shard.name}


def cut(shard: Path) -> set[str]:
    """Cut a shard in the second of its tensors' bytes; returns the names of the tensors that are lost."""
    data = shard.read_bytes()
    places = {name: data.find(tensor.numpy().tobytes()) for name, tensor in STATE.items()}
    last = max(places, key=places.__getitem__)
    os.truncate(shard, places[last] + 40)
    return {last}


def tensors_of(found: Salvaged) -> State:
    """What was found, as torch tensors."""
    return {tensor.name: torch_tensor(found.checkpoint, tensor, {}) for tensor in found.checkpoint.tensors}


def assert_all_but(found: Salvaged, lost: set[str]) -> None:
    """Everything but `lost` is there with its values, and `lost` is listed by name."""
    made = tensors_of(found)
    assert set(made) == set(STATE) - lost
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in made.items())
    assert {item.name for item in found.lost} == lost
    found.close()


@pytest.mark.parametrize("number", range(3))
def test_all_tensors_but_those_cut_off_are_there(folder: Path, number: int) -> None:
    lost = cut(shards_of(folder)[number])
    for path in (folder, next(folder.glob("*.index.json"))):
        assert_all_but(open_salvaged(str(path)), lost)


def test_a_missing_shard_loses_what_the_index_has_for_it(folder: Path) -> None:
    shard = shards_of(folder)[1]
    lost = held_by(folder, shard)
    shard.unlink()
    found = open_salvaged(str(folder))
    assert found.problem == f"of its 3 shards {shard.name!r} is not there"
    assert {item.why for item in found.lost} == {f"its shard {shard.name!r} is not there"}
    assert_all_but(found, lost)


def test_cut_missing_and_foreign_shards_are_told_apart(folder: Path) -> None:
    first, second, third = shards_of(folder)
    lost = held_by(folder, first) | held_by(folder, third) | cut(second)
    first.unlink()
    third.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    found = open_salvaged(str(folder))
    problem = f"{first.name!r} is not there, {second.name!r} is cut short, {third.name!r} is not readable"
    assert found.problem == f"of its 3 shards {problem}"
    assert all("is not readable: " in item.why for item in found.lost if item.name in held_by(folder, third))
    assert_all_but(found, lost)


@pytest.mark.parametrize("size", [5, 100])
def test_a_shard_cut_before_its_names_loses_the_names_of_the_index(folder: Path, size: int) -> None:
    shard = shards_of(folder)[2]
    os.truncate(shard, size)
    found = open_salvaged(str(folder))
    assert all(item.why.startswith(f"its shard {shard.name!r} is ") for item in found.lost)
    assert_all_but(found, held_by(folder, shard))


def test_without_an_index_the_names_of_shards_say_which_one_is_missing(folder: Path) -> None:
    first, second, _ = shards_of(folder)
    lost = held_by(folder, first)
    next(folder.glob("*.index.json")).unlink()
    first.unlink()
    found = open_salvaged(str(folder))
    assert set(tensors_of(found)) == set(STATE) - lost
    assert [(item.name, item.why) for item in found.lost] == [("", f"all of shard {first.name!r}, which is not there")]
    second.unlink()
    alone = open_salvaged(str(folder))  # of which one shard is left, that opens as a file does
    assert len(tensors_of(alone)) == 2
    assert len(alone.lost) == 2


@pytest.mark.parametrize("size", [0, 30])
def test_a_cut_index_loses_no_tensor(folder: Path, size: int) -> None:
    index = next(folder.glob("*.index.json"))
    os.truncate(index, size)
    for path in (folder, index):
        found = open_salvaged(str(path))
        assert found.problem.startswith("its index: ")
        assert_all_but(found, set())


def test_a_name_that_no_shard_has_is_lost(folder: Path) -> None:
    lost = cut(shards_of(folder)[0])
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    whole = shards_of(folder)[1].name
    content["weight_map"]["gone"] = whole
    index.write_text(json.dumps(content))
    found = open_salvaged(str(folder))
    assert {item.name: item.why for item in found.lost}["gone"] == f"its shard {whole!r} does not have it"
    assert_all_but(found, {*lost, "gone"})


def test_an_alias_of_a_lost_tensor_is_lost_with_it(here: Path) -> None:
    folder = save(tied_state(), here / "tied", "safetensors")
    (lost,) = (shard for shard in shards_of(folder) if "m.a" in held_by(folder, shard))
    lost.unlink()
    found = open_salvaged(str(folder))
    gone = {item.name for item in found.lost}
    assert {"m.a", "z.tied", "z.more"} <= gone
    assert {tensor.name for tensor in found.checkpoint.tensors} == set(tied_state()) - gone
    found.close()


def test_of_a_set_without_any_shard_nothing_is_salvaged(folder: Path, ckpt: Ckpt) -> None:
    for shard in shards_of(folder):
        shard.unlink()
    answer = ckpt("ls", "--salvage", folder)
    assert (answer.code, answer.out) == (2, "")
    assert "3 of its 3 shards are not there" in answer.err
    assert "--salvage" not in answer.err
    with pytest.raises(CkptError):
        open_salvaged(str(folder))


def test_a_folder_with_one_cut_file_is_salvaged_as_the_file(here: Path, ckpt: Ckpt) -> None:
    save({"a": torch.ones(20), "b": torch.zeros(20)}, here / "one", "safetensors")
    (file,) = (here / "one").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 4)
    answer = ckpt("ls", "--salvage", "one")
    assert (answer.code, answer.lines) == (1, ["a\tfloat32\t[20]\t80"])


# --- the command line -------------------------------------------------------------------------------------------------


def test_ls_salvage_of_a_whole_set_is_that_without(folder: Path, ckpt: Ckpt) -> None:
    assert ckpt("ls", "--salvage", folder, "--json") == ckpt("ls", folder, "--json")
    next(folder.glob("*.index.json")).unlink()
    assert ckpt("ls", "--salvage", folder, "-l") == ckpt("ls", folder, "-l")


def test_ls_salvage_lists_the_set_and_what_is_lost(folder: Path, ckpt: Ckpt) -> None:
    (lost,) = cut(shards_of(folder)[1])
    answer = ckpt("ls", "--salvage", folder)
    assert answer.code == 1
    assert [line.split("\t")[0] for line in answer.lines] == [name for name in STATE if name != lost]
    assert answer.err.splitlines()[1:] == [
        "  5 tensors whole",
        "  lost (1):",
        f"    {lost}: of its 400 bytes the last 360 are not there",
    ]
    report = json.loads(ckpt("ls", "--salvage", folder, "--json").out)
    assert [item["name"] for item in report["lost"]] == [lost]


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt", "out"])
def test_convert_salvage_writes_the_set_without_what_is_lost(folder: Path, ckpt: Ckpt, output: str) -> None:
    first, second, _ = shards_of(folder)
    lost = held_by(folder, first) | cut(second)
    first.unlink()
    options = ["--to", "hf"] if output == "out" else []
    answer = ckpt("convert", "--salvage", folder, output, *options, "--json")
    assert answer.code == 1
    report = json.loads(answer.out)
    assert {item["name"] for item in report["lost"]} == lost
    assert report["tensors"] == 3
    written = next(Path("out").glob("model*")) if output == "out" else Path(output)
    made = torch.load(written) if output == "out.pt" else load_file(written)
    assert set(made) == set(STATE) - lost
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in made.items())


def test_the_error_of_a_missing_shard_says_how_to_salvage_the_rest(folder: Path, ckpt: Ckpt) -> None:
    shards_of(folder)[0].unlink()
    hint = f"ckpt ls --salvage {folder} lists what the others have, ckpt convert --salvage {folder} OUT writes it"
    assert hint in ckpt("ls", folder).err
