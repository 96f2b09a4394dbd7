"""`merge`: the union of checkpoints, as torch and safetensors read it; and what is refused or said."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_cli

State = dict[str, torch.Tensor]

A = {"a.weight": torch.arange(6.0).reshape(2, 3), "shared": torch.ones(4)}
B = {"b.weight": torch.arange(8, dtype=torch.int64), "shared": torch.ones(4), "half": torch.ones(3).bfloat16()}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(state: State, name: str, metadata: dict[str, str] | None = None) -> str:
    """Save a state in the format that its name says: also as shards, or for torch.distributed."""
    if name.endswith(".safetensors"):
        save_file(state, name, metadata)
    elif name.endswith(".pt"):
        torch.save(state, name, _use_new_zipfile_serialization="legacy" not in name)
    else:
        torch.save(state, f"{name}.pt")
        ckpt_cli.convert(f"{name}.pt", name, to="dcp" if "dcp" in name else "hf")
    return name


def values_of(path: str) -> State:
    with ckpt_cli.open(path) as checkpoint:
        return {tensor.name: tensor.torch() for tensor in checkpoint.tensors}


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


KINDS = ["a.pt", "a-legacy.pt", "a.safetensors", "a-hf", "a-dcp"]


@pytest.mark.parametrize(("first", "second"), [*itertools.product(KINDS, KINDS)])
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out-hf"])
def test_any_formats_merge_into_any_other(ckpt: Ckpt, first: str, second: str, output: str) -> None:
    paths = [saved(A, first), saved(B, second.replace("a", "b", 1))]
    answer = ckpt("merge", *paths, "-o", output, *(["--to", "hf"] if output == "out-hf" else []))
    assert answer.code == 0, answer.err
    assert same(values_of(output), {**A, **B})
    assert f"  2 tensors of {paths[0]}" in answer.err
    assert "the same in several: shared" in answer.err
    if output == "out.pt":
        assert same(torch.load(output), {**A, **B})
    elif output == "out.safetensors":
        assert same(load_file(output), {**A, **B})


def test_names_that_differ_are_refused_unless_one_is_preferred(ckpt: Ckpt) -> None:
    one, other = saved({"x": torch.zeros(2)}, "a.pt"), saved({"x": torch.ones(2)}, "b.pt")
    answer = ckpt("merge", one, other, "-o", "out.pt")
    assert (answer.code, "x of a.pt and b.pt" in answer.err) == (2, True)
    assert not Path("out.pt").exists()
    for prefer, value in (("first", 0.0), ("last", 1.0)):
        report = json.loads(ckpt("merge", one, other, "-o", f"{prefer}.pt", "--prefer", prefer, "--json").out)
        assert report["preferred"] == [{"name": "x", "path": one if prefer == "first" else other}]
        assert torch.load(f"{prefer}.pt")["x"].tolist() == [value, value]


def test_another_dtype_or_shape_is_another_entry_though_bytes_are_the_same(ckpt: Ckpt) -> None:
    zeros = torch.zeros(4)
    for number, other in enumerate([zeros.int(), zeros.reshape(2, 2)]):
        one, two = saved({"x": zeros}, f"a{number}.pt"), saved({"x": other}, f"b{number}.pt")
        assert ckpt("merge", one, two, "-o", "out.pt").code == 2


def test_prefixes_keep_checkpoints_apart(ckpt: Ckpt) -> None:
    one, other = saved({"x": torch.zeros(2)}, "a.safetensors"), saved({"x": torch.ones(2)}, "b.pt")
    answer = ckpt(
        "merge", one, other, "--prefix", "a.safetensors=unet.", "--prefix", "b.pt=vae", "-o", "out.safetensors"
    )
    assert answer.code == 0, answer.err
    assert same(load_file("out.safetensors"), {"unet.x": torch.zeros(2), "vae.x": torch.ones(2)})


def test_ties_stay_within_each_and_views_get_bytes_of_their_own(ckpt: Ckpt) -> None:
    weight, base = torch.randn(3, 4), torch.arange(12.0)
    torch.save({"e": weight, "h": weight}, "a.pt")
    torch.save({"t": base.reshape(3, 4).t(), "v": base[4:8], "p": base, "q": base}, "b.pt")
    assert ckpt("merge", "a.pt", "b.pt", "-o", "out.pt").code == 0
    out: Any = torch.load("out.pt")
    assert out["e"].data_ptr() == out["h"].data_ptr()
    assert out["p"].data_ptr() == out["q"].data_ptr()
    assert torch.equal(out["t"], base.reshape(3, 4).t())
    assert torch.equal(out["v"], base[4:8])
    assert ckpt("merge", "b.pt", "a.pt", "-o", "out.safetensors").code == 0
    assert "e\t" in ckpt("ties", "out.safetensors").out.replace(",", "\t")


def test_values_come_along_where_the_first_can_have_them(ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(1), "epoch": 3}, "a.pt")
    torch.save({"v": torch.ones(1), "epoch": 3, "lr": 0.5, "when": torch.device("cpu")}, "b.pt")
    answer = ckpt("merge", "a.pt", "b.pt", "-o", "out.pt")
    assert answer.code == 0, answer.err
    out = torch.load("out.pt")
    assert (out["epoch"], out["lr"], "when" in out) == (3, 0.5, False)
    assert "left out: when of b.pt" in answer.err
    saved({"w": torch.ones(1)}, "c.safetensors")
    answer = ckpt("merge", "c.safetensors", "b.pt", "-o", "out.safetensors")
    assert "left out: epoch of b.pt, lr of b.pt, when of b.pt" in answer.err


@pytest.mark.parametrize(("base", "to"), [("a.pt", "dcp"), ("a-dcp", "pt"), ("a-dcp", "dcp")])
def test_values_come_along_into_other_formats_too(ckpt: Ckpt, base: str, to: str) -> None:
    torch.save({"m": {"w": torch.ones(1)}, "epoch": 3}, "a.pt")
    torch.save({"m": {"v": torch.ones(2)}, "epoch": 4, "lr": 0.5}, "b.pt")
    assert ckpt("convert", "a.pt", "a-dcp", "--to", "dcp").code == 0
    answer = ckpt("merge", base, "b.pt", "--prefer", "last", "-o", "out", "--to", to)
    assert answer.code == 0, answer.err
    with ckpt_cli.open("out") as checkpoint:
        assert sorted(checkpoint) == ["epoch", "lr", "m.v", "m.w"]
        assert (checkpoint["epoch"], checkpoint["lr"]) == (4, 0.5)


def test_values_that_the_format_cannot_hold_are_never_lost_silently(ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(1)}, "a.pt")
    torch.save({"v": torch.ones(1), "lr": 0.5}, "b.pt")
    answer = ckpt("merge", "a.pt", "b.pt", "-o", "out.safetensors")
    assert (answer.code, "lr: not a tensor" in answer.err) == (2, True)
    answer = ckpt("merge", "a.pt", "b.pt", "-o", "out.safetensors", "--tensors-only")
    assert (answer.code, "left out: lr" in answer.err) == (0, True)


def test_values_that_differ_are_refused_as_tensors_are(ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(1), "epoch": 3}, "a.pt")
    torch.save({"v": torch.ones(1), "epoch": 4}, "b.pt")
    answer = ckpt("merge", "a.pt", "b.pt", "-o", "out.pt")
    assert (answer.code, "epoch of a.pt and b.pt" in answer.err) == (2, True)
    assert ckpt("merge", "a.pt", "b.pt", "-o", "out.pt", "--prefer", "last").code == 0
    assert torch.load("out.pt")["epoch"] == 4


def test_metadata_is_merged_too(ckpt: Ckpt) -> None:
    one = saved({"a": torch.ones(1)}, "a.safetensors", {"format": "pt", "x": "1", "y": "2"})
    other = saved({"b": torch.ones(1)}, "b.safetensors", {"format": "pt", "x": "1", "z": "3"})
    assert ckpt("merge", one, other, "-o", "out.safetensors").code == 0
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "1", "y": "2", "z": "3"}
    other = saved({"b": torch.ones(1)}, "b.safetensors", {"x": "7"})
    answer = ckpt("merge", one, other, "-o", "new.safetensors")
    assert (answer.code, "metadata x of a.safetensors and b.safetensors" in answer.err) == (2, True)
    assert ckpt("merge", one, other, "-o", "new.safetensors", "--prefer", "last").code == 0
    with safe_open("new.safetensors", "pt") as file:
        assert file.metadata()["x"] == "7"
    torch.save({"c": torch.ones(1)}, "c.pt")
    answer = ckpt("merge", "c.pt", other, "-o", "c-out.pt")
    assert "left out: metadata x of b.safetensors" in answer.err


def test_shards_without_an_index_become_a_model(ckpt: Ckpt) -> None:
    for number in range(3):
        saved({f"layers.{number}.w": torch.full((50,), float(number))}, f"part-{number}.safetensors")
    paths = [f"part-{number}.safetensors" for number in range(3)]
    assert ckpt("merge", *paths, "-o", "model", "--to", "hf", "--max-shard", "250B").code == 0
    assert len(list(Path("model").glob("*.safetensors"))) == 3
    assert json.loads(Path("model/model.safetensors.index.json").read_text())["metadata"]["total_size"] == 600
    assert ckpt("check", "model").code == 0


def test_what_cannot_be_taken_is_refused_by_name(ckpt: Ckpt) -> None:
    saved({"a": torch.ones(1)}, "a.pt")
    torch.save({"s": torch.eye(3).to_sparse()}, "b.pt")
    answer = ckpt("merge", "a.pt", "b.pt", "-o", "out.pt")
    assert (answer.code, "'s' is a sparse_coo tensor" in answer.err) == (2, True)
    torch.save({"a": {"b": torch.ones(1)}}, "c.pt")
    answer = ckpt("merge", "a.pt", "c.pt", "-o", "out.pt")
    assert (answer.code, "a would be an entry with other entries in it" in answer.err) == (2, True)
    for arguments in (
        ["a.pt"],
        ["a.pt", "./a.pt"],
        ["a.pt", "c.pt", "--prefix", "d.pt=x"],
        ["a.pt", "c.pt", "--prefix", "x"],
    ):
        assert ckpt("merge", *arguments, "-o", "out.pt").code == 2
    Path("there.pt").write_bytes(b"x")
    assert "--force" in ckpt("merge", "a.pt", "b.pt", "-o", "there.pt").err
    assert not Path("out.pt").exists()


def test_a_dry_run_writes_nothing_and_finds_what_would_be_refused(ckpt: Ckpt) -> None:
    one, other = saved(A, "a.pt"), saved(B, "b.safetensors")
    report = json.loads(ckpt("merge", one, other, "-o", "out.pt", "-n", "--json").out)
    assert report["dry_run"]
    assert report["bytes_written"] > 0
    assert not Path("out.pt").exists()
    assert ckpt("merge", one, other, "-o", "out.pt").code == 0
    assert Path("out.pt").stat().st_size == report["bytes_written"]


def test_python_merges_too() -> None:
    one, other = saved(A, "a.pt"), saved(B, "b.safetensors")
    report = ckpt_cli.merge([one, other], "out.pt", prefixes={one: "p"})
    assert report["inputs"] == [{"path": one, "tensors": 2}, {"path": other, "tensors": 3}]
    assert "p.a.weight" in torch.load("out.pt")
    with pytest.raises(ckpt_cli.CkptError, match="prefer is first or last"):
        ckpt_cli.merge([one, other], "out.pt", prefer="both")
