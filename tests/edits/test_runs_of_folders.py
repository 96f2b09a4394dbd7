"""Edits of runs that have folders of their own: distributed checkpoints, and the files of ranks.

Each edit goes to the file that has the entry, all or nothing also over several folders; what is joined from the files
of ranks is refused by name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from dcp_formats import read
from run_folders import run_folder
from zero_folders import zero_folder

SAMPLES = Path(__file__).parent.parent / "samples"
MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What `Accelerator.save_state` wrote of a model that two ranks had parts of."""
    return Path(shutil.copytree(SAMPLES / "accelerate_sharded", tmp_path / "run"))


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A run whose model is in DeepSpeed's files of two ranks, beside files of the trainer."""
    path = zero_folder(tmp_path / "run", 2, 2, [{"a": torch.randn(3, 2), "b": torch.randn(4)}])
    torch.save({"last_epoch": 3}, path / "scheduler.pt")
    torch.save({"x": torch.ones(3)}, path / "rng_state_0.pth")
    torch.save({"lr": 0.1}, path / "training_args.bin")
    (path / "trainer_state.json").write_text('{"global_step": 7}')
    (path / "zero_to_fp32.py").write_text("pass\n")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, also in folders."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(folder: Path, before: dict[str, bytes]) -> set[str]:
    """The folders and files in which something is another one now, or is gone."""
    after = files_of(folder)
    return {name.partition("/")[0] for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted names."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def both(folder: Path) -> dict[str, Any]:
    """What torch reads of the model and the optimizer."""
    return flat(read(folder / MODEL)) | flat(read(folder / OPTIMIZER))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


# --- distributed checkpoints in folders of their own


def test_elements_of_both_folders_and_values_are_set_by_one_edit(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    before, old = files_of(run), both(run)
    edit = ("model.0.bias[1]=5", "optimizer.state.0.bias.exp_avg+=1", "scheduler.last_epoch=9")
    assert ckpt("set", run, *edit, "-o", tmp_path / "out").code == 0
    assert not changed(run, before)
    assert ckpt("set", run, *edit).code == 0
    assert changed(run, before) == {MODEL, OPTIMIZER, "scheduler.bin"}
    old["model.0.bias"][1] = 5
    old["optimizer.state.0.bias.exp_avg"] += 1
    for folder in (run, tmp_path / "out"):
        assert same(both(folder), old)
        assert torch.load(folder / "scheduler.bin")["last_epoch"] == 9
        assert ckpt("check", "--deep", folder).code == 0


def test_a_parameter_is_renamed_with_its_states_in_the_other_folder(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    old, before = both(run), files_of(run)
    assert ckpt("rename", run, "model.0.weight", "model.net.weight", "-o", tmp_path / "out").code == 0
    assert not changed(run, before)
    assert ckpt("rename", run, "model.0.weight", "model.net.weight").code == 0
    assert changed(run, before) == {MODEL, OPTIMIZER}
    found = both(run)
    names = {name.replace("0.weight", "net.weight") for name in old}
    assert same(found, both(tmp_path / "out"))
    assert {name for name in found if "param_groups" not in name} == {n for n in names if "param_groups" not in n}
    assert torch.equal(found["model.net.weight"], old["model.0.weight"])
    assert torch.equal(found["optimizer.state.net.weight.exp_avg"], old["optimizer.state.0.weight.exp_avg"])


def test_rm_takes_the_states_in_the_other_folder_out_too(run: Path, ckpt: Ckpt) -> None:
    old = both(run)
    assert ckpt("rm", run, "model.0.weight").code == 0
    found = both(run)
    (groups,) = (found[name] for name in found if name.endswith("param_groups"))
    assert groups[0]["params"] == ["0.bias", "2.weight"]
    left = {name: value for name, value in old.items() if "0.weight" not in name and "param_groups" not in name}
    assert same({name: value for name, value in found.items() if "param_groups" not in name}, left)
    assert ckpt("check", "--deep", run).code == 0
    assert ckpt("compact", run).code == 0
    assert same(both(run), found)


def test_a_folder_of_which_nothing_is_left_goes(run: Path, ckpt: Ckpt) -> None:
    before = files_of(run)
    assert ckpt("rm", run, "optimizer", "rng_state_1").code == 0
    assert changed(run, before) == {OPTIMIZER, "random_states_1.pkl"}
    assert not [name for name in files_of(run) if name.startswith(OPTIMIZER)]
    assert {line.split(".")[0] for line in ckpt("ls", "-a", run).lines} == {"model", "scheduler", "rng_state_0"}


def test_cast_new_entries_and_other_values_go_to_the_folder_that_has_them(run: Path, ckpt: Ckpt) -> None:
    old, before = both(run), files_of(run)
    assert ckpt("cast", run, "bfloat16", "--lossy").code == 0
    assert changed(run, before) == {MODEL}
    assert ckpt("set", run, "--new", "optimizer.more=3", "model.new=[1,2]", "--dtype", "int8").code == 0
    found = both(run)
    assert torch.equal(found["model.0.bias"], old["model.0.bias"].bfloat16())
    assert (found["optimizer.more"].item(), found["model.new"].tolist()) == (3, [1, 2])


def test_a_backup_of_an_edit_of_several_folders_is_refused_before_anything_changes(run: Path, ckpt: Ckpt) -> None:
    before = files_of(run)
    for edit in (
        ("rename", run, "model.0.weight", "model.w"),
        ("set", run, "model.0.bias=1", "scheduler.last_epoch=4"),
    ):
        answer = ckpt(*edit, "--backup")
        assert (answer.code, "several folders" in answer.err) == (2, True)
        assert not changed(run, before)


def test_a_name_of_the_other_folder_is_refused(run: Path, ckpt: Ckpt) -> None:
    before = files_of(run)
    answer = ckpt("rename", run, "model.0.bias", "optimizer.bias")
    assert (answer.code, "cannot be called" in answer.err) == (2, True)
    assert not changed(run, before)


def test_an_adapter_in_a_folder_of_its_own_is_edited_in_the_run(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "run"
    (path / "style").mkdir(parents=True)
    torch.save({"lora.weight": torch.ones(2)}, path / "style" / "adapter_model.bin")
    (path / "style" / "adapter_config.json").write_text("{}")
    torch.save({"w": torch.ones(2)}, path / "pytorch_model.bin")
    torch.save({"last_epoch": 3}, path / "scheduler.pt")
    torch.save({"x": 1}, path / "rng_state.pth")
    assert ckpt("rename", path, "style.lora.weight", "style.lora.w", "-o", tmp_path / "out").code == 0
    assert ckpt("rename", path, "--sub", r"weight$", "w").code == 0
    for folder in (path, tmp_path / "out"):
        assert torch.load(folder / "style" / "adapter_model.bin")["lora.w"].tolist() == [1, 1]


# --- the files of ranks


def test_other_files_of_a_run_with_ranks_are_edited(ranks: Path, ckpt: Ckpt) -> None:
    before = files_of(ranks)
    values = ("trainer_state.global_step=8", "scheduler.last_epoch=5", "rng_state_0.x[1]=4", "training_args.lr=0.5")
    assert ckpt("set", ranks, *values).code == 0
    assert changed(ranks, before) == {"trainer_state.json", "scheduler.pt", "rng_state_0.pth", "training_args.bin"}
    assert torch.load(ranks / "rng_state_0.pth")["x"].tolist() == [1, 4, 1]
    assert ckpt("rename", ranks, "scheduler.last_epoch", "scheduler.epoch").code == 0
    assert torch.load(ranks / "scheduler.pt") == {"epoch": 5}
    assert ckpt("cast", ranks, "float64", "rng_state_0.x").code == 0
    assert ckpt("to", ranks, "cuda:1").code == 0
    assert ckpt("rm", ranks, "training_args").code == 0
    assert not (ranks / "training_args.bin").exists()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (("set", "model.a[0,0]=1"), "model.a"),
        (("set", "scheduler.last_epoch=5", "optimizer.state.b.exp_avg=1"), "optimizer.state.b.exp_avg"),
        (("rm", "model.a"), "model.a"),
        (("rename", "model.b", "model.c"), "model.b"),
        (("cast", "bfloat16", "--lossy"), "model.a"),
        (("keep", "scheduler"), "model.a"),
        (("untie", "model.a"), ""),
        (("set", "--new", "model.c=1"), "model.c"),
    ],
)
def test_what_is_joined_from_ranks_is_refused_by_name(
    ranks: Path, ckpt: Ckpt, edit: tuple[str, ...], named: str
) -> None:
    before = files_of(ranks)
    answer = ckpt(edit[0], ranks, *edit[1:])
    assert answer.code == 2
    assert not named or f"{named!r} is joined from the files of several ranks" in answer.err
    assert not changed(ranks, before)


def test_an_output_of_a_run_with_ranks_is_the_run_with_the_edit(ranks: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    before = files_of(ranks)
    out = tmp_path / "out"
    assert ckpt("set", ranks, "trainer_state.global_step=8", "rng_state_0.x[0]=2", "-o", out).code == 0
    assert not changed(ranks, before)
    assert changed(out, before) == {"trainer_state.json", "rng_state_0.pth"}
    other = tmp_path / "other"
    assert ckpt("rename", ranks, "scheduler.last_epoch", "scheduler.e", "-o", other, "--weights-only").code == 0
    assert changed(other, before) == {"scheduler.pt", "zero_to_fp32.py"}
    assert ckpt("diff", ranks, other, "model", "optimizer").code == 0


# --- conversions of all


def test_all_of_a_run_with_ranks_becomes_one_file_or_a_distributed_checkpoint(
    ranks: Path, tmp_path: Path, ckpt: Ckpt
) -> None:
    assert ckpt("convert", ranks, tmp_path / "model.pt").code == 0
    assert ckpt("convert", ranks, tmp_path / "all.pt", "--all").code == 0
    assert ckpt("convert", ranks, tmp_path / "all", "--all", "--to", "dcp").code == 0
    model, one, other = torch.load(tmp_path / "model.pt"), torch.load(tmp_path / "all.pt"), read(tmp_path / "all")
    assert same(one["model"], model)
    assert one["optimizer"]["state"]["a"]["exp_avg"].shape == (3, 2)
    assert one["optimizer"]["param_groups"] == [{"lr": 0.5, "params": ["a", "b"]}]
    assert (one["scheduler"], one["training_args"]) == ({"last_epoch": 3}, {"lr": 0.1})
    assert one["trainer_state"] == {"global_step": 7}
    assert same(flat(other), flat(one))


def test_all_of_a_run_of_folders_becomes_one_file_or_a_distributed_checkpoint(
    run: Path, tmp_path: Path, ckpt: Ckpt
) -> None:
    old = both(run)
    assert ckpt("convert", run, tmp_path / "all.pt", "--all").code == 0
    assert ckpt("convert", run, tmp_path / "all", "--all", "--to", "dcp").code == 0
    one, other = torch.load(tmp_path / "all.pt", weights_only=False), read(tmp_path / "all", weights_only=False)
    found, other = flat({key: one[key] for key in ("model", "optimizer")}), flat(other)
    assert found.keys() == old.keys()
    assert same({name: other[name] for name in old}, found)
    assert same(found, old)
    assert one["scheduler"] == torch.load(run / "scheduler.bin")
    assert other["scheduler.last_epoch"] == one["scheduler"]["last_epoch"]
    random = one["rng_state_0"]["torch_manual_seed"]
    assert torch.equal(random, torch.load(run / "random_states_0.pkl", weights_only=False)["torch_manual_seed"])


@pytest.mark.parametrize("kind", ["run", "ranks", "bin"])
def test_a_dtype_of_all_of_a_run_is_that_of_the_model(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, ckpt: Ckpt
) -> None:
    path = run_folder(tmp_path / "c", "bin") if kind == "bin" else request.getfixturevalue(kind)
    assert ckpt("convert", path, tmp_path / "model.pt", "--dtype", "bfloat16", "--lossy").code == 0
    for options in ((), ("--to", "dcp")):
        out = tmp_path / ("all" if options else "all.pt")
        assert ckpt("convert", path, out, "--all", "--dtype", "bfloat16", "--lossy", *options).code == 0
        found = read(out, weights_only=False) if options else torch.load(out, weights_only=False)
        assert same(found["model"], torch.load(tmp_path / "model.pt"))
        states = flat(found["optimizer"]["state"])
        assert {value.dtype for value in states.values() if isinstance(value, torch.Tensor)} == {torch.float32}
