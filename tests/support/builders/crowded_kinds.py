"""More files under 1 MB that are as full as can be, of containers and manners that `crowded.py` has not.

Each is made to a scale: at 1 it is just below 1 MB, for `every_command.py`; the suite opens smaller ones and counts.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from containers import initializer, onnx_model
from zero_folders import zero_folder

from builders import st
from builders.old import archive as tar_of
from builders.pickles import Ops, built, new, parameter, pickled, tensor, tensor_v3
from builders.pt import DEFLATED, Record, archive, torch_records


class Make(Protocol):
    """Writes into a folder, to a scale; returns the path to give to a command."""

    def __call__(self, folder: Path, scale: float) -> Path: ...


def _file(name: str, content: Callable[[float], bytes]) -> Make:
    def make(folder: Path, scale: float) -> Path:
        (folder / name).write_bytes(content(scale))
        return folder / name

    return make


def _of(count: int, scale: float) -> range:
    return range(max(int(count * scale), 1))


def _deflated(root: Any) -> bytes:
    records = torch_records(root, {"0": bytes(4)})
    records[0].method = DEFLATED
    return archive(records)


def _state_of_torch(scale: float) -> bytes:
    """States of an optimizer as torch.save writes them, with the pickle compressed."""
    one = torch.zeros(2)
    states = {n: {"step": torch.tensor(1.0), "exp_avg": one[:1], "exp_avg_sq": one[1:]} for n in _of(1200, scale)}
    buffer = io.BytesIO()
    torch.save({"state": states, "param_groups": [{"params": list(states)}]}, buffer)
    return buffer.getvalue()


def _many(made: Callable[[int], Ops], count: int) -> Callable[[float], bytes]:
    return lambda scale: _deflated({f"w{n}": made(n) for n in _of(count, scale)})


def _slow_names(scale: float) -> bytes:
    """Names that patterns such as `(a|aa)+$` and `*a*a*a*b` go through again and again."""
    return pickled({"a" * 700 + f"!{n}": n for n in _of(1200, scale)})


def _script(scale: float) -> bytes:
    """A TorchScript archive with much code, which names attributes, calls and nests brackets."""
    lines = "".join(f"    x{n} = torch.add(self.w, (((({n}))))).m.n_{n}(x)\n" for n in _of(90_000, scale))
    code = f"class M(Module):\n  w : Tensor\n  def forward(self, x: Tensor) -> Tensor:\n{lines}    return x\n".encode()
    records = torch_records(built(new("__torch__.M"), {"w": tensor("0", (1,))}), {"0": bytes(4)}, layout=False)
    records += [Record("archive/constants.pkl", pickled(())), Record("archive/code/__torch__.py", code, DEFLATED)]
    return archive(records)


def _msgpack(scale: float) -> bytes:
    """Maps of arrays of no elements, each as flax writes it."""
    array = b"\x93\x91\x00\xa5uint8\xc4\x00"
    each = b"\xc7" + bytes([len(array)]) + b"\x01" + array
    keys = [f"w{n}".encode() for n in _of(40_000, scale)]
    return b"\xdf" + struct.pack(">I", len(keys)) + b"".join(bytes([0xA0 + len(key)]) + key + each for key in keys)


def _msgpack_nested(scale: float) -> bytes:
    """Maps in maps, as deep as the limit allows, again and again."""
    deep = b"\x81\xa1a" * 90 + b"\x01"
    count = len(_of(3_500, scale))
    return b"\xdf" + struct.pack(">I", count) + b"".join(b"\xa5" + b"%05d" % n + deep for n in range(count))


def _onnx(scale: float) -> bytes:
    empty = torch.zeros(0)
    return onnx_model(*(initializer(f"w{n}", empty) for n in _of(45_000, scale)))


def _onnx_nodes(scale: float) -> bytes:
    """A graph of very many nodes of no content."""
    return onnx_model(initializer("w", torch.zeros(1)), graph=b"\x0a\x00" * len(_of(450_000, scale)))


def _index(shards: int) -> Make:
    """An index of as many names as 1 MB holds, of shards that are not there but for the first."""

    def make(folder: Path, scale: float) -> Path:
        (folder / "s0.safetensors").write_bytes(st.file({"w0": st.info("U8", [0], 0, 0)}))
        weight_map = {f"w{n}": f"s{n % shards}.safetensors" for n in _of(30_000, scale)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


def _ranks(stage: int, count: int) -> Make:
    """Rank files of DeepSpeed with parameters of one element each."""

    def make(folder: Path, scale: float) -> Path:
        return zero_folder(folder, stage, 2, [{f"layers.{n}.w": torch.zeros(1) for n in _of(count, scale)}])

    return make


def _nested_json(scale: float) -> bytes:
    deep = b'{"a":' * 400 + b"1" + b"}" * 400
    return b"[" + b",".join([deep] * len(_of(350, scale))) + b"]"


def _header(scale: float) -> bytes:
    """A safetensors header of names that differ in their last parts only, deep below each other."""
    prefix = "a." * 60
    return st.file({f"{prefix}{n}": st.info("F32", [1, 0], 0, 0) for n in _of(5_000, scale)})


def _tars(scale: float) -> bytes:
    """A tar of pickles, compressed."""
    members = [(f"m{n}.pkl", pickled([n])) for n in _of(60_000, scale)]
    return gzip.compress(tar_of(members), 9)


def _dicts_within(scale: float) -> bytes:
    """Dicts of dicts whose names each repeat the way to them."""
    root: Any = {f"k{n}": n for n in _of(150, scale)}
    for level in range(4):
        root = {f"level{level}_{n}": root for n in range(4)}
    return pickled(root)


KINDS: dict[str, Make] = {
    "optimizer_of_torch": _file("a.pt", _state_of_torch),
    "parameters_many": _file("a.pt", _many(lambda _: parameter(tensor("0", (1,))), 25_000)),
    "untyped_many": _file("a.pt", _many(lambda _: tensor_v3("0", (4,), "uint8", 4), 25_000)),
    "zip_of_10_000_records": _file(
        "a.pt",
        lambda scale: archive(
            [*torch_records({"w": tensor("0", (1,))}, {"0": bytes(4)}),
             *(Record(f"archive/{n}") for n in _of(9_000, scale))], alignment=1)),
    "script_of_much_code": _file("a.pt", _script),
    "names_slow_to_match": _file("a.pkl", _slow_names),
    "name_of_900_kb": _file("a.pkl", lambda scale: pickled({"a" * int(900_000 * scale): tensor("0", (0,))})),
    "dicts_within": _file("a.pkl", _dicts_within),
    "safetensors_header": _file("a.safetensors", _header),
    "msgpack_many": _file("a.msgpack", _msgpack),
    "msgpack_nested": _file("a.msgpack", _msgpack_nested),
    "onnx_many": _file("a.onnx", _onnx),
    "onnx_of_nodes": _file("a.onnx", _onnx_nodes),
    "index_of_one_shard": _index(1),
    "index_of_many_shards": _index(9_000),
    "ranks_of_stage_2": _ranks(2, 2_500),
    "ranks_of_stage_3": _ranks(3, 1_200),
    "json_nested": _file("a.json", _nested_json),
    "tar_gz_of_pickles": _file("a.tar.gz", _tars),
    "gguf_of_nothing": _file("a.gguf", lambda scale: b"GGUF\3\0\0\0" + b"\xff" * 16 + bytes(int(900_000 * scale))),
    "plain_words": _file("a.txt", lambda scale: b"weights and words, " * int(47_000 * scale)),
    "plain_line": _file("a.txt", lambda scale: b"(" * int(900_000 * scale)),
}  # fmt: skip
"""Each by its name."""
