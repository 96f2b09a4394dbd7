"""Checkpoints in containers of other libraries, written as these write them, and read by torch alone.

`tests/environments/containers.py` holds them to the libraries themselves.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import old

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


ONNX_TYPES = {torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6, torch.int64: 7,
              torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}  # fmt: skip


def varint(value: int) -> bytes:
    """A number of protobuf, a negative one as 64 bits."""
    value &= (1 << 64) - 1
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def part(number: int, content: bytes | int) -> bytes:
    """A field of a protobuf: bytes or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def initializer(name: str, tensor: torch.Tensor, *contents: bytes) -> bytes:
    """A `TensorProto` of onnx/onnx.proto, whose elements are `raw_data` or the fields of `contents`."""
    dims = b"".join(map(varint, tensor.shape))
    head = (part(1, dims) if dims else b"") + part(2, ONNX_TYPES[tensor.dtype]) + part(8, name.encode())
    return head + (b"".join(contents) if contents else part(9, raw(tensor)))


def onnx_model(*initializers: bytes, graph: bytes = b"", properties: bytes = b"") -> bytes:
    """A `ModelProto` with a node, these initializers and strings."""
    inside = part(1, part(4, b"Relu")) + part(2, b"g") + b"".join(part(5, each) for each in initializers) + graph
    return part(1, 8) + part(2, b"pytorch") + part(3, b"2.1") + properties + part(7, inside)


def write_onnx(state: State, path: Path) -> None:
    """A model with the state as initializers."""
    path.write_bytes(onnx_model(*(initializer(name, tensor) for name, tensor in state.items())))


def _parts(data: bytes) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        content: Any = number()
        if key & 7 == 2:
            at, content = at + content, data[at : at + content]
        found.append((key >> 3, content))
    return found


def read_onnx(path: Path) -> State:
    """The initializers with `raw_data`."""
    (graph,) = (content for number, content in _parts(path.read_bytes()) if number == 7)
    found: State = {}
    for number, content in _parts(graph):
        if number == 5:
            said = dict(_parts(content))
            dtype = next(dtype for dtype, code in ONNX_TYPES.items() if code == said[2])
            made = torch.frombuffer(bytearray(said[9]), dtype=dtype) if said.get(9) else torch.empty(0, dtype=dtype)
            found[said[8].decode()] = made.reshape(list(said.get(1, b"")))  # sizes below 128
    return found


_TAR_KINDS = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.int64: "Long",
              torch.bool: "Bool"}  # fmt: skip


def write_tar(state: State, path: Path) -> None:
    """As torch up to 0.1.10 did: storages and tensors in lists, one of each for all names of a tensor."""
    storages: list[old.TarStorage] = []
    tensors: dict[int, old.TarTensor] = {}
    for number, tensor in enumerate(state.values(), 1):
        if id(tensor) not in tensors:
            storage, kind, size = tensor.untyped_storage(), _TAR_KINDS[tensor.dtype], tensor.element_size()
            storages.append(old.TarStorage(1000 + number, kind, bytes(storage.tolist()), size))
            view = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            tensors[id(tensor)] = old.TarTensor(2000 + number, 1000 + number, kind, *view)
    root = {name: old.numbered(tensors[id(tensor)].key) for name, tensor in state.items()}
    path.write_bytes(old.tar(root, storages, tensors.values()))


def read_tar(path: Path) -> State:
    found: State = torch.load(path, weights_only=False)  # which is how torch reads them
    return found


def changed(sound: bytes, changes: Sequence[bytes], seed: int, begin: int = 0) -> Iterator[bytes]:
    """Yield fifty contents that have one to three bytes from `begin` on replaced by one of the changes."""
    chance = random.Random(seed)
    for _ in range(50):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(begin, len(content))
            content[at : at + 1] = chance.choice(changes)
        yield bytes(content)
