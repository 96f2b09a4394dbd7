"""Sets of shards: what belongs together, what is missing or too many, and edits of several files as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from contract import write_shards
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from safetensors.torch import load_file, save_file
from set_elements import edit

from ckpt_cli.errors import CkptError, LimitError, MalformedError, RefusedError, UnknownFormatError, UsageError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of three shards with two tensors each, and what lies beside it on the hub."""
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        state = {f"layers.{number}.{part}": torch.full((2, 2), float(number)) for part in ("weight", "bias")}
        save_file(state, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(state, shard))
    write_index(folder, weight_map)
    (folder / "config.json").write_text("{}")
    return folder


def write_index(folder: Path, weight_map: Any, **more: Any) -> None:
    """The index, as transformers lays it out."""
    index = {"metadata": {"total_size": 96, "total_parameters": 24}, "weight_map": weight_map, **more}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def weight_map_of(folder: Path) -> dict[str, str]:
    """What the index says."""
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def names_of(checkpoint: Checkpoint) -> list[str]:
    """The names of its tensors."""
    return [tensor.name for tensor in checkpoint.tensors]


ALL = [f"layers.{number}.{part}" for number in range(3) for part in ("bias", "weight")]


def test_an_index_and_its_folder_open_as_one_checkpoint(folder: Path) -> None:
    for path in (folder, folder / INDEX):
        checkpoint = open_checkpoint(str(path))
        assert names_of(checkpoint) == ALL
        assert (checkpoint.format, checkpoint.version) == ("shards", "3 safetensors shards")
        assert checkpoint.metadata == {"format": "pt", "total_size": "96", "total_parameters": "24"}
        assert not checkpoint.notes
        assert len(checkpoint.container.files) == 4


def test_one_shard_opens_alone_with_a_note_that_it_is_one(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder / SHARDS[1]))
    assert names_of(checkpoint) == ALL[2:4]
    assert checkpoint.format == "safetensors"
    assert checkpoint.notes == [f"one shard of {INDEX}"]


def test_notes_are_told_on_stderr_and_escaped(folder: Path, ckpt: Ckpt) -> None:
    answer = ckpt("ls", folder / SHARDS[0])
    assert answer.err == f"note: {folder / SHARDS[0]}: one shard of {INDEX}\n"
    write_index(folder, {**weight_map_of(folder), "\33[31m": SHARDS[0]})
    answer = ckpt("ls", folder)
    assert answer.code == 0
    assert "\33" not in answer.err
    assert "the index names tensors that their shards do not have" in answer.err


def test_a_missing_shard_is_told_with_its_name(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    with pytest.raises(MalformedError, match=f"1 of its 3 shards are not there: '{SHARDS[1]}'"):
        open_checkpoint(str(folder))
    assert names_of(open_checkpoint(str(folder / SHARDS[2]))) == ALL[4:]


def test_what_the_index_names_and_no_shard_has_is_noted(folder: Path) -> None:
    write_index(folder, {**weight_map_of(folder), "lost.weight": SHARDS[0]})
    checkpoint = open_checkpoint(str(folder))
    assert names_of(checkpoint) == ALL
    assert checkpoint.notes == ["the index names tensors that their shards do not have (1): 'lost.weight'"]


def test_what_the_index_does_not_name_is_listed_all_the_same(folder: Path) -> None:
    weight_map = weight_map_of(folder)
    del weight_map["layers.1.bias"]
    write_index(folder, weight_map)
    checkpoint = open_checkpoint(str(folder))
    assert names_of(checkpoint) == ALL
    assert checkpoint.notes == ["shards have tensors that the index does not name (1): 'layers.1.bias'"]


def test_a_tensor_that_the_index_looks_for_in_another_shard_is_listed_and_converted(folder: Path, ckpt: Ckpt) -> None:
    write_index(folder, {**weight_map_of(folder), "layers.0.bias": SHARDS[2]})
    checkpoint = open_checkpoint(str(folder))
    assert sorted(names_of(checkpoint)) == sorted(ALL)
    assert checkpoint.notes == ["tensors are in another shard than the index says (1): 'layers.0.bias'"]
    assert ckpt("convert", folder, folder.parent / "whole.safetensors").code == 0
    assert sorted(load_file(folder.parent / "whole.safetensors")) == sorted(ALL)
    assert "missing-tensor" in ckpt("check", folder).out


def test_of_two_copies_the_one_that_the_index_names_counts(folder: Path) -> None:
    save_file({"layers.0.bias": torch.zeros(7), "layers.2.bias": torch.ones(2)}, folder / SHARDS[2])
    weight_map = weight_map_of(folder)
    del weight_map["layers.2.weight"]
    write_index(folder, weight_map)
    checkpoint = open_checkpoint(str(folder))
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    assert shapes["layers.0.bias"] == (2, 2)
    assert checkpoint.notes == ["tensors are in a second shard too, whose copy is left out (1): 'layers.0.bias'"]


def test_shards_without_their_index_are_joined_with_a_note(folder: Path) -> None:
    (folder / INDEX).unlink()
    checkpoint = open_checkpoint(str(folder))
    assert names_of(checkpoint) == ALL
    assert checkpoint.notes == ["there is no index beside the shards"]
    (folder / SHARDS[0]).unlink()
    with pytest.raises(UsageError, match="2 checkpoints"):
        open_checkpoint(str(folder))


def test_a_folder_with_one_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(str(tmp_path)).format == "zip"
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert names_of(open_checkpoint(str(tmp_path))) == ["b"]  # the same model twice: the safer format
    torch.save({"c": torch.ones(1)}, tmp_path / "optimizer.pt")
    with pytest.raises(UsageError, match="a folder of 3 checkpoints"):
        open_checkpoint(str(tmp_path))


def test_a_folder_without_a_checkpoint_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="a folder without a checkpoint"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "../model.safetensors"}, "not a file beside it"),
        ({"a": "/etc/passwd"}, "not a file beside it"),
        ({"a": ".."}, "not a file beside it"),
        ({"a": ""}, "not a file beside it"),
        ({"a": "x\0y"}, "not a file beside it"),
        ({"a": INDEX}, "names itself"),
        ({"a": 1}, "does not map names to files"),
        ([], "does not map names to files"),
        ({}, "is empty"),
        ({"a": "gone.safetensors"}, "not there"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, weight_map: Any, problem: str) -> None:
    write_index(folder, weight_map)
    with pytest.raises(MalformedError, match=problem) as refused:
        open_checkpoint(str(folder))
    assert refused.value.path == str(folder / INDEX)


