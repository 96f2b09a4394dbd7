"""TorchScript archives: names, kinds and values against torch.jit, and what a bad one is told for."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import Ops, built, call, named, new, tensor
from builders.pt import DEFLATED, Record, archive, torch_records
from conftest import Ckpt
from contract import quietly
from torch import nn

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, MalformedError, UnknownFormatError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Tensor, Value


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """TorchScript is deprecated, and says so."""
    with quietly():
        yield


class Part(nn.Module):
    """A module with every kind of attribute that a script can have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.plain = torch.arange(3.0)
        self.ints, self.floats, self.bools = [1, 2], [1.5], [True, False]
        self.tensors = [torch.ones(1), torch.zeros(2)]
        self.table = {"a": torch.ones(4)}
        self.numbers = {"one": 1}
        self.rate, self.steps, self.word = 0.5, 7, "naïve"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = self.plain.sum() + self.tensors[0] + self.table["a"][0] + self.ints[0] + self.floats[0]
        if self.bools[0] and self.steps > 0 and self.word != "" and self.numbers["one"] > 0:
            used = used * self.rate
        return self.linear(x) + used + self.kept[0] + self.passing[0] + self.frozen[0]


class Whole(nn.Module):
    """A module of modules, two of which share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.part(x))


def saved(folder: Path, module: Any, **extra: Any) -> Path:
    """What torch.jit.save makes of a module."""
    path = folder / "script.pt"
    torch.jit.save(module, path, **extra)
    return path


def values(checkpoint: Checkpoint) -> dict[str, object]:
    """Each entry's value, or the shape of one that is a tensor."""
    return {entry.name: entry.value if isinstance(entry, Value) else entry.shape for entry in checkpoint.entries}


def agrees(path: Path) -> dict[str, Tensor]:
    """Compare names, kinds, gradients and shapes with what torch.jit.load finds; all tensors by name."""
    module = torch.jit.load(path)
    mine = {each.name: each for each in open_checkpoint(str(path)).tensors}
    state = module.state_dict(keep_vars=True)
    assert set(state) <= set(mine)
    for name, expected in state.items():
        assert (mine[name].shape, mine[name].requires_grad) == (tuple(expected.shape), expected.requires_grad)
    kinds = dict.fromkeys(dict(module.named_parameters(remove_duplicate=False)), "parameter")
    kinds |= dict.fromkeys(dict(module.named_buffers(remove_duplicate=False)), "buffer")
    assert {name: each.kind for name, each in mine.items() if each.kind != "tensor"} == kinds
    return mine


def test_a_scripted_module_has_the_names_and_kinds_of_its_state_dict(tmp_path: Path) -> None:
    mine = agrees(saved(tmp_path, torch.jit.script(Whole())))
    others = {name for name, each in mine.items() if each.kind == "tensor"}
    assert others == {"part.plain", "part.tensors.0", "part.tensors.1", "part.table.a"}
    assert mine["layers.0.weight"].view == mine["layers.2.weight"].view


def test_attributes_are_plain_values(tmp_path: Path) -> None:
    found = values(open_checkpoint(str(saved(tmp_path, torch.jit.script(Part())))))
    expected = {"training": True, "ints": [1, 2], "floats": [1.5], "bools": [True, False], "numbers.one": 1,
                "rate": 0.5, "steps": 7, "word": "naïve", "linear.training": True}  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_an_empty_list_and_dict_of_a_type_are_plain_values(tmp_path: Path) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ints = torch.jit.Attribute([], list[int])
            self.table = torch.jit.Attribute({}, dict[str, torch.Tensor])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + len(self.ints) + len(self.table)

    found = values(open_checkpoint(str(saved(tmp_path, torch.jit.script(Empty())))))
    assert (found["ints"], found["table"]) == ([], {})


