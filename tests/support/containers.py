"""Checkpoints in containers of other libraries, written as these write them, and read by torch alone.

`tests/environments/containers.py` holds them to the libraries themselves.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

State = dict[str, torch.Tensor]

SB3_DATA: dict[str, Any] = {
    "policy_class": {
        ":type:": "<class 'abc.ABCMeta'>",
        ":serialized:": base64.b64encode(pickle.dumps(OrderedDict)).decode(),
        "__module__": "stable_baselines3.common.policies",
    },
    "num_timesteps": 10_000,
    "learning_rate": 0.0003,
    "_last_obs": None,
    "net_arch": [64, 64],
    "policy_kwargs": {"a": {"b": 1}},
}
"""Some of what an algorithm of Stable-Baselines3 has in its `data`."""


def write_sb3(files: dict[str, Any], path: Path, *, data: object = SB3_DATA, method: int = zipfile.ZIP_STORED) -> None:
    """As stable_baselines3/common/save_util.py (`save_to_zip_file`) does, with one file for each of `files`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("data", json.dumps(data, indent=4))
        for name, state in files.items():
            with archive.open(f"{name}.pth", "w", force_zip64=True) as file:
                torch.save(state, file)
        archive.writestr("_stable_baselines3_version", "2.3.2")
        archive.writestr("system_info.txt", "- OS: Linux")


def write_policy(state: State, path: Path) -> None:
    """A policy alone."""
    write_sb3({"policy": state}, path)


def read_sb3(path: Path, name: str = "policy") -> State:
    """One of its files; the checksums of the archive and of the file in it are verified."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        data = archive.read(f"{name}.pth")
    with zipfile.ZipFile(io.BytesIO(data)) as inner:
        assert inner.testzip() is None
    found: State = torch.load(io.BytesIO(data))
    return found


def packed(value: object, *, chunk: int = 1 << 30) -> bytes:
    """A value in msgpack, as flax/serialization.py (`msgpack_serialize`) writes it, with chunks of `chunk` bytes."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() <= chunk:
            return _extension(1, _array(value))
        flat, size = value.contiguous().reshape(-1), max(1, chunk // value.element_size())
        chunks = {str(at // size): flat[at : at + size] for at in range(0, flat.numel(), size)}
        shape = {str(number): count for number, count in enumerate(value.shape)}
        return packed({"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}, chunk=1 << 30)
    if isinstance(value, np.generic):
        return _extension(3, _array(torch.from_numpy(np.asarray(value))))
    if isinstance(value, complex):
        return _extension(2, b"\x92" + packed(value.real) + packed(value.imag))
    if isinstance(value, dict):
        return _counted(0x80, 16, (0xDE, 0xDF), len(value)) + b"".join(
            packed(key) + packed(item, chunk=chunk) for key, item in value.items()
        )
    if isinstance(value, tuple | list):
        return _counted(0x90, 16, (0xDC, 0xDD), len(value)) + b"".join(packed(item, chunk=chunk) for item in value)
    return _leaf(value)


def _leaf(value: object) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else b"\xd3" + value.to_bytes(8, "big", signed=True)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        head = bytes([0xA0 + len(text)]) if len(text) < 32 else b"\xd9" + bytes([len(text)])
        return head + text
    assert isinstance(value, bytes)
    return b"\xc6" + len(value).to_bytes(4, "big") + value


def _counted(small: int, below: int, longer: tuple[int, int], count: int) -> bytes:
    if count < below:
        return bytes([small + count])
    return bytes([longer[0]]) + count.to_bytes(2, "big")


def _extension(kind: int, data: bytes) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(data))
    head = bytes([fixed]) if fixed else b"\xc9" + len(data).to_bytes(4, "big")
    return head + bytes([kind]) + data


def _array(tensor: torch.Tensor) -> bytes:
    name = str(tensor.dtype).removeprefix("torch.")
    return b"\x93" + packed(list(tensor.shape)) + packed(name) + packed(raw(tensor))


def raw(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def nested(state: Mapping[str, object]) -> dict[str, Any]:
    """Dotted names as maps within maps."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        at = found
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = value
    return found


def write_msgpack(state: State, path: Path) -> None:
    """Maps of arrays."""
    path.write_bytes(packed(nested(state)))


def read_msgpack(path: Path) -> State:
    """The arrays by their dotted names."""
    data = path.read_bytes()
    found, end = _unpacked(data, 0)
    assert end == len(data)
    return _flat(found, "")


def _flat(value: Any, name: str) -> State:
    if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
        shape = [value["shape"][str(at)] for at in range(len(value["shape"]))]
        return {name[1:]: torch.cat([value["chunks"][str(at)] for at in range(len(value["chunks"]))]).reshape(shape)}
    if isinstance(value, dict):
        return {key: leaf for part, below in value.items() for key, leaf in _flat(below, f"{name}.{part}").items()}
    return {name[1:]: value} if isinstance(value, torch.Tensor) else {}


def _unpacked(data: bytes, at: int) -> tuple[Any, int]:
    """The item that begins at a byte, and the byte behind it; of what `packed` writes."""
    code, at = data[at], at + 1
    if 0x80 <= code <= 0x9F or code in (0xDC, 0xDE):
        at, count = (at, code & 15) if code < 0xA0 else (at + 2, int.from_bytes(data[at : at + 2], "big"))
        is_map = code < 0x90 or code == 0xDE
        found: list[Any] = []
        for _ in range(count * (2 if is_map else 1)):
            item, at = _unpacked(data, at)
            found.append(item)
        return (dict(zip(found[::2], found[1::2], strict=True)) if is_map else found), at
    if code < 0x80 or code in (0xC0, 0xC2, 0xC3):
        return ({0xC0: None, 0xC2: False, 0xC3: True}.get(code, code), at)
    if code in (0xCB, 0xD3):
        return struct.unpack(">d" if code == 0xCB else ">q", data[at : at + 8])[0], at + 8
    if 0xA0 <= code <= 0xBF or code == 0xD9:
        at, size = (at, code & 31) if code != 0xD9 else (at + 1, data[at])
        return data[at : at + size].decode(), at + size
    if code == 0xC6:
        size = int.from_bytes(data[at : at + 4], "big")
        return data[at + 4 : at + 4 + size], at + 4 + size
    at = at if code != 0xC9 else at + 4
    (shape, name, content), end = _unpacked(data, at + 1)
    made = torch.frombuffer(bytearray(content), dtype=getattr(torch, name)) if content else torch.empty(0)
    return made.to(getattr(torch, name)).reshape(shape), end
