"""`stats`, `diff`, `match`, `check`, `scan`, `hash`, indices, views; by torch and the commands."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from api_in_use import states_of
from conftest import Ckpt
from safetensors.torch import save_file

import ckpt_cli


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {f"layers.{n}.weight": torch.randn(4, 5) for n in range(3)} | {"half": torch.randn(7).to(torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


INDICES = [0, -1, slice(1, None), (0, slice(None, 2)), (..., 1), (slice(None, None, -2),), np.int64(2), (), None,
           [2, 0], np.array([True, False, True, False]), True, (1, np.array([0, 2]))]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_of_a_tensor_gives_what_numpy_gives(trained: Path, index: object) -> None:
    with ckpt_cli.open(trained) as checkpoint:
        tensor = checkpoint["state_dict.layers.1.weight"]
        assert np.array_equal(tensor[index], tensor.numpy()[index])


def test_an_index_reads_only_what_it_selects(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        assert checkpoint["w"][5, :3].tolist() == [0, 0, 0]
    save_file({"w": torch.ones(3, 4, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with ckpt_cli.open(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint["w"][2].tolist() == [1, 1, 1, 1]


def test_an_index_that_does_not_fit_is_an_index_error_so_that_loops_end(trained: Path) -> None:
    with ckpt_cli.open(trained) as checkpoint:
        tensor = checkpoint["state_dict.layers.0.weight"]
        for index in (4, (0, 5), (0, 0, 0), (..., ...)):
            with pytest.raises(IndexError, match=r"state_dict\.layers\.0\.weight"):
                tensor[index]
        assert np.array_equal(np.stack(list(tensor)), tensor.numpy())
    with pytest.raises(ckpt_cli.CkptError, match="is closed"):
        tensor[0]


def test_a_prefix_gives_a_view_of_what_lies_below_it(trained: Path) -> None:
    with ckpt_cli.open(trained) as checkpoint:
        state = checkpoint["state_dict"]
        assert isinstance(state, ckpt_cli.View)
        oracle = torch.load(trained)["state_dict"]
        assert list(state) == list(oracle)
        assert len(state) == 4
        assert all(torch.equal(state[name].torch(), oracle[name]) for name in state)
        assert [tensor.name for tensor in state.tensors] == [f"state_dict.{name}" for name in oracle]
        assert list(state["layers"]["2"]) == ["weight"]
        assert state["layers.2.weight"].name == "state_dict.layers.2.weight"
        assert "epoch" not in state
        assert "state_dict" in checkpoint
        assert "state" not in checkpoint
        for missing in ("state", "state_dict.", "state_dict.layers.9", ""):
            with pytest.raises(KeyError):
                checkpoint[missing]
        with pytest.raises(KeyError):
            state["epoch"]
    assert repr(state) == f"<ckpt_cli.View 'state_dict' of {str(trained)!r}: 4 entries>"


def test_stats_are_those_of_torch_and_of_the_command(trained: Path, ckpt: Ckpt) -> None:
    with ckpt_cli.open(trained) as checkpoint:
        found = checkpoint.stats(total=True, percentiles=True)
        some = checkpoint.stats("state_dict.layers", exclude="*.0.*", sort="std", jobs=1)
    reported = json.loads(ckpt("stats", "--json", "--percentiles", str(trained)).out)["tensors"]
    keys = ["name", "dtype", "numel", "min", "max", "mean", "std", "norm", "zeros", "nan", "inf", "outlier", "p50"]
    assert [[row[key] for key in keys] for row in found.rows()] == [[row[key] for key in keys] for row in reported]
    weight = torch.load(trained)["state_dict"]["layers.0.weight"]
    assert found.rows()[0]["std"] == pytest.approx(weight.double().std().item())
    assert found.rows()[0]["shape"] == (4, 5)
    assert found.total is not None
    assert found.total.numel == 67
    assert {row["name"] for row in some.rows()} == {"state_dict.layers.1.weight", "state_dict.layers.2.weight"}
    assert "p50" not in some.rows()[0]
    with pytest.raises(ckpt_cli.CkptError, match="is closed"):
        checkpoint.stats()


def test_rows_of_what_has_no_values_have_none_and_a_note(tmp_path: Path) -> None:
    torch.save({"m": torch.empty(2, device="meta")}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        (row,) = checkpoint.stats().rows()
    assert (row["min"], row["zeros"]) == (None, None)
    assert row["note"]


def test_optimizer_is_that_of_ls_with_a_row_for_each_parameter(tmp_path: Path, ckpt: Ckpt) -> None:
    net = torch.nn.Linear(2, 3)
    adam = torch.optim.AdamW(net.named_parameters(), lr=0.5)
    net(torch.ones(1, 2)).sum().backward()
    adam.step()
    torch.save(net.state_dict(), tmp_path / "model.pt")
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    rows = states_of(tmp_path / "optimizer.pt", tmp_path / "model.pt")
    printed = ckpt("ls", "--optimizer", "--json", "--model", tmp_path / "model.pt", tmp_path / "optimizer.pt").out
    assert rows == json.loads(printed)["entries"]
    assert [(row["name"], row["lr"], row["step"]) for row in rows] == [("weight", 0.5, 1), ("bias", 0.5, 1)]
    with ckpt_cli.open(tmp_path / "model.pt") as checkpoint, pytest.raises(ckpt_cli.CkptError, match="optimizer"):
        checkpoint.optimizer()
    with pytest.raises(ckpt_cli.CkptError, match="closed"):
        checkpoint.optimizer()


def test_diff_takes_paths_and_open_checkpoints(trained: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    state = torch.load(trained)
    state["state_dict"]["layers.1.weight"][2, 3] += 1
    state["epoch"] = 4
    state["extra"] = torch.ones(1)
    torch.save(state, tmp_path / "b.pt")
    found = ckpt_cli.diff(trained, tmp_path / "b.pt")
    with ckpt_cli.open(trained) as a, ckpt_cli.open(tmp_path / "b.pt") as b:
        assert ckpt_cli.diff(a, b) == found
        assert ckpt_cli.diff(a, a).equal
        assert ckpt_cli.diff(a, b, "state_dict", exclude=["*.1.*"]).equal
        assert ckpt_cli.diff(a, b, "state_dict", atol=2).equal
    reported = json.loads(ckpt("diff", "--json", str(trained), str(tmp_path / "b.pt")).out)
    assert [change.name for change in found.changed] == [change["name"] for change in reported["changed"]]
    rows = {row["name"]: row for row in found.rows()}
    assert {name: row["what"] for name, row in rows.items()} == {
        "state_dict.layers.1.weight": "value", "epoch": "entry", "extra": "only in b"}  # fmt: skip
    assert (rows["epoch"]["a"], rows["epoch"]["b"], rows["epoch"]["numel"]) == (3, 4, None)
    assert list(rows["state_dict.layers.1.weight"]["first"]) == [[2, 3]]
    assert len({tuple(row) for row in found.rows()}) == 1
    with pytest.raises(ckpt_cli.CkptError):
        ckpt_cli.diff(trained, trained, first=-1)


def test_diff_aligns_names_by_strip_and_sub(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(2)}, tmp_path / "b.pt")
    assert not ckpt_cli.diff(tmp_path / "a.pt", tmp_path / "b.pt").equal
    assert ckpt_cli.diff(tmp_path / "a.pt", tmp_path / "b.pt", strip="module", sub=[("^a$", "b")]).equal


def test_match_is_that_of_the_command_with_rows_and_commands(trained: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    state = torch.load(trained)["state_dict"]
    model = {f"module.{name}": value for name, value in state.items() if name != "half"}
    torch.save(model | {"module.layers.0.weight": torch.ones(4, 6)}, tmp_path / "b.pt")
    b = tmp_path / "b.pt"
    found = ckpt_cli.match(trained, b)
    reported = json.loads(ckpt("match", "--json", trained, b).out)
    assert (found.loads, found.commands) == (reported["loads"], [cure["command"] for cure in reported["cures"]])
    assert [row["name"] for row in found.rows() if row["what"] == "missing"] == reported["missing"]
    (tmp_path / "b.json").write_text(ckpt("ls", "--json", b).out)
    with ckpt_cli.open(trained) as opened, ckpt_cli.open(b) as other:
        assert ckpt_cli.match(opened, other).rows() == found.rows()
        assert ckpt_cli.match(opened, tmp_path / "b.json").rows() == found.rows()
        assert ckpt_cli.match(opened, trained, of="state_dict", other_of="state_dict").loads
    ckpt_cli.rename(trained, add="module.", output=tmp_path / "c.pt")
    sizes = ckpt_cli.match(tmp_path / "c.pt", b, of="module.state_dict", other_of="module").rows()
    assert sizes == [
        {"what": "unexpected", "name": "half", "a": None, "b": None},
        {"what": "size", "name": "layers.0.weight", "a": [4, 5], "b": [4, 6]},
    ]


def test_series_is_that_of_the_command_with_a_row_for_each_tensor_and_file(tmp_path: Path, ckpt: Ckpt) -> None:
    for step in (100, 20):
        torch.save({"w": torch.full((3,), float(step)), "step": step}, tmp_path / f"{step}.pt")
    found = ckpt_cli.series(tmp_path)
    reported = json.loads(ckpt("series", "--json", tmp_path).out)["points"]
    keys = ["name", "path", "step", "norm", "change", "max", "nan", "dtype", "numel"]
    assert [[row[key] for key in keys] for row in found.rows()] == [[row[key] for key in keys] for row in reported]
    assert [(row["step"], row["change"]) for row in found.rows()] == [(20, None), (100, 4.0)]
    with ckpt_cli.open(tmp_path / "20.pt") as early:
        given = [early, tmp_path / "100.pt"]
        assert ckpt_cli.series(given, "w", fold=True, jobs=1).rows() == found.rows()
        assert ckpt_cli.series(tmp_path / "*.pt", "w").rows() == found.rows()
        with pytest.raises(ckpt_cli.CkptError, match="nothing is called 'v'"):
            ckpt_cli.series(given, "v")
    with pytest.raises(ckpt_cli.CkptError, match="at least one"):
        ckpt_cli.series([])


def test_check_gives_the_findings(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "a.pt")
    assert ckpt_cli.check(tmp_path / "a.pt").ok
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        report = ckpt_cli.check(checkpoint, deep=True)
    assert "nan" in [row["code"] for row in report.rows()]
    allowed = ckpt_cli.check(tmp_path / "a.pt", deep=True, allow="nan")
    assert (allowed.allowed, [row["code"] for row in allowed.rows() if row["code"] == "nan"]) == (1, [])


def test_scan_gives_the_findings_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    found = ckpt_cli.scan(tmp_path / "a.pkl")
    assert not found.ok
    assert [(row["severity"], row["name"]) for row in found.rows()] == [("error", "os.system")]
    assert not (tmp_path / "ran").exists()
    assert ckpt_cli.scan(tmp_path / "a.pkl", allow=["os.system"]).ok
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert ckpt_cli.scan(tmp_path / "b.pkl").rows() == []


def test_hash_is_that_of_the_command_and_verifies_its_output(trained: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    printed = ckpt("hash", "--json", str(trained)).out
    (tmp_path / "m.json").write_text(printed)
    reported = json.loads(printed)
    found = ckpt_cli.hash(trained)
    assert (found.algorithm, found.checkpoint, found.tensors) == ("blake3", reported["checkpoint"], reported["tensors"])
    assert found.rows()[0] == {
        "name": "state_dict.layers.0.weight",
        "hash": found.tensors["state_dict.layers.0.weight"],
    }
    assert ckpt_cli.hash(trained, "state_dict.half", algorithm="sha256").tensors.keys() == {"state_dict.half"}
    with ckpt_cli.open(trained) as checkpoint:
        assert ckpt_cli.hash(checkpoint, verify=tmp_path / "m.json").ok
    state = torch.load(trained)
    state["state_dict"]["half"][0] = 9
    torch.save(state, trained)
    verdict = ckpt_cli.hash(trained, verify=tmp_path / "m.json")
    assert verdict.rows() == [{"what": "differs", "name": "state_dict.half"}]


def test_notes_say_what_the_commands_say(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.notes == []
