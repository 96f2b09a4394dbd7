"""Plain state_dicts of many tensors: renamed and thinned out as any other pickle is, in few steps and little memory."""

from __future__ import annotations

import io
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli.edits.plan import EditOptions, EditPlan
from ckpt_cli.edits.rename import plan_rename, renaming
from ckpt_cli.edits.rm import plan_keep, plan_rm
from ckpt_cli.edits.transaction import transaction
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.rename_rules import Rule
from ckpt_cli.pickles.edit import rewrite
from ckpt_cli.pickles.read import OPCODES

Plan = Callable[[Checkpoint], EditPlan]


def _strip(prefix: str) -> Plan:
    return lambda checkpoint: plan_rename(checkpoint, renaming(None, None, [Rule("strip", prefix)]))


def _state(count: int, nbytes: int = 8) -> OrderedDict[str, Any]:
    """A state_dict as a module gives it, with notes of its modules."""
    state: OrderedDict[str, Any] = OrderedDict(
        (f"model.{number // 4}.{'abcd'[number % 4]}", torch.full((nbytes // 4,), float(number)))
        for number in range(count)
    )
    state._metadata = OrderedDict(  # type: ignore[attr-defined]  # torch's own attribute
        (name, {"version": 1}) for name in ("", "model", *(f"model.{number}" for number in range(count // 4 + 1)))
    )
    return state


def _edited(source: Path, target: Path, plan: Plan, *, in_general: bool = False) -> bytes | str:
    """The file that an edit writes, or the refusal; `in_general` as it is done to any pickle."""
    target.unlink(missing_ok=True)
    try:
        if not in_general:
            transaction(str(source), plan, EditOptions(output=str(target)))
        else:
            with (
                patch.object(rewrite, "edit_flat", lambda *_: False),
                patch("ckpt_cli.pickles.read.WITH_ROWS", OPCODES),
            ):
                transaction(str(source), plan, EditOptions(output=str(target)))
    except CkptError as error:
        return error.problem
    return target.read_bytes()


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 70),
    kind=st.sampled_from(["dict", "with values", "ties", "shared", "views", "nested", "repeated"]),
    plan=st.sampled_from(
        [
            _strip("model"),
            _strip("model.0"),
            lambda checkpoint: plan_rename(checkpoint, renaming(None, None, [Rule("add", "net")])),
            lambda checkpoint: plan_rename(checkpoint, renaming("model.0.a", "x", [])),
            lambda checkpoint: plan_rename(checkpoint, renaming("model.0", "model.1", [])),
            lambda checkpoint: plan_rm(checkpoint, ["model.0"]),
            lambda checkpoint: plan_rm(checkpoint, ["model.0.a"]),
            lambda checkpoint: plan_keep(checkpoint, ["model.0"]),
        ]
    ),
)
def test_an_edit_of_a_plain_state_dict_writes_what_the_general_one_does(
    tmp_path_factory: pytest.TempPathFactory, count: int, kind: str, plan: Plan
) -> None:
    state = _state(count)
    first = state["model.0.a"]
    if kind == "with values":
        state |= {"epoch": 3, "name": "run", "none": None}
    elif kind == "ties":
        state |= {"tied": first, "model.9999.a": first}
    elif kind == "shared":
        state["model.0.z"] = first.clone().set_(first.untyped_storage(), 0, (1, 2))  # type: ignore[call-overload]
    elif kind == "views":
        state |= {f"view.{name}": tensor[1:] for name, tensor in list(state.items())}
    elif kind == "nested":
        state |= {"inner": {"model.0.a": first}, "list": [torch.zeros(2)]}
    elif kind == "repeated":
        state |= {f"again.{name}": tensor for name, tensor in list(state.items())}
    folder = tmp_path_factory.mktemp("plain")
    torch.save(state, folder / "m.pt")
    quick = _edited(folder / "m.pt", folder / "a.pt", plan)
    assert quick == _edited(folder / "m.pt", folder / "a.pt", plan, in_general=True)
    if isinstance(quick, bytes):
        torch.load(io.BytesIO(quick), weights_only=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_torch_loads_what_was_renamed_with_its_values_and_notes(tmp_path: Path, in_place: bool) -> None:
    state = _state(600)
    torch.save(state, tmp_path / "m.pt")
    out = tmp_path / ("m.pt" if in_place else "out.pt")
    transaction(str(tmp_path / "m.pt"), _strip("model"), EditOptions(output=None if in_place else str(out)))
    loaded = torch.load(out, weights_only=True)
    assert list(loaded) == [name.removeprefix("model.") for name in state]
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values(), strict=True))
    assert {"", "0", "149"} <= loaded._metadata.keys()


@pytest.mark.parametrize("in_place", [False, True])
def test_torch_loads_what_is_left_with_storages_numbered_anew(tmp_path: Path, in_place: bool) -> None:
    state = _state(600)
    torch.save(state, tmp_path / "m.pt")
    out = tmp_path / ("m.pt" if in_place else "out.pt")
    plan: Plan = lambda checkpoint: plan_rm(checkpoint, ["model.1", "model.100.c"])  # noqa: E731 - as the others
    transaction(str(tmp_path / "m.pt"), plan, EditOptions(output=None if in_place else str(out)))
    for name in [name for name in state if name.startswith("model.1.") or name == "model.100.c"]:
        del state[name]
    loaded = torch.load(out, weights_only=True)
    assert list(loaded) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values(), strict=True))
    assert "model.1" not in loaded._metadata
    checkpoint = open_checkpoint(str(out))
    assert [tensor.storage.key for tensor in checkpoint.tensors if tensor.storage] == [*map(str, range(len(state)))]
    checkpoint.close()


def test_records_of_all_sizes_are_copied_with_their_bytes(tmp_path: Path) -> None:
    state = {
        f"model.{number}": torch.randn(size) for number, size in enumerate([0, 1, 5, 900, 1020, 1100, 70_000] * 20)
    }
    torch.save(state, tmp_path / "m.pt")
    transaction(str(tmp_path / "m.pt"), _strip("model"), EditOptions(output=str(tmp_path / "out.pt")))
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values(), strict=True))


