"""Pickled and safetensors files with one fault each, and their twins without it."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from builders.pickles import Ops, built, call, new, storage, tensor, value
from builders.pt import Record, archive, torch_records, write
from builders.st import floats, info
from builders.st import write as write_st
from layouts import wrapper
from safetensors.torch import save_file

from check_cases.case import PT, case, hub, padded, patched, rezipped, saved, two


@case("truncated")
def _(folder: Path, fault: bool) -> Path:
    return patched(saved(folder), lambda data: data[:1000] if fault else data)


@case("truncated")
def _(folder: Path, fault: bool) -> Path:
    save_file(two(), folder / "m.safetensors", PT)
    return patched(folder / "m.safetensors", lambda data: data[:-8] if fault else data)


def _views(folder: Path, contents: dict[str, bytes], *, size: int = 3) -> Path:
    """A file of one tensor of floats over storage 0, byte by byte."""
    torch.save({"w": torch.arange(float(size))}, folder / "whole.pt")
    with zipfile.ZipFile(folder / "whole.pt") as whole:
        pickle = whole.read("whole/data.pkl")
    return write(folder / "m.pt", pickle, contents)


@case("short-storage")
def _(folder: Path, fault: bool) -> Path:
    return _views(folder, {"0": struct.pack("<3f", 1, 2, 3)[: 8 if fault else 12]})


@case("malformed")
def _(folder: Path, fault: bool) -> Path:
    header, data = floats(2, 3)
    return write_st(
        folder / "m.safetensors", padded({**header, "__metadata__": PT}), data + b"\0" * (3 if fault else 0)
    )


@case("malformed", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    (folder / "m.pt").write_bytes(archive(torch_records(b"\x80\x02K\x01" + (b"(." if fault else b"."))))
    return folder / "m.pt"


@case("leading-bytes")
def _(folder: Path, fault: bool) -> Path:
    return patched(saved(folder), lambda data: b"HTTP/1.1 200 OK\r\n\r\n" + data if fault else data)


@case("far-end")
def _(folder: Path, fault: bool) -> Path:
    return patched(saved(folder), lambda data: data + b"\0" * (100_000 if fault else 0))


@case("trailing-bytes")
def _(folder: Path, fault: bool) -> Path:
    return patched(saved(folder), lambda data: data + b"junk" * fault)


@case("local-header")
def _(folder: Path, fault: bool) -> Path:
    return patched(saved(folder), lambda data: data.replace(b"m/data/1FB", b"m/data/xFB", 1) if fault else data)


@case("directory", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    """Two zip64 end records: some readers take the one that the locator names, others the one before it."""
    data = archive(torch_records({"n": 1}))
    at = data.rindex(b"PK\6\7")
    (folder / "m.pt").write_bytes(data[:at] + (data[at - 56 : at] if fault else b"") + data[at:])
    return folder / "m.pt"


@case("no-version", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    return write(folder / "m.pt", {"n": 1}, version=None if fault else b"3\n")


@case("no-byteorder", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    return write(folder / "m.pt", {"n": 1}, byteorder=None if fault else b"little")


@case("outside-prefix", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    records = torch_records({"n": 1}) + [Record("elsewhere/x", b"x")] * fault
    (folder / "m.pt").write_bytes(archive(records))
    return folder / "m.pt"


@case("layout", "misaligned")
def _(folder: Path, fault: bool) -> Path:
    path = saved(folder)
    return rezipped(path) if fault else path


@case("layout")
def _(folder: Path, fault: bool) -> Path:
    """Storages in another order than the pickle has them."""
    path = saved(folder)
    with zipfile.ZipFile(path) as old:
        contents = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    order = ["1", "0"] if fault else ["0", "1"]
    return write(path, contents["data.pkl"], {key: contents[f"data/{key}"] for key in order}, prefix="m")


@case("compressed", "misaligned")
def _(folder: Path, fault: bool) -> Path:
    path = saved(folder)
    return rezipped(path, lambda name: "/.format" not in name, zipfile.ZIP_DEFLATED if fault else zipfile.ZIP_STORED)


@case("stray-storage")
def _(folder: Path, fault: bool) -> Path:
    return _views(folder, {"0": bytes(range(12)), **({"7": b"abcdefgh"} if fault else {})})


@case("unlisted-storage")
def _(folder: Path, fault: bool) -> Path:
    aside = storage("1", 2) + b"0" if fault else b""  # a reference that the pickle drops
    root = Ops(value({"x": tensor("0", [3])}) + aside)
    return write(folder / "m.pt", root, {"0": bytes(12), **({"1": bytes(8)} if fault else {})})


@case("unlisted-bytes", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    records = torch_records({"n": 1})
    if fault:
        records[3].data, records[3].stored, records[3].described = records[3].content + b"." * 100, 6, False
    (folder / "m.pt").write_bytes(archive(records))
    return folder / "m.pt"


@case("dangerous", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    return write(folder / "m.pt", {"w": call("os.system", "echo hi") if fault else 1})


@case("same-name")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"a": {"b": torch.ones(2)}, "a.b" if fault else "a.c": torch.ones(3)})


@case("waste")
def _(folder: Path, fault: bool) -> Path:
    whole = torch.randn(300_000)
    return saved(folder, {"a": whole[:7] if fault else whole})


@case("byte-strings")
def _(folder: Path, fault: bool) -> Path:
    text = b"caf\xe9" if fault else "caf\u00e9".encode()
    raw = b"U" + bytes([len(text)]) + text
    return write(folder / "m.pt", {"arch": Ops(raw), "w": tensor("0", (2,))}, {"0": bytes(8)})


@case("byte-strings")
def _(folder: Path, fault: bool) -> Path:
    """A string that is so long that it stays in the file."""
    text = b"\xe9" * 70_000 if fault else b"e" * 70_000
    raw = b"T" + struct.pack("<i", len(text)) + text
    return write(folder / "m.pt", {"arch": Ops(raw), "w": tensor("0", (2,))}, {"0": bytes(8)})


@case("no-elements")
def _(folder: Path, fault: bool) -> Path:
    weight = torch.empty(0 if fault else 4, dtype=torch.float16)
    return saved(folder, {"state_dict": {"l.weight": weight, "n": torch.ones(3), "steps": torch.empty(0).long()}})


@case("no-elements")
def _(folder: Path, fault: bool) -> Path:
    """A note: biases alone may be empty in some libraries."""
    return saved(folder, {"l.bias": torch.empty(0 if fault else 3), "l.weight": torch.ones(5), "e": torch.empty(0, 5)})


@case("local-shard")
def _(folder: Path, fault: bool) -> Path:
    spec = "torch.distributed.tensor._dtensor_spec.DTensorSpec"
    parts = {"_local_tensor": tensor("0", (2, 2)), "_spec": built(new(spec), {"mesh": None, "placements": ()})}
    shape = (4, 2) if fault else (2, 2)
    made = wrapper("torch.distributed.tensor.DTensor", parts, shape, "float32")
    return write(folder / "model_world_size_2_rank_0.pt", {"w": made}, {"0": bytes(16)})


@case("no-tensors")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"epoch": 1 if fault else torch.ones(2)})


@case("oddity")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    return folder / ("model-00001-of-00002.safetensors" if fault else "model.safetensors.index.json")


# safetensors


@case("repeated-name")
def _(folder: Path, fault: bool) -> Path:
    one = json.dumps(info("F32", [2], 0, 8))
    twice = f'"a": {one}, ' if fault else ""
    return write_st(
        folder / "m.safetensors", padded(f'{{"__metadata__": {{"format": "pt"}}, {twice}"a": {one}}}'), bytes(8)
    )


@case("no-format")
def _(folder: Path, fault: bool) -> Path:
    save_file(two(), folder / "m.safetensors", {"licence": "MIT"} if fault else PT)
    return folder / "m.safetensors"


@case("dangling-alias")
def _(folder: Path, fault: bool) -> Path:
    kept = "embed.weight" if fault else "wte.weight"
    save_file({"wte.weight": torch.ones(2)}, folder / "m.safetensors", {**PT, "lm_head.weight": kept})
    return folder / "m.safetensors"


@case("misaligned")
def _(folder: Path, fault: bool) -> Path:
    header, data = floats(2, 3)
    return write_st(folder / "m.safetensors", padded({**header, "__metadata__": PT}, int(fault)), data)


def _training(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], *, fault: bool) -> Path:
    """A model with the Adam state of its four parameters, with a change if it shall have a fault."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 2))
    adam = torch.optim.Adam(layers.named_parameters())
    layers(torch.ones(2, 3)).sum().backward()
    adam.step()
    model, state = layers.state_dict(), adam.state_dict()
    if fault:
        change(model, state)
    return saved(folder, {"model": model, "optimizer": state})


@case("optimizer-fit")
def _(folder: Path, fault: bool) -> Path:
    return _training(folder, lambda model, _: model.pop("0.bias"), fault=fault)


@case("optimizer-fit")
def _(folder: Path, fault: bool) -> Path:
    return _training(folder, lambda _, state: state["state"][3].pop("exp_avg_sq"), fault=fault)


@case("optimizer-fit")
def _(folder: Path, fault: bool) -> Path:
    return _training(folder, lambda _, state: state["state"].update({7: state["state"][0]}), fault=fault)
