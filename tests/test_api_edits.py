"""Edits from Python: each does, and reports, what the command of the same name does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_in_use import ask, edit, look
from conftest import Ckpt
from safetensors.torch import load_file, save_file

import ckpt_cli

Report = dict[str, Any]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint with tied, sliced and other entries."""
    torch.manual_seed(0)
    w = torch.randn(3, 4)
    state = {
        "module.a.weight": w,
        "module.b.weight": w,
        "module.c.weight": w.clone(),
        "module.part": torch.ones(99)[:2],
    }
    torch.save({**state, "epoch": 3, "name": "first", "none": None}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_file(
        {"w": torch.ones(3), "v": torch.ones(3)}, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "x"}
    )
    return tmp_path / "a.safetensors"


PAIRS: dict[str, tuple[list[str], Callable[[Path], Report]]] = {
    "set": (["module.a.weight[0,0]=100", "epoch=4"],
            lambda p: ckpt_cli.set(p, {"module.a.weight[0,0]": 100, "epoch": 4})),
    "set -o": (["module.c.weight*=2", "-o", "out.pt"],
               lambda p: ckpt_cli.set(p, {"module.c.weight *=": 2}, output="out.pt")),
    "rename": (["epoch", "step"], lambda p: ckpt_cli.rename(p, "epoch", "step")),
    "rename --strip": (["--strip", "module", "--sub", "^a", "z"],
                       lambda p: ckpt_cli.rename(p, strip="module.", sub=[("^a", "z")])),
    "rm": (["module.*.weight", "--exclude", "module.a"],
           lambda p: ckpt_cli.rm(p, "module.*.weight", exclude="module.a")),
    "keep": (["module", "--backup"], lambda p: ckpt_cli.keep(p, "module", backup=True)),
    "keep --root": (["--root", "module", "-n"], lambda p: ckpt_cli.keep(p, root="module", dry_run=True)),
    "cast": (["float16", "module.c"], lambda p: ckpt_cli.cast(p, "float16", "module.c")),
    "tie": (["module.a.weight", "module.c.weight"], lambda p: ckpt_cli.tie(p, "module.a.weight", "module.c.weight")),
    "untie": (["module.b.weight"], lambda p: ckpt_cli.untie(p, "module.b.weight")),
    "compact": ([], ckpt_cli.compact),
    "to": (["cuda:1"], lambda p: ckpt_cli.to(p, "cuda:1")),
    "convert": (["out.safetensors", "module", "--dtype", "bfloat16", "--tensors-only"],
                lambda p: ckpt_cli.convert(p, "out.safetensors", "module", dtype="bfloat16", tensors_only=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_an_edit_reports_and_writes_what_its_command_does(
    trained: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, call = PAIRS[case]
    for folder in ("command", "python"):
        (tmp_path / folder).mkdir()
        shutil.copy(trained, tmp_path / folder / "a.pt")
    monkeypatch.chdir(tmp_path / "command")
    reported = json.loads(ckpt(case.split()[0], "a.pt", *arguments, "--json").out)
    monkeypatch.chdir(tmp_path / "python")
    assert call(Path("a.pt")) == reported
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.name[0] != "."}
        for folder in ("command", "python")
    ]
    assert files[0] == files[1]


def test_meta_undo_and_index_report_what_their_commands_do(plain: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    assert ckpt_cli.meta(plain) == json.loads(ckpt("meta", str(plain), "--json").out) == {"format": "pt", "note": "x"}
    old = plain.read_bytes()
    done = ckpt_cli.meta(plain, {"a=b": "c=d"}, delete="note", backup=True)
    assert done["backup"] == f"{plain}.bak"
    assert ckpt_cli.meta(plain) == {"format": "pt", "a=b": "c=d"}
    reported = json.loads(ckpt("undo", str(plain), "-n", "--json").out)
    assert ckpt_cli.undo(plain, dry_run=True) == reported
    assert ckpt_cli.undo(plain)["verb"] == reported["verb"]
    assert plain.read_bytes() == old
    with pytest.raises(ckpt_cli.CkptError, match="metadata is text"):
        ckpt_cli.meta(plain, {"n": 1})  # type: ignore[dict-item]
    ckpt_cli.convert(plain, tmp_path / "shards", max_shard=12)
    assert ckpt_cli.index(tmp_path / "shards", dry_run=True) == json.loads(
        ckpt("index", str(tmp_path / "shards"), "-n", "--json").out
    )


VALUES = [100, -1.5, float("nan"), float("-inf"), True, [1, 2.5, float("inf"), 4], np.float32(0.1), np.int64(3),
          np.arange(4), np.array([1, 2, 3, 4], np.float16), torch.tensor([1.5, 2, 3, 4]), torch.tensor(0.5),
          torch.tensor([1.5, 2, 3, 4], dtype=torch.bfloat16), [np.float64(1), torch.tensor(2), 3, 4],
          (1, 2, 3, 4), torch.nn.Parameter(torch.ones(4))]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_set_takes_numbers_lists_arrays_and_tensors(trained: Path, value: Any) -> None:
    wanted = torch.load(trained)["module.c.weight"]
    wanted[1] = torch.tensor([float(v) for v in value]) if isinstance(value, list | tuple) else torch.as_tensor(value)
    ckpt_cli.set(trained, {"module.c.weight[1]": value})
    assert torch.equal(torch.load(trained)["module.c.weight"].nan_to_num(7), wanted.detach().nan_to_num(7))


def test_set_takes_complex_numbers(tmp_path: Path) -> None:
    torch.save({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.pt")
    ckpt_cli.set(tmp_path / "a.pt", {"z[0]": 1 - 2j})
    ckpt_cli.set(tmp_path / "a.pt", {"z[1]": np.complex64(2j)})
    assert torch.load(tmp_path / "a.pt")["z"].tolist() == [1 - 2j, 2j]


@pytest.mark.parametrize("text", ["plain", "@file", "true", "None", '"quoted"', "7", "", "a=b", "ü\n"])
def test_a_text_stays_the_text_that_it_is(trained: Path, text: str) -> None:
    ckpt_cli.set(trained, {"name": text})
    assert torch.load(trained)["name"] == text


def test_set_takes_values_that_are_not_tensors_and_new_ones(trained: Path) -> None:
    new = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    ckpt_cli.set(trained, {"tags": ["a", 1, None], "module.new": new, "odd=name": 5}, new=True)
    ckpt_cli.set(trained, {"epoch +=": 2, "name": None})
    state = torch.load(trained)
    assert (state["tags"], state["epoch"], state["name"], state["odd=name"]) == (["a", 1, None], 5, None, 5)
    assert state["module.new"].dtype == torch.int16
    assert torch.equal(state["module.new"], new)
    ckpt_cli.set(trained, ["epoch=9", "module.new[0,0]=1"])
    assert (torch.load(trained)["epoch"], torch.load(trained)["module.new"][0, 0]) == (9, 1)


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        ({"name": object()}, "cannot be written"),
        ({"module.part": np.array(["x"])}, "cannot be written"),
        ({"nothing": 1}, "nothing"),
        ({"module.part": [1, 2, 3]}, "shape"),
        ("epoch=4", "assignments are"),
        ({"epoch": {1, 2}}, "cannot be written"),
    ],
)
def test_what_cannot_be_set_is_refused_and_the_file_is_as_it_was(trained: Path, assignments: Any, problem: str) -> None:
    old = trained.read_bytes()
    with pytest.raises(ckpt_cli.CkptError, match=problem):
        ckpt_cli.set(trained, assignments)
    assert trained.read_bytes() == old


def test_rename_takes_a_dict_a_file_and_another_checkpoint(trained: Path, tmp_path: Path) -> None:
    names = {"module.a": "x", "module.b.weight": "y.w"}
    (tmp_path / "map.json").write_text(json.dumps(names))
    by_file = ckpt_cli.rename(trained, map=tmp_path / "map.json", dry_run=True)
    assert ckpt_cli.rename(trained, map=names, dry_run=True) == by_file
    assert by_file["renamed"] == {"module.a.weight": "x.weight", "module.b.weight": "y.w"}
    with pytest.raises(ckpt_cli.CkptError, match="nowhere"):
        ckpt_cli.rename(trained, map={"nowhere": "x"})
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save(net.state_dict(), tmp_path / "b.pt")
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "c.pt")
    ckpt_cli.rename(tmp_path / "c.pt", like=tmp_path / "b.pt")
    assert list(torch.load(tmp_path / "c.pt")) == ["0.weight", "0.bias"]
    with pytest.raises(ckpt_cli.CkptError, match="like"):
        ckpt_cli.rename(tmp_path / "c.pt", "a", "b", like=tmp_path / "b.pt")


def test_calls_without_what_they_need_are_refused(trained: Path, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ckpt_cli.rm(trained),
        lambda: ckpt_cli.keep(trained),
        lambda: ckpt_cli.keep(trained, "module", root="module"),
        lambda: ckpt_cli.tie(trained),
        lambda: ckpt_cli.untie(trained),
        lambda: ckpt_cli.rename(trained),
        lambda: ckpt_cli.rename(trained, strip="module", guess=True),
        lambda: ckpt_cli.set(trained, {"x": 1}, dtype="int8"),
        lambda: ckpt_cli.cast(trained, "float7"),
        lambda: ckpt_cli.convert(trained, tmp_path / "b.pt", shared="some"),
        lambda: ckpt_cli.convert(trained, tmp_path / "b", max_shard="big"),
        lambda: ckpt_cli.set(trained, {"epoch": 1}, output=tmp_path / "b.pt", backup=True),
    ]
    old = trained.read_bytes()
    for call in calls:
        with pytest.raises(ckpt_cli.CkptError):
            call()
    assert trained.read_bytes() == old


def test_code_that_uses_every_public_name_runs(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"model": {"w": torch.ones(2, 2), "b": torch.zeros(9)[:2]}, "epoch": 3}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2, 2), "b": torch.ones(2)}, tmp_path / "b.pt")
    (tmp_path / "m.json").write_text(ckpt("hash", "--json", str(tmp_path / "a.pt")).out)
    assert look(tmp_path / "a.pt") == {"model.w": [1, 1], "model.b": [0]}
    rows = ask(tmp_path / "a.pt", str(tmp_path / "b.pt"), tmp_path / "m.json")
    assert {row["name"] for row in rows} == {"b", "epoch"}
    fp8 = Path(__file__).parent / "samples" / "quantized" / "compressed-fp8-channel" / "model.safetensors"
    shutil.copyfile(fp8, tmp_path / "fp8.safetensors")
    assert edit(tmp_path / "a.pt", tmp_path)[-1]["problem"]
    assert load_file(tmp_path / "plain.safetensors")["weight"].dtype == torch.bfloat16
    used = Path(edit.__code__.co_filename).read_text()
    assert [name for name in ckpt_cli.__all__ if f"ckpt_cli.{name}" not in used] == []
