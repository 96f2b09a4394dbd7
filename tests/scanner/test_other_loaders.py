"""What loaders other than those of pickles would run, import, unpack or read from elsewhere is a finding."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from scanning import HARMFUL, HARMLESS, codes, scanned


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def _tar(members: dict[str, bytes], links: dict[str, str] | None = None, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for number, (name, target) in enumerate((links or {}).items()):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 2], target
            file.addfile(member)
    return buffer.getvalue()


# --- configurations ---------------------------------------------------------------------------------------------------

YAML = {
    "latent diffusion": b"model:\n  target: os.system\n  params: {command: id}\n",
    "LightningCLI": b"model:\n  class_path: os.system\n  init_args: {command: id}\n",
    "in braces": b"model: {target: 'os.system', params: {}}\n",
    "MLflow": b"flavors:\n  python_function:\n    loader_module: os\n",
    "an escaped key of Hydra": b'model:\n  "_t\\x61rget_": "os.syst\\x65m"\n',
    "an alias": b"x: &a os.system\nmodel:\n  _target_: *a\n",
    "an interpolation": b"x: os.system\nmodel:\n  _target_: ${x}\n",
}


@pytest.mark.parametrize("kind", YAML)
def test_what_a_loader_of_yaml_would_call_is_a_finding(tmp_path: Path, kind: str) -> None:
    assert codes(scanned(tmp_path / "m.nemo", _tar({"model_config.yaml": YAML[kind]}))) == {"config-call"}


@pytest.mark.parametrize("code", ["__import__('os').system('id')", "[open('x') for _ in '1']", "os.getcwd()"])
def test_a_resolver_that_evaluates_python_is_a_finding(tmp_path: Path, code: str) -> None:
    text = b"x: ${eval:" + code.encode() + b"}\n"
    assert codes(scanned(tmp_path / "m.nemo", _tar({"model_config.yaml": text}))) == {"config-call"}


def test_ordinary_yaml_is_quiet(tmp_path: Path) -> None:
    text = (
        b"model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    size: ${eval:2 * ${model.dim}}\n"
        b"  class_path: torch.nn.Linear\n  _target_: nemo.collections.asr.models.EncDecCTCModel\n"
        b"  optim: {_target_: '${optimizer}', name: 'a.b'}\nloader_module: mlflow.pytorch\nhome: ${oc.env:HOME}\n"
        b"target: some text about os.system\nregex: '\\x61'\n"
    )
    assert scanned(tmp_path / "m.nemo", _tar({"model_config.yaml": text})).findings == []


JSON: dict[str, tuple[str, object]] = {
    "sentence-transformers": ("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "os.system"}]),
    "PEFT": ("adapter_config.json", {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}),
    "LightningCLI": ("config.json", {"class_path": "os.system", "init_args": {}}),
    "latent diffusion": ("config.json", {"model": {"target": "os.system", "params": {}}}),
}


@pytest.mark.parametrize("kind", JSON)
def test_what_a_loader_of_json_would_import_is_a_finding(tmp_path: Path, kind: str) -> None:
    name, document = JSON[kind]
    content = json.dumps(document).encode()
    assert codes(scanned(tmp_path / "m.zip", _zip({name: content}))) == {"config-call"}
    assert codes(scanned(tmp_path / name, content)) == {"config-call"}


def test_a_pipeline_of_another_repository_is_a_finding(tmp_path: Path) -> None:
    document = json.dumps({"custom_pipelines": {"x": {"impl": "somebody/else--code.Pipe"}}, "impl": "a.b"}).encode()
    assert codes(scanned(tmp_path / "m.zip", _zip({"config.json": document}))) == {"remote-code"}


def test_ordinary_modules_are_quiet(tmp_path: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    others = {"type": "code.python", "parent_library": "transformers.models.bert", "target": "labels"}
    members = {"modules.json": json.dumps(modules).encode(), "card.json": json.dumps(others).encode()}
    assert scanned(tmp_path / "m.zip", _zip(members)).findings == []


# --- exported programs and machine code -------------------------------------------------------------------------------


def _program(guards: list[str]) -> bytes:
    document = json.dumps({"graph_module": {"signature": {}}, "guards_code": guards, "verifiers": ["TRAINING"]})
    return _zip({"m/archive_format": b"pt2", "m/models/model.json": document.encode()})


def test_the_guards_of_an_exported_program_are_conditions_on_sizes(tmp_path: Path) -> None:
    sizes = [
        "L['x'].size()[0] >= 2",
        "L['args'][0].stride()[1] == 4 * L['x'].size()[0]",
        "Mod(s0, 8) == 0",
        "L['open'].size()[0] != 1",
    ]
    assert scanned(tmp_path / "m.pt2", _program(sizes)).findings == []
    for guard in ("__import__('os').system('id')", "os.system('id')", "True\nimport os", "eval('1')"):
        assert codes(scanned(tmp_path / "m.pt2", _program([*sizes, guard]))) == {"expression"}


@pytest.mark.parametrize("head", [b"\x7fELF\2\1\1", b"MZ\x90\0", b"\xcf\xfa\xed\xfe"])
@pytest.mark.parametrize("name", ["m/data/aotinductor/model/cx.wrapper.so", "m/a.pyd", "m/b.DLL", "m/c.dylib"])
def test_a_library_of_machine_code_in_a_package_is_a_finding(tmp_path: Path, name: str, head: bytes) -> None:
    assert codes(scanned(tmp_path / "m.pt2", _zip({name: head + bytes(200)}))) == {"native-code"}
    assert scanned(tmp_path / "m.pt2", _zip({name: b"not one" * 20})).findings == []


# --- members and files elsewhere --------------------------------------------------------------------------------------

OUTSIDE = ["../evil.py", "a/../../evil.py", "/etc/cron.d/x", "..\\evil.py", "C:/evil.py"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_member_that_unpacks_outside_of_its_folder_is_a_finding(tmp_path: Path, name: str) -> None:
    assert codes(scanned(tmp_path / "m.tar", _tar({name: b"text", "a": b"text"}))) == {"outside-folder"}
    assert "outside-folder" in codes(scanned(tmp_path / "m.keras", _zip({name: b"text", "a": b"text"})))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("target", [*OUTSIDE[:4], "../" + "x" * 200, "/" + "é" * 80])
def test_a_link_that_leads_outside_of_its_folder_is_a_finding(tmp_path: Path, target: str, form: int) -> None:
    for links in ({"a": target}, {"b": "c", "a": target}):
        content = _tar({"c": b"text"}, links, form)
        assert codes(scanned(tmp_path / "m.tar", content)) == {"outside-folder"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_ordinary_members_and_links_are_quiet(tmp_path: Path, form: int) -> None:
    members = {"./model_config.yaml": b"a: 1\n", "a..b/..c": b"text", "x" * 150 + "/y": b"text"}
    content = _tar(members, {"latest": "step-2", "other": "a..b/..c", "long": "x" * 150 + "/y"}, form)
    assert scanned(tmp_path / "m.tar", content).findings == []


def _onnx(path: bytes) -> bytes:
    entry = b"\x0a\x08location\x12" + bytes([len(path)]) + path
    tensor = b"\x08\x02\x10\x01\x42\x01w" + b"\x6a" + bytes([len(entry)]) + entry + b"\x70\x01"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    return b"\x08\x08\x12\x07pytorch\x3a" + bytes([len(graph)]) + graph


def test_tensors_of_an_onnx_model_are_read_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in (b"../../etc/passwd", b"/etc/passwd"):
        (folder / "m.onnx").write_bytes(_onnx(path))
        found = scanned(folder / "m.onnx", _onnx(path))
        assert codes(found) == {"outside-folder"}
        assert path.decode() in found.findings[0].message
    (folder / "a.pkl").write_bytes(HARMLESS)
    from ckpt_cli.ops.scan import scan

    (folder / "m.onnx").write_bytes(_onnx(b"weights/m.data"))
    assert scan(str(folder)).findings == []


def test_a_pickle_in_a_msgpack_file_is_found(tmp_path: Path) -> None:
    content = b"\x83\xc2nd\xc3\xc4kind\xa1O\xc4data\xc5" + struct.pack(">H", len(HARMFUL)) + HARMFUL
    assert "dangerous-global" in codes(scanned(tmp_path / "m.msgpack", content))