def test_constants_of_the_code_go_by_the_name_that_it_calls_them(tmp_path: Path, ckpt: Ckpt) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + torch.tensor([1.0, 2.0, 3.0])

    path = saved(tmp_path, torch.jit.trace(Scaled(), torch.ones(3)))
    mine = agrees(path)
    assert list(mine) == ["weight", "CONSTANTS.c0"]
    with zipfile.ZipFile(path) as file:
        assert any(b"CONSTANTS.c0" in file.read(name) for name in file.namelist() if name.endswith(".py"))
    assert ckpt("set", path, "CONSTANTS.c0[0]=10", "weight=2").code == 0
    assert torch.jit.load(path)(torch.ones(3)).tolist() == [12.0, 4.0, 5.0]


def test_a_frozen_module_has_constants_only(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval())))
    checkpoint = open_checkpoint(str(path))
    names = [each.name for each in checkpoint.tensors]
    assert sorted(names) == [f"CONSTANTS.c{number}" for number in range(4)]


def test_a_quantized_module_lists_its_packed_weights(tmp_path: Path) -> None:
    module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    weight, bias = open_checkpoint(str(saved(tmp_path, torch.jit.script(module)))).tensors
    assert (weight.name, weight.dtype.name, weight.layout) == (
        "0._packed_params._packed_params.0",
        "qint8",
        "quantized",
    )
    assert (bias.name, bias.dtype.name, bias.shape) == ("0._packed_params._packed_params.1", "float32", (4,))


def test_a_model_for_mobile_is_said_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "mobile.ptl"
    torch.jit.script(Whole())._save_for_lite_interpreter(str(path))
    checkpoint = open_checkpoint(str(path))
    agrees(path)
    assert checkpoint.version == "TorchScript archive, version 3, with bytecode for mobile"


def test_extra_files_are_metadata(tmp_path: Path) -> None:
    extra = {"note.txt": "hello", "deep/config.json": "{}", "raw": b"\xff\xfe", "long": "x" * 70_000}
    checkpoint = open_checkpoint(str(saved(tmp_path, torch.jit.script(nn.Linear(1, 1)), _extra_files=extra)))
    assert checkpoint.metadata == {
        "note.txt": "hello", "deep/config.json": "{}", "raw": "<2 bytes>", "long": "<70000 bytes>",
    }  # fmt: skip


