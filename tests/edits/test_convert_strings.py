"""Strings of metadata in conversions: as they were, where readers look for them, and nothing added without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors import safe_open
from safetensors.torch import save_file
from shard_strings import notes_in, shards_of, strings_in


def done(ckpt: Ckpt, *arguments: object) -> dict[str, Any]:
    answer = ckpt("convert", *arguments, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def strings_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, "pt") as file:
        found: dict[str, str] | None = file.metadata()
    return found


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": "np", "a": "1"}, {"a": "1"}, {"total_size": "own"}])
def test_a_safetensors_file_and_its_conversion_do_not_differ(
    tmp_path: Path, ckpt: Ckpt, metadata: dict[str, str]
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": torch.ones(2), "v": torch.zeros(3)}, source, metadata=metadata)
    assert done(ckpt, source, target)["added"] == []
    assert strings_of(target) == metadata
    assert ckpt("diff", source, target).code == 0
    done(ckpt, source, tmp_path / "hf", "--to", "hf")
    assert strings_of(tmp_path / "hf" / "model.safetensors") == metadata
    done(ckpt, source, tmp_path / "set", "--max-shard", "8")
    assert strings_in(tmp_path / "set") == [metadata, metadata]


def test_a_set_and_its_conversion_do_not_differ(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "a", [{"a": "1"}, {"a": "1"}], {"total_size": 16, "n": {"x": [1]}, "s": "t"})
    done(ckpt, folder, tmp_path / "b", "--max-shard", "8")
    assert strings_in(tmp_path / "b") == [{"a": "1"}, {"a": "1"}]
    assert notes_in(tmp_path / "b") == {"total_size": 16, "n": {"x": [1]}, "s": "t"}
    assert ckpt("diff", folder, tmp_path / "b").code == 0


def test_a_total_of_the_old_index_that_is_not_written_is_named(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "a", [None, None], {"total_size": 16, "total_parameters": 4})
    told = done(ckpt, folder, tmp_path / "b", "--max-shard", "8")
    assert told["not_kept"] == ["total_parameters of the old index"]


def test_a_safetensors_file_without_metadata_gets_the_format_and_the_report_says_so(tmp_path: Path, ckpt: Ckpt) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": torch.ones(2), "v": torch.zeros(3)}, source)
    assert "added: format=pt in its metadata" in ckpt("convert", source, target).err
    assert strings_of(target) == {"format": "pt"}
    assert done(ckpt, source, tmp_path / "set", "--max-shard", "8")["added"] == ["format=pt in its metadata"]
    assert strings_in(tmp_path / "set") == [{"format": "pt"}, {"format": "pt"}]
    assert done(ckpt, target, tmp_path / "c.safetensors")["added"] == []


def test_shards_without_metadata_get_the_format_and_their_index_keeps_its_notes(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards_of(tmp_path / "a", [None, None], {"total_size": 16, "n": {"x": [1]}})
    assert done(ckpt, folder, tmp_path / "b", "--max-shard", "8")["added"] == ["format=pt in its metadata"]
    assert strings_in(tmp_path / "b") == [{"format": "pt"}, {"format": "pt"}]
    assert notes_in(tmp_path / "b") == {"total_size": 16, "n": {"x": [1]}}
    told = done(ckpt, folder, tmp_path / "one.safetensors")
    assert told["added"] == ["format=pt in its metadata"]
    assert (strings_of(tmp_path / "one.safetensors") or {})["format"] == "pt"


def test_what_had_no_strings_gets_the_format_and_says_so(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    told = ckpt("convert", tmp_path / "a.pt", tmp_path / "b.safetensors").err
    assert "added: format=pt in its metadata" in told
    assert strings_of(tmp_path / "b.safetensors") == {"format": "pt"}


def test_strings_without_end_are_not_written_into_every_shard(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_cli import limits

    monkeypatch.setattr(limits, "METADATA", 100_000)
    tensors = {str(number): torch.ones(1) for number in range(20)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"a": "x" * 50_000})
    answer = ckpt("convert", tmp_path / "a.safetensors", tmp_path / "b", "--max-shard", "4")
    assert answer.code == 2
    assert "would stand in each of 20 shards" in answer.err


def test_a_module_becomes_detached_tensors_and_requires_grad_is_named(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    told = done(ckpt, tmp_path / "m.pt", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert told["not_kept"] == ["requires_grad of 2 tensors"]


def test_what_a_file_keeps_of_requires_grad_is_not_called_lost(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2, requires_grad=True)}, tmp_path / "m.pt")
    told = done(ckpt, tmp_path / "m.pt", tmp_path / "o.pt", "--shared", "clone")
    assert torch.load(tmp_path / "o.pt", weights_only=True)["w"].requires_grad
    assert told["not_kept"] == []
