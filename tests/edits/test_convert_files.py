"""Where conversions go: shards as huggingface_hub splits them, DCP folders, full folders; memory and trouble."""

from __future__ import annotations

import fcntl
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ckpt
from contract import contents
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict, split_torch_state_dict_into_shards
from memory_in_use import MEASURED

from ckpt_cli.edits.convert_options import size_of
from ckpt_cli.errors import RefusedError, UsageError
from ckpt_cli.files.crc32 import of_zeros
from ckpt_cli.formats.targets import TARGETS, target_of

INDEX = "model.safetensors.index.json"


def weights() -> dict[str, torch.Tensor]:
    """Tensors of several sizes, with a tie across what would be two shards."""
    torch.manual_seed(0)
    tied = torch.randn(5, 4)
    return {
        "embed": tied,
        "a": torch.randn(10),
        "large": torch.randn(60),
        "b": torch.randn(3),
        "c": torch.randn(20),
        "d": torch.ones(4, dtype=torch.int64),
        "head": tied,
        "last": torch.randn(1),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A torch.save file of them."""
    path = tmp_path / "a.pt"
    torch.save(weights(), path)
    return path


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [50, 100, 150, 300, 10_000])
@pytest.mark.parametrize("kind", ["hf", "hf-bin"])
def test_shards_are_split_as_huggingface_hub_splits_them(
    tmp_path: Path, ckpt: Ckpt, source: Path, kind: str, most: int
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    stem = "model.safetensors" if kind == "hf" else "pytorch_model.bin"
    pattern = stem.replace(".", "{suffix}.")
    wanted = weights()
    if kind == "hf":  # its own save drops the alias that comes later in the order of names
        save_torch_state_dict(wanted, theirs, max_shard_size=most)
    split = split_torch_state_dict_into_shards(wanted, filename_pattern=pattern, max_shard_size=most)
    answer = ckpt("convert", source, ours, "--to", kind, "--max-shard", str(most))
    assert answer.code == 0, answer.err
    names = {each.name for each in ours.iterdir()}
    assert names - {f"{stem}.index.json"} == set(split.filename_to_tensors)
    assert (f"{stem}.index.json" in names) == split.is_sharded
    for shard, tensors in split.filename_to_tensors.items():
        found = load_state_dict_from_file(ours / shard, weights_only=True, safe=kind == "hf")
        kept = [name for name in tensors if kind != "hf" or name != "head"]
        assert sorted(found) == sorted(kept)
        assert all(torch.equal(found[name], wanted[name]) for name in kept)
    if split.is_sharded:
        index = json.loads((ours / f"{stem}.index.json").read_text())
        assert index["metadata"]["total_size"] == split.metadata["total_size"]
        kept_names = {name: shard for name, shard in split.tensor_to_filename.items() if kind != "hf" or name != "head"}
        assert index["weight_map"] == kept_names
    if kind == "hf" and split.is_sharded:
        their_index, our_index = (json.loads((folder / INDEX).read_text()) for folder in (theirs, ours))
        assert our_index["weight_map"] == their_index["weight_map"]
        assert our_index["metadata"]["head"] == their_index["metadata"]["head"] == "embed"


def test_a_set_is_split_anew_and_joined(tmp_path: Path, ckpt: Ckpt, source: Path) -> None:
    first, second, joined = tmp_path / "one", tmp_path / "two", tmp_path / "c.pt"
    assert ckpt("convert", source, first, "--max-shard", "60B").code == 0
    assert ckpt("convert", first / INDEX, second, "--max-shard", "200B").code == 0
    assert len(list(first.iterdir())) > len(list(second.iterdir())) > 2
    assert ckpt("convert", second, joined).code == 0
    found = torch.load(joined)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    assert found["head"].data_ptr() == found["embed"].data_ptr()


def test_in_a_folder_that_is_full_its_old_checkpoint_gives_way_and_all_else_stays(
    tmp_path: Path, ckpt: Ckpt, source: Path
) -> None:
    folder = tmp_path / "model"
    assert ckpt("convert", source, folder, "--max-shard", "60B").code == 0
    (folder / "config.json").write_text("{}")
    old = contents(folder)
    assert ckpt("convert", source, folder, "--max-shard", "10MB").code == 2
    assert contents(folder) == old
    assert ckpt("convert", folder, folder, "--max-shard", "10MB", "--force").code == 0
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert ckpt("convert", folder, folder, "--max-shard", "60B", "--force").code == 0
    assert contents(folder).keys() == old.keys()
    assert ckpt("convert", folder, tmp_path / "b.pt").code == 0
    found = torch.load(tmp_path / "b.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def test_names_and_folders_say_which_format(tmp_path: Path) -> None:
    said = {
        "a.pt": "pt", "a.CKPT": "pt", "a.safetensors": "safetensors", "a.npz": "npz", "a/": "hf", "a": "hf",
        str(tmp_path): "hf",
    }  # fmt: skip
    assert {path: target_of(path, None, sharded=False).name for path in said} == said
    assert target_of("a", None, sharded=True).name == "hf"
    assert target_of("a", "pt", sharded=True).name == "hf-bin"
    assert target_of("a", "safetensors", sharded=True).name == "hf"
    for path, name, sharded in (("a.xyz", None, False), ("a.pt", None, True), ("a", "dcp", True), ("a", "npz", True)):
        with pytest.raises(UsageError):
            target_of(path, name, sharded=sharded)
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [size_of(text) for text in ("5GB", "1.5 MB", "2KiB", "7", "3b")] == [5 * 10**9, 1_500_000, 2048, 7, 3]
    for text in ("", "GB", "0", "-1GB", "5 apples", "1e9"):
        with pytest.raises(UsageError):
            size_of(text)


# --- DCP -------------------------------------------------------------------------------------------------------------


def test_a_dcp_folder_says_what_torch_would_say(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {
        "w": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "t": torch.randn(3, 2).t(),
        "n": torch.tensor(3), "e": torch.empty(0, 3), "u": torch.ones(2, dtype=torch.uint16),
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "ours", "--to", "dcp").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {name: each.contiguous() for name, each in state.items()}, checkpoint_id=tmp_path / "theirs", no_dist=True
        )
    ours, theirs = (pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("ours", "theirs"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    found = {name: torch.full_like(each.contiguous(), 0) for name, each in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert all(torch.equal(found[name], each) for name, each in state.items())


# --- memory ----------------------------------------------------------------------------------------------------------


def write_sparse(path: Path, nbytes: int) -> None:
    """A torch.save file whose storages are holes."""
    with torch.serialization.skip_data():
        torch.save({f"layers.{i}.weight": torch.empty(nbytes // 40 // 4) for i in range(40)}, path)


@pytest.mark.parametrize("options", [["b.safetensors"], ["b.pt", "--shared", "clone"], ["b", "--to", "dcp"], ["b/"]])
def test_twenty_gigabytes_take_little_memory_and_stay_holes(tmp_path: Path, options: list[str]) -> None:
    write_sparse(tmp_path / "a.pt", 20 * 10**9)
    call = [sys.executable, "-c", MEASURED, "convert", "a.pt", *options]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250 * 1024
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert sum(each.stat().st_size for each in files) > 39 * 10**9
    assert sum(each.stat().st_blocks for each in files) * 512 < 200 * 10**6


def test_a_cast_takes_little_memory(tmp_path: Path) -> None:
    write_sparse(tmp_path / "a.pt", 4 * 10**8)
    for name in ("b.safetensors", "b.pt"):
        call = [sys.executable, "-c", MEASURED, "convert", "a.pt", name, "--dtype", "bf16"]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 100 * 1024
        (tmp_path / name).unlink()


def test_the_checksum_of_zeros_is_known_without_them() -> None:
    import zlib

    for nbytes in (0, 1, 7, 4096, 100_001):
        for before in (b"", b"abc", bytes(range(256))):
            assert of_zeros(nbytes, zlib.crc32(before)) == zlib.crc32(before + bytes(nbytes))


# --- stops -----------------------------------------------------------------------------------------------------------


def test_a_new_file_that_does_not_read_back_is_not_kept(
    tmp_path: Path, ckpt: Ckpt, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_cli.formats.safetensors import write as new_safetensors

    def drop_one(*args: object) -> None:
        new = args[0]
        write(new.part(new.tensors[:-1], {}), *args[1:])  # type: ignore[attr-defined]  # a NewCheckpoint

    write = new_safetensors.write
    monkeypatch.setattr(new_safetensors, "write", drop_one)
    answer = ckpt("convert", source, tmp_path / "b.safetensors")
    assert (answer.code, "did not read back" in answer.err) == (2, True)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]


def test_while_another_process_writes_the_output_it_is_busy(tmp_path: Path, ckpt: Ckpt, source: Path) -> None:
    with (tmp_path / ".b.safetensors.ckpt-tmp").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = ckpt("convert", source, tmp_path / "b.safetensors")
        assert (answer.code, "another process is writing it" in answer.err) == (2, True)


def test_a_folder_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, ckpt: Ckpt, source: Path) -> None:
    for target in ("nowhere/b.safetensors", "nowhere/b/"):
        answer = ckpt("convert", source, tmp_path / target)
        assert (answer.code, len(answer.err.splitlines())) == (2, 1)


def test_progress_is_told_of_all_bytes(tmp_path: Path, source: Path) -> None:
    from ckpt_cli.edits.convert import convert
    from ckpt_cli.edits.convert_options import ConvertOptions

    for name, dtype in (("b.safetensors", None), ("b.pt", None), ("b.npz", None), ("c.safetensors", "bfloat16")):
        reported: list[int] = []
        from ckpt_cli.edits.cast import dtype_named

        options = ConvertOptions(dtype=dtype_named(dtype) if dtype else None, progress=reported.append)
        done = convert(str(source), str(tmp_path / name), options)
        assert 0 < sum(reported) <= done.bytes_written
    with pytest.raises(RefusedError):
        convert(str(source), str(tmp_path / "b.pt"), ConvertOptions())
