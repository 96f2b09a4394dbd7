"""Edits of tensors that an object has under a further name, which it keeps to itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file
from torch import nn


def saved(path: Path, made: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(made, path)
    return str(path)


def loaded(path: str) -> Any:
    return torch.load(path, weights_only=False)


def require_consistent(lstm: Any) -> None:
    """The parameters of an LSTM are the tensors that it computes with."""
    for name, used in zip(lstm._flat_weights_names, lstm._flat_weights, strict=True):
        parameter = getattr(lstm, name)
        assert (parameter.dtype, parameter.shape) == (used.dtype, used.shape)
        assert parameter.data_ptr() == used.data_ptr()
        assert parameter is used


def once() -> Any:
    """The tensor objects themselves in a private list."""
    return nn.LSTM(3, 4)


def rebuilt() -> Any:
    """The same storages by calls of their own."""
    lstm = nn.LSTM(3, 4)
    lstm._flat_weights = [weight.detach() for weight in lstm._flat_weights]
    return lstm


@pytest.mark.parametrize("make", [once, rebuilt])
@pytest.mark.parametrize("arguments", [[], ["weight_ih_l0"], ["_flat_weights.0"], ["*_l0"]])
def test_cast_changes_every_name_of_the_same_bytes(
    make: Callable[[], Any], arguments: list[str], tmp_path: Path, ckpt: Ckpt
) -> None:
    path = saved(tmp_path / "m.pt", make())
    done = ckpt("cast", path, "float64", *arguments)
    assert done.code == 0, done.err
    lstm = loaded(path)
    for name, used in zip(lstm._flat_weights_names, lstm._flat_weights, strict=True):
        parameter = getattr(lstm, name)
        assert parameter.dtype == used.dtype
        assert parameter.data_ptr() == used.data_ptr()
    assert lstm.weight_ih_l0.dtype == torch.float64
    if arguments == ["weight_ih_l0"]:
        assert "_flat_weights.0 also changed" in done.err
        assert lstm.weight_hh_l0.dtype == torch.float32
    if not arguments:
        lstm(torch.zeros(1, 1, 3, dtype=torch.float64))


def test_cast_reaches_tensors_in_private_containers_of_all_kinds(tmp_path: Path, ckpt: Ckpt) -> None:
    module = nn.Linear(2, 2)
    weight = module.weight
    module.__dict__["_cache"] = {"k": weight, "deep": [(weight, {"z": weight.detach()})]}
    path = saved(tmp_path / "m.pt", {"net": module, "view": weight.detach()})
    assert ckpt("cast", path, "bfloat16").code == 0
    whole = loaded(path)
    cache = whole["net"]._cache
    every = [whole["net"].weight, cache["k"], cache["deep"][0][0], cache["deep"][0][1]["z"], whole["view"]]
    assert {each.dtype for each in every} == {torch.bfloat16}
    assert len({each.data_ptr() for each in every}) == 1


def test_set_through_a_private_name_changes_the_parameter(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", once())
    done = ckpt("set", path, "_flat_weights.0[0,0]=5")
    assert "weight_ih_l0 also changed" in done.err
    require_consistent(loaded(path))
    assert loaded(path).weight_ih_l0[0, 0] == 5


def test_rm_says_what_still_refers_to_the_bytes(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", once())
    done = ckpt("rm", path, "weight_ih_l0")
    assert (done.code, "_flat_weights.0 still refers to them" in done.err) == (0, True)
    assert "_flat_weights.0" in ckpt("ls", path).out
    assert "still refer" not in ckpt("rm", path, "_flat_weights").err
    assert "_flat_weights" not in ckpt("ls", path).out


def test_a_pattern_renames_parameters_and_leaves_what_an_object_keeps(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", {"rnn": once()})
    assert ckpt("rename", path, "--sub", "weight", "w").code == 0
    names = [line.split("\t")[0] for line in ckpt("ls", path).out.splitlines()]
    assert {"rnn.w_ih_l0", "rnn._flat_weights.0"} <= set(names)


@pytest.mark.parametrize("how", [["rnn", "lstm"], ["--sub", r"^rnn\.", "lstm."]])
def test_what_an_object_keeps_is_renamed_with_it(how: list[str], tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", {"rnn": once()})
    assert ckpt("rename", path, *how).code == 0
    assert all(line.startswith("lstm.") for line in ckpt("ls", path).out.splitlines())
    require_consistent(loaded(path)["lstm"])


def test_untie_keeps_the_names_of_one_object_together(tmp_path: Path, ckpt: Ckpt) -> None:
    lstm = once()
    alone = saved(tmp_path / "alone.pt", lstm)
    refused = ckpt("untie", alone, "weight_ih_l0")
    assert (refused.code, "_flat_weights.0" in refused.err) == (2, True)
    path = saved(tmp_path / "m.pt", {"rnn": lstm, "copy": lstm.weight_ih_l0.detach()})
    assert ckpt("untie", path, "rnn.weight_ih_l0").code == 0
    whole = loaded(path)
    require_consistent(whole["rnn"])
    assert whole["copy"].data_ptr() != whole["rnn"].weight_ih_l0.data_ptr()


def test_tie_takes_the_names_of_one_object_along(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", once())
    done = ckpt("tie", path, "bias_ih_l0", "bias_hh_l0", "--force")
    assert "_flat_weights.3 also changed" in done.err
    lstm = loaded(path)
    pointers = {each.data_ptr() for each in (lstm.bias_ih_l0, lstm.bias_hh_l0, *lstm._flat_weights[2:])}
    assert len(pointers) == 1


@pytest.mark.parametrize("command", [["keep", "--root", "rnn"], ["compact"], ["keep", "rnn"]])
def test_other_edits_leave_an_object_consistent(command: list[str], tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", {"rnn": once(), "wasteful": torch.ones(1000)[:3]})
    done = ckpt(command[0], path, *command[1:])
    assert done.code == 0, done.err
    whole = loaded(path)
    require_consistent(whole["rnn"] if isinstance(whole, dict) else whole)


def test_an_object_is_opened_where_it_is_left_once_its_other_name_is_gone(tmp_path: Path, ckpt: Ckpt) -> None:
    layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    layers[0].__dict__["_next"] = [layers[1]]
    path = saved(tmp_path / "m.pt", {"net": layers})
    assert ckpt("rm", path, "net.1").code == 0
    assert "net.0._next.0.weight" in ckpt("ls", path).out


def test_the_parts_of_a_named_tuple_can_be_cast_and_not_be_removed(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", {"pair": slice(torch.ones(2), torch.ones(3), None), "n": 1})
    assert ckpt("cast", path, "float16").code == 0
    assert loaded(path)["pair"].start.dtype == torch.float16
    refused = ckpt("rm", path, "pair.1")
    assert (refused.code, "Traceback" in refused.err) == (2, False)
    assert loaded(path)["pair"].stop.dtype == torch.float16


def test_a_storage_by_itself_is_cast_with_the_tensors_over_it(tmp_path: Path, ckpt: Ckpt) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.arange(3.0)
        path = saved(tmp_path / "m.pt", {"t": tensor, "s": tensor.storage()})
        assert ckpt("cast", path, "float64").code == 0
        whole = loaded(path)
        assert (whole["t"].dtype, whole["s"].dtype) == (torch.float64, torch.float64)
        assert whole["s"].tolist() == [0, 1, 2]
        assert whole["t"].data_ptr() == whole["s"].data_ptr()


# --- conversions ------------------------------------------------------------------------------------------------------


def test_convert_of_a_module_takes_what_its_state_dict_has_and_names_the_rest(tmp_path: Path, ckpt: Ckpt) -> None:
    lstm = once()
    done = ckpt("convert", saved(tmp_path / "m.pt", lstm), str(tmp_path / "o.safetensors"))
    assert load_file(tmp_path / "o.safetensors").keys() == lstm.state_dict().keys()
    assert "4 tensors: _flat_weights.0" in done.err


def test_convert_of_a_module_within_writes_no_aliases_and_names_them(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", {"rnn": once(), "epoch": 1})
    done = ckpt("convert", path, str(tmp_path / "o.safetensors"), "--tensors-only")
    assert len(load_file(tmp_path / "o.safetensors")) == 4
    assert "rnn._flat_weights.0: the same tensor as rnn.weight_ih_l0" in done.err


@pytest.mark.parametrize("target", ["o.safetensors", "o_dcp"])
def test_convert_says_that_attributes_of_tensors_do_not_come_along(target: str, tmp_path: Path, ckpt: Ckpt) -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.info = {"k": torch.ones(2)}  # type: ignore[attr-defined]  # torch keeps any
    path = saved(tmp_path / "m.pt", {"w": parameter, "x": torch.ones(1)})
    to = ["--to", "dcp"] if target == "o_dcp" else []
    done = ckpt("convert", path, str(tmp_path / target), *to)
    assert (done.code, "tensors among the attributes of 1 tensor" in done.err) == (0, True)


NOTHING: dict[str, tuple[Any, str]] = {
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "a: sparse_coo tensor"),
    "values": ({"epoch": 3}, "no tensor"),
    "empty": ({}, "no tensor"),
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("more", [[], ["--tensors-only"], ["--tensors-only", "-n"]])
def test_convert_never_writes_a_file_without_a_tensor(
    kind: str, suffix: str, more: list[str], tmp_path: Path, ckpt: Ckpt
) -> None:
    made, why = NOTHING[kind]
    path, output = saved(tmp_path / "m.pt", made), tmp_path / f"o.{suffix}"
    done = ckpt("convert", path, str(output), *more)
    assert (done.code, output.exists()) == (2, False)
    if more:
        assert why in done.err


def test_convert_of_a_module_whose_tensors_are_all_attributes_is_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    module = nn.Module()
    module.__dict__["_cache"] = {"k": torch.ones(3)}
    done = ckpt("convert", saved(tmp_path / "m.pt", module), str(tmp_path / "o.safetensors"))
    assert (done.code, "_cache.k" in done.err) == (2, True)


# --- arrays of objects ------------------------------------------------------------------------------------------------


def test_the_arrays_of_a_dict_in_an_npy_file_are_entries(tmp_path: Path, ckpt: Ckpt) -> None:
    path = str(tmp_path / "a.npy")
    np.save(path, np.array({"w": np.arange(3.0), "deep": [np.ones(2, "f4")], "n": 1}, object))
    assert ckpt("ls", path).out.splitlines() == ["array.w\tfloat64\t[3]\t24", "array.deep.0\tfloat32\t[2]\t8"]
    assert "array.n\tint\t\t\t1" in ckpt("ls", "-a", path).out
    assert ckpt("set", path, "array.w[1]=7").code == 0
    assert np.load(path, allow_pickle=True).item()["w"].tolist() == [0, 7, 2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_arrays_in_an_object_array_of_an_npz_file_are_entries(save: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    path = str(tmp_path / "a.npz")
    grid = np.empty(2, object)
    grid[0], grid[1] = {"w": np.arange(3.0)}, np.ones(2)
    save(path, grid=grid, plain=np.zeros(2))
    before = ckpt("hash", path).out
    assert [line.split("\t")[0] for line in ckpt("ls", path).out.splitlines()] == ["grid.0.w", "grid.1", "plain"]
    if save is np.savez:
        assert ckpt("set", path, "grid.0.w[1]=7").code == 0
        assert np.load(path, allow_pickle=True)["grid"][0]["w"].tolist() == [0, 7, 2]
        assert ckpt("hash", path).out != before
        assert ckpt("check", path).code == 0
    assert ckpt("convert", path, str(tmp_path / "o.safetensors"), "--tensors-only").code == 0
    assert load_file(tmp_path / "o.safetensors").keys() == {"grid.0.w", "grid.1", "plain"}


def test_an_object_array_whose_pickle_does_not_read_is_an_error_of_one_line(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array({"w": np.ones(3)}, object))
    path.write_bytes(path.read_bytes()[:-20])
    done = ckpt("ls", str(path))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
