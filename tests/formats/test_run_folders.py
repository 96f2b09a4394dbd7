"""Folders of training runs as one checkpoint: which are recognized, what their entries are called, and values."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from run_folders import MODELS, STATE, model_of, run_folder, trained
from safetensors.torch import save_file
from zero_folders import zero_folder

import ckpt_cli
from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.errors import UsageError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.runs.names import is_of_run
from ckpt_cli.formats.runs.read import RunFiles
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value

SAMPLES = Path(__file__).parents[1] / "samples"

TRAINER = {"model.safetensors": "model", "optimizer.pt": "optimizer", "scheduler.pt": "scheduler",
           "rng_state.pth": "rng_state", "training_args.bin": "training_args"}  # fmt: skip
ACCELERATE = {"model.safetensors": "model", "optimizer.bin": "optimizer", "scheduler.bin": "scheduler",
              "random_states_0.pkl": "rng_state_0", "custom_checkpoint_0.pkl": "custom_checkpoint_0"}  # fmt: skip
SAMPLE_RUNS: dict[str, dict[str, str]] = {
    "trainer/checkpoint-2": TRAINER,
    "trainer/checkpoint-4": TRAINER,
    "trainer_lora/checkpoint-2": {"adapter_model.safetensors": "model", **dict(list(TRAINER.items())[1:])},
    "accelerate": ACCELERATE,
}
"""The files of each sample that are checkpoints, and what their entries begin with."""


def facts(checkpoint: Checkpoint, entry: Entry) -> Any:
    """What an entry is: the values of a tensor, or the value."""
    if isinstance(entry, Value):
        return repr(entry.value)
    return (entry.dtype.name, entry.shape, values_of(checkpoint, entry).tolist())


def entries_of(path: Path) -> dict[str, Any]:
    """Every entry of a checkpoint."""
    with closing(open_checkpoint(str(path))) as checkpoint:
        return {entry.name: facts(checkpoint, entry) for entry in checkpoint.entries}


def names_of(path: Path) -> set[str]:
    """The outermost keys of the names."""
    with closing(open_checkpoint(str(path))) as checkpoint:
        assert {entry.name.partition(".")[0] for entry in checkpoint.entries} == set(checkpoint.top_level)
        return set(checkpoint.top_level)


@pytest.mark.parametrize("name", SAMPLE_RUNS)
def test_a_run_has_what_its_files_have_alone_and_nothing_else(name: str) -> None:
    found = entries_of(SAMPLES / name)
    alone: dict[str, Any] = {}
    for file, prefix in SAMPLE_RUNS[name].items():
        alone |= {f"{prefix}.{entry}": value for entry, value in entries_of(SAMPLES / name / file).items()}
    rest = {entry: value for entry, value in found.items() if not entry.startswith("trainer_state.")}
    assert rest == alone
    if name.startswith("trainer"):
        state = json.loads((SAMPLES / name / "trainer_state.json").read_text())
        assert found["trainer_state.global_step"] == repr(state["global_step"])
        assert found["trainer_state.log_history.1.loss"] == repr(state["log_history"][1]["loss"])
        assert len(found) - len(rest) == len(list(leaves(state)))


def leaves(data: Any) -> Any:
    """The scalars in JSON data."""
    if isinstance(data, dict | list) and data:
        for item in data.values() if isinstance(data, dict) else data:
            yield from leaves(item)
    else:
        yield data


@pytest.mark.parametrize("model", MODELS)
def test_ls_lists_the_model_and_all_of_it_the_rest(model: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = run_folder(tmp_path / "checkpoint-7", model, ranks=2)
    wanted = {f"model.{name}" for name in trained()[0].state_dict()}
    assert {line.split("\t")[0] for line in ckpt("ls", path).lines} == wanted
    parts = {"model", "optimizer", "scheduler", "rng_state_0", "rng_state_1", "trainer_state", "training_args"}
    assert {line.partition(".")[0] for line in ckpt("ls", "-a", path).lines} == parts
    assert names_of(path) == parts


def test_the_state_of_a_trainer_is_values(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    with closing(open_checkpoint(str(path))) as checkpoint:
        values = {e.name: e.value for e in checkpoint.entries if isinstance(e, Value)}
    assert values["trainer_state.epoch"] == 1.5
    assert values["trainer_state.best_metric"] is None
    assert values["trainer_state.sizes"] == STATE["sizes"]
    assert values["trainer_state.log_history.1.loss"] == 0.25


def test_the_parts_are_the_checkpoints_that_they_are_alone(tmp_path: Path) -> None:
    """For those who need the document of the optimizer, or the model without the beginning of its names."""
    with closing(open_checkpoint(str(run_folder(tmp_path / "run", "shards")))) as checkpoint:
        container = checkpoint.container
        assert isinstance(container, RunFiles)
        optimizer, model = container.part("optimizer"), container.part("model")
        assert container.part("nothing") is None
        assert optimizer is not None
        assert model is not None
        assert optimizer.document is not None
        assert optimizer.entries[0].name == "state.0.step"
        assert model.format == "shards"
        assert [f"model.{entry.name}" for entry in model.entries] == [entry.name for entry in checkpoint.own]
        for tensor in checkpoint.tensors:
            assert tensor.storage is not None
            part, storage = container.owner_of(tensor.storage)
            own = next(entry for entry in part.checkpoint.entries if part.outer(entry.name) == tensor.name)
            assert isinstance(own, Tensor)
            assert own.storage is storage


def test_a_file_of_a_run_still_opens_by_its_own_name(tmp_path: Path, ckpt: Ckpt) -> None:
    path = run_folder(tmp_path / "run")
    assert ckpt("ls", path / "optimizer.pt").lines[0].startswith("state.0.step\t")
    assert {line.split("\t")[0] for line in ckpt("ls", path / "model.safetensors").lines} == set(model_of(path))


def test_files_shows_the_files_as_they_are(tmp_path: Path, ckpt: Ckpt) -> None:
    path = run_folder(tmp_path / "run", "shards")
    names = [line.split("\t")[0] for line in ckpt("ls", "--files", path).lines]
    assert "model-00001-of-00002.0.weight" in names
    assert "optimizer.state.0.exp_avg" in names
    assert ckpt("set", path, "model.0.bias=1").code == 0


def test_a_model_that_was_saved_twice_is_there_twice(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    torch.save(trained()[0].state_dict(), path / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, path / "pytorch_model_1.bin")
    (path / "default").mkdir()
    (path / "default" / "adapter_config.json").write_text("{}")
    save_file({"lora": torch.ones(1)}, path / "default" / "adapter_model.safetensors")
    found = entries_of(path)
    assert found["model.0.bias"] == found["pytorch_model.0.bias"]
    assert found["model_1.x"] == found["default.lora"]


def test_what_is_no_checkpoint_beside_them_is_noted(tmp_path: Path, ckpt: Ckpt) -> None:
    path = run_folder(tmp_path / "run")
    (path / "tokenizer.bin").write_bytes(b"no checkpoint at all")
    answer = ckpt("ls", path)
    assert answer.code == 0
    assert "not opened with it: tokenizer.bin" in answer.err


def test_tied_names_of_a_model_are_tied_in_a_run_and_never_across_files(tmp_path: Path, ckpt: Ckpt) -> None:
    path = run_folder(tmp_path / "run", "bin")
    shared = torch.ones(3)
    torch.save({"a": shared, "b": shared}, path / "pytorch_model.bin")
    assert [line.split("\t")[1] for line in ckpt("ties", path).lines] == ["model.a,model.b"]


# --- recognition


def test_the_folders_of_runs_are_told_by_their_names() -> None:
    model = "model.safetensors"
    yes = (
        [model, "rng_state.pth"], [model, "rng_state_0.pth"], [model, "random_states_0.pkl"], [model, "scaler.pt",
        "optimizer.bin"], [model, "optimizer.pt", "trainer_state.json"], ["adapter_model.bin", "scheduler.pt",
        "training_args.bin"], [".metadata", "__0_0.distcp", "meta.pt"],
    )  # fmt: skip
    no = (
        [model], [model, "optimizer.pt"], [model, "trainer_state.json"], [model, "training_args.bin"], [".metadata"],
        ["a.pt", "b.pt"], ["random_states_0.pkl"], [".metadata", "__0_0.distcp"], [],
    )  # fmt: skip
    assert all(is_of_run(".", names) for names in yes)
    assert not any(is_of_run(".", names) for names in no)


def test_other_folders_of_several_files_still_ask_for_one(tmp_path: Path) -> None:
    for name in ("a.pt", "optimizer.pt"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UsageError, match="a folder of 2 checkpoints"):
        open_checkpoint(str(tmp_path))


# --- what is put together of several files


def test_files_of_ranks_are_the_model_of_a_run(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "checkpoint-3"
    zero_folder(path, 3, 2, [{"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(())}])
    for name in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({"x": torch.ones(2)}, path / name)
    (path / "trainer_state.json").write_text('{"global_step": 3}')
    found = entries_of(path)
    assert found["model.w"] == ("float32", (2, 3), [[0, 1, 2], [3, 4, 5]])
    assert found["rng_state_1.x"] == ("float32", (2,), [1, 1])
    assert found["trainer_state.global_step"] == "3"
    assert ckpt("convert", path, tmp_path / "o.safetensors").code == 0
    answer = ckpt("set", path, "model.v=2")
    assert (answer.code, answer.err.count("\n")) == (2, 2)


def test_a_distributed_checkpoint_with_lightnings_meta_is_one_run(tmp_path: Path, ckpt: Ckpt) -> None:
    from dcp_formats import save

    path = tmp_path / "step.ckpt"
    save({"model.w": torch.arange(4.0), "optimizer_0.state.w.exp_avg": torch.zeros(4)}, path)
    torch.save({"epoch": 2, "global_step": 5, "loops": {}}, path / "meta.pt")
    found = entries_of(path)
    assert found["model.w"] == ("float32", (4,), [0, 1, 2, 3])
    assert found["meta.global_step"] == "5"
    assert json.loads(ckpt("info", path, "--json").out)["training"]["global_step"] == 5
    assert ckpt("set", path, "model.w[0]=9").code == 0
    assert entries_of(path)["model.w"][2] == [9, 1, 2, 3]
    assert ckpt("convert", path, tmp_path / "o.pt").code == 0
    assert torch.load(tmp_path / "o.pt")["w"].tolist() == [9, 1, 2, 3]
    assert ckpt("cast", path, "bfloat16", "model").code == 0
    assert ckpt("rename", path, "--sub", r"(w|epoch)$", r"\1x").code == 0
    found = entries_of(path)
    assert found["model.wx"] == ("bfloat16", (4,), [9, 1, 2, 3])
    assert found["meta.epochx"] == "2"
    assert ckpt("compact", path).code == 0
    assert ckpt("rm", path, "optimizer_0").code == 0
    assert ckpt("check", "--deep", path).code == 0
    assert entries_of(path)["model.wx"] == ("bfloat16", (4,), [9, 1, 2, 3])


def test_distributed_checkpoints_in_folders_of_accelerate_are_parts(tmp_path: Path, ckpt: Ckpt) -> None:
    from dcp_formats import save

    save({"model.w": torch.ones(4)}, tmp_path / "pytorch_model_fsdp_0")
    save({"optimizer.state.w.exp_avg": torch.zeros(4)}, tmp_path / "optimizer_0")
    torch.save({"x": 1}, tmp_path / "random_states_0.pkl")
    assert set(entries_of(tmp_path)) == {"model.w", "optimizer.state.w.exp_avg", "rng_state_0.x"}
    assert ckpt("set", tmp_path, "model.w[0]=9").code == 0
    assert entries_of(tmp_path)["model.w"][2] == [9, 1, 1, 1]


def test_what_accelerate_sharded_is_the_full_state_that_it_saves_otherwise() -> None:
    full = Path(__file__).parents[1] / "samples" / "accelerate_full"
    model, optimizer = torch.load(full / "pytorch_model_fsdp.bin"), torch.load(full / "optimizer.bin")
    for folder in (full, full.with_name("accelerate_sharded")):
        with ckpt_cli.open(folder) as checkpoint:
            assert {name for name in checkpoint if name.startswith("model.")} == {f"model.{name}" for name in model}
            assert all(torch.equal(checkpoint[f"model.{name}"].torch(), tensor) for name, tensor in model.items())
            for name, states in optimizer["state"].items():
                read = {key: checkpoint[f"optimizer.state.{name}.{key}"].torch() for key in states}
                assert all(torch.equal(read[key], value) for key, value in states.items())
            assert {row["how"] for row in checkpoint.optimizer().rows()} == {"named"}


# --- folders of checkpoints


def test_info_of_a_folder_of_checkpoints_has_a_row_each_by_step(tmp_path: Path, ckpt: Ckpt) -> None:
    for step in (1000, 500):
        run_folder(tmp_path / f"checkpoint-{step}", step=step)
    rows = [line.split("\t") for line in ckpt("info", tmp_path).lines]
    assert [(row[0], row[1], row[-3]) for row in rows] == [("run", "26", "500"), ("run", "26", "1000")]
    assert [each["training"]["global_step"] for each in json.loads(ckpt("info", tmp_path, "--json").out)] == [500, 1000]
    answer = ckpt("ls", tmp_path)
    assert answer.code == 2
    assert "a folder of 2 checkpoints of a run: checkpoint-500, checkpoint-1000" in answer.err
    assert {line.split("\t")[1] for line in ckpt("series", tmp_path, "model").lines} == {"500", "1000"}


def test_a_folder_that_is_a_model_itself_is_not_a_list(tmp_path: Path, ckpt: Ckpt) -> None:
    shutil.copytree(run_folder(tmp_path / "r"), tmp_path / "out" / "checkpoint-7")
    save_file({"a": torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    assert json.loads(ckpt("info", tmp_path / "out", "--json").out)["format"] == "safetensors"
