"""DeepSpeed's and Megatron's folders: which files they are, and those listed as what they are."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from set_elements import edit

from ckpt_cli.errors import MalformedError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Value


class ZeroStageEnum(IntEnum):
    """What DeepSpeed writes the stage as."""

    weights = 3


def deepspeed(path: Path, stage: Any, groups: str, ranks: int = 2, tag: str = "global_step10") -> Path:
    """The folder that save_checkpoint leaves."""
    folder = path / tag
    folder.mkdir(parents=True)
    (path / "latest").write_text(tag)
    (path / "zero_to_fp32.py").write_text("")
    shapes = [{"fc.weight": torch.Size([4, 3]), "fc.bias": torch.Size([3])}]
    model = {
        "module": {"fc.weight": torch.zeros(4, 3, dtype=torch.bfloat16)},
        "param_shapes": shapes,
        "ds_version": "0",
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        state = {"zero_stage": stage, groups: [torch.full((8,), float(rank))], "partition_count": ranks}
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


@pytest.mark.parametrize(
    ("stage", "groups", "said"),
    [
        (1, "single_partition_of_fp32_groups", "stage 1"),
        (2, "single_partition_of_fp32_groups", "stage 2"),
        (ZeroStageEnum.weights, "fp32_flat_groups", "stage 3"),
        (None, "fp32_flat_groups", "stage 3"),
        (None, "single_partition_of_fp32_groups", "stage 1"),
    ],
)
def test_a_folder_says_which_stage_how_many_ranks_and_which_tag(
    tmp_path: Path, stage: Any, groups: str, said: str
) -> None:
    checkpoint = open_checkpoint(str(deepspeed(tmp_path / "d", stage, groups)))
    assert checkpoint.format == "deepspeed"
    assert checkpoint.version.startswith(f"DeepSpeed ZeRO {said}, 2 ranks, tag global_step10; weights: float32")
    assert not checkpoint.notes
    files = open_checkpoint(str(tmp_path / "d"), files=True)
    assert files.version.startswith(f"DeepSpeed ZeRO {said}")
    assert files.version.endswith(", 2 ranks, tag global_step10")
    assert list(files.notes) == ["its files are listed as they are"]


def test_entries_are_those_of_the_files_below_the_files_names(tmp_path: Path) -> None:
    path = deepspeed(tmp_path / "d", 2, "single_partition_of_fp32_groups")
    checkpoint = open_checkpoint(str(path), files=True)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    assert list(tensors) == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.optimizer_state_dict.single_partition_of_fp32_groups.0",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.optimizer_state_dict.single_partition_of_fp32_groups.0",
        "mp_rank_00_model_states.module.fc.weight",
    ]
    names = {entry.name for entry in checkpoint.entries if isinstance(entry, Value)}
    assert "mp_rank_00_model_states.param_shapes.0.fc.weight" in names
    (_, second, _) = tensors.values()
    assert second.storage is not None
    assert bytes(second.storage.view(0, 4)) == b"\0\0\x80?"
    inner = open_checkpoint(str(path / "global_step10"), files=True)
    assert [entry.name for entry in inner.entries] == [entry.name for entry in checkpoint.entries]
    assert inner.version == checkpoint.version


def test_a_model_beside_a_latest_that_names_no_files_of_ranks_is_the_checkpoint(tmp_path: Path) -> None:
    path = deepspeed(tmp_path / "d", 2, "single_partition_of_fp32_groups")
    torch.save({"w": torch.ones(2)}, path / "pytorch_model.bin")
    assert "model.fc.weight" in open_checkpoint(str(path)).names
    for said in ("gone", "", "empty"):
        (path / "empty").mkdir(exist_ok=True)
        (path / "latest").write_text(said)
        assert [entry.name for entry in open_checkpoint(str(path)).entries] == ["w"]


@pytest.mark.parametrize("said", ["", "../x", "..", "gone", "a\0b", "/etc"])
def test_a_latest_that_names_no_folder_is_refused(tmp_path: Path, said: str) -> None:
    path = deepspeed(tmp_path / "d", 2, "single_partition_of_fp32_groups")
    (path / "latest").write_text(said)
    with pytest.raises(MalformedError) as refused:
        open_checkpoint(str(path))
    assert refused.value.path == str(path / "latest")


def test_a_tag_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").write_text("empty")
    with pytest.raises(MalformedError, match="without a file of a rank"):
        open_checkpoint(str(tmp_path))


def test_megatrons_ranks_are_listed_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("25\n")
    for rank in range(2):
        folder = tmp_path / "iter_0000025" / f"mp_rank_{rank:02}"
        folder.mkdir(parents=True)
        torch.save({"model": {"w": torch.ones(2)}, "iteration": 25}, folder / "model_optim_rng.pt")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.version == "Megatron-LM, 2 model-parallel ranks, iter_0000025"
    assert [tensor.name for tensor in checkpoint.tensors] == [
        "mp_rank_00/model_optim_rng.model.w",
        "mp_rank_01/model_optim_rng.model.w",
    ]


def test_megatrons_ranks_are_not_written_to_one_folder(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / "d" / f"mp_rank_{rank:02}").mkdir(parents=True)
        torch.save({"w": torch.ones(2)}, tmp_path / "d" / f"mp_rank_{rank:02}" / "model_optim_rng.pt")
    with pytest.raises(UnsupportedError, match="same names in several folders"):
        edit(tmp_path / "d", "mp_rank_01/model_optim_rng.w=4", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edit(tmp_path / "d", "mp_rank_01/model_optim_rng.w=4")
    assert torch.load(tmp_path / "d" / "mp_rank_01" / "model_optim_rng.pt")["w"].tolist() == [4, 4]


def test_a_joined_model_is_not_edited_but_a_ranks_file_is(tmp_path: Path) -> None:
    path = deepspeed(tmp_path / "d", 2, "single_partition_of_fp32_groups")
    file = path / "global_step10" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for output in (None, tmp_path / "out"):
        with pytest.raises(UnsupportedError, match="joined from the files of several ranks") as refused:
            edit(path, "model.fc.bias[0]=7", output=output)
        assert "ckpt convert" in (refused.value.hint or "")
    assert not (tmp_path / "out").exists()
    change = "optimizer_state_dict.single_partition_of_fp32_groups.0[3]=7"
    edit(file, change, output=tmp_path / "out.pt")
    edit(file, change)
    for edited in (file, tmp_path / "out.pt"):
        state = torch.load(edited, weights_only=False)["optimizer_state_dict"]
        assert state["single_partition_of_fp32_groups"][0].tolist() == [1, 1, 1, 7, 1, 1, 1, 1]