def test_set_leaves_a_file_that_torch_and_zipfile_read(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, torch.jit.script(Whole()))
    assert ckpt("set", path, "layers.2.weight[0,0]=100", "part.plain=9", "part.table.a[1]=8").code == 0
    module = torch.jit.load(path)
    assert module.state_dict()["layers.0.weight"][0, 0] == 100
    assert module.part.plain.tolist() == [9, 9, 9]
    assert module.part.table["a"].tolist() == [1, 8, 1, 1]
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_only_the_code_of_classes_that_are_met_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is more code than the limit, what is a parameter is not known."""
    path = saved(tmp_path, torch.jit.script(Whole()))
    monkeypatch.setattr(limits, "SCRIPT_CODE", 10)
    assert {each.kind for each in open_checkpoint(str(path)).tensors} == {"tensor"}


# --- built by hand ---------------------------------------------------------------------------------------------------

T = tensor("0", (4,))
CODE = b'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = ["b", ]\n  w : Tensor\n'
MODULE = built(new("__torch__.M"), {"w": T, "b": T, "n": call("torch.jit._pickle.build_intlist", [1, 2])})


def script(folder: Path, root: Any = MODULE, *, code: bytes | None = CODE, constants: Any = (), **more: bytes) -> Path:
    """An archive of one class."""
    records = torch_records(root, {"0": bytes(16)}, layout=False)
    records.append(Record("archive/constants.pkl", torch_records(constants, {})[0].content))
    if code is not None:
        records.append(Record("archive/code/__torch__.py", code, method=DEFLATED))
    records += (Record(f"archive/{name}", content) for name, content in more.items())
    path = folder / "built.pt"
    path.write_bytes(archive(records))
    return path


def kinds(path: Path) -> list[str]:
    """The kinds of all tensors."""
    return [each.kind for each in open_checkpoint(str(path)).tensors]


def test_an_archive_without_code_has_tensors_of_no_kind(tmp_path: Path) -> None:
    assert kinds(script(tmp_path)) == ["parameter", "buffer"]
    assert kinds(script(tmp_path, code=None)) == ["tensor", "tensor"]
    assert kinds(script(tmp_path, code=CODE.replace(b"class M(", b"class N("))) == ["tensor", "tensor"]
    assert kinds(script(tmp_path, code=b"\xff\0 nothing")) == ["tensor", "tensor"]


def test_only_classes_of_scripts_have_code(tmp_path: Path) -> None:
    assert kinds(script(tmp_path, built(new("lab.M"), {"w": T}))) == ["tensor"]
    assert kinds(script(tmp_path, built(new("__torch__.M"), {"w": T, 1: T}))) == ["parameter", "tensor"]


def test_wrappers_within_wrappers_are_taken_off_so_often_only(tmp_path: Path) -> None:
    for times, plain in ((2, True), (8, True), (9, False)):
        node: Any = [1]
        for _ in range(times):
            node = call("torch.jit._pickle.restore_type_tag", node, "List[int]")
        (found,) = values(open_checkpoint(str(script(tmp_path, built(new("__torch__.M"), {"x": node}))))).values()
        assert (found == [1]) is plain


def test_a_wrapper_of_nothing_is_an_object(tmp_path: Path) -> None:
    odd = call("torch.jit._pickle.build_intlist")
    (found,) = values(open_checkpoint(str(script(tmp_path, built(new("__torch__.M"), {"x": odd}))))).values()
    assert found == Opaque("torch.jit._pickle.build_intlist()")


BAD: dict[str, tuple[dict[str, Any], type[CkptError], str]] = {
    "constants that are no pickle": ({"constants": b"hello"}, MalformedError, "the pickle"),
    "a constant without record": ({"constants": (T,)}, MalformedError, "has no record 'archive/constants/0'"),
    "a storage that is too short": ({"root": built(new("__torch__.M"), {"w": tensor("0", (5,))})}, MalformedError,
                                    "storage '0' should have 20 bytes, its record has 16"),
    "a key that means two records": ({"root": built(new("__torch__.M"), {"w": tensor("constants/0", (4,))}),
                                      "constants": (T,), "data/constants/0": bytes(16), "constants/0": bytes(16)},
                                     MalformedError, "two storages would be called 'constants/0'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused(name: str, tmp_path: Path) -> None:
    given, kind, words = BAD[name]
    path = script(tmp_path, **given)
    with pytest.raises(kind) as refused:
        open_checkpoint(str(path))
    assert words in str(refused.value)
    assert refused.value.path == str(path)


def test_an_archive_without_its_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.pt"
    path.write_bytes(archive([Record("archive/constants.pkl", b"\x80\2).")]))
    with pytest.raises(MalformedError, match=r"there is no record 'archive/data\.pkl'"):
        open_checkpoint(str(path))


def test_an_archive_is_known_without_running_anything(tmp_path: Path) -> None:
    run = call("os.system", "touch canary")
    path = script(tmp_path, built(new("__torch__.M"), {"w": T, "x": run, "f": named("os.system")}), constants=(run,))
    checkpoint = open_checkpoint(str(path))
    assert [entry.name for entry in checkpoint.entries] == ["w", "x", "f", "CONSTANTS.c0"]
    assert "os.system" in checkpoint.objects
    assert isinstance(run, Ops)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (["archive/tensors/0", "archive/model.json"], "an old TorchScript archive (model.json"),
        (["archive/.data/extern_modules", "archive/pkg/a.py"], "a torch.package archive"),
        (["archive/data/aotinductor/model/x.so"], "an AOTInductor package"),
    ],
)
def test_other_zip_files_of_torch_are_told_for_what_they_are(records: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(archive([Record(name, b"{}") for name in records]))
    with pytest.raises(UnknownFormatError) as refused:
        open_checkpoint(str(path))
    assert words in str(refused.value)


def test_a_package_of_torch_is_told_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "package.pt"
    with torch.package.PackageExporter(str(path)) as exporter:
        exporter.save_pickle("model", "state.pkl", {"a": torch.ones(2)})
    with pytest.raises(UnknownFormatError, match=r"a torch\.package archive"):
        open_checkpoint(str(path))
