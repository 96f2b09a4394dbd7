"""DeepSpeed's folders open as the model: ZeRO 1 to 3, put together from the files of all ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from zero_folders import change, model_name, numbered, optim_name, zero_folder

import ckpt_cli
from ckpt_cli.errors import CkptError, RanksError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.runs.read import run_parts
from ckpt_cli.model.checkpoint import Tensor, Value
from ckpt_cli.ops.check.run import check

SAMPLES = Path(__file__).parents[1] / "samples"


def values_of(path: Path, inside: str = "model.") -> dict[str, torch.Tensor]:
    """The tensors below a prefix, as a user reads them."""
    with ckpt_cli.open(path) as checkpoint:
        return {name.removeprefix(inside): checkpoint[name].torch() for name in checkpoint if name.startswith(inside)}


def require_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() >= wanted.keys()
    for name, tensor in wanted.items():
        same = found[name].to(tensor.dtype)
        assert same.shape == tensor.shape, name
        assert torch.equal(same, tensor), name


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_what_deepspeed_wrote_is_what_zero_to_fp32_makes_of_it(name: str) -> None:
    found = values_of(SAMPLES / name)
    wanted = load_file(SAMPLES / f"{name}.safetensors")
    require_equal(found, wanted)
    beyond = set(found) - set(wanted)  # which stage 1 does not list, and zero_to_fp32 forgets
    assert beyond == ({"frozen.weight", "frozen.bias"} if name == "zero1" else set())
    assert found["frozen.weight"].dtype == (torch.float32 if name == "zero2" else torch.bfloat16)
    assert found["l1.weight"].dtype == torch.float32
    assert found["mask"].dtype == torch.int64


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_tied_parameters_are_one_tensor_in_the_order_of_the_module(name: str) -> None:
    checkpoint = open_checkpoint(str(SAMPLES / name))
    model = [entry for entry in checkpoint.own if isinstance(entry, Tensor)]
    by_name = {tensor.name: tensor for tensor in model}
    assert by_name["model.head.weight"].view == by_name["model.emb.weight"].view
    assert "model.tmp" not in by_name
    module = torch.load(next((SAMPLES / name).glob("*/*model_states.pt")), weights_only=False)["module"]
    assert [tensor.name for tensor in model] == [f"model.{key}" for key in module]
    checkpoint.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zero1", "DeepSpeed ZeRO stage 1, 2 ranks, tag global_step2; weights: float32 master copies"),
        ("zero2", "DeepSpeed ZeRO stage 2, 3 ranks, tag global_step2; weights: float32 master copies"),
        ("zero3", "DeepSpeed ZeRO stage 3, 3 ranks, tag global_step2; weights: float32 master copies"),
    ],
)
def test_the_version_says_stage_ranks_tag_and_what_the_weights_are(name: str, said: str) -> None:
    checkpoint = open_checkpoint(str(SAMPLES / name))
    frozen = "bfloat16" if name != "zero2" else "float32"
    assert checkpoint.version == f"{said}, frozen ones as they are ({frozen})"
    checkpoint.close()


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_the_optimizers_states_stand_beside_the_names_of_their_parameters(name: str) -> None:
    found = values_of(SAMPLES / name, "optimizer.state.")
    trained = {"emb.weight", "l1.weight", "l1.bias", "norm.weight", "norm.bias", "l2.weight", "scale"}
    assert {key.rpartition(".")[0] for key in found} == trained
    shapes = {key: tensor.shape for key, tensor in values_of(SAMPLES / name).items()}
    for key in trained:
        assert found[f"{key}.exp_avg"].shape == found[f"{key}.exp_avg_sq"].shape == shapes[key]
    used = found["emb.weight.exp_avg_sq"].sum(1) > 0
    assert used.tolist() == [True] * 5


shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=6)


@settings(deadline=None, max_examples=40)
@given(stage=st.sampled_from([1, 2, 3]), world=st.integers(1, 8), one=shapes, two=shapes, gaps=st.integers(0, 3))
def test_any_shapes_are_put_together_as_they_were_cut(
    stage: int, world: int, one: list[tuple[int, ...]], two: list[tuple[int, ...]], gaps: int
) -> None:
    groups = [numbered(one, "a"), numbered(two, "b")]
    trained = {**groups[0], **groups[1]}
    frozen = {name: tensor.bfloat16() for name, tensor in numbered(two, "f").items()}
    with TemporaryDirectory() as folder:
        path = zero_folder(Path(folder) / "run", stage, world, groups, frozen=frozen, gaps=gaps if stage < 3 else 0)
        found = values_of(path)
        assert list(found) == [*trained, *frozen]
        require_equal(found, {**trained, **frozen})
        states = values_of(path, "optimizer.state.")
        require_equal(states, {f"{name}.exp_avg": tensor * 2 for name, tensor in trained.items()})
        checkpoint = open_checkpoint(str(path))
        for tensor in checkpoint.own:
            assert isinstance(tensor, Tensor)
            assert tensor.storage is not None
            whole = bytes(tensor.storage.view(0, tensor.nbytes))
            placed = b"".join(
                each.file.read(each.offset, each.nbytes) for each in tensor.storage.extents(0, tensor.nbytes)
            )
            assert placed == whole
            for begin in range(0, tensor.nbytes, 7):
                assert bytes(tensor.storage.view(begin, min(9, tensor.nbytes - begin))) == whole[begin : begin + 9]
        checkpoint.close()


def run(path: Path, stage: int = 2, world: int = 4, **more: Any) -> Path:
    return zero_folder(path / "run", stage, world, [numbered([(4, 3), (3,), ()])], **more)


def test_a_training_without_zero_has_its_model_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    saved = {"module": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 1}
    torch.save(saved, tmp_path / "step" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("step\n")
    checkpoint = open_checkpoint(str(tmp_path))
    assert [entry.name for entry in checkpoint.entries] == ["model.w", "optimizer.state.0.exp_avg", "epoch"]
    assert checkpoint.version == "DeepSpeed, 1 rank, tag step; weights as they are"
    checkpoint.close()


def test_another_tag_is_named_by_its_folder(tmp_path: Path) -> None:
    run(tmp_path)
    zero_folder(tmp_path / "other", 3, 2, [{"w": torch.full((3,), 5.0)}], tag="old")
    shutil.move(tmp_path / "other" / "old", tmp_path / "run" / "old")
    assert list(values_of(tmp_path / "run")) == ["p0", "p1", "p2"]
    assert values_of(tmp_path / "run" / "old")["w"].tolist() == [5, 5, 5]


def test_latest_wins_over_loose_files_beside_it_which_are_further_parts(tmp_path: Path) -> None:
    path = run(tmp_path)
    for name in ("scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({"x": 1}, path / name)
    save_file({"w": torch.ones(1)}, path / "model.safetensors")
    checkpoint = open_checkpoint(str(path))
    assert [tensor.name for tensor in checkpoint.own] == ["model.p0", "model.p1", "model.p2"]
    assert not checkpoint.notes
    parts = {"scheduler.x", "rng_state_0.x", "training_args.x", "model_safetensors.w"}
    assert parts <= checkpoint.names.keys()
    assert any(part.fixed for part in run_parts(checkpoint))
    checkpoint.close()


def test_files_of_before_torch_1_6_are_joined_too(tmp_path: Path) -> None:
    path = run(tmp_path, 3)
    for file in path.glob("*/*.pt"):
        saved = torch.load(file, weights_only=False)
        torch.save(saved, file, _use_new_zipfile_serialization=False)
    require_equal(values_of(path), numbered([(4, 3), (3,), ()]))


def test_client_state_and_settings_are_values(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(run(tmp_path)))
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert (values["epoch"], values["global_steps"], values["optimizer.param_groups.0.lr"]) == (3, 7, 0.5)
    checkpoint.close()


@pytest.mark.parametrize("name", ["zero2", "zero3", "universal3"])
def test_the_groups_of_the_optimizer_list_the_names_of_their_parameters(name: str) -> None:
    checkpoint = open_checkpoint(str(SAMPLES / name))
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    checkpoint.close()
    decayed, others = (values[f"optimizer.param_groups.{number}.params"] for number in range(2))
    assert (decayed, others) == (
        ["emb.weight", "l1.weight", "l2.weight"],
        ["scale", "l1.bias", "norm.weight", "norm.bias"],
    )
    assert values["optimizer.param_groups.0.weight_decay"] == 0.1


def test_groups_of_which_there_are_not_as_many_as_of_vectors_stay_as_they_are(tmp_path: Path) -> None:
    path = run(tmp_path, 3, 1)
    state = {"state": {0: {"step": 1}}, "param_groups": [{"params": [0]}, {"params": [1]}]}
    change(path / "global_step7" / optim_name(0), __optimizer_state_dict=state)
    checkpoint = open_checkpoint(str(path))
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert values["optimizer.param_groups.1.params"] == [1]
    checkpoint.close()


@pytest.mark.parametrize(("stage", "gone", "said"), [(2, [2], "rank 2 is"), (3, [0, 3], "ranks 0, 3 are")])
def test_missing_ranks_are_named(tmp_path: Path, stage: int, gone: list[int], said: str) -> None:
    path = run(tmp_path, stage)
    for rank in gone:
        (path / "global_step7" / optim_name(rank)).unlink()
    with pytest.raises(RanksError, match=f"{4 - len(gone)} of 4 files of ranks are there: {said} missing") as refused:
        open_checkpoint(str(path))
    assert "--files" in (refused.value.hint or "")
    assert open_checkpoint(str(path), files=True).format == "deepspeed"


def refused(path: Path, kind: type[CkptError], match: str) -> None:
    with pytest.raises(kind, match=match) as error:
        open_checkpoint(str(path))
    assert "ckpt ls --files" in (error.value.hint or "")


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    path = run(tmp_path)
    first = path / "global_step7" / optim_name(0)
    shutil.copy(first, first.with_name(first.name.removeprefix("bf16_")))
    refused(path, RanksError, "two files are of rank 0")
    first.with_name(first.name.removeprefix("bf16_")).unlink()
    shutil.copy(first, first.with_name(optim_name(4)))
    refused(path, RanksError, "files of 5 ranks, and .* says that there were 4")
    (first.with_name(optim_name(4))).unlink()
    change(path / "global_step7" / optim_name(3), __zero_stage=1)
    refused(path, RanksError, "it is of another save than")


def test_files_of_another_step_are_refused(tmp_path: Path) -> None:
    path = run(tmp_path, 3)
    change(path / "global_step7" / model_name(3, 2), global_steps=6)
    refused(path, RanksError, "it is of step 6, and .* of step 7")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("steps", [(torch.tensor(4.0), torch.tensor(5.0)), (4, 5), (torch.tensor([4]), 4)])
def test_files_of_optimizers_that_took_other_steps_are_refused(
    tmp_path: Path, stage: int, steps: tuple[Any, Any]
) -> None:
    path = run(tmp_path, stage, 2)
    inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    for rank, step in enumerate(steps):
        change(path / "global_step7" / optim_name(rank), **{f"__{inner}": {"state": {0: {"step": step}}}})
    refused(path, RanksError, "another number of steps than that of bf16_zero_pp_rank_0_")
    change(path / "global_step7" / optim_name(1), **{f"__{inner}": {"state": {0: {"step": steps[0]}}}})
    assert "model.p0" in open_checkpoint(str(path)).names


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("numel", [0, 1, 40])
def test_sums_that_do_not_fit_are_refused(tmp_path: Path, stage: int, numel: int) -> None:
    path = run(tmp_path, stage)
    key = "__fp32_flat_groups" if stage == 3 else "__single_partition_of_fp32_groups"
    change(path / "global_step7" / optim_name(1), **{key: [torch.ones(numel)] * (2 if stage == 3 else 1)})
    refused(path, RanksError, "elements, and its parameters need")


def test_tensor_and_pipeline_parallel_and_experts_are_refused_by_name(tmp_path: Path) -> None:
    path = run(tmp_path)
    folder = path / "global_step7"
    for name, said in (
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("layer_00-model_00-model_states.pt", "pipeline parallel"),
        ("layer_1_expert_3_mp_rank_00_model_states.pt", "experts"),
    ):
        torch.save({"module": {}}, folder / name)
        refused(path, UnsupportedError, said)
        (folder / name).unlink()
    change(folder / model_name(2, 0), mp_world_size=2)
    refused(path, UnsupportedError, "tensor parallel")
    change(folder / model_name(2, 0), mp_world_size=1)
    for key, name in (("ds_autoep_layers", "checkpoint_format"), ("autoep_layers", "expert_state_format")):
        change(folder / model_name(2, 0), **{key: [{name: "zero3_partitioned"}]})
        refused(path, UnsupportedError, "AutoEP")
        change(folder / model_name(2, 0), **{key: None})
    change(folder / optim_name(0), __partition_count=[4, 2])
    refused(path, UnsupportedError, "experts")


def test_frozen_parameters_need_the_files_of_all_ranks(tmp_path: Path) -> None:
    path = run(tmp_path, 3, frozen=numbered([(5,)], "f"))
    (path / "global_step7" / model_name(3, 2)).unlink()
    refused(path, RanksError, "3 of 4 files of model states")


def test_check_finds_missing_ranks_other_saves_and_sums_that_do_not_fit(tmp_path: Path) -> None:
    path = run(tmp_path)
    assert not [finding for finding in check(str(path)).findings if finding.severity == "error"]
    folder = path / "global_step7"
    (folder / optim_name(3)).rename(folder / "kept")
    (finding,) = [each for each in check(str(path)).findings if each.severity == "error"]
    assert (finding.code, finding.message) == ("ranks", "3 of 4 files of ranks are there: rank 3 is missing")
    assert "--files" in finding.hint
    shutil.copy(folder / "kept", folder / optim_name(5))
    (folder / "kept").rename(folder / optim_name(3))
    (finding,) = [each for each in check(str(path)).findings if each.severity == "error"]
    assert finding.code == "ranks"
    assert "another save" in finding.message
    (folder / optim_name(5)).unlink()
    change(folder / optim_name(0), __single_partition_of_fp32_groups=[torch.ones(99)])
    (finding,) = [each for each in check(str(path)).findings if each.severity == "error"]
    assert finding.code == "ranks"
    assert "its parameters need" in finding.message


def test_model_states_of_stage_3_alone_are_no_model(tmp_path: Path) -> None:
    path = run(tmp_path, 3)
    for rank in range(4):
        (path / "global_step7" / optim_name(rank)).unlink()
    refused(path, RanksError, "files of optimizer states are missing")
    other = zero_folder(tmp_path / "two", 2, 1, [numbered([(2,)])])
    (other / "global_step7" / optim_name(0)).unlink()
    assert values_of(other)["p0"].dtype == torch.bfloat16  # stage 2 has them whole, in half precision
