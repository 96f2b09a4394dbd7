"""Files and folders under 1 MB that hold as much as that allows: names, ties, chunks, shards, or bytes compressed."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dcp_files import Writer

from builders import old, st
from builders.crowded_kinds import KINDS
from builders.pickles import Ops, built, call, new, pickled, tensor, value
from builders.pt import DEFLATED, Record, archive, torch_records

Build = Callable[[Path], Path]
"""Writes into a folder; returns the path to give to a command."""


def _file(name: str, content: Callable[[], bytes]) -> Build:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return build


def plain(content: Callable[[], bytes]) -> Build:
    """Return what writes a file that has no suffix."""
    return _file("hostile", content)


def _packed(root: Any, storages: dict[str, bytes]) -> bytes:
    """A torch file whose pickle, and storages of zeros, are compressed."""
    records = torch_records(root, storages)
    for record in records:
        if len(record.content) > 1000:
            record.method = DEFLATED
    return archive(records)


def _safetensors(count: int, name: str, shape: list[int], nbytes: int) -> bytes:
    header = {name % n: st.info("U8", shape, n * nbytes, n * nbytes + nbytes) for n in range(count)}
    return st.file(header, bytes(count * nbytes))


def _views(count: int, shape: tuple[int, ...], stride: tuple[int, ...] | None = None, apart: int = 1) -> bytes:
    """Tensors that are views of one storage."""
    views = {f"w{n}": tensor("0", shape, stride=stride, offset=n * apart, numel=150_000) for n in range(count)}
    return _packed(views, {"0": bytes(600_000)})


def _one_storage_each(count: int) -> bytes:
    views = {f"w{n}": tensor(f"{n}", (1,)) for n in range(count)}
    return archive(torch_records(views, {f"{n}": bytes(4) for n in range(count)}), alignment=4)


def _npz(count: int, shape: int = 1, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    arrays = {f"a{n}": np.zeros(shape, "u1") for n in range(count)}
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _tar(count: int) -> bytes:
    root = {f"w{n}": old.numbered(n) for n in range(count)}
    storages = [old.TarStorage(n + count, "Float", bytes(4)) for n in range(count)]
    return old.tar(root, storages, [old.TarTensor(n, n + count, "Float", (1,), (1,)) for n in range(count)], [])


def _legacy(count: int) -> bytes:
    return old.save({f"w{n}": tensor(f"{n}", (1,)) for n in range(count)}, {f"{n}": bytes(4) for n in range(count)})


def _zip(records: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, content in records:
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _in_boxes(mebibytes: int, boxes: int) -> bytes:
    """Zips within zips, each compressed, the innermost with zeros."""
    content = bytes(mebibytes << 20)
    for number in range(boxes):
        content = _zip([(f"{number}.zip" if number else "a.bin", content)])
    return content


def _metadata() -> bytes:
    return st.file({"__metadata__": {f"k{n}": "v" * 20 for n in range(25_000)}})


def _zeros(*shape: int) -> bytes:
    return _packed({"w": tensor("0", shape)}, {"0": bytes(800_000_000)})


def _script(count: int) -> bytes:
    names = "".join(f'"w{n}", ' for n in range(count))
    lines = "".join(f"  w{n} : Tensor\n" for n in range(count))
    code = f"class M(Module):\n  __parameters__ = [{names}]\n{lines}".encode()
    root = built(new("__torch__.M"), {f"w{n}": tensor("0", (1,)) for n in range(count)})
    records = torch_records(root, {"0": bytes(4)}, layout=False)
    records += [Record("archive/constants.pkl", pickled(())), Record("archive/code/__torch__.py", code, DEFLATED)]
    return archive(records)


def _shards(count: int, each: int) -> Build:
    def build(folder: Path) -> Path:
        weight_map = {}
        for shard in range(count):
            name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
            header = {f"w{shard}.{n}": st.info("U8", [0], 0, 0) for n in range(each)}
            (folder / name).write_bytes(st.file(header))
            weight_map.update(dict.fromkeys(header, name))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return build


def _distributed(count: int, cuts: int) -> Build:
    def build(folder: Path) -> Path:
        writer = Writer(folder)
        for n in range(count):
            writer.tensor(f"w{n}", torch.zeros(cuts), [((cut,), (1,)) for cut in range(cuts)])
        writer.write()
        return folder

    return build


def _hdf5(text: bytes) -> bytes:
    return b"\x89HDF\r\n\x1a\n" + text * (900_000 // len(text))


def _deep_names(levels: int, each: int) -> bytes:
    prefix = ".".join(f"block{n}" for n in range(levels))
    return _packed({f"{prefix}.w{n}": tensor("0", (1,)) for n in range(each)}, {"0": bytes(4)})


def groups(count: int) -> bytes:
    """State of an optimizer, with as many entries."""
    one, none = tensor("0", (1,)), tensor("0", (), numel=1)
    state = {n: {"step": none, "exp_avg": one, "exp_avg_sq": one} for n in range(count)}
    return _packed({"state": state, "param_groups": [{"params": list(range(count)), "lr": 1.0}]}, {"0": bytes(4)})


def _nested_lists(levels: int, count: int) -> bytes:
    item: Any = [tensor("0", (1,))] * 8
    for _ in range(levels):
        item = value({"a": item, "b": list(range(count))})
    return _packed(item, {"0": bytes(4)})


def _objects(count: int) -> bytes:
    return _packed([call("lab.Thing", n) for n in range(count)], {})


def _text_pickle(text: str, count: int) -> bytes:
    return pickled([f"{text}{n}" for n in range(count)])


def _json(item: str) -> bytes:
    return ("[" + ",".join([item] * (900_000 // (len(item) + 1))) + "]").encode()


def _many_calls(count: int) -> bytes:
    return pickled([call("torch.nn.functional.relu", n) for n in range(count)], 4)


BUILDS: dict[str, Build] = {
    "safetensors_empty": _file("a.safetensors", lambda: _safetensors(15_000, "w%d", [0], 0)),
    "safetensors_of_one_byte": _file("a.safetensors", lambda: _safetensors(14_000, "w%d", [1], 1)),
    "safetensors_layers": _file("a.safetensors", lambda: _safetensors(9_000, "model.layers.%d.mlp.up.weight", [2], 2)),
    "safetensors_long_names": _file("a.safetensors", lambda: _safetensors(15, "w%d" + "x" * 60_000, [1], 1)),
    "safetensors_of_64_dimensions": _file("a.safetensors", lambda: _safetensors(3_000, "w%d", [1] * 64, 1)),
    "safetensors_metadata": _file("a.safetensors", _metadata),
    "safetensors_one": _file("a.safetensors", lambda: _safetensors(1, "w%d", [900_000], 900_000)),
    "safetensors_rows": _file("a.safetensors", lambda: _safetensors(1, "w%d", [900_000, 1], 900_000)),
    "views_tied": _file("a.pt", lambda: _views(20_000, (1000,), apart=0)),
    "views_overlapping": _file("a.pt", lambda: _views(10_000, (1000,))),
    "views_strided": _file("a.pt", lambda: _views(10_000, (50, 50), (777, 3))),
    "views_expanded": _file("a.pt", lambda: _views(10_000, (4000, 4000), (0, 0))),
    "views_expanded_once": _file("a.pt", lambda: _views(1, (100_000, 100_000), (0, 0))),
    "views_windows": _file("a.pt", lambda: _views(1, (10_000, 100_000), (1, 1))),
    "views_of_64_dimensions": _file("a.pt", lambda: _views(3_000, (1,) * 62 + (2, 2), (3,) * 64)),
    "views_many": _file("a.pt", lambda: _views(100_000, (1,))),
    "storages_many": _file("a.pt", lambda: _one_storage_each(3_500)),
    "storage_of_zeros": _file("a.pt", lambda: _zeros(200_000_000)),
    "storage_matrix_of_zeros": _file("a.pt", lambda: _zeros(100_000_000, 2)),
    "deep_names": _file("a.pt", lambda: _deep_names(900, 2_000)),
    "optimizer": _file("a.pt", lambda: groups(20_000)),
    "nested_lists": _file("a.pt", lambda: _nested_lists(400, 100)),
    "objects": _file("a.pt", lambda: _objects(150_000)),
    "numbers": _file("a.pt", lambda: _packed({f"k{n}": n for n in range(300_000)}, {})),
    "npz_many": _file("a.npz", lambda: _npz(3_500)),
    "npz_of_zeros": _file("a.npz", lambda: _npz(1, 700_000_000, compressed=True)),
    "npz_of_zeros_many": _file("a.npz", lambda: _npz(500, 1_000_000, compressed=True)),
    "npy_many": _file("a.npy", lambda: _npy(7_000)),
    "tar_many": _file("a.tar", lambda: _tar(4_000)),
    "legacy_many": _file("a.pt", lambda: _legacy(9_000)),
    "legacy_saves": _file("a.pt", lambda: old.save({"w": tensor("0", (1,))}, {"0": bytes(4)}) * 900),
    "script_many": _file("a.pt", lambda: _script(20_000)),
    "gzip_of_zeros": _file("a.pt.gz", lambda: gzip.compress(bytes(900_000_000), 9)),
    "gzip_of_pickles": _file("a.pkl.gz", lambda: gzip.compress(pickle.dumps([1] * 10) * 5_000_000, 9)),
    "boxes": _file("a.zip", lambda: _in_boxes(900, 4)),
    "zip_of_empty_records": _file("a.zip", lambda: _zip([(f"{n}", b"") for n in range(9_000)])),
    "zip_of_pickles": _file("a.zip", lambda: _zip([(f"{n}.pkl", pickle.dumps([n])) for n in range(7_000)])),
    "zip_of_json": _file("a.zip", lambda: _zip([("config.json", _json('"' + "QUFB" * 10 + '"') * 100)])),
    "hdf5_pickles": _file("a.h5", lambda: _hdf5(b"\x80\x02cos\nsystem\n")),
    "hdf5_protos": _file("a.h5", lambda: _hdf5(b"\x80\x04")),
    "hdf5_names": _file("a.h5", lambda: _hdf5(b"ca\nb\n")),
    "hdf5_json": _file("a.h5", lambda: _hdf5(b'"class_name" : "Dense" \\u0041')),
    "json_of_base64": _file("a.json", lambda: _json('"' + "gASV" + "QUFB" * 20 + '"')),
    "json_of_short_strings": _file("a.json", lambda: _json('"class_name":"x"')),
    "json_of_escapes": _file("a.json", lambda: _json('"' + "\\u0041" * 40 + '"')),
    "pickle_of_base64": _file("a.pkl", lambda: _text_pickle("gASV" + "QUFB" * 10, 15_000)),
    "pickle_of_text": _file("a.pkl", lambda: _text_pickle("abc def\n" * 10, 9_000)),
    "pickle_of_words": _file("a.pkl", lambda: pickled(["abcdefgh" * 110_000])),
    "pickle_of_hex": _file("a.pkl", lambda: _text_pickle("8004" * 20, 9_000)),
    "pickle_of_zlib": _file("a.pkl", lambda: pickled([b"x\x9c" + bytes(30)] * 20_000)),
    "pickle_of_calls": _file("a.pkl", lambda: _many_calls(20_000)),
    "pickle_of_protos": _file("a.pkl", lambda: pickled([value(b"\x80\x04" * 20)] * 20_000)),
    "pickles_in_a_row": _file("a.pkl", lambda: pickle.dumps([1]) * 60_000),
    "getattrs": _file("a.pkl", lambda: pickled(_getattrs(20_000))),
    "shards_many": _shards(150, 20),
    "shards_few": _shards(2, 4_000),
    "distributed_many": _distributed(300, 1),
    "distributed_chunks": _distributed(2, 150),
    **{name: partial(make, scale=1.0) for name, make in KINDS.items()},
}  # fmt: skip
"""Each by its name."""


def _npy(count: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1, "u1"))
    return buffer.getvalue() * count


def _getattrs(count: int) -> Ops:
    item: Any = call("builtins.getattr", 1, "a")
    for _ in range(400):
        item = call("builtins.getattr", item, "b")
    return Ops(b"(" + item * (count // 400) + b"l")
