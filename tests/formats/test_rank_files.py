"""Rank files of FSDP open as the model: parts are put together by their placements, never by their values."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from zero_folders import numbered

import ckpt_cli
from ckpt_cli.errors import CkptError, MalformedError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.runs.read import run_parts
from ckpt_cli.model.checkpoint import Tensor, Value
from ckpt_cli.ops.check.run import check
from ckpt_cli.ops.info import summarize

SAMPLES = Path(__file__).parents[1] / "samples"


def values_of(path: Path, inside: str = "model.") -> dict[str, torch.Tensor]:
    """The tensors below a prefix, as a user reads them."""
    with ckpt_cli.open(path) as checkpoint:
        return {name.removeprefix(inside): checkpoint[name].torch() for name in checkpoint if name.startswith(inside)}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fsdp2", "FSDP, 3 ranks; DTensor (Shard(dim=0),)"),
        ("hsdp", "FSDP, 4 ranks; DTensor (Replicate(), Shard(dim=0))"),
        ("fsdp1", "FSDP, 2 ranks; ShardedTensor"),
    ],
)
def test_what_fsdp_wrote_is_its_full_state_dict(name: str, said: str) -> None:
    found = values_of(SAMPLES / name)
    wanted = load_file(SAMPLES / f"{name}.safetensors")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    checkpoint = open_checkpoint(str(SAMPLES / name))
    assert checkpoint.version == said
    tensors = {entry.name: entry for entry in checkpoint.own if isinstance(entry, Tensor)}
    if name != "fsdp1":  # whose state_dict has the tied one in a part of another storage
        assert tensors["model.head.weight"].view == tensors["model.emb.weight"].view
    checkpoint.close()


@pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
def test_states_of_the_optimizer_are_joined_too(name: str) -> None:
    found = values_of(SAMPLES / name, "optimizer.state.")
    model = values_of(SAMPLES / name)
    whole = [tensor.shape for key, tensor in model.items() if key not in ("mask", "head.weight")]
    states = {key: tensor for key, tensor in found.items() if key.endswith(".exp_avg")}
    assert sorted(map(tuple, (tensor.shape for tensor in states.values()))) == sorted(map(tuple, whole))
    assert all(tensor.isfinite().all() for tensor in states.values())


@st.composite
def spread(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], list[int | None]]]]:
    """A mesh of at most 8 ranks, and shapes with the dimension that each axis of the mesh cuts, None for copies."""
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (5,), (8,), (2, 2), (2, 3), (3, 2), (4, 2), (2, 2, 2)]))
    tensors = []
    for shape in draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4)):
        dims = st.sampled_from([None, *range(len(shape))])
        tensors.append((shape, draw(st.lists(dims, min_size=len(mesh), max_size=len(mesh)))))
    return mesh, tensors


@settings(deadline=None, max_examples=15)
@given(spread())
def test_any_mesh_and_placements_are_put_together_as_torch_cuts_them(
    case: tuple[tuple[int, ...], list[tuple[tuple[int, ...], list[int | None]]]],
) -> None:
    mesh, cuts = case
    whole = numbered([shape for shape, _ in cuts])
    with TemporaryDirectory() as folder:
        for rank in range(prod(mesh)):
            saved = parts_of(rank, mesh, whole, [dims for _, dims in cuts])
            with patch.object(DTensor, "data_ptr", lambda _: 0):  # which fails for empty parts that no process made
                torch.save(saved, Path(folder) / f"model_world_size_{prod(mesh)}_rank_{rank}.pt")
        found = values_of(Path(folder))
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def parts_of(
    rank: int, mesh: tuple[int, ...], whole: dict[str, torch.Tensor], dims: list[list[int | None]]
) -> dict[str, DTensor]:
    """The DTensors of one rank, cut by torch; no other process is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(mesh))
    try:
        devices = init_device_mesh("cpu", mesh)
        found = {}
        for (name, tensor), cut in zip(whole.items(), dims, strict=True):
            placements = [Replicate() if dim is None else Shard(dim) for dim in cut]
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, devices, placements)
            local = tensor
            for dim, (begin, size) in enumerate(zip(offset, shape, strict=True)):
                local = local.narrow(dim, min(begin, local.shape[dim]), size)
            found[name] = DTensor.from_local(
                local.contiguous(), devices, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        return found
    finally:
        dist.destroy_process_group()


def copied(path: Path, name: str = "fsdp2") -> Path:
    return Path(shutil.copytree(SAMPLES / name, path / name))


def refused(path: Path, kind: type[CkptError], match: str) -> None:
    with pytest.raises(kind, match=match) as error:
        open_checkpoint(str(path))
    assert error.value.hint


def test_missing_ranks_and_two_saves_are_refused(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / "model_world_size_3_rank_1.pt").rename(path / "x")
    refused(path, MalformedError, "2 of 3 files of ranks are there: rank 1 is missing")
    (path / "x").rename(path / "model_world_size_3_rank_1.pt")
    torch.save({}, path / "model_world_size_2_rank_0.pt")
    refused(path, MalformedError, "saves by 2 and by 3 ranks")


def test_a_part_of_another_rank_does_not_pass_for_its_own(tmp_path: Path) -> None:
    path = copied(tmp_path)
    shutil.copy(path / "model_world_size_3_rank_0.pt", path / "model_world_size_3_rank_1.pt")
    with pytest.raises(MalformedError, match=r"its parts have .* elements, it has"):
        open_checkpoint(str(path))


def plain(path: Path, *ranks: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    for rank, saved in enumerate(ranks):
        torch.save(saved, path / f"model_world_size_{len(ranks)}_rank_{rank}.pt")
    return path


def test_plain_tensors_are_taken_once_if_all_ranks_have_the_same(tmp_path: Path) -> None:
    same = {"w": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(3), "empty": torch.empty(0, 2)}
    found = values_of(plain(tmp_path / "same", same, same, same))
    assert {key: tensor.tolist() for key, tensor in found.items()} == {
        "w": [[0, 1, 2], [3, 4, 5]],
        "scalar": 3,
        "empty": [],
    }
    assert values_of(plain(tmp_path / "one", same))["w"].shape == (2, 3)


def test_plain_tensors_that_differ_are_refused_when_they_are_read(tmp_path: Path) -> None:
    path = plain(tmp_path / "run", {"w": torch.zeros(9)}, {"w": torch.zeros(9)}, {"w": torch.eye(3).flatten()})
    checkpoint = open_checkpoint(str(path))
    (tensor,) = checkpoint.tensors
    assert tensor.storage is not None
    for read in (tensor.storage.view, tensor.storage.extents):
        with pytest.raises(MalformedError, match=r"rank_2\.pt has other values than .*_rank_0\.pt"):
            read(0, 36)
    assert len(tensor.storage.view(4, 8)) == 8  # where they are the same
    checkpoint.close()


def test_tensors_of_other_shapes_or_names_are_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "shapes", {"w": torch.zeros(4)}, {"w": torch.zeros(5)})
    with pytest.raises(MalformedError, match="one dtype and shape"):
        open_checkpoint(str(path))
    path = plain(tmp_path / "names", {"w": torch.zeros(4)}, {"v": torch.zeros(4)})
    with pytest.raises(MalformedError, match="other entries"):
        open_checkpoint(str(path))


def test_local_state_is_refused_by_name_with_what_would_be_needed(tmp_path: Path) -> None:
    message = r"LOCAL_STATE_DICT\): each rank has a part of flat parameters \(_flat_param\)"
    refused(SAMPLES / "local", UnsupportedError, message)
    checkpoint = open_checkpoint(str(SAMPLES / "local"), files=True)
    assert [tensor.name for tensor in checkpoint.tensors if tensor.name.endswith("0._flat_param")]
    checkpoint.close()
    for rank in range(2):  # of the second model
        torch.save({"_flat_param": torch.zeros(3)}, tmp_path / f"pytorch_model_fsdp_1_rank{rank}.bin")
    refused(tmp_path, UnsupportedError, message)


def test_accelerates_files_of_ranks_are_joined_as_the_model_and_its_optimizer(tmp_path: Path) -> None:
    for rank in range(3):
        for old, new in (("model", "pytorch_model_fsdp_0"), ("optim", "optimizer_0")):
            shutil.copy(SAMPLES / "fsdp2" / f"{old}_world_size_3_rank_{rank}.pt", tmp_path / f"{new}_rank{rank}.bin")
    torch.save({}, tmp_path / "scheduler.bin")
    found = open_checkpoint(str(tmp_path))
    wanted = open_checkpoint(str(SAMPLES / "fsdp2"))
    assert [entry.name for entry in found.entries] == [entry.name for entry in wanted.entries]
    assert found.version == wanted.version
    assert list(found.notes) == ["not opened with it: scheduler.bin"]
    assert len(found.own) == len(wanted.own)
    assert torch.equal(values_of(tmp_path)["l1.weight"], load_file(SAMPLES / "fsdp2.safetensors")["l1.weight"])
    (tmp_path / "pytorch_model_fsdp_0_rank1.bin").unlink()
    refused(tmp_path, MalformedError, "2 of 3 files of ranks are there: rank 1 is missing")
    (tmp_path / "pytorch_model_fsdp_0_rank2.bin").rename(tmp_path / "pytorch_model_fsdp_0_rank1.bin")
    with pytest.raises(MalformedError, match=r"its parts have .* elements, it has"):
        open_checkpoint(str(tmp_path))


def test_accelerates_files_of_ranks_are_the_model_of_the_run_that_they_lie_in(tmp_path: Path) -> None:
    for rank in range(3):
        for old, new in (("model", "pytorch_model_fsdp_0"), ("optim", "optimizer_0")):
            shutil.copy(SAMPLES / "fsdp2" / f"{old}_world_size_3_rank_{rank}.pt", tmp_path / f"{new}_rank{rank}.bin")
        torch.save({"step": 7}, tmp_path / f"random_states_{rank}.pkl")
    torch.save({"last_epoch": 2}, tmp_path / "scheduler.bin")
    checkpoint = open_checkpoint(str(tmp_path))
    alone = open_checkpoint(str(SAMPLES / "fsdp2"))
    assert [entry.name for entry in checkpoint.own] == [entry.name for entry in alone.own]
    assert {entry.name for entry in alone.entries} < {entry.name for entry in checkpoint.entries}
    assert {"scheduler.last_epoch", "rng_state_2.step"} <= set(checkpoint.names)
    assert any(part.fixed for part in run_parts(checkpoint))
    assert not summarize(checkpoint).advice  # none of it could be followed
    assert not [finding for finding in check(str(tmp_path)).findings if finding.severity != "note"]
    (tmp_path / "pytorch_model_fsdp_0_rank1.bin").rename(tmp_path / "kept")
    (finding,) = [finding for finding in check(str(tmp_path)).findings if finding.severity == "error"]
    assert (finding.code, finding.message) == ("ranks", "2 of 3 files of ranks are there: rank 1 is missing")
    (tmp_path / "kept").rename(tmp_path / "pytorch_model_fsdp_0_rank1.bin")
    assert torch.equal(values_of(tmp_path)["l1.weight"], load_file(SAMPLES / "fsdp2.safetensors")["l1.weight"])


def test_several_models_of_accelerate_have_numbers(tmp_path: Path) -> None:
    for rank in range(2):
        for number in range(2):
            torch.save({"w": torch.full((2,), number)}, tmp_path / f"pytorch_model_fsdp_{number}_rank{rank}.bin")
    checkpoint = open_checkpoint(str(tmp_path))
    assert [tensor.name for tensor in checkpoint.own if isinstance(tensor, Tensor)] == ["model_0.w", "model_1.w"]
    checkpoint.close()


def test_what_verl_wrote_has_the_own_state_of_each_rank_too() -> None:
    assert {name: tensor.tolist() for name, tensor in values_of(SAMPLES / "verl").items()} == {
        name: tensor.tolist() for name, tensor in load_file(SAMPLES / "verl.safetensors").items()
    }
    checkpoint = open_checkpoint(str(SAMPLES / "verl"))
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert values["extra_state.1.lr_scheduler.last_epoch"] == 1
    assert values["optimizer.param_groups.0.lr"] == 0.005
    names = [tensor.name for tensor in checkpoint.tensors]
    assert "extra_state.0.rng.cpu" in names
    assert "optimizer.state.0.exp_avg" not in names  # of each rank other numbers, of a flat parameter
    assert list(checkpoint.notes) == [
        "the optimizer's states are left out: they are of flat parameters, of which each rank has a part, and no file "
        "says which"
    ]
    checkpoint.close()
    files = open_checkpoint(str(SAMPLES / "verl"), files=True)
    assert "optim_world_size_2_rank_1.state.0.exp_avg" in files.names
    assert "extra_state_world_size_2_rank_1.lr_scheduler.last_epoch" in files.names
    files.close()


def test_states_that_ranks_are_missing_of_leave_the_model_as_it_is(tmp_path: Path) -> None:
    path = copied(tmp_path, "verl")
    (path / "extra_state_world_size_2_rank_0.pt").unlink()
    (path / "optim_world_size_2_rank_0.pt").unlink()
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.top_level == ["model"]
    assert list(checkpoint.notes) == [
        "not opened with it: extra_state_world_size_2_rank_1.pt, optim_world_size_2_rank_1.pt"
    ]
    checkpoint.close()
    torch.save({"w": torch.ones(1)}, path / "model_world_size_2_rank_00.pt")
    refused(path, MalformedError, "are of one rank")


@pytest.mark.parametrize("placement", ["Partial", "_StridedShard"])
def test_placements_that_are_no_parts_are_refused_by_name(tmp_path: Path, placement: str) -> None:
    from torch.distributed.tensor import placement_types

    path = copied(tmp_path)
    file = path / "model_world_size_3_rank_1.pt"
    saved = torch.load(file, weights_only=False)
    tensor = saved["l1.weight"]
    given = {} if placement == "Partial" else {"dim": 0, "split_factor": 2}
    tensor._spec.placements = (getattr(placement_types, placement)(**given),)
    torch.save(saved, file)
    with pytest.raises(UnsupportedError, match=f"l1.weight.*is not known: placements .{placement}") as error:
        open_checkpoint(str(path))
    assert "full state" in (error.value.hint or "")
