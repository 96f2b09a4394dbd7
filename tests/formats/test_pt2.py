"""Exported programs: names, kinds and values against torch.export, and what a bad archive is told for."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pt import DEFLATED, Record, archive
from conftest import Ckpt
from contract import FORMATS, export, quietly
from torch import nn
from torch._export.serde.schema import ScalarType
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

from ckpt_cli import limits
from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.errors import CkptError, LimitError, MalformedError, UnknownFormatError, UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.torch_zip.pt2 import _DTYPES
from ckpt_cli.model.checkpoint import Opaque, Value

OLD = next(each for each in FORMATS if each.label == "pt2-old")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch.export logs a warning of every old file that it reads."""
    with quietly():
        yield


class Net(nn.Module):
    """Parameters, buffers of both kinds, a tied weight, and tensors that are constants of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)
        self.plain = torch.arange(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)) + self.plain + self.passing + self.kept[0] + self.frozen[0]


def program() -> torch.export.ExportedProgram:
    """The module, exported."""
    return torch.export.export(Net(), (torch.ones(1, 3),))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The module, exported and saved."""
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    with quietly():
        torch.export.save(program(), path)
    return path.read_bytes()


def test_names_and_kinds_are_those_of_the_program(net: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(net)
    checkpoint = open_checkpoint(str(path))
    loaded = torch.export.load(path)
    mine = {each.name: each for each in checkpoint.tensors}
    assert set(mine) == set(loaded.state_dict) | set(loaded.constants)
    for name, expected in {**loaded.state_dict, **loaded.constants}.items():
        assert mine[name].requires_grad is expected.requires_grad
        assert values_of(checkpoint, mine[name]).tolist() == expected.tolist()
    signature = loaded.graph_signature
    kinds = dict.fromkeys(signature.parameters, "parameter") | dict.fromkeys(signature.buffers, "buffer")
    assert {name: each.kind for name, each in mine.items() if each.kind != "tensor"} == kinds
    assert mine["first.weight"].view == mine["last.weight"].view
    assert set(checkpoint.top_level) == {"first", "last", "frozen", "kept", "plain", "passing"}


def test_set_leaves_a_file_that_torch_and_zipfile_read(net: bytes, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(net)
    done = ckpt("set", path, "last.weight[0,0]=100", "plain=9", "passing[1]=8")
    assert (done.code, "first.weight also changed" in done.err) == (0, True)
    loaded = torch.export.load(path)
    assert loaded.state_dict["first.weight"][0, 0] == 100
    assert (loaded.constants["plain"].tolist(), loaded.constants["passing"].tolist()) == ([9, 9, 9], [0, 8, 2])
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_set_keeps_the_checksums_of_a_zip_within_a_zip(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "old.pt2"
    OLD.write(OLD.sample(), path)
    assert ckpt("set", path, "2.weight[0,0]=100").code == 0
    with zipfile.ZipFile(path) as outer:
        assert outer.testzip() is None
        with zipfile.ZipFile(io.BytesIO(outer.read("serialized_state_dict.pt"))) as inner:
            assert inner.testzip() is None
    assert torch.export.load(path).state_dict["0.weight"][0, 0] == 100


def test_every_dtype_that_torch_numbers_is_known() -> None:
    mine = {number: f"torch.{dtype}" for number, dtype in _DTYPES.items()}
    assert mine == {int(number): str(dtype) for number, dtype in _SERIALIZE_TO_TORCH_DTYPE.items()}
    assert set(mine) == set(map(int, ScalarType)) - {0}


def test_several_programs_are_told_apart_by_their_names(tmp_path: Path, ckpt: Ckpt) -> None:
    from torch.export.pt2_archive._package import load_pt2, package_pt2

    path = tmp_path / "two.pt2"
    package_pt2(str(path), exported_programs={"big": program(), "small": export(OLD.sample())})
    names = {each.name for each in open_checkpoint(str(path)).tensors}
    assert {"big.first.weight", "big.plain", "small.0.weight"} <= names
    assert ckpt("set", path, "small.3.scale=0").code == 0
    loaded = load_pt2(str(path)).exported_programs["small"]
    assert loaded.state_dict["3.scale"].tolist() == [0, 0, 0, 0]


# --- built by hand ---------------------------------------------------------------------------------------------------


def payload(path_name: str = "weight_0", **changes: Any) -> dict[str, Any]:
    """A tensor of shape (2, 2) in float32, some of what is said of it changed."""
    meta = {
        "dtype": 7, "sizes": [{"as_int": 2}, {"as_int": 2}], "requires_grad": True,
        "device": {"type": "cuda", "index": 1}, "strides": [{"as_int": 2}, {"as_int": 1}],
        "storage_offset": {"as_int": 0}, "layout": 7,
    }  # fmt: skip
    top = {key: changes.pop(key) for key in ("is_param", "use_pickle", "tensor_meta") if key in changes}
    return {"path_name": path_name, "is_param": True, "use_pickle": False, "tensor_meta": {**meta, **changes}, **top}


def built(folder: Path, config: Any, *more: Record, weight: bytes = bytes(16)) -> Path:
    """An archive with one map of weights."""
    text = config if isinstance(config, bytes) else json.dumps({"config": config}).encode()
    path = folder / "built.pt2"
    records = [
        Record("m/archive_format", b"pt2"),
        Record("m/data/weights/weight_0", weight),
        Record("m/data/weights/model_weights_config.json", text),
        *more,
    ]
    path.write_bytes(archive(records))
    return path


def test_what_the_map_says_is_what_is_listed(tmp_path: Path) -> None:
    path = built(tmp_path, {"a": payload(), "b": payload(is_param=False, sizes=[3], strides=[1], storage_offset=1)})
    first, second = open_checkpoint(str(path)).tensors
    assert (first.shape, first.stride, first.kind, first.requires_grad, first.device) == (
        (2, 2), (2, 1), "parameter", True, "cuda:1",
    )  # fmt: skip
    assert (second.shape, second.storage_offset, second.kind) == ((3,), 1, "buffer")
    assert first.storage is second.storage


def test_a_tensor_saved_without_its_bytes_has_none(tmp_path: Path) -> None:
    (tensor,) = open_checkpoint(str(built(tmp_path, {"a": payload()}, weight=b""))).tensors
    assert (tensor.layout, tensor.storage, tensor.shape) == ("meta", None, (2, 2))


def test_a_tensor_that_is_pickled_is_read_from_the_zip_within(tmp_path: Path, ckpt: Ckpt) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(4.0), buffer)
    path = built(tmp_path, {"a": payload(use_pickle=True, is_param=True)}, weight=buffer.getvalue())
    assert ckpt("set", path, "a[1]=7").code == 0
    (tensor,) = open_checkpoint(str(path)).tensors
    assert (tensor.name, tensor.shape, tensor.kind) == ("a", (4,), "parameter")
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert torch.load(io.BytesIO(file.read("m/data/weights/weight_0"))).tolist() == [0, 7, 2, 3]


def test_an_object_among_the_constants_is_told_and_not_opened(tmp_path: Path) -> None:
    config = {"config": {"x": payload("custom_obj_0", use_pickle=True, tensor_meta=None)}}
    more = [Record("m/data/constants/custom_obj_0", b"cos\nsystem\n"),
            Record("m/data/constants/model_constants_config.json", json.dumps(config).encode())]  # fmt: skip
    entries = open_checkpoint(str(built(tmp_path, {}, *more))).entries
    assert entries == [Value("x", Opaque("<an object, pickled in 11 bytes>"))]


def test_of_two_equal_names_the_last_counts_as_it_does_for_torch(tmp_path: Path) -> None:
    first, last = json.dumps(payload()), json.dumps(payload(sizes=[4], strides=[1]))
    path = built(tmp_path, f'{{"config": {{"a": {first}, "a": {last}}}}}'.encode())
    assert [each.shape for each in open_checkpoint(str(path)).tensors] == [(4,)]


def test_a_save_of_torch_2_8_has_its_weights_in_one_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": nn.Parameter(torch.ones(2)), "b": torch.zeros(3)}, buffer)
    model = Record("m/models/model.json", b'{"x": {"buffer_name": "b", "persistent": true}}')
    path = tmp_path / "legacy.pt2"
    records = [Record("m/archive_format", b"pt2"), Record("m/data/weights/model.pt", buffer.getvalue()), model]
    path.write_bytes(archive(records))
    assert [(each.name, each.kind) for each in open_checkpoint(str(path)).tensors] == [("w", "parameter"),
                                                                                      ("b", "buffer")]  # fmt: skip


BAD: dict[str, tuple[Callable[[Path], Path], type[CkptError], str]] = {
    "no JSON": (lambda f: built(f, b"{"), MalformedError, "model_weights_config.json' is not JSON"),
    "no object": (lambda f: built(f, b"[]"), MalformedError, "is not a JSON object"),
    "no config": (lambda f: built(f, b"{}"), MalformedError, "has no config"),
    "bad UTF-8": (lambda f: built(f, b'{"config": "\xff"}'), MalformedError, "is not JSON"),
    "deep JSON": (lambda f: built(f, b'{"a":' + b"[" * 100_000), MalformedError, "nests too deeply"),
    "a long integer": (lambda f: built(f, b'{"config": ' + b"9" * 5000 + b"}"), MalformedError, "is not JSON"),
    "a payload that is none": (lambda f: built(f, {"a": 5}), MalformedError, "does not say where 'a' is"),
    "a path of another type": (lambda f: built(f, {"a": payload(5)}), MalformedError,  # type: ignore[arg-type]
                               "does not say where 'a' is"),
    "a path upwards": (lambda f: built(f, {"a": payload("../../../etc/passwd")}), MalformedError,
                       "has no record 'm/data/weights/../../../etc/passwd'"),
    "an absolute path": (lambda f: built(f, {"a": payload("/etc/passwd")}), MalformedError, "has no record"),
    "no meta": (lambda f: built(f, {"a": payload(tensor_meta=None)}), MalformedError, "has no tensor_meta"),
    "a dtype of no number": (lambda f: built(f, {"a": payload(dtype=[7])}), MalformedError, "not one of torch's"),
    "an unknown dtype": (lambda f: built(f, {"a": payload(dtype=99)}), MalformedError, "not one of torch's"),
    "a sparse layout": (lambda f: built(f, {"a": payload(layout=1)}), MalformedError, "not one of torch's"),
    "more than the record has": (lambda f: built(f, {"a": payload(sizes=[2, 3])}), MalformedError,
                                 "needs bytes 0–20, storage 'weights/weight_0' has 16"),
    "an offset beyond": (lambda f: built(f, {"a": payload(storage_offset={"as_int": 1})}), MalformedError, "needs"),
    "a negative size": (lambda f: built(f, {"a": payload(sizes=[-1, 2])}), MalformedError, "shape is not a number"),
    "a size that overflows": (lambda f: built(f, {"a": payload(sizes=[1 << 62, 1 << 62])}), MalformedError,
                              "more elements than 64 bits can count"),
    "a symbolic size": (lambda f: built(f, {"a": payload(sizes=[{"as_expr": "s0"}, 2])}), MalformedError,
                        "shape is not a number"),
    "true for a size": (lambda f: built(f, {"a": payload(sizes=[True, 2])}), MalformedError, "shape is not a number"),
    "no strides": (lambda f: built(f, {"a": payload(strides=None)}), MalformedError, "its stride is not a list"),
    "too many dimensions": (lambda f: built(f, {"a": payload(sizes=[1] * 65)}), MalformedError, "shape is not a list"),
    "lengths that differ": (lambda f: built(f, {"a": payload(sizes=[4])}), MalformedError, "have different lengths"),
    "a pickle that is none": (lambda f: built(f, {"a": payload(use_pickle=True)}), CkptError, "no end record"),
    "a zip that is no checkpoint": (lambda f: built(f, {"a": payload(use_pickle=True)},
                                                    weight=archive([Record("a/b", b"c")])), MalformedError,
                                    "is not a torch.save file"),
    "a zip that is compressed": (lambda f: compressed(f), UnsupportedError, "a compressed zip file within a zip file"),
    "another format": (lambda f: of_format(f, b"pt3"), UnknownFormatError, "says its format is b'pt3'"),
    "a long format": (lambda f: of_format(f, b"pt2" * 1000), UnknownFormatError, "too long to be one"),
    "no models": (lambda f: of_format(f, b"pt2"), MalformedError, "without weights or constants"),
    "AOTInductor": (lambda f: of_format(f, b"pt2", Record("m/data/aotinductor/model/x.so", b"\x7fELF")),
                    UnsupportedError, "an AOTInductor package"),
}  # fmt: skip


def of_format(folder: Path, kind: bytes, *more: Record) -> Path:
    """An archive that says which format it has, and holds nothing else of note."""
    path = folder / "bare.pt2"
    path.write_bytes(archive([Record("m/archive_format", kind), *more]))
    return path


def compressed(folder: Path) -> Path:
    """An old program whose weights someone compressed."""
    path = folder / "old.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("serialized_exported_program.json", "{}")
        file.writestr("serialized_state_dict.pt", archive([Record("a/b", b"c")]))
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused(name: str, tmp_path: Path) -> None:
    build, kind, words = BAD[name]
    path = build(tmp_path)
    with pytest.raises(kind) as refused:
        open_checkpoint(str(path))
    assert words in str(refused.value)
    assert refused.value.path == str(path)


@pytest.mark.parametrize("limit", ["ZIP_JSON", "ZIP_JSON_PARSED"])
def test_a_map_is_read_within_a_limit(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(tmp_path, {"a": payload()})
    monkeypatch.setattr(limits, limit, 100)
    with pytest.raises(LimitError, match="model_weights_config"):
        open_checkpoint(str(path))


def test_a_compressed_map_is_read(tmp_path: Path) -> None:
    path = built(tmp_path, {"a": payload()})
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    path.write_bytes(archive([Record(name, content, method=DEFLATED) for name, content in contents.items()]))
    checkpoint = open_checkpoint(str(path))
    assert values_of(checkpoint, checkpoint.tensors[0]).tolist() == [[0, 0], [0, 0]]