def test_an_index_of_an_index_is_refused(folder: Path) -> None:
    (folder / "other.json").write_text((folder / INDEX).read_text())
    write_index(folder, {"a": "other.json"})
    with pytest.raises(UnknownFormatError, match="JSON"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"weight_map": ', "not valid"),
        (b'{"a": 1}', "no weight_map"),
        (b'{"weight_map": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"\xff": 1}', "not valid"),
    ],
)
def test_json_that_is_no_index_is_told_so(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CkptError, match=problem):
        open_checkpoint(str(tmp_path))


def test_an_index_beyond_the_limits_is_refused(folder: Path) -> None:
    write_index(folder, {str(number): f"{number}.bin" for number in range(10_001)})
    with pytest.raises(LimitError, match="10001 shards"):
        open_checkpoint(str(folder))
    with open(folder / INDEX, "ab") as file:
        file.truncate(2**30)
    with pytest.raises(LimitError, match="far larger than an index"):
        open_checkpoint(str(folder))


def test_an_edit_of_several_shards_is_one(folder: Path, ckpt: Ckpt) -> None:
    answer = ckpt("set", "--backup", folder, "layers.0.bias=5", "layers.2.weight[0,0]=6")
    assert answer.code == 0, answer.err
    assert ckpt("show", folder, "layers.0.bias").out == "tensor([[5., 5.],\n        [5., 5.]])\n"
    assert ckpt("show", folder / SHARDS[2], "layers.2.weight[0,0]").out == "tensor(6.)\n"
    backups = {f"{shard}.bak" for shard in (SHARDS[0], SHARDS[2])}
    assert set(os.listdir(folder)) == {*SHARDS, INDEX, "config.json", *backups, f".{SHARDS[0]}.bak.ckpt-undo"}


