"""A pickle that stands backwards, in wide characters or numbers, in rot13 or as a list of numbers is found."""

from __future__ import annotations

import base64
import binascii
import codecs
import io
import json
import pickle
import struct
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders.pickles import pickled
from builders.pt import Record, archive, torch_records
from safetensors.numpy import save
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli.scanner.transforms import backwards, narrowed, rotated, turned

P0 = b"cos\nsystem\n(S'echo hello'\ntR."


def _rot13(content: bytes) -> bytes:
    return codecs.encode(content.decode("latin-1"), "rot13").encode("latin-1")


def _wide(encoding: str) -> Callable[[bytes], bytes]:
    return lambda content: content.decode("latin-1").encode(encoding)


DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "rot13 of base64": lambda content: _rot13(base64.b64encode(content)),
    "rot13 of hex": lambda content: _rot13(binascii.hexlify(content)),
    "numbers with 0x": lambda content: ", ".join(map(hex, content)).encode(),
    "a list of numbers": lambda content: str(list(content)).encode(),
    "numbers and spaces": lambda content: " ".join(map(str, content)).encode(),
    "numbers in code": lambda content: b"loads(bytes(" + str(list(content)).encode() + b"))",
    "UTF-16": _wide("utf-16-le"),
    "UTF-16 of big endian": _wide("utf-16-be"),
    "UTF-16 with its mark": _wide("utf-16"),
    "UTF-32": _wide("utf-32-le"),
    "UTF-16 of base64": lambda content: base64.b64encode(content).decode().encode("utf-16-le"),
    "backwards": lambda content: content[::-1],
    "base64 backwards": lambda content: base64.b64encode(content)[::-1],
    "base64 backwards in code": lambda content: b"f(b64decode('" + base64.b64encode(content)[::-1] + b"'[::-1]))",
    "hex backwards": lambda content: binascii.hexlify(content)[::-1],
    "base64 of bytes backwards": lambda content: base64.b64encode(content[::-1]),
    "zlib backwards": lambda content: zlib.compress(content)[::-1],
    "zlib of bytes backwards": lambda content: zlib.compress(content[::-1]),
    "quoted-printable": lambda content: binascii.b2a_qp(content, istext=False),
    "percent signs": lambda content: urllib.parse.quote(content).encode(),
    "octal escapes": lambda content: "".join(f"\\{byte:03o}" for byte in content).encode(),
    "escapes of JSON": lambda content: "".join(f"\\u{byte:04x}" for byte in content).encode(),
    "int16": lambda content: np.frombuffer(content, "u1").astype("<i2").tobytes(),
    "int32": lambda content: np.frombuffer(content, "u1").astype("<i4").tobytes(),
    "int64": lambda content: np.frombuffer(content, "u1").astype("<i8").tobytes(),
    "int64 of big endian": lambda content: np.frombuffer(content, "u1").astype(">i8").tobytes(),
}
PAYLOADS = {"protocol 2": HARMFUL, "protocol 0": P0}


def _names_the_command(path: Path, content: bytes) -> bool:
    found = scanned(path, content)
    return not found.ok and any("os.system" in finding.message for finding in found.findings)


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_pickle_in_disguise_is_found_in_strings_records_and_storages(
    tmp_path: Path, disguise: str, payload: bytes
) -> None:
    hidden = DISGUISES[disguise](payload)
    for value in (hidden, hidden.decode("latin-1")):
        assert _names_the_command(tmp_path / "m.pkl", pickled({"x": value}))
    assert _names_the_command(tmp_path / "s.pt", archive(torch_records(HARMLESS, {"0": hidden})))
    records = [*torch_records(HARMLESS), Record("archive/extra/notes.txt", hidden)]
    assert _names_the_command(tmp_path / "r.pt", archive(records))


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_harmless_pickle_in_disguise_is_quiet(tmp_path: Path, disguise: str) -> None:
    hidden = DISGUISES[disguise](pickled({"a": [1] * 40, "b": "text\nof\nlines"}))
    assert scanned(tmp_path / "m.pkl", pickled({"x": hidden, "y": hidden.decode("latin-1")})).findings == []
    assert scanned(tmp_path / "s.pt", archive(torch_records(HARMLESS, {"0": hidden}))).findings == []


def test_a_pickle_of_protocol_0_in_rot13_is_found(tmp_path: Path) -> None:
    hidden = _rot13(P0)
    assert _names_the_command(tmp_path / "m.pkl", pickled({"x": hidden.decode()}))
    assert _names_the_command(tmp_path / "m.pt", archive(torch_records(HARMLESS, {"0": hidden})))
    assert _names_the_command(tmp_path / "binary.pkl", pickled({"x": _rot13(HARMFUL)}))


