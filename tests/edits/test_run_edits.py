"""Edits of the folders of training runs: each goes to the file that has the entry, and torch loads every file after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from run_folders import MODELS, STATE, model_of, run_folder, trained
from safetensors import safe_open
from safetensors.torch import save_file


@pytest.fixture(params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a run with one kind of model."""
    return run_folder(tmp_path / "checkpoint-7", request.param)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def changed(folder: Path, before: dict[str, bytes]) -> set[str]:
    """The names of the files that are others now, or are gone."""
    after = contents(folder)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def optimizer_of(folder: Path) -> Any:
    return torch.load(folder / "optimizer.pt")


def state_of(folder: Path) -> Any:
    return json.loads((folder / "trainer_state.json").read_text())


def refusal(answer: Any) -> str:
    """The problem in one line of an edit that was refused."""
    assert answer.code == 2
    assert answer.err.startswith("ckpt: ")
    assert all(line.startswith("hint: ") for line in answer.err.splitlines()[1:])
    return str(answer.err.splitlines()[0])


# --- values


def test_elements_of_several_files_are_set_by_one_edit(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    assert ckpt("set", run, "model.0.bias[1]=5", "optimizer.state.1.exp_avg=[1,2,3]").code == 0
    assert model_of(run)["0.bias"][1] == 5
    assert optimizer_of(run)["state"][1]["exp_avg"].tolist() == [1, 2, 3]
    assert len(changed(run, before)) == 2
    optimizer = trained()[1]
    optimizer.load_state_dict(optimizer_of(run))


def test_other_values_of_several_files_are_set_by_one_edit(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    values = ("optimizer.param_groups.0.lr=0.5", "scheduler.last_epoch=9", "trainer_state.global_step=8",
              "trainer_state.log_history.1.loss=0.125", "trainer_state.best_metric=1e-3")  # fmt: skip
    assert ckpt("set", run, *values).code == 0
    assert changed(run, before) == {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert optimizer_of(run)["param_groups"][0]["lr"] == 0.5
    assert torch.load(run / "scheduler.pt")["last_epoch"] == 9
    log = [STATE["log_history"][0], {"loss": 0.125, "step": 2}]  # type: ignore[index]
    assert state_of(run) == {**STATE, "global_step": 8, "best_metric": 1e-3, "log_history": log}


def test_elements_and_other_values_are_set_by_one_edit(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    values = ("model.0.bias[1]=5", "optimizer.state.1.exp_avg+=1", "trainer_state.epoch=2", "scheduler.last_epoch=9")
    moment = optimizer_of(run)["state"][1]["exp_avg"]
    assert ckpt("set", run, *values, "-o", tmp_path / "out").code == 0
    assert not changed(run, before)
    assert ckpt("set", run, *values).code == 0
    for folder in (run, tmp_path / "out"):
        assert model_of(folder)["0.bias"][1] == 5
        assert torch.equal(optimizer_of(folder)["state"][1]["exp_avg"], moment + 1)
        assert (state_of(folder)["epoch"], torch.load(folder / "scheduler.pt")["last_epoch"]) == (2, 9)


def test_elements_beside_a_file_that_is_written_again_are_set_with_it(run: Path, ckpt: Ckpt) -> None:
    longer = "x" * 9000
    assert ckpt("set", run, "model.0.bias[1]+=5", f"training_args.more={longer}", "--new", "--backup").code == 0
    assert model_of(run)["0.bias"][1] == trained()[0].state_dict()["0.bias"][1] + 5
    assert torch.load(run / "training_args.bin") == {"lr": 0.1, "more": longer}
    assert ckpt("undo", run).code == 0
    assert "more" not in torch.load(run / "training_args.bin")
    assert torch.equal(model_of(run)["0.bias"], trained()[0].state_dict()["0.bias"])


def test_elements_of_a_file_that_is_written_again_are_set_after_that(tmp_path: Path, ckpt: Ckpt) -> None:
    run = run_folder(tmp_path / "checkpoint-7")
    before, old = contents(run), model_of(run)
    values = ("model.0.bias+=1", "model.new=[1,2]", "--new", "--dtype", "float32")
    assert "set one after the other" in refusal(ckpt("set", run, *values))
    assert not changed(run, before)
    assert ckpt("set", run, *values, "-o", tmp_path / "out").code == 0
    found = model_of(tmp_path / "out")
    assert torch.equal(found["0.bias"], old["0.bias"] + 1)
    assert found["new"].tolist() == [1, 2]


def test_json_keeps_its_layout_and_what_is_not_named(run: Path, ckpt: Ckpt) -> None:
    text = (run / "trainer_state.json").read_text()
    assert ckpt("set", run, "trainer_state.epoch=2.5").code == 0
    assert (run / "trainer_state.json").read_text() == text.replace("1.5", "2.5")


def test_json_that_has_a_key_twice_is_not_written_again(run: Path, ckpt: Ckpt) -> None:
    (run / "trainer_state.json").write_text('{"a": 1, "a": 2, "epoch": 1}')
    assert "one key twice" in refusal(ckpt("set", run, "trainer_state.epoch=2"))


def test_new_entries_go_to_the_file_whose_names_they_have(run: Path, ckpt: Ckpt) -> None:
    assert ckpt("set", run, "--new", "model.new=[1,2]", "--dtype", "float32").code == 0
    assert model_of(run)["new"].tolist() == [1, 2]
    assert ckpt("set", run, "--new", "trainer_state.more.deep=3", "scheduler.more=4").code == 0
    assert state_of(run)["more"] == {"deep": 3}
    assert torch.load(run / "scheduler.pt")["more"] == 4
    assert "no file of the run" in refusal(ckpt("set", run, "--new", "nothing.x=3"))
    assert "tensors cannot be written" in refusal(ckpt("set", run, "--new", "trainer_state.x=3", "--dtype", "float32"))


# --- names


def test_names_change_in_all_files_that_have_them(run: Path, ckpt: Ckpt) -> None:
    names = list(model_of(run))
    before = contents(run)
    assert ckpt("rename", run, "--sub", r"\.(bias|exp_avg|epoch)$", r".other_\1").code == 0
    assert set(model_of(run)) == {name.replace(".bias", ".other_bias") for name in names}
    assert all("other_exp_avg" in state for state in optimizer_of(run)["state"].values())
    assert state_of(run)["other_epoch"] == 1.5
    assert not changed(run, before) & {"scheduler.pt", "rng_state.pth", "training_args.bin"}


@pytest.mark.parametrize(
    "edit",
    [
        ("model.0.bias", "optimizer.bias"),
        ("optimizer.state.0.step", "model.step"),
        ("trainer_state.epoch", "scheduler.epoch"),
        ("model.0.bias", "nothing.bias"),
        ("--strip", "model"),
        ("--add", "net"),
    ],
)
def test_a_name_that_another_file_would_have_is_refused_in_one_line(
    run: Path, ckpt: Ckpt, edit: tuple[str, ...]
) -> None:
    before = contents(run)
    problem = refusal(ckpt("rename", run, *edit))
    assert "cannot be called" in problem
    assert not changed(run, before)


def test_tensors_of_two_files_cannot_be_tied(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    problem = refusal(ckpt("tie", run, "model.0.bias", "optimizer.state.1.exp_avg", "--force"))
    assert "another file" in problem
    assert not changed(run, before)


# --- entries


def test_a_file_of_which_nothing_is_left_goes_and_undo_brings_it_back(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    answer = ckpt("rm", run, "optimizer", "scheduler", "model.0.bias", "--backup")
    assert answer.code == 0
    assert "optimizer.pt, scheduler.pt removed" in answer.err
    assert not (run / "optimizer.pt").exists()
    assert "0.bias" not in model_of(run)
    assert ckpt("undo", run).code == 0
    assert not changed(run, before)


def test_keep_of_the_model_leaves_its_files_and_undo_brings_back_the_others(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    names = set(model_of(run))
    assert ckpt("keep", run, "model", "--backup").code == 0
    assert {line.split("\t")[0] for line in ckpt("ls", run).lines} == names
    assert not list(run.glob("*.pt"))
    assert ckpt("undo", run).code == 0
    assert not changed(run, before)


def test_containers_in_json_go_with_all_that_is_in_them(run: Path, ckpt: Ckpt) -> None:
    assert ckpt("rm", run, "trainer_state.log_history.0", "trainer_state.epoch").code == 0
    assert state_of(run)["log_history"] == [{"loss": 0.25, "step": 2}]
    assert "epoch" not in state_of(run)
    assert ckpt("rm", run, "trainer_state.log_history").code == 0
    assert set(state_of(run)) == STATE.keys() - {"epoch", "log_history"}


def test_cast_without_names_casts_the_model(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    assert ckpt("cast", run, "bfloat16", "--lossy").code == 0
    assert {tensor.dtype for tensor in model_of(run).values()} == {torch.bfloat16}
    assert all("model" in name for name in changed(run, before))
    assert ckpt("cast", run, "float64", "optimizer.state.*.exp_avg").code == 0
    assert optimizer_of(run)["state"][0]["exp_avg"].dtype == torch.float64
    assert optimizer_of(run)["state"][0]["step"].dtype == torch.float32


def test_ties_and_unused_bytes_are_edited_within_one_file(tmp_path: Path, ckpt: Ckpt) -> None:
    run = run_folder(tmp_path / "run", "bin")
    wide = torch.arange(1000.0)[:3]
    torch.save({"a": wide, "b": wide, "c": torch.ones(3)}, run / "pytorch_model.bin")
    size = (run / "pytorch_model.bin").stat().st_size
    assert ckpt("compact", run).code == 0
    assert (run / "pytorch_model.bin").stat().st_size < size
    assert ckpt("untie", run, "model.a").code == 0
    assert ckpt("tie", run, "model.a", "model.c", "--force").code == 0
    found = model_of(run)
    assert found["a"].data_ptr() == found["c"].data_ptr() != found["b"].data_ptr()


# --- metadata


def test_meta_is_that_of_the_model(tmp_path: Path, ckpt: Ckpt) -> None:
    single, shards = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", "shards")
    for run in (single, shards):
        assert ckpt("meta", run, "who=me").code == 0
        assert "who\tme" in ckpt("meta", run).out
        for file in run.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt", "who": "me"}
    assert "no metadata of strings" in refusal(ckpt("meta", run_folder(tmp_path / "c", "bin"), "a=b"))


def test_ties_in_metadata_survive_edits_of_a_run(tmp_path: Path, ckpt: Ckpt) -> None:
    run = run_folder(tmp_path / "run")
    save_file({"a": torch.ones(3)}, run / "model.safetensors", metadata={"format": "pt", "b": "a"})
    assert ckpt("meta", run, "x=y").code == 0
    assert ckpt("rename", run, "model.a", "model.c").code == 0
    with safe_open(run / "model.safetensors", "pt") as opened:
        found = opened.metadata()
    assert (found["b"], found["x"]) == ("c", "y")
    assert ckpt("ties", run).lines[0].split("\t")[1] in ("model.c,model.b", "model.b,model.c")


# --- elsewhere


def test_an_output_is_a_new_folder_with_all_files(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    for number, edit in enumerate((("set", "model.0.bias=1"), ("rename", "model.0.bias", "model.0.b"))):
        out = tmp_path / f"out{number}"
        assert ckpt(edit[0], run, *edit[1:], "-o", out).code == 0
        assert not changed(run, before)
        assert contents(out).keys() == before.keys()
        assert optimizer_of(out)["state"][0]["step"] == optimizer_of(run)["state"][0]["step"]
        assert ckpt("check", "--deep", out).code == 0


def test_convert_takes_the_weights_and_says_what_stayed_behind(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    out = tmp_path / "out.pt"
    answer = ckpt("convert", run, out)
    assert answer.code == 0
    assert "entries of the run left out, which --all takes" in answer.err
    found = torch.load(out)
    assert found.keys() == model_of(run).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model_of(run).items())
    assert ckpt("convert", run, tmp_path / "all.safetensors", "--all", "--tensors-only").code == 0
    assert any(
        line.startswith("optimizer.state.0.exp_avg\t") for line in ckpt("ls", tmp_path / "all.safetensors").lines
    )


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    answer = ckpt("rm", run, "optimizer", "-n")
    assert answer.code == 0
    assert "optimizer.pt would be removed" in answer.err
    assert not changed(run, before)


def test_devices_change_in_the_files_of_torch(run: Path, ckpt: Ckpt) -> None:
    before = contents(run)
    answer = ckpt("to", run, "cuda:1")
    assert answer.code == 0
    assert changed(run, before) == {name for name in before if name in ("optimizer.pt", "rng_state.pth")} | {
        name for name in before if name == "pytorch_model.bin"
    }
    assert ("model" in answer.err.splitlines()[0].split("moved ")[1]) == (run / "pytorch_model.bin").exists()
    assert ckpt("to", run, "cpu").code == 0
    assert optimizer_of(run)["state"][0]["step"] == 1


def test_rm_carries_the_state_of_a_parameter_to_the_optimizer_beside(tmp_path: Path, ckpt: Ckpt) -> None:
    run = run_folder(tmp_path / "run", "bin")
    assert "not known which states" in refusal(ckpt("rm", run_folder(tmp_path / "other"), "model.0.bias"))
    assert ckpt("rm", run, "model.0.bias", "--optimizer", "trust").code == 0
    left = [name for name in trained()[0].state_dict() if name != "0.bias"]
    assert list(model_of(run)) == left
    saved = optimizer_of(run)
    assert saved["param_groups"][0]["params"] == [0, 1, 2, 3, 4]
    full = trained()[1].state_dict()["state"]
    kept = [full[number] for number in (0, 2, 3, 4, 5)]
    assert all(torch.equal(saved["state"][at]["exp_avg"], state["exp_avg"]) for at, state in enumerate(kept))


def test_convert_all_makes_one_file_with_the_objects_of_all_files(run: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    out = tmp_path / "all.pt"
    assert ckpt("convert", run, out, "--all").code == 0
    found = torch.load(out, weights_only=False)
    assert list(found) == ["model", "optimizer", "scheduler", "rng_state", "trainer_state", "training_args"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in model_of(run).items())
    assert found["trainer_state"] == STATE
    assert found["scheduler"] == torch.load(run / "scheduler.pt")
    saved = optimizer_of(run)
    assert found["optimizer"]["param_groups"] == saved["param_groups"]
    assert found["optimizer"]["state"].keys() == saved["state"].keys()
    assert all(
        torch.equal(found["optimizer"]["state"][at]["exp_avg"], saved["state"][at]["exp_avg"]) for at in range(6)
    )


def test_convert_all_keeps_ties_within_files(tmp_path: Path, ckpt: Ckpt) -> None:
    run = run_folder(tmp_path / "run")
    save_file({"a": torch.ones(3)}, run / "model.safetensors", metadata={"format": "pt", "b": "a"})
    assert ckpt("convert", run, tmp_path / "all.pt", "--all").code == 0
    model = torch.load(tmp_path / "all.pt", weights_only=False)["model"]
    assert model["a"].data_ptr() == model["b"].data_ptr()