def test_a_shard_that_may_not_be_written_changes_nothing(folder: Path) -> None:
    """As another user, since root may write everything."""
    for path in (folder.parent, folder):
        path.chmod(0o777)
    for shard in SHARDS:
        (folder / shard).chmod(0o666)
    (folder / INDEX).chmod(0o666)
    (folder / SHARDS[2]).chmod(0o444)
    for parent in folder.parents:
        if str(parent) not in ("/", "/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys; from ckpt_cli.cli.main import run; import ckpt_cli.cli.set, ckpt_cli.cli.ls\n"
        "import numpy, ckpt_cli.edits.transaction, ckpt_cli.edits.set_tensors, ckpt_cli.edits.assignment\n"
        "import ckpt_cli.arrays.codec\n"
        "import ckpt_cli.render.edits, ckpt_cli.formats.sharded.read, ckpt_cli.formats.sharded.names\n"
        "import ckpt_cli.formats.safetensors.read, ckpt_cli.files.journal.apply, ckpt_cli.files.lock\n"
        "import ckpt_cli.arrays.indexing, shlex, json, resource\n"
        "os.setuid(65534)\n"
        "print(run(['set', sys.argv[1], 'layers.0.bias=5', 'layers.2.bias=5']), flush=True)\n"
        "print(run(['set', sys.argv[1], 'layers.0.bias=7']), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "0"], done.stderr
    assert "Permission denied" in done.stderr
    assert set(os.listdir(folder)) == {*SHARDS, INDEX, "config.json"}


def test_a_set_in_the_hubs_cache_is_not_edited_in_place(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for number, shard in enumerate(SHARDS):
        blob = blobs / f"{number:064x}"
        (folder / shard).rename(blob)
        (folder / shard).symlink_to(blob)
    with pytest.raises(RefusedError, match="Hugging Face"):
        edit(folder, "layers.0.bias=5")
    out = tmp_path / "out"
    edit(folder, "layers.0.bias=5", output=out)
    assert sorted(os.listdir(out)) == sorted([*SHARDS, INDEX, "config.json"])
    assert not any(path.is_symlink() for path in out.iterdir())


def test_an_output_must_be_a_new_or_empty_folder(folder: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    for place in (folder, folder / SHARDS[0], tmp_path):
        answer = ckpt("set", folder, "layers.0.bias=5", "-o", place)
        assert answer.code == 2
        assert "must go to a folder that is new or empty" in answer.err
    (tmp_path / "empty").mkdir()
    assert ckpt("set", folder, "layers.0.bias=5", "-o", tmp_path / "empty").code == 0
    assert ckpt("show", tmp_path / "empty", "layers.0.bias[0]").out == "tensor([5., 5.])\n"


def test_the_same_storage_number_in_two_shards_is_two_storages(tmp_path: Path, ckpt: Ckpt) -> None:
    write_shards({str(number): torch.full((2,), float(number)) for number in range(6)}, tmp_path / "set")
    listed = json.loads(ckpt("ls", "--json", tmp_path / "set").out)
    storages = [entry["storage"] for entry in listed["entries"]]
    assert storages[0] == "pytorch_model-00001-of-00002.bin:0"
    assert len(set(storages)) == 6
    assert ckpt("ties", tmp_path / "set").out == ""


def test_more_shards_than_files_are_open_at_a_time_by_default(tmp_path: Path) -> None:
    weight_map = {}
    save_file({"a": torch.ones(1)}, tmp_path / "one")
    one = (tmp_path / "one").read_bytes()
    for number in range(1200):
        shard = f"{number}.safetensors"
        (tmp_path / shard).write_bytes(one.replace(b'"a"', b'"a"'))
        weight_map[f"{number}.a"] = shard
    write_index(tmp_path, weight_map)
    code = (
        "import resource, sys; _, most = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))\n"
        "from ckpt_cli.cli.main import run; sys.exit(run(['ls', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("safe", [True, False])
def test_what_huggingface_hub_writes_is_read_and_what_ckpt_edits_it_reads(
    tmp_path: Path, safe: bool, ckpt: Ckpt
) -> None:
    torch.manual_seed(0)
    shared = torch.randn(20, 20)
    state = {f"layers.{number}.weight": torch.randn(20, 20, dtype=torch.bfloat16) for number in range(6)}
    state |= {"embed.weight": shared, "head.weight": shared}
    names = list(state)  # the writer drops tied ones from the state that it is given
    save_torch_state_dict(state, tmp_path, max_shard_size=2000, safe_serialization=safe)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.format == "shards"
    assert {tensor.name: tensor.shape for tensor in checkpoint.tensors} == dict.fromkeys(names, (20, 20))
    assert not checkpoint.notes
    assert ckpt("ties", tmp_path, "embed.weight", "head.weight").code == 0
    assert ckpt("set", tmp_path, "embed.weight[0,0]=100", "layers.3.weight=2").code == 0
    loaded: dict[str, torch.Tensor] = {}
    for shard in tmp_path.glob("*.safetensors" if safe else "*.bin"):
        loaded.update(load_state_dict_from_file(shard, safe=False, weights_only=True))
    kept = next(name for name in ("embed.weight", "head.weight") if name in loaded)
    assert loaded[kept][0, 0] == 100
    assert loaded["layers.3.weight"].eq(2).all()
    assert torch.equal(loaded["layers.2.weight"], state["layers.2.weight"])
