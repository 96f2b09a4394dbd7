"""Code and JSON in archives: Keras's Lambda layers, exported programs, TorchScript, and pickles in base64."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import pickled
from builders.pt import Record, archive
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli.ops.scan import Scan, scan
from ckpt_cli.scanner.documents import is_arithmetic


def _archived(path: Path, members: dict[str, bytes]) -> Scan:
    return scanned(path, archive([Record(name, content) for name, content in members.items()]))


# --- Keras ------------------------------------------------------------------------------------------------------------

LAMBDA = rb'{"class_name":"Functional","config":{"layers":[{"class_name":"%s","config":{"name":"x"}}]}}'

SPELLINGS = {
    "plain": LAMBDA % b"Lambda",
    "with an escape": LAMBDA % rb"\u004cambda",
    "with escapes only": LAMBDA % rb"\u004c\u0061\u006D\u0062\u0064\u0061",
    "a key with an escape": (LAMBDA % b"Lambda").replace(b"class_name", rb"\u0063lass_name"),
    "with white space": (LAMBDA % b"Lambda").replace(b":", b" \n\t: "),
    "a function": LAMBDA % b"__lambda__",
    "UTF-16": (LAMBDA % b"Lambda").decode().encode("utf-16"),
    "UTF-32 without a mark": (LAMBDA % b"Lambda").decode().encode("utf-32-le"),
    "UTF-8 with a mark": b"\xef\xbb\xbf" + LAMBDA % b"Lambda",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_lambda_layer_is_found_however_it_is_spelled(tmp_path: Path, name: str) -> None:
    found = _archived(tmp_path / "m.keras", {"metadata.json": b"{}", "config.json": SPELLINGS[name]})
    assert codes(found) == {"keras-lambda"}
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.json").write_bytes(SPELLINGS[name])
    assert codes(scan(str(folder))) == {"keras-lambda"}


@pytest.mark.parametrize("name", ["plain", "with an escape", "with escapes only", "a key with an escape", "a function"])
def test_a_lambda_layer_is_found_in_hdf5(tmp_path: Path, name: str) -> None:
    content = b"\x89HDF\r\n\x1a\n" + bytes(50) + SPELLINGS[name] + bytes(50)
    assert codes(scanned(tmp_path / "m.h5", content)) == {"keras-lambda"}


def test_a_model_of_keras_without_code_is_clean(tmp_path: Path) -> None:
    layer = {"module": "keras.layers", "class_name": "Dense", "config": {"name": "Lambda"}, "registered_name": None}
    function = {"module": "builtins", "class_name": "function", "config": "relu", "registered_name": "function"}
    config = json.dumps({"class_name": "Functional", "config": {"layers": [layer, function]}}).encode()
    found = _archived(tmp_path / "m.keras", {"config.json": config, "model.weights.h5": b"\x89HDF\r\n\x1a\n" + config})
    assert (found.ok, found.findings) == (True, [])


def test_a_module_that_keras_would_import_is_judged(tmp_path: Path) -> None:
    config = json.dumps({"class_name": "function", "module": "os", "config": "system"}).encode()
    assert codes(_archived(tmp_path / "m.keras", {"config.json": config}), "error") == {"keras-import"}


def test_a_module_of_torch_that_keras_has_in_base64_is_looked_into(tmp_path: Path) -> None:
    held = base64.b64encode(archive([Record("archive/data.pkl", HARMFUL)])).decode()
    layer = {"class_name": "TorchModuleWrapper", "config": {"module": held}}
    assert "dangerous-global" in codes(_archived(tmp_path / "m.keras", {"config.json": json.dumps(layer).encode()}))


@pytest.mark.parametrize("attribute", [HARMFUL, b"cos\nsystem\n(Vid\ntR.", b"(cos\nsystem\nVid\no."])
def test_an_attribute_of_hdf5_that_is_a_pickle_is_found(tmp_path: Path, attribute: bytes) -> None:
    content = b"\x89HDF\r\n\x1a\n" + bytes(50) + attribute + bytes(50)
    assert codes(scanned(tmp_path / "m.h5", content)) == {"dangerous-global", "hidden-pickle"}


def test_words_in_hdf5_are_no_names(tmp_path: Path) -> None:
    words = b"\n".join([b"calendar", b"subprocess", b"copy", b"os", b"cos", b"system", b"(chair", b"eval", b"x"])
    assert scanned(tmp_path / "m.h5", b"\x89HDF\r\n\x1a\n" + bytes(50) + words + bytes(50)).ok


# --- exported programs ------------------------------------------------------------------------------------------------


class Sized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x]).view(-1, 8) * (x.shape[0] // 2 % 3) + x.shape[0]


@pytest.fixture(scope="module")
def exported() -> dict[str, bytes]:
    buffer = io.BytesIO()
    size = torch.export.Dim("n", min=2, max=64)
    torch.export.save(torch.export.export(Sized(), (torch.ones(6, 4),), dynamic_shapes=({0: size},)), buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name: file.read(name) for name in file.namelist()}


def _changed(document: Any, key: str, value: str) -> Any:
    if isinstance(document, dict):
        if key == "range_constraints" and isinstance(document.get(key), dict):
            return document | {key: {value: next(iter(document[key].values()))}}
        return {name: value if name == key else _changed(item, key, value) for name, item in document.items()}
    return [_changed(item, key, value) for item in document] if isinstance(document, list) else document


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_clean(tmp_path: Path, exported: dict[str, bytes]) -> None:
    assert any(b"expr_str" in content for content in exported.values())
    found = _archived(tmp_path / "m.pt2", exported)
    assert (found.ok, found.findings) == (True, [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("expr_str", "__import__('os').system('echo MARKER')", "expression"),
        ("expr_str", "eval(chr(95))", "expression"),
        ("expr_str", "s77.__class__", "expression"),
        ("range_constraints", "open('x')", "expression"),
        ("target", "torch.hub.load", "script-effect"),
        ("target", "torch.ops.aten.from_file.default", "script-effect"),
    ],
)
def test_code_in_an_exported_program_is_found(
    tmp_path: Path, exported: dict[str, bytes], key: str, value: str, code: str
) -> None:
    members = {
        name: json.dumps(_changed(json.loads(content), key, value)).encode() if name.endswith("model.json") else content
        for name, content in exported.items()
    }
    assert codes(_archived(tmp_path / "m.pt2", members), "error") == {code}
    escaped = {name: content.replace(b'"expr_str"', rb'"\u0065xpr_str"') for name, content in members.items()}
    assert codes(_archived(tmp_path / "m.pt2", escaped), "error") == {code}


@pytest.mark.parametrize(
    "text",
    ["s0", "2*s0 + 1", "Symbol('s77', positive=True, integer=True)", "Max(1, s0//2)", "Eq(s0 % 8, 0)", "1.5e-3*u0"],
)  # fmt: skip
def test_sizes_are_arithmetic(text: str) -> None:
    assert is_arithmetic(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "open(x)", "s0.a", "[s0]", "lambda: 0", "'a b'", "Symbol('f(x)')", "f\"{x}\"", "a__b", "x:=1", "getattr(a, b)",
        "1" * (1 << 17), "Add('open(1)')", "{1}", "s0 if s1 else s2; s3", "\u017fymbol('x')", "exec",
    ],
)  # fmt: skip
def test_anything_else_is_not(text: str) -> None:
    assert not is_arithmetic(text.encode())


# --- stable-baselines3 ------------------------------------------------------------------------------------------------


def test_the_pickles_of_a_stable_baselines3_archive_are_searched(tmp_path: Path) -> None:
    for payload, ok in ((HARMFUL, False), (pickled({"a": 1}), True)):
        value = {":type:": "<class 'abc.ABCMeta'>", ":serialized:": base64.b64encode(payload).decode()}
        data = json.dumps({"policy_class": value, "n_envs": 1}).encode()
        found = _archived(tmp_path / "agent.zip", {"data": data, "_stable_baselines3_version": b"2.3.0"})
        assert found.ok is ok
        escaped = {"data": data.replace(b"gAJ", rb"\u0067AJ").replace(b":serialized:", rb":serializ\u0065d:")}
        assert _archived(tmp_path / "agent.zip", escaped).ok is ok


# --- TorchScript ------------------------------------------------------------------------------------------------------


class Saves(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "MARKER")
        return x


class Maps(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("f", False, 3)


class Talks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2, "use torch.save(x, 'f')"
        print("os.system", x.shape)
        return torch.relu(x) @ x.t()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("module", "code"), [(Saves, {"script-effect"}), (Maps, {"script-effect"}), (Talks, set())])
def test_torchscript_that_reads_or_writes_files_is_found(tmp_path: Path, module: type, code: set[str]) -> None:
    torch.jit.script(module()).save(str(tmp_path / "m.pt"))
    assert codes(scan(str(tmp_path / "m.pt"))) == code


@pytest.mark.parametrize(
    ("line", "severities"),
    [
        ('torch.save(x, "f")', ["error"]),
        ('torch . save(x, "f")', ["error"]),
        ('torch. # why\n    save(x, "f")', ["error"]),
        ('torch.\\\n    save(x, "f")', ["error"]),
        ('ops.aten.save(x, "f")', ["error"]),
        ('_0 = ops.aten.from_file("f")', ["error"]),
        ("_0 = torch.from_file", ["error"]),
        ('(x).save("f")', ["error"]),
        ('x.save("f")', ["error"]),
        ('t = torch\n    t.save(x, "f")', ["error", "warning"]),
        ("t = torch\n    t.relu(x)", ["warning"]),
        ("torch" + " " * 5000 + ".relu(x)", ["warning"]),
        ("import os\n    os.system(x)", ["warning"]),
        ("from subprocess import run", ["warning"]),
        ("_0 = ops.c10d.send(x)", ["warning"]),
        ("_0 = ops.lab.f(x)", ["note"]),
        ('_0 = "torch.save"', []),
        ("# torch.save(x)", []),
        ("_0 = torch.relu(x)", []),
        ("_0 = ops.quantized.linear(x)", []),
        ("_0 = __torch__.torch.nn.modules.lab.save(x)", []),
        ("self.torch = x", []),
    ],
)
def test_code_is_read_as_torchscript_reads_it(tmp_path: Path, line: str, severities: list[str]) -> None:
    code = f"class M(Module):\n  def forward(self: __torch__.M,\n    x: Tensor) -> Tensor:\n    {line}\n    return x\n"
    found = _archived(tmp_path / "m.pt", {"m/code/__torch__.py": code.encode()})
    assert sorted(item.severity for item in found.findings) == severities


def test_a_method_of_ones_own_called_save_is_no_operator(tmp_path: Path) -> None:
    code = (
        b"class M(Module):\n  def save(self) -> int:\n    return 1\n  def f(self) -> int:\n    return (self).save()\n"
    )
    assert _archived(tmp_path / "m.pt", {"m/code/__torch__.py": code}).findings == []


def test_every_operator_of_torch_that_takes_a_file_name_is_known() -> None:
    from ckpt_cli.scanner.scripts import effect_of

    words = ("file", "path", "url")
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if any(word in argument.name for argument in schema.arguments for word in words if "str" in str(argument.type)):
            assert effect_of(namespace, name), schema


def test_a_pickle_in_the_metadata_of_safetensors_or_in_any_json_is_found(tmp_path: Path) -> None:
    for content, expected in ((HARMFUL, {"dangerous-global"}), (b"quiet text " * 9, set())):
        held = {"__metadata__": {"state": base64.b64encode(content).decode()}}
        header = json.dumps(held).encode()
        assert codes(scanned(tmp_path / "m.safetensors", len(header).to_bytes(8, "little") + header)) == expected
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(header)
        (folder / "m.pkl").write_bytes(HARMLESS)
        assert codes(scan(str(folder))) == expected