def test_numbers_of_a_json_document_are_found(tmp_path: Path) -> None:
    for payload in PAYLOADS.values():
        document = json.dumps({"model": "a", "state": list(payload)}, indent=1).encode()
        assert _names_the_command(tmp_path / "m.pt", archive([Record("config.json", document)]))
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert _names_the_command(tmp_path / "folder" / "m.json", document)
    document = json.dumps({"sizes": [128, 2, 99, 256] * 40, "ids": list(range(200))}).encode()
    assert scanned(tmp_path / "c.pt", archive([Record("config.json", document)])).findings == []


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("kind", ["<i2", "<i4", ">i4", "<i8", "<u2", "<u4", ">u8"])
def test_a_pickle_in_wide_integers_is_found_in_arrays_and_tensors(tmp_path: Path, kind: str, payload: bytes) -> None:
    values = np.frombuffer(payload, "u1").astype(kind)
    buffer = io.BytesIO()
    np.save(buffer, values)
    assert _names_the_command(tmp_path / "m.npy", buffer.getvalue())
    assert _names_the_command(tmp_path / "m.safetensors", save({"w": values.astype(values.dtype.newbyteorder("<"))}))


# --- in the middle of a string ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("before", [b"some text first ", b"\x80\2N.", b"\x80\4\x8c\1a.", bytes(3000)])
def test_a_pickle_within_a_string_is_found(tmp_path: Path, before: bytes, payload: bytes) -> None:
    text = before + payload + b" and more"
    for value in (text, text.decode("latin-1")):
        found = scanned(tmp_path / "m.pkl", pickled({"x": value}))
        assert {"hidden-pickle", "dangerous-global"} <= codes(found)


def test_a_second_pickle_behind_one_that_builds_an_object_is_found(tmp_path: Path) -> None:
    first = pickle.dumps({1, 2}, 2)
    assert "hidden-pickle" in codes(scanned(tmp_path / "m.pkl", pickled({"x": first + HARMFUL})))
    assert "hidden-pickle" not in codes(scanned(tmp_path / "m.pkl", pickled({"x": first + HARMLESS})))


# --- what a zip file has besides records ------------------------------------------------------------------------------


def _zip(comment: bytes = b"", extra: bytes = b"", of_file: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        member = zipfile.ZipInfo("a/data.pkl")
        member.comment = comment
        member.extra = struct.pack("<HH", 0x7777, len(extra)) + extra if extra else b""
        file.writestr(member, HARMLESS)
        file.comment = of_file
    return buffer.getvalue()


@pytest.mark.parametrize("payload", [HARMFUL, P0, b"notes " + HARMFUL, base64.b64encode(HARMFUL), HARMFUL[::-1]])
@pytest.mark.parametrize("place", ["comment", "extra", "of_file"])
def test_a_pickle_in_a_comment_or_an_extra_field_of_a_zip_is_found(tmp_path: Path, place: str, payload: bytes) -> None:
    assert _names_the_command(tmp_path / "m.pt", _zip(**{place: payload}))


def test_ordinary_comments_and_extra_fields_are_quiet(tmp_path: Path) -> None:
    times = struct.pack("<HHBII", 0x5455, 9, 3, 1, 2) + struct.pack("<HHBBIBI", 0x7875, 11, 1, 4, 1000, 4, 1000)
    content = _zip(b"written by a tool", times, b"PyTorch model, version 3\nof the laboratory\n")
    assert scanned(tmp_path / "m.pt", content).findings == []


# --- the transforms themselves ----------------------------------------------------------------------------------------


def test_ordinary_bytes_are_not_transformed() -> None:
    for data in (b"", b".", bytes(64), b"model.layers.0.weight", np.arange(40).tobytes(), "étude".encode("utf-16")):
        assert backwards(data) is None
        assert list(narrowed(data, lambda head: head.startswith(b"\x80\2"))) == []
    assert rotated(b"alpha\nbeta\ngamma\n") is None
    assert list(turned(b"model_layers_weight")) == []


def test_what_undoes_itself_is_not_undone_over_and_over(tmp_path: Path) -> None:
    text = b"pcpv\npc\n(cppv\nvp\n(" * 20
    for content in (text, text.decode()):
        assert scanned(tmp_path / "m.pkl", pickled({"x": content})).findings == []
