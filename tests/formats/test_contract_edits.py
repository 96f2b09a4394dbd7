"""The edits that every format must pass whose entries can be renamed, removed and cast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from contract import FORMATS, Format, State, bits

EDITED = ("zip", "zip-lightning", "legacy", "safetensors", "shards-zip", "shards-safetensors", "dcp", "dcp-ranks")
"""The labels of these formats; the entries of safetensors with a `.metadata` beside them cannot be renamed."""

pytestmark = pytest.mark.parametrize(
    "kind", [kind for kind in FORMATS if kind.label in EDITED], ids=lambda kind: kind.label
)


def edited(ckpt: Ckpt, kind: Format, path: Path, command: str, *more: str) -> State:
    """What the format's own library reads after an edit, which a dry run says beforehand; `check` finds no errors."""
    if command == "rm" and kind.variant == "lightning":  # whose optimizer numbers its parameters
        more = (*more, "--optimizer", "drop")
    dry = ckpt(command, path, *more, "-n", "--json")
    answer = ckpt(command, path, *more, "--json")
    assert (answer.code, answer.err) == (0, "")
    done, would = json.loads(answer.out), json.loads(dry.out)
    assert would == {**done, "dry_run": True}
    assert ckpt("check", "--deep", path, "--json").code != 2
    assert "error" not in {finding["severity"] for finding in json.loads(ckpt("check", path, "--json").out)["findings"]}
    return kind.read(path)


def same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape, bits(found[name])) == (
            tensor.dtype,
            tensor.shape,
            bits(tensor),
        ), name


def test_a_prefix_is_renamed_there_and_back(kind: Format, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / f"sample{kind.suffix}"
    kind.write(kind.sample(), path)
    before = kind.read(path)
    found = edited(ckpt, kind, path, "rename", kind.named("3"), kind.named("third"))
    same(found, {f"third{name[1:]}" if name.startswith("3.") else name: each for name, each in before.items()})
    same(edited(ckpt, kind, path, "rename", kind.named("third"), kind.named("3")), before)


def test_entries_are_removed_and_what_is_left_is_cast(kind: Format, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / f"sample{kind.suffix}"
    kind.write(kind.sample(), path)
    wanted = {name: each for name, each in kind.read(path).items() if not name.startswith(("4.", "2."))}
    same(edited(ckpt, kind, path, "rm", kind.named("4"), kind.named("2")), wanted)
    cast = {name: each.double() if each.is_floating_point() else each for name, each in wanted.items()}
    same(edited(ckpt, kind, path, "cast", "float64"), cast)
    kept = [name for name in cast if name.startswith("3.")]
    rest = {name: cast[name] for name in kept}
    gone = [kind.named(name) for name in cast if name not in kept]
    same(edited(ckpt, kind, path, "rm", *gone), rest)


def test_an_output_is_a_copy_with_the_edit(kind: Format, tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / f"sample{kind.suffix}", tmp_path / f"out{kind.suffix}"
    kind.write(kind.sample(), path)
    before = kind.read(path)
    assert ckpt("rename", path, kind.named("3.scale"), kind.named("3.factor"), "-o", out).code == 0
    wanted = {"3.factor" if name == "3.scale" else name: torch.clone(each) for name, each in before.items()}
    same(kind.read(out), wanted)
    same(kind.read(path), before)
