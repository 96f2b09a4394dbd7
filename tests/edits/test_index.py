"""`ckpt index` writes the index of a set of shards from the shards that are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_edit import State, assert_states
from safetensors.torch import load_file, save_file
from shard_sets import KINDS, index_of, kind_of, save, state, tied_state, whole

from ckpt_cli.edits.index import index
from ckpt_cli.edits.plan import EditOptions, EditResult
from ckpt_cli.edits.undo import undo
from ckpt_cli.errors import CkptError, RefusedError, UnknownFormatError, UsageError
from ckpt_cli.files import atomic
from ckpt_cli.ops.check.run import check


def write(path: Path, **options: bool) -> EditResult:
    return index(str(path), EditOptions(**options))


def index_file(folder: Path) -> Path:
    (path,) = folder.glob("*.index.json")
    return path


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A set whose index was changed by hand."""
    found = index_of(folder)
    change(found)
    index_file(folder).write_text(json.dumps(found))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(state(), tmp_path / "set", request.param)


def test_the_index_is_the_one_that_huggingface_hub_writes(folder: Path) -> None:
    expected = index_of(folder)
    name = index_file(folder).name
    index_file(folder).unlink()
    done = write(folder)
    assert (done.changed, done.output) == ((name,), str(folder / name))
    assert done.bytes_written == (folder / name).stat().st_size
    assert index_of(folder) == expected
    assert check(str(folder)).findings == []
    assert_states(whole(folder), state())


def test_shard_names_of_an_earlier_save_are_replaced_by_those_that_are_there(folder: Path) -> None:
    expected = index_of(folder)
    index_file(folder).write_text(index_file(folder).read_text().replace("-of-00003", "-of-00030"))
    done = write(folder)
    assert index_of(folder) == expected
    assert set(done.placed) == set(state())


def test_what_the_index_notes_is_kept_and_totals_follow_the_shards(folder: Path) -> None:
    expected = index_of(folder)

    def spoil(found: dict[str, Any]) -> None:
        found["metadata"] = {"total_size": 7, "total_parameters": 8, "note": "kept", "more": [1, None]}
        found["weight_map"]["gone"] = found["weight_map"].pop("m.a")

    done = write(changed(folder, spoil))
    found = index_of(folder)
    assert found["weight_map"] == expected["weight_map"]
    numel = sum(tensor.numel() for tensor in state().values())
    assert found["metadata"] == {**expected["metadata"], "total_parameters": numel, "note": "kept", "more": [1, None]}
    assert done.placed == {"gone": "no shard, so no longer in the index", "m.a": "the index now"}


def test_an_index_that_is_right_is_left_alone(folder: Path) -> None:
    before, stamp = content(folder), index_file(folder).stat().st_mtime_ns
    assert write(folder).bytes_written == 0
    assert (content(folder), index_file(folder).stat().st_mtime_ns) == (before, stamp)


@pytest.mark.parametrize(
    "broken", [b"", b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": "../a"}}', b"\xff\xfe", b"[]"]
)
def test_an_index_that_cannot_be_read_is_replaced(folder: Path, broken: bytes) -> None:
    expected = index_of(folder)
    index_file(folder).write_bytes(broken)
    write(folder)
    assert index_of(folder) == expected


def test_the_metadata_of_a_broken_weight_map_are_kept(folder: Path) -> None:
    write(changed(folder, lambda found: found.update(weight_map={}, metadata={"note": "kept"})))
    assert index_of(folder)["metadata"]["note"] == "kept"


def test_a_dry_run_writes_nothing_and_says_what_it_would_write(folder: Path) -> None:
    index_file(folder).write_text(json.dumps({"weight_map": {"x": "none.bin"}}))
    before = content(folder)
    planned = write(folder, dry_run=True)
    assert content(folder) == before
    done = write(folder)
    assert planned.bytes_written == done.bytes_written
    assert planned.placed == done.placed


def test_undo_brings_the_old_index_back(folder: Path) -> None:
    index_file(folder).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "none.bin"}}))
    before = content(folder)
    done = write(folder, backup=True)
    assert done.backup == f"{index_file(folder)}.bak"
    undo(str(folder))
    assert content(folder) == before


