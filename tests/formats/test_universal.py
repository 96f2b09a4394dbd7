"""Universal checkpoints of DeepSpeed open as the model: a file for each parameter and for each of its states."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_zero import refused, require_equal, shapes, values_of
from zero_folders import numbered

from ckpt_cli.errors import CkptError, FormatError, MalformedError, RanksError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Tensor, Value

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.mark.parametrize("number", [1, 3])
def test_what_deepspeed_made_universal_is_the_model_that_it_was_made_of(number: int) -> None:
    found = values_of(SAMPLES / f"universal{number}")
    require_equal(found, load_file(SAMPLES / f"zero{number}.safetensors"))
    before = values_of(SAMPLES / f"zero{number}")
    assert list(found) == list(before)
    for name, tensor in before.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("number", [1, 3])
def test_states_stand_beside_the_names_of_their_parameters(number: int) -> None:
    found = values_of(SAMPLES / f"universal{number}", "optimizer.state.")
    before = values_of(SAMPLES / f"zero{number}", "optimizer.state.")
    assert found.keys() == before.keys()
    require_equal(found, before)
    checkpoint = open_checkpoint(str(SAMPLES / f"universal{number}"))
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert (values["optimizer.param_groups.0.lr"], values["global_steps"], values["epoch"]) == (0.01, 2, 1)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    assert tensors["model.head.weight"].view == tensors["model.emb.weight"].view
    assert checkpoint.version == (
        "DeepSpeed, universal checkpoint, tag global_step2_universal; weights: float32 master copies, frozen ones as "
        "they are (bfloat16)"
    )
    checkpoint.close()


def test_it_is_found_by_its_tag_and_beside_the_files_that_it_was_made_of(tmp_path: Path) -> None:
    inner = open_checkpoint(str(SAMPLES / "universal1" / "global_step2_universal"))
    outer = open_checkpoint(str(SAMPLES / "universal1"))
    assert [entry.name for entry in inner.entries] == [entry.name for entry in outer.entries]
    shutil.copytree(SAMPLES / "universal1", tmp_path / "run")
    shutil.copytree(SAMPLES / "zero1", tmp_path / "run", dirs_exist_ok=True)
    assert open_checkpoint(str(tmp_path / "run")).version.startswith("DeepSpeed ZeRO stage 1")
    files = open_checkpoint(str(SAMPLES / "universal1"), files=True)
    names = [tensor.name for tensor in files.tensors]
    assert "zero/l1.weight/fp32.param" in names
    assert "mp_rank_00_model_states.module.l1.weight" in names


def universal(
    path: Path, stage: int, groups: list[dict[str, torch.Tensor]], *, module: Mapping[str, Any] | None = None
) -> Path:
    """Write what ds_to_universal.py does."""
    folder = path / "step_universal"
    folder.mkdir(parents=True)
    trained = {name: tensor for group in groups for name, tensor in group.items()}
    model = {
        "module": module or {name: torch.empty(0) for name in trained},
        "buffer_names": [],
        "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
    }
    torch.save(model, folder / ("zero_pp_rank_0_" * (stage == 3) + "mp_rank_00_model_states.pt"))
    for name, tensor in trained.items():
        (folder / "zero" / name).mkdir(parents=True)
        for key, values in (("fp32", tensor), ("exp_avg", tensor * 2)):
            saved = values.flatten() if stage == 3 else {"param": values, "cat_dim": 0}
            torch.save(saved, folder / "zero" / name / f"{key}.pt")
    (folder / "zero").mkdir(exist_ok=True)
    torch.save({"param_groups": [{"lr": 0.5}]}, folder / "zero" / "optimizer_state.pt")
    return folder


@settings(deadline=None, max_examples=15)
@given(stage=st.sampled_from([2, 3]), one=shapes, two=shapes)
def test_any_shapes_are_read(stage: int, one: list[tuple[int, ...]], two: list[tuple[int, ...]]) -> None:
    groups = [numbered(one, "a"), numbered(two, "b")]
    trained = {**groups[0], **groups[1]}
    with TemporaryDirectory() as folder:
        path = universal(Path(folder), stage, groups)
        found = values_of(path)
        assert list(found) == list(trained)
        require_equal(found, trained)
        states = values_of(path, "optimizer.state.")
        require_equal(states, {f"{name}.exp_avg": tensor * 2 for name, tensor in trained.items()})


def test_experts_that_were_put_together_have_no_other_place_and_are_entries_too(tmp_path: Path) -> None:
    path = universal(tmp_path, 2, [numbered([(2, 3)])])
    (path / "zero" / "experts.w1").mkdir()
    torch.save({"param": torch.ones(4, 2, 2), "is_expert_param": True}, path / "zero" / "experts.w1" / "fp32.pt")
    assert values_of(path)["experts.w1"].shape == (4, 2, 2)


def test_tensor_parallel_ranks_were_put_together_but_what_is_not_trained_was_not(tmp_path: Path) -> None:
    path = universal(tmp_path, 2, [numbered([(4, 3)])])
    saved = torch.load(path / "mp_rank_00_model_states.pt")
    saved["param_shapes"] = [{"p0": (2, 3)}]
    for rank in range(2):
        torch.save(saved, path / f"mp_rank_{rank:02}_model_states.pt")
    require_equal(values_of(path), numbered([(4, 3)]))
    saved["module"]["frozen"] = torch.ones(2)
    torch.save(saved, path / "mp_rank_00_model_states.pt")
    refused(path, UnsupportedError, "tensor parallel")


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = universal(tmp_path, 3, [numbered([(2, 3)])])
    (path / "zero" / "p0" / "fp32.pt").unlink()
    refused(path, RanksError, "zero/p0/fp32.pt is missing")
    assert open_checkpoint(str(path), files=True).format == "deepspeed"
    other = universal(tmp_path / "two", 3, [numbered([(2, 3)])])
    (other / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    (tmp_path / "two" / "latest_universal").write_text(other.name)
    with pytest.raises(RanksError, match="model states are missing"):
        open_checkpoint(str(tmp_path / "two"))


@pytest.mark.parametrize(
    "saved", [torch.ones(5), torch.ones(2, 2), {}, {"param": 7}, 7, None, [torch.ones(6)], torch.ones(6).to_sparse()]
)
def test_files_of_something_else_are_refused(tmp_path: Path, saved: Any) -> None:
    path = universal(tmp_path, 3, [numbered([(2, 3)])])
    torch.save(saved, path / "zero" / "p0" / "fp32.pt")
    with pytest.raises(FormatError) as error:
        open_checkpoint(str(path))
    assert "\n" not in error.value.problem
    assert str(error.value.path).endswith("fp32.pt")


def test_a_state_of_another_shape_is_listed_as_what_it_is(tmp_path: Path) -> None:
    path = universal(tmp_path, 2, [numbered([(2, 3)])])
    torch.save({"param": torch.ones(2, 1)}, path / "zero" / "p0" / "row_var.pt")
    torch.save(12, path / "zero" / "p0" / "step.pt")
    checkpoint = open_checkpoint(str(path))
    entries = {entry.name: entry for entry in checkpoint.entries}
    state, step = entries["optimizer.state.p0.row_var"], entries["optimizer.state.p0.step"]
    assert isinstance(state, Tensor)
    assert state.shape == (2, 1)
    assert isinstance(step, Value)
    assert step.value == 12
    checkpoint.close()


def test_more_files_than_a_set_may_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = universal(tmp_path, 2, [numbered([(1,), (2,)])])
    monkeypatch.setattr("ckpt_cli.limits.SHARDS", 4)
    for files in (False, True):
        with pytest.raises(CkptError, match="files"):
            open_checkpoint(str(path), files=files)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = universal(tmp_path, 2, [numbered([(1,)])])
    (path / "zero" / "p0" / "exp_avg.pt").write_bytes(b"PK\3\4")
    with pytest.raises(CkptError) as error:
        open_checkpoint(str(path))
    assert str(error.value.path).endswith("exp_avg.pt")
    assert not isinstance(error.value, MalformedError) or error.value.problem
