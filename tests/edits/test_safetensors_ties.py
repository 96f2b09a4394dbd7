"""Ties in safetensors files: aliases that `save_model` notes follow every edit, dry or done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from run_edit import (
    assert_refused,
    assert_states,
    edited,
    edited_as_told,
)
from safetensors.torch import load_file, load_model, save_file, save_model
from safetensors_parts import metadata, parts
from torch import nn


class Tied(nn.Module):
    """A model whose head is its embedding, and a copy of it besides; the biases are tied too; one weight is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(4, 3)
        self.head, self.tail = nn.Linear(3, 4), nn.Linear(3, 4)
        self.head.weight = self.tail.weight = self.emb.weight
        self.head.bias = self.tail.bias
        self.own = nn.Linear(3, 2, bias=False)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """What `save_model` makes of it: three tensors, two aliases of one and one of another in the metadata."""
    path = tmp_path / "tied.safetensors"
    save_model(Tied(), str(path), metadata={"kept": "note"})
    return path


def tie_of(path: Path, last: str = "weight") -> tuple[str, list[str]]:
    """The one name that is stored of those that are tied and end so, and those that are aliases of it."""
    (kept,) = {value for name, value in metadata(path).items() if name != "kept" and name.endswith(last)}
    return kept, [name for name, value in metadata(path).items() if value == kept]


def test_aliases_follow_when_their_names_or_that_of_their_tensor_change(ckpt: Ckpt, tied: Path) -> None:
    edited(ckpt, "rename", tied, "--add", "m")
    kept, aliases = tie_of(tied)
    assert sorted([kept, *aliases]) == ["m.emb.weight", "m.head.weight", "m.tail.weight"]
    assert metadata(tied)["kept"] == "note"
    edited(ckpt, "rename", tied, "--strip", "m")
    load_model(Tied(), str(tied))  # which raises where a name is missing
    for name in ("emb", "head", "tail"):
        edited(ckpt, "rename", tied, name, f"{name}.x")
    kept, aliases = tie_of(tied)
    assert sorted([kept, *aliases]) == ["emb.x.weight", "head.x.weight", "tail.x.weight"]
    kept, aliases = tie_of(tied, "bias")
    assert sorted([kept, *aliases]) == ["head.x.bias", "tail.x.bias"]
    assert ckpt("ties", tied, "emb.x.weight", "tail.x.weight").code == 0


def test_removing_the_name_that_is_stored_keeps_its_bytes_under_an_alias(ckpt: Ckpt, tied: Path) -> None:
    kept, aliases = tie_of(tied)
    bias = tie_of(tied, "bias")
    before = load_file(tied)
    edited(ckpt, "rm", tied, kept)
    now, rest = tie_of(tied)
    assert {now, *rest} == set(aliases)
    assert tie_of(tied, "bias") == bias
    value = before.pop(kept)
    assert_states(load_file(tied), {**before, now: value})
    edited(ckpt, "rm", tied, rest[0])
    assert metadata(tied) == {"kept": "note", bias[1][0]: bias[0]}
    assert_states(load_file(tied), {**before, now: value})


def test_the_last_name_of_a_tie_takes_the_bytes_with_it(ckpt: Ckpt, tied: Path) -> None:
    edited(ckpt, "keep", tied, "own")
    assert_states(load_file(tied), {"own.weight": Tied().own.weight})
    assert metadata(tied) == {"kept": "note"}
    assert len(parts(tied)[1]) == 24


@pytest.mark.parametrize("which", ["stored", "alias"])
def test_untie_writes_a_tensor_of_its_own(ckpt: Ckpt, tied: Path, which: str) -> None:
    kept, aliases = tie_of(tied)
    before = load_file(tied)
    name = kept if which == "stored" else aliases[0]
    edited(ckpt, "untie", tied, name)
    now, rest = tie_of(tied)
    assert sorted([now, *rest]) == sorted({kept, *aliases} - {name})
    assert len(rest) == 1
    value = before.pop(kept)
    assert_states(load_file(tied), {**before, name: value, now: value})
    assert ckpt("ties", tied, name, now).code == 1
    assert_refused(ckpt, tied, "shares its bytes with no other name", "untie", name)


def test_untie_and_tie_are_each_others_inverse(ckpt: Ckpt, tied: Path) -> None:
    before, (kept, aliases) = metadata(tied), tie_of(tied)
    edited(ckpt, "untie", tied, aliases[0])
    edited(ckpt, "tie", tied, kept, aliases[0])
    assert metadata(tied) == before
    net = Tied()
    assert load_model(net, str(tied)) == (set(), [])
    assert_states(net.state_dict(), Tied().state_dict())


def test_tie_stores_equal_tensors_once_under_the_name_that_is_given_first(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    one = torch.randn(4)
    save_file({"a": one, "b": one.clone(), "c": torch.zeros(4)}, path, metadata={"note": "a"})
    # the note's value is a tensor's name and its key is none: that is how an alias is recorded, so it is one
    edited(ckpt, "tie", path, "a", "b")
    assert_states(load_file(path), {"a": one, "c": torch.zeros(4)})
    assert metadata(path) == {"note": "a", "b": "a"}
    assert_refused(ckpt, path, "tied already", "tie", "a", "b")
    assert_refused(ckpt, path, "different values", "tie", "c", "a")
    edited(ckpt, "tie", path, "c", "a", "--force")  # which takes `a` away from the others
    assert_states(load_file(path), {"c": torch.zeros(4), "note": one})
    assert metadata(path) == {"a": "c", "b": "note"}
    assert ckpt("show", path, "a").out == ckpt("show", path, "c").out


def test_no_name_and_no_string_may_become_a_tie_that_nobody_asked_for(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path, metadata={"author": "me", "b.note": "x"})
    assert_refused(ckpt, path, "would then record a tie", "rename", "a", "me")
    assert_refused(ckpt, path, "would then record a tie", "meta", "author=b")
    assert_refused(ckpt, path, "would record a tie", "meta", "b=x")
    edited(ckpt, "meta", path, "author=you")
    assert_refused(ckpt, path, "would then record a tie", "rename", "a", "you")
    edited(ckpt, "rename", path, "a", "me")
    edited(ckpt, "rename", path, "b", "b.note")  # a tensor may be called as a string is
    assert_refused(ckpt, path, "has a string 'b.note'", "tie", "me", "b.note")


EDITS = [
    ("rename", "own", "a.much.longer.name"), ("rename", "own", "o"), ("rm", "own"), ("keep", "emb", "head.weight"),
    ("keep", "--root", "own"), ("cast", "bfloat16"), ("untie", "*"), ("meta", "licence=M"),
    ("meta", f"licence={'M' * 2000}"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", EDITS, ids=lambda arguments: " ".join(arguments)[:25])
def test_a_dry_run_changes_nothing_and_tells_what_the_edit_writes(
    tied: Path, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    before, new = tied.read_bytes(), tied.with_name("new.safetensors")
    done = edited_as_told(ckpt, command, tied, *rest, "-o", new)
    assert new.stat().st_size == done["bytes_written"]
    assert (done["output"], done["in_place"]) == (str(new), False)
    assert tied.read_bytes() == before
    done = edited_as_told(ckpt, command, tied, *rest)
    assert (done["output"], done["in_place"]) == (str(tied), True)
    assert_states(load_file(tied), load_file(new))
    assert metadata(tied) == metadata(new)