def test_a_crash_leaves_the_old_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_file(folder).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "none.bin"}}))
    before = content(folder)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(folder)
    assert content(folder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_tied_names_are_indexed_as_their_writer_does(tmp_path: Path, kind: str) -> None:
    folder = save(tied_state(), tmp_path / "set", kind)
    expected = index_of(folder)
    assert write(folder).bytes_written == 0
    index_file(folder).write_text(json.dumps({**expected, "weight_map": {"m.a": "none.bin"}}))
    write(folder)
    assert index_of(folder) == expected


# --- which files are the set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_refused(folder: Path, with_index: bool) -> None:
    next(iter(sorted(folder.glob("*-00002-of-*")))).unlink()
    if not with_index:
        index_file(folder).unlink()
    before = content(folder)
    with pytest.raises(RefusedError, match=r"-00002-of-00003\.\w+ is not there") as refused:
        write(folder)
    assert refused.value.hint == "fetch it first"
    assert content(folder) == before


def test_shards_of_an_earlier_save_are_left_out(folder: Path) -> None:
    expected = index_of(folder)
    first = next(iter(sorted(folder.glob("*-00001-of-*"))))
    stray = folder / first.name.replace("of-00003", "of-00005")
    shutil.copy(first, stray)
    assert write(folder).left == (stray.name,)
    index_file(folder).unlink()
    assert write(folder).left == (stray.name,)
    assert index_of(folder) == expected


def test_two_whole_sets_are_not_guessed_between(folder: Path) -> None:
    index_file(folder).unlink()
    suffix = "safetensors" if kind_of(folder) == "safetensors" else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shutil.copy(folder / f"{stem}-00001-of-00003.{suffix}", folder / f"{stem}-00001-of-00001.{suffix}")
    with pytest.raises(UsageError, match="two sets are complete"):
        write(folder)


def test_a_set_without_a_shard_that_an_edit_emptied_is_whole(folder: Path) -> None:
    """`ckpt rm` removes a shard of which nothing is left; the names of the others stay."""
    (last,) = folder.glob("*-00003-of-*")
    last.unlink()

    def drop(found: dict[str, Any]) -> None:
        found["weight_map"] = {name: shard for name, shard in found["weight_map"].items() if shard != last.name}

    expected = index_of(changed(folder, drop))["weight_map"]
    write(folder)
    assert index_of(folder)["weight_map"] == expected


def test_files_of_any_name_that_the_index_knows_are_the_set(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    places = {"x": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    write(tmp_path)
    assert index_of(tmp_path) == {
        "metadata": {"total_size": 16},
        "weight_map": {"b": "b.safetensors", "a": "a.safetensors"},
    }


def test_two_shards_with_one_name_are_refused_unless_the_index_chooses(tmp_path: Path) -> None:
    for number, value in ((1, 1.0), (2, 2.0)):
        save_file(
            {"a": torch.full((2,), value)}, tmp_path / f"model-{number:05}-of-00002.safetensors", {"format": "pt"}
        )
    with pytest.raises(RefusedError, match="both have a tensor 'a'"):
        write(tmp_path)
    places = {"a": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    write(tmp_path)
    assert index_of(tmp_path) == {"metadata": {"total_size": 8}, "weight_map": places}


def test_sets_of_two_models_are_not_guessed_between(tmp_path: Path) -> None:
    for stem in ("model", "other"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{stem}-00001-of-00001.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="a folder of 2 checkpoints"):
        write(tmp_path)
    write(tmp_path / "other.safetensors.index.json")
    assert index_of(tmp_path)["weight_map"] == {"a": "other-00001-of-00001.safetensors"}


def test_what_has_no_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="a folder without shards"):
        write(tmp_path)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere")
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="neither a folder of shards nor the name of an index"):
        write(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="the name of an index ends in"):
        write(tmp_path / "m.gguf.index.json")


def test_a_shard_that_is_not_a_checkpoint_is_refused(folder: Path) -> None:
    next(iter(sorted(folder.glob("*-00002-of-*")))).write_bytes(b"<html>Sign in</html>")
    before = content(folder)
    with pytest.raises(CkptError) as refused:
        write(folder)
    assert "-00002-of-00003" in (refused.value.path or "")
    assert content(folder) == before


def test_a_link_is_not_written_through(folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.json"
    os.replace(index_file(folder), real)
    name = "model.safetensors.index.json" if kind_of(folder) == "safetensors" else "pytorch_model.bin.index.json"
    (folder / name).symlink_to(real)
    with pytest.raises(RefusedError, match="symbolic link"):
        write(folder)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=12), st.integers(1, 4), st.data())
def test_every_tensor_is_indexed_in_its_own_shard(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], count: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("set")
    parts: list[State] = [{} for _ in range(count)]
    for number, shape in enumerate(shapes):
        parts[data.draw(st.integers(0, count - 1))][f"t{number}"] = torch.full(shape, float(number))
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number:05}-of-{count:05}.safetensors", {"format": "pt"})
    write(folder)
    found = index_of(folder)
    assert found["metadata"]["total_size"] == sum(t.nbytes for part in parts for t in part.values())
    for name, shard in found["weight_map"].items():
        assert name in load_file(folder / shard)
    assert len(found["weight_map"]) == len(shapes)
