"""A pickle in a tensor of bytes is found in every format, and bytes that are numbers never alarm."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import old, st
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli.ops.scan import scan

P0 = b"cos\nsystem\n(S'echo hello'\ntR."


def _saved(**options: bool) -> Callable[[bytes], bytes]:
    def write(content: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save({"w": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, buffer, **options)
        return buffer.getvalue()

    return write


def _numpy(save: Callable[..., None], kind: str) -> Callable[[bytes], bytes]:
    def write(content: bytes) -> bytes:
        buffer = io.BytesIO()
        save(buffer, np.frombuffer(content, kind))
        return buffer.getvalue()

    return write


def _texts(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([base64.b64encode(content).decode()]))
    return buffer.getvalue()


def _strings(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([content]))
    return buffer.getvalue()


def _tar(content: bytes) -> bytes:
    tensor = old.TarTensor(9, 5, "Byte", (len(content),), (1,))
    return old.tar({"a": old.numbered(9)}, [old.TarStorage(5, "Byte", content, itemsize=1)], [tensor], [])


def _safetensors(kind: str) -> Callable[[bytes], bytes]:
    return lambda content: st.file({"w": st.info(kind, [len(content)], 0, len(content))}, content)


WRITERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "safetensors": ("m.safetensors", _safetensors("U8")),
    "safetensors of int8": ("m.safetensors", _safetensors("I8")),
    "npy": ("m.npy", _numpy(np.save, "u1")),
    "npz": ("m.npz", _numpy(np.savez, "u1")),
    "compressed npz": ("m.npz", _numpy(np.savez_compressed, "i1")),
    "npy of strings": ("m.npy", _strings),
    "npy of base64": ("m.npy", _texts),
    "torch": ("m.pt", _saved()),
    "torch before 1.6": ("m.pt", _saved(_use_new_zipfile_serialization=False)),
    "tar": ("m.tar", _tar),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("payload", [HARMFUL, P0, base64.b64encode(HARMFUL)])
def test_a_pickle_in_bytes_is_found(tmp_path: Path, how: str, payload: bytes) -> None:
    name, write = WRITERS[how]
    found = scanned(tmp_path / name, write(payload))
    assert "dangerous-global" in codes(found)
    assert any("os.system" in finding.message for finding in found.findings)


@pytest.mark.parametrize("how", WRITERS)
def test_other_bytes_are_quiet(tmp_path: Path, how: str) -> None:
    name, write = WRITERS[how]
    for content in (HARMLESS * 3, b"\x80\x04\x95" + bytes(range(100)), b"N.N." * 30):
        assert scanned(tmp_path / name, write(content)).findings == []


@pytest.mark.filterwarnings("ignore")
def test_random_bytes_of_every_format_are_quiet(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for how, (name, write) in WRITERS.items():
        for _ in range(30):
            content = random.bytes(65).replace(b"\0", b"\1")
            (tmp_path / name).write_bytes(write(content))
            assert scan(str(tmp_path / name)).findings == [], how
