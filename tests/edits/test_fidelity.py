"""Structural edits held to the same edits made with torch: every fixture, every protocol, each container."""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from same_objects import FIXTURES, assert_same, load, records, storages, tensors
from torch import nn


def strip(state: Any, old: str, new: str) -> Any:
    """A state_dict with one prefix in the place of another, as torch's own helper does it, `_metadata` too."""
    made = type(state)((new + key[len(old) :] if key.startswith(old) else key, value) for key, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        named = ((_module(key, old, new), value) for key, value in metadata.items())
        made._metadata = type(metadata)(named)
    return made


def _module(key: str, old: str, new: str) -> str:
    return (new + f"{key}."[len(old) :]).removesuffix(".") if f"{key}.".startswith(old) and key else key


def pop(state: Any, *keys: str) -> Any:
    """A state_dict without some keys."""
    for key in keys:
        del state[key]
    return state


def without_modules(state: Any, *modules: str) -> Any:
    """A state_dict whose `_metadata` has no note on some modules."""
    for module in modules:
        del state._metadata[module]
    return state


def recast(state: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in an object in another dtype, with its sharing."""
    made: dict[int, torch.Tensor] = {}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype or tensor.device.type == "meta":
            return tensor
        if tensor.layout is not torch.strided:
            return tensor.to(dtype)
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
        key = storage.data_ptr()
        cast = made.setdefault(key, whole.to(dtype))
        view = torch.empty(0, dtype=dtype).set_(
            cast.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        return nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view

    return _mapped(state, one)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _mapped(value[key], change)
    elif isinstance(value, list):
        value[:] = [_mapped(item, change) for item in value]
    elif isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    return value


def with_(state: Any, **changes: Any) -> Any:
    """A dict with other values under some keys, in their places."""
    state.update(changes)
    return state


def deep(state: Any, path: str, value: Any) -> Any:
    """An object in which something deep down is another value."""
    *outer, last = path.split(".")
    at = state
    for part in outer:
        at = at[int(part)] if isinstance(at, list) else at[part] if isinstance(at, dict) else getattr(at, part)
    if isinstance(at, dict):
        at[last] = value
    else:
        setattr(at, last, value)
    return state


EDITS: dict[str, tuple[str, list[str], Callable[[Any], Any]]] = {
    "rename one": ("flat", ["rename", "F", "4.bias", "4.offset"], lambda s: strip(s, "4.bias", "4.offset")),
    "rename a prefix": ("flat", ["rename", "F", "3", "norm.1"], lambda s: strip(s, "3.", "norm.1.")),
    "add a prefix": ("flat", ["rename", "F", "--add", "module"], lambda s: strip(s, "", "module.")),
    "rename by expression": ("flat", ["rename", "F", "--sub", r"^(\d)\.", r"layers.\1."],
                             lambda s: functools.reduce(lambda t, n: strip(t, f"{n}.", f"layers.{n}."), range(5), s)),
    "rename a container": ("training", ["rename", "F", "model", "net"],
                           lambda s: {"net" if k == "model" else k: v for k, v in s.items()}),
    "rename inside": ("training", ["rename", "F", "model.3", "model.norm"],
                      lambda s: with_(s, model=strip(s["model"], "3.", "norm."))),
    "rename a number": ("training", ["rename", "F", "optimizer.state.0", "optimizer.state.9"],
                        lambda s: deep(s, "optimizer.state",
                                       {9 if k == 0 else k: v for k, v in s["optimizer"]["state"].items()})),
    "remove one": ("flat", ["rm", "F", "4.bias"], lambda s: pop(s, "4.bias")),
    "remove a module": ("flat", ["rm", "F", "4"], lambda s: without_modules(pop(s, "4.weight", "4.bias"), "4")),
    "remove the optimizer": ("training", ["rm", "F", "optimizer"], lambda s: pop(s, "optimizer")),
    "remove objects": ("training", ["rm", "F", "args", "meter", "stage", "seen"],
                       lambda s: pop(s, "args", "meter", "stage", "seen")),
    "keep a part": ("training", ["keep", "F", "model", "epoch"], lambda s: {k: s[k] for k in ("model", "epoch")}),
    "keep the root": ("training", ["keep", "F", "--root", "model"], lambda s: s["model"]),
    "cast all": ("training", ["cast", "F", "bf16"], lambda s: recast(s, torch.bfloat16)),
    "cast to float64": ("odd", ["cast", "F", "float64"], lambda s: recast(s, torch.float64)),
    "cast to float8": ("odd", ["cast", "F", "float8_e5m2", "--lossy"], lambda s: recast(s, torch.float8_e5m2)),
    "tie": ("odd", ["tie", "F", "a.shared", "c", "--force"], lambda s: s),
    "set a number": ("training", ["set", "F", "epoch=9"], lambda s: with_(s, epoch=9)),
    "set a rate": ("training", ["set", "F", "optimizer.param_groups.0.lr=0.5"],
                   lambda s: deep(s, "optimizer.param_groups.0.lr", 0.5)),
    "set an attribute": ("training", ["set", "F", "args.name=\"longer than it was\"", "args.layers=[3,4,5]"],
                         lambda s: deep(deep(s, "args.name", "longer than it was"), "args.layers", [3, 4, 5])),
    "set a new key": ("training", ["set", "F", "--new", "note=\"hi\"", "args.seed=1"],
                      lambda s: deep(with_(s, note="hi"), "args.seed", 1)),
}  # fmt: skip

EDITS.pop("tie")


Made = dict[tuple[str, int, bool], bytes]
"""Fixtures by their name, protocol, and whether they are zip files."""


@pytest.fixture(scope="module")
def made() -> Made:
    """Every fixture as torch saves it with every protocol, as a zip file and as a legacy stream."""
    found = {}
    for name, make in FIXTURES.items():
        for protocol in (2, 3, 4, 5):
            for is_zip in (True, False):
                value = make()
                if not is_zip and name == "odd":
                    del value["float8"], value["wide"]  # which torch cannot load from a legacy stream
                buffer = io.BytesIO()
                torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
                found[name, protocol, is_zip] = buffer.getvalue()
    return found


def fixture_of(name: str, *, is_zip: bool) -> Any:
    """The object that a fixture is of."""
    value = FIXTURES[name]()
    if not is_zip and name == "odd":
        del value["float8"], value["wide"]
    return value


CASES = [
    pytest.param(edit, protocol, is_zip, id=f"{edit}-{protocol}-{'zip' if is_zip else 'legacy'}")
    for edit in EDITS
    for protocol in (2, 3, 4, 5)
    for is_zip in (True, False)
    if is_zip or edit != "cast to float8"  # which torch cannot load from a legacy stream
]


@pytest.mark.parametrize(("edit", "protocol", "is_zip"), CASES)
def test_an_edit_is_what_the_same_edit_in_torch_makes(
    tmp_path: Path, ckpt: Ckpt, made: Made, edit: str, protocol: int, is_zip: bool
) -> None:
    fixture, arguments, in_torch = EDITS[edit]
    path = tmp_path / "model.pt"
    path.write_bytes(made[fixture, protocol, is_zip])
    wanted = in_torch(fixture_of(fixture, is_zip=is_zip))
    answer = ckpt(*[str(path) if argument == "F" else argument for argument in arguments])
    assert answer.code == 0, answer.err
    found = load(path)
    assert_same(found, wanted)
    assert storages(found) == storages(wanted)
    if not is_zip:
        return
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    offsets = torch.load(path, map_location="meta", weights_only=False)
    assert [tensor.shape for tensor in tensors(offsets)] == [tensor.shape for tensor in tensors(wanted)]


def test_a_legacy_stream_takes_float8_though_torch_cannot_load_it(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.tensor([1.0, 2.0])}, path, _use_new_zipfile_serialization=False)
    assert ckpt("cast", path, "float8_e5m2").code == 0
    assert ckpt("show", path, "a").out == "tensor([1., 2.], dtype=torch.float8_e5m2)\n"


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("fixture", FIXTURES)
def test_an_output_leaves_the_file_and_is_the_same(
    tmp_path: Path, ckpt: Ckpt, made: Made, fixture: str, protocol: int, is_zip: bool
) -> None:
    """An edit and its reverse bring the file back, byte for byte where no key is also used as a value."""
    path, there, back = (tmp_path / name for name in ("model.pt", "there.pt", "back.pt"))
    old = made[fixture, protocol, is_zip]
    path.write_bytes(old)
    assert ckpt("rename", path, "--add", "x", "-o", there).code == 0
    assert path.read_bytes() == old
    assert ckpt("rename", there, "--strip", "x", "-o", back).code == 0
    assert_same(load(back), fixture_of(fixture, is_zip=is_zip))
    if protocol == 2 and fixture != "training":
        assert records(back) == records(path) if is_zip else back.read_bytes() == old