# --- costs -----------------------------------------------------------------------------------------------------------


def _calls(work: Callable[[], object]) -> int:
    """Calls of Python functions during some work."""
    calls = 0

    def note(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def _calls_for_each(tmp_path: Path, work: Callable[[Path], object]) -> float:
    """Calls that each further tensor costs."""
    for count in (2000, 4000):
        torch.save(_state(count), tmp_path / f"{count}.pt")
    work(tmp_path / "2000.pt")
    few, many = (_calls(lambda path=tmp_path / f"{count}.pt": work(path)) for count in (2000, 4000))
    return (many - few) / 2000


def test_opening_calls_few_functions_for_each_tensor(tmp_path: Path) -> None:
    assert _calls_for_each(tmp_path, lambda path: open_checkpoint(str(path)).close()) < 20


def _renamed(path: Path) -> None:
    out = path.with_suffix(".out")
    out.unlink(missing_ok=True)
    transaction(str(path), _strip("model"), EditOptions(output=str(out)))


def _thinned(path: Path) -> None:
    out = path.with_suffix(".out")
    out.unlink(missing_ok=True)
    transaction(str(path), lambda checkpoint: plan_rm(checkpoint, ["model.0.a"]), EditOptions(output=str(out)))


@pytest.mark.parametrize("work", [_renamed, _thinned])
def test_edits_call_few_functions_for_each_tensor(tmp_path: Path, work: Callable[[Path], None]) -> None:
    assert _calls_for_each(tmp_path, work) < 100


@pytest.mark.parametrize("work", [_renamed, _thinned])
def test_edits_hold_little_for_each_tensor(tmp_path: Path, work: Callable[[Path], None]) -> None:
    peaks = []
    for count in (2000, 4000):
        torch.save(_state(count), tmp_path / f"{count}.pt")
        work(tmp_path / f"{count}.pt")
        tracemalloc.start()
        try:
            work(tmp_path / f"{count}.pt")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2000 < 3000
