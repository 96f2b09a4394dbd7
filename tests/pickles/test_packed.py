"""Packed weights of quantized modules, and other states of TorchScript that are not dicts: every tensor is listed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import built, new, pickled
from conftest import Ckpt, refused
from packed_modules import QUANTIZED, SCRIPTED, engine
from safetensors.torch import load_file

import ckpt_cli
from ckpt_cli.errors import LimitError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor


def scripted(name: str, path: Path, *, mobile: bool = False) -> Any:
    """Save one of the modules as TorchScript."""
    with engine():
        module = SCRIPTED[name]()
        if mobile:
            module._save_for_lite_interpreter(str(path))
        else:
            torch.jit.save(module, str(path))
    return module


def eager(name: str, path: Path, **options: Any) -> Any:
    """Save one of the modules by torch.save."""
    with engine():
        module = QUANTIZED[name]()
        torch.save(module, path, **options)
    return module


def loaded(path: Path) -> Any:
    """What torch loads."""
    with engine():
        return torch.load(path, weights_only=False)


def reached(tensors: Iterable[Tensor]) -> set[str]:
    """The keys of the storages that some tensors, or the parts of them, are views of."""
    found: set[str] = set()
    for tensor in tensors:
        if tensor.storage is not None:
            found.add(tensor.storage.key)
        found |= reached(tensor.parts)
    return found


def stored(path: Path) -> set[str]:
    """The keys of the storages that have a record."""
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    data = {name.removeprefix("data/") for name in names if name.startswith("data/")}
    return data | {name for name in names if name.startswith("constants/")}


def as_stored(tensor: torch.Tensor) -> list[Any]:
    """The numbers that a file has of a tensor."""
    plain: list[Any] = (tensor.int_repr() if tensor.is_quantized else tensor).tolist()
    return plain


def flat_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict, those of packed weights by their positions in the state that torch gives."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found[name] = item
        elif isinstance(item, tuple | list):
            for index, inner in enumerate(item):
                add(f"{name}.{index}", inner)
        elif isinstance(item, torch.ScriptObject):
            add(name, item.__getstate__()[0])

    with engine():
        for name, item in module.state_dict().items():
            add(name, item)
    return found


def names(checkpoint: Checkpoint) -> list[str]:
    return [tensor.name for tensor in checkpoint.tensors]


# --- every storage is reached ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mobile"),
    [(name, mobile) for name in SCRIPTED for mobile in (False, True) if not mobile or name != "a constant"],
)
def test_every_record_of_a_scripted_module_is_reached_by_an_entry(name: str, mobile: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    scripted(name, path, mobile=mobile)
    checkpoint = open_checkpoint(str(path))
    assert reached(checkpoint.tensors) == stored(path)
    assert stored(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_storage_of_a_pickled_quantized_module_is_reached(name: str, zipped: bool, tmp_path: Path) -> None:
    path, other = tmp_path / "m.pt", tmp_path / "zip.pt"
    eager(name, path, _use_new_zipfile_serialization=zipped)
    eager(name, other)
    assert len(reached(open_checkpoint(str(path)).tensors)) == len(stored(other)) > 0


# --- names and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_tensors_go_by_what_the_state_dict_calls_them(name: str, tmp_path: Path) -> None:
    whole, script = tmp_path / "whole.pt", tmp_path / "script.pt"
    module = eager(name, whole)
    with engine():
        torch.jit.save(torch.jit.script(module), str(script))
    expected = flat_state(module)
    for path in (whole, script):
        with ckpt_cli.open(str(path)) as checkpoint:
            for key, tensor in expected.items():
                if key.rpartition(".")[2] not in (
                    "scale",
                    "zero_point",
                ):  # numbers, which the state_dict has as tensors
                    assert as_stored(checkpoint[key].torch()) == as_stored(tensor)


def test_parts_that_have_no_name_go_by_their_position(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    scripted("a state of its own", path)
    assert names(open_checkpoint(str(path))) == ["0.0", "0.1.0", "1.0", "1.1.0"]
    with ckpt_cli.open(str(path)) as checkpoint:
        assert checkpoint["1.1.0"].numpy().tolist() == [0, 2, 4, 6]
        assert checkpoint["0.2"] == 2.0


def test_packed_tensors_are_shown_compared_hashed_and_checked(tmp_path: Path, ckpt: Ckpt) -> None:
    path, other = tmp_path / "m.pt", tmp_path / "other.pt"
    scripted("linear", path)
    other.write_bytes(path.read_bytes())
    weight, bias = "0._packed_params._packed_params.0", "0._packed_params._packed_params.1"
    assert ckpt("check", "--deep", path).code == 0
    assert ckpt("set", other, f"{bias}[1]=3").code == 0
    assert ckpt("show", other, bias).out == "tensor([0., 3., 0., 0.])\n"
    assert ckpt("diff", path, other).code == 1
    assert weight in ckpt("hash", path).out
    with engine():
        changed = getattr(torch.jit.load(str(other)), "0")._packed_params._packed_params
        assert changed.__getstate__()[0][1].tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_tensors_that_a_module_keeps_to_itself_are_listed_once(name: str, tmp_path: Path) -> None:
    path, other = tmp_path / "m.pt", tmp_path / "other.pt"
    module = eager(name, path)
    keeper = torch.nn.Module()
    keeper.__dict__["_kept"] = {"deep": [module]}
    with engine():
        torch.save(keeper, other)
    assert names(open_checkpoint(str(other))) == [
        f"_kept.deep.0.{known}" for known in names(open_checkpoint(str(path)))
    ]


# --- edits -----------------------------------------------------------------------------------------------------------


def test_set_changes_a_packed_weight_in_place(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    eager("conv2d", path)
    assert ckpt("set", path, "0.weight[0,0,0,0]=7", "0.bias=1").code == 0
    found = loaded(path)[0]
    assert found.weight().int_repr()[0, 0, 0, 0] == 7
    assert found.bias().tolist() == [1, 1, 1, 1]


def test_a_tied_bias_changes_with_the_packed_one(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    eager("dynamic lstm cell", path)
    done = ckpt("set", path, "bias_ih[0]=4")
    assert "_packed_weight_ih.1" in done.err
    assert flat_state(loaded(path))["_packed_weight_ih.1"][0] == 4


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("linear", "0._packed_params._packed_params.1"),
        ("conv2d", "0.bias"),
        ("dynamic lstm", "_all_weight_values.0.param.1.1"),
        ("embedding", "0._packed_params._packed_weight"),
    ],
)
def test_what_torch_packs_is_neither_taken_out_nor_cast(name: str, entry: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    eager(name, path)
    before = path.read_bytes()
    commands = [("rm", path, entry), ("rename", path, entry, "x")]
    if name != "embedding":
        commands.append(("cast", path, "float16", entry))
    for command in commands:
        done = ckpt(*command)
        assert (done.code, len(done.err.splitlines()) <= 2) == (2, True)
    assert path.read_bytes() == before


def test_all_else_of_a_quantized_module_can_be_edited(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    eager("two after a float one", path)
    assert ckpt("cast", path, "float16", "0").code == 0
    assert ckpt("set", path, "1.scale=0.5").code == 0
    assert ckpt("rm", path, "2").code == 0
    found = loaded(path)
    assert (found[0].weight.dtype, found[1].scale, len(found)) == (torch.float16, 0.5, 2)
    assert found[1].weight().shape == (8, 8)


# --- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [scripted, eager])
@pytest.mark.parametrize("target", ["out.safetensors", "out.pt", "out.npz"])
def test_quantized_weights_that_do_not_fit_are_refused_by_name(
    save: Any, target: str, tmp_path: Path, ckpt: Ckpt
) -> None:
    save("linear", tmp_path / "m.pt")
    done = ckpt("convert", tmp_path / "m.pt", tmp_path / target)
    assert done.code == 2
    assert "0._packed_params._packed_params.0: quantized tensor" in done.err
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize("save", [scripted, eager])
def test_packed_weights_that_are_plain_numbers_come_along(save: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "m.pt", tmp_path / "o.safetensors"
    save("dynamic lstm of halves", path)
    assert ckpt("convert", path, out).code == 0
    with ckpt_cli.open(str(path)) as checkpoint:
        for name, tensor in load_file(out).items():
            assert torch.equal(tensor, checkpoint[name].torch())
    assert len(load_file(out)) == 4


def test_the_weights_of_a_frozen_module_come_along(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "m.pt", tmp_path / "o.safetensors"
    scripted("a constant in a module", path)
    assert ckpt("convert", path, out).code == 2
    assert ckpt("convert", path, out, "--tensors-only").code == 0
    assert sorted(tensor.shape for tensor in load_file(out).values()) == [(2,), (2, 3)]


def test_constants_of_bytecode_are_tied_to_those_of_the_code(tmp_path: Path) -> None:
    path = tmp_path / "m.ptl"
    scripted("a constant in a module", path, mobile=True)
    tensors = {tensor.name: tensor for tensor in open_checkpoint(str(path)).tensors}
    (bias,) = (name for name in tensors if name.startswith("BYTECODE.") and tensors[name].shape == (2,))
    assert ".forward." in bias
    assert tensors[bias].view in [tensor.view for name, tensor in tensors.items() if name.startswith("CONSTANTS.")]


def test_packed_weights_come_along_beside_others(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "m.pt", tmp_path / "o.safetensors"
    with engine():
        packed = torch.ao.nn.quantized.dynamic.Linear(2, 2, dtype=torch.float16)
        torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), packed), path)
    assert ckpt("convert", path, out).code == 0
    inside = "1._packed_params._packed_params"
    assert set(load_file(out)) == {"0.weight", "0.bias", f"{inside}.0", f"{inside}.1"}


# --- hostile ones ----------------------------------------------------------------------------------------------------


def test_states_that_are_shared_or_nest_meet_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    held = b"ctorch\nScriptObject\n)\x81"
    wide = b"(" + b"N" * 100_000 + b"t"
    named = b"X\x25\0\0\0__torch__.torch.classes.quantized.Base"
    shared = wide + named[:1] + len(named[5:]).to_bytes(4, "little") + named[5:] + b"\x86q\0000"
    path.write_bytes(b"\x80\2" + shared + b"](" + (held + b"h\0b") * 1000 + b"e.")
    assert isinstance(refused(str(path)), LimitError)


@pytest.mark.parametrize("state", [None, 5, (), (1,), (1, 2), ((), "x"), (((),), "__torch__.torch.classes.a.B")])
def test_a_state_that_torch_does_not_write_is_still_listed(state: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickled({"a": built(new("torch.ScriptObject"), state), "b": 1}))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.entries[-1].name == "b"
    assert checkpoint.entries[0].name.partition(".")[0] == "a"
