"""Rank files that say what is not so: one line of refusal, before memory, disk or time is spent."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero import run
from zero_folders import change, model_name, optim_name

from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.formats import open_checkpoint

_VECTOR = torch.ones(4)


def problem_of(path: Path) -> str:
    """The problem with which a folder is refused; empty for one that opens."""
    try:
        open_checkpoint(str(path)).close()
    except CkptError as error:
        return error.problem
    return ""


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        [{"p0": torch.Size([2**40]), "p1": torch.Size([2**20])}],
        [{"p0": (2**31, 2**31)}],
        [{"p0": (2**62, 2**62)}],
        [{"p0": (-1, 3)}],
        [{"p0": (1.5,)}],
        [{"p0": "many"}],
        [{}],
        [],
        [[], []],
        {"p0": (10**30,)},
        None,
        7,
    ],
)
def test_shapes_of_more_than_there_is_are_refused(tmp_path: Path, stage: int, shapes: Any) -> None:
    path = run(tmp_path, stage)
    change(path / "global_step7" / model_name(stage, 0), param_shapes=shapes)
    with pytest.raises(CkptError):
        open_checkpoint(str(path))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("count", [10**18, -1, 0, 2.5, "4", [4, 10**18], [[4]], {"a": 4}])
def test_a_count_of_parts_that_is_none_is_refused_or_not_believed(tmp_path: Path, stage: int, count: Any) -> None:
    path = run(tmp_path, stage)
    for rank in range(4):
        change(path / "global_step7" / optim_name(rank), __partition_count=count)
    assert "\n" not in problem_of(path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "vectors",
    [
        [],
        [None],
        [7],
        ["x"],
        [_VECTOR.to_sparse()],
        [torch.ones(4, dtype=torch.float64)],
        [torch.ones(8)[::2]],
        [torch.ones(1).expand(9)],
        [torch.ones(2, 2).t()],
        [_VECTOR] * 50,
        {0: _VECTOR},
    ],
)
def test_copies_that_are_no_vectors_are_refused(tmp_path: Path, stage: int, vectors: Any) -> None:
    path = run(tmp_path, stage)
    key = "__fp32_flat_groups" if stage == 3 else "__single_partition_of_fp32_groups"
    change(path / "global_step7" / optim_name(2), **{key: vectors})
    with pytest.raises(CkptError):
        open_checkpoint(str(path))


def test_states_that_do_not_fit_are_left_out_with_a_note(tmp_path: Path) -> None:
    path = run(tmp_path)
    short = {"state": {0: {"exp_avg": torch.ones(1)}}}
    for state in (7, [], {"state": 7}, short, {"state": {0: [1], 1: {}}}):
        change(path / "global_step7" / optim_name(1), __base_optimizer_state=state)
        checkpoint = open_checkpoint(str(path))
        assert "optimizer.state.p0.exp_avg" not in checkpoint.names
        assert any("exp_avg is left out" in note for note in checkpoint.notes)
        checkpoint.close()


def test_states_that_multiply_meet_a_limit(tmp_path: Path) -> None:
    path = run(tmp_path, 2, 1)
    folder = path / "global_step7"
    shapes = OrderedDict((f"p{number}", (0,)) for number in range(4_000))
    change(folder / model_name(2, 0), param_shapes=[shapes], module={})
    states = {f"state{number}": torch.ones(0) for number in range(2_000)}
    change(
        folder / optim_name(0),
        __base_optimizer_state={"state": {0: states}},
        __single_partition_of_fp32_groups=[torch.ones(0)],
    )
    with pytest.raises(FormatError, match="over and over"):
        open_checkpoint(str(path))


def test_groups_that_are_one_mapping_many_times_meet_a_limit(tmp_path: Path) -> None:
    path = run(tmp_path, 2, 1)
    states = {f"state{number}": number for number in range(1_000)}
    change(
        path / "global_step7" / optim_name(0), __base_optimizer_state={"state": dict.fromkeys(range(20_000), states)}
    )
    with pytest.raises(FormatError):
        open_checkpoint(str(path))


@pytest.mark.parametrize("key", ["shared_params", "buffer_names", "frozen_param_shapes", "module", "global_steps"])
@pytest.mark.parametrize("value", [None, 3, [[1]], {"p0": "p0"}, {"x": "gone"}, {"p0": (10**12,)}, {1: 2}])
def test_what_else_is_said_wrongly_is_refused_or_left_out(tmp_path: Path, key: str, value: Any) -> None:
    path = run(tmp_path)
    change(path / "global_step7" / model_name(2, 0), **{key: value} if value is not None else {key: 0})
    assert "\n" not in problem_of(path)


def test_names_of_files_with_digits_of_other_scripts_are_sorted(tmp_path: Path) -> None:
    path = run(tmp_path)
    (path / "global_step7" / "²_٣_model_states.pt").write_bytes(b"")
    with pytest.raises(CkptError):
        open_checkpoint(str(path))
