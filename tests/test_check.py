"""`ckpt check`: each code has a file with that fault and a twin without; what libraries write is clean."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import call
from builders.pt import DEFLATED, Record, archive, torch_records, write
from builders.st import floats, info
from builders.st import file as st_file
from builders.st import write as write_st
from conftest import Ckpt
from contract import FORMATS, Format
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file, save_model

from ckpt_cli import limits
from ckpt_cli.errors import FormatError
from ckpt_cli.ops.check import CODES, Report, check

README = Path(__file__).parent.parent / "README.md"
PT = {"format": "pt"}


def deep_check(path: Path, workers: int = 2) -> Report:
    with ThreadPoolExecutor(workers) as pool:
        return check(str(path), pool)


def codes(report: Report, *severities: str) -> set[str]:
    return {each.code for each in report.findings if not severities or each.severity in severities}


# --- a file with each fault, and its twin -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How to make a file or folder with one fault, and the same without it."""

    code: str
    make: Callable[[Path, bool], Path]
    """Writes into a folder, with the fault or without, and returns what to check."""


CASES: list[Case] = []


def case(code: str) -> Callable[[Callable[[Path, bool], Path]], Callable[[Path, bool], Path]]:
    """Add a maker to the cases."""

    def keep(make: Callable[[Path, bool], Path]) -> Callable[[Path, bool], Path]:
        CASES.append(Case(code, make))
        return make

    return keep


def two() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(40.0)}


def saved(folder: Path, state: Any = None, name: str = "m.pt") -> Path:
    torch.save(two() if state is None else state, folder / name)
    return folder / name


def patched(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def rezipped(path: Path, keep: Callable[[str], bool] = lambda _: True, method: int = zipfile.ZIP_STORED) -> Path:
    """The records of a file in a zip as Python writes it."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w", method) as new:
        for each in old.infolist():
            if keep(each.filename):
                new.writestr(each.filename, old.read(each.filename))
    os.replace(path.with_suffix(".new"), path)
    return path


@case("truncated")
def _(folder: Path, fault: bool) -> Path:
    return patched(saved(folder), lambda data: data[:1000] if fault else data)


@case("truncated")
def _(folder: Path, fault: bool) -> Path:
    save_file(two(), folder / "m.safetensors", PT)
    return patched(folder / "m.safetensors", lambda data: data[:-8] if fault else data)


STORAGE = {"w": call("torch._utils._rebuild_tensor_v2")}


def _views(folder: Path, contents: dict[str, bytes], *, size: int = 3) -> Path:
    """A file of one tensor of floats over storage 0, byte by byte."""
    from builders.pickles import built, get, named, persistent, value  # noqa: F401 - the names that a pickle needs

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
    return write_st(folder / "m.safetensors", {**header, "__metadata__": PT}, data + b"\0" * (3 if fault else 0))


@case("malformed")
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


@case("directory")
def _(folder: Path, fault: bool) -> Path:
    """A zip64 end record that is there twice as its locator says: the strict reader takes the one that it names."""
    records = torch_records({"n": 1})
    data = archive(records)
    if fault:
        at = data.rindex(b"PK\6\7")
        data = data[:at] + data[at:].replace(struct.pack("<Q", at - 56), struct.pack("<Q", at - 56), 1)
        end = len(data) - 22
        data = data[: end + 8] + struct.pack("<HH", len(records), len(records)) + data[end + 12 :]
        wide = data.rindex(b"PK\6\6")
        data = data[: wide + 32] + struct.pack("<Q", len(records)) + data[wide + 40 :]
    (folder / "m.pt").write_bytes(data)
    return folder / "m.pt"


@case("no-version")
def _(folder: Path, fault: bool) -> Path:
    return write(folder / "m.pt", {"n": 1}, version=None if fault else b"3\n")


@case("no-byteorder")
def _(folder: Path, fault: bool) -> Path:
    return write(folder / "m.pt", {"n": 1}, byteorder=None if fault else b"little")


@case("outside-prefix")
def _(folder: Path, fault: bool) -> Path:
    records = torch_records({"n": 1}) + [Record("elsewhere/x", b"x")] * fault
    (folder / "m.pt").write_bytes(archive(records))
    return folder / "m.pt"


@case("layout")
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


@case("compressed")
def _(folder: Path, fault: bool) -> Path:
    path = saved(folder)
    return rezipped(path, lambda name: "/.format" not in name, zipfile.ZIP_DEFLATED if fault else zipfile.ZIP_STORED)


@case("stray-storage")
def _(folder: Path, fault: bool) -> Path:
    return _views(folder, {"0": bytes(range(12)), **({"7": b"abcdefgh"} if fault else {})})


@case("unlisted-bytes")
def _(folder: Path, fault: bool) -> Path:
    records = torch_records({"n": 1})
    if fault:
        records[3].data, records[3].stored, records[3].described = records[3].content + b"." * 100, 6, False
    (folder / "m.pt").write_bytes(archive(records))
    return folder / "m.pt"


@case("dangerous")
def _(folder: Path, fault: bool) -> Path:
    return write(folder / "m.pt", {"w": call("os.system", "echo hi") if fault else 1})


@case("same-name")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"a": {"b": torch.ones(2)}, "a.b" if fault else "a.c": torch.ones(3)})


@case("waste")
def _(folder: Path, fault: bool) -> Path:
    whole = torch.randn(300_000)
    return saved(folder, {"a": whole[:7] if fault else whole})


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
    return write_st(folder / "m.safetensors", f'{{"__metadata__": {{"format": "pt"}}, {twice}"a": {one}}}    ', bytes(8))


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
    raw = json.dumps({**header, "__metadata__": PT}).encode()
    raw += b" " * (-len(raw) % 8 + (1 if fault else 0))
    (folder / "m.safetensors").write_bytes(st_file(raw, data))
    return folder / "m.safetensors"


# shards


def hub(folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """What huggingface_hub writes: two shards and an index."""
    save_torch_state_dict(state or {f"l{n}.weight": torch.randn(8, 8) for n in range(4)}, folder, max_shard_size=512)
    return folder


def reindexed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return folder


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@case("missing-shard")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        (folder / SECOND).unlink()
    return folder


@case("missing-tensor")
def _(folder: Path, fault: bool) -> Path:
    return reindexed(hub(folder), lambda index: index["weight_map"].update({"ghost": FIRST} if fault else {}))


@case("no-index")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        (folder / "model.safetensors.index.json").unlink()
    return folder


@case("no-checkpoint")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    return folder


@case("stray-shard")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        shutil.copy(folder / SECOND, folder / "model-00003-of-00003.safetensors")
    return folder


@case("shard-count")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        for name in (FIRST, SECOND):
            (folder / name).rename(folder / name.replace("of-00002", "of-00003"))
        text = (folder / "model.safetensors.index.json").read_text()
        (folder / "model.safetensors.index.json").write_text(text.replace("of-00002", "of-00003"))
    return folder


@case("unlisted-tensor")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)

    def forget(index: dict[str, Any]) -> None:
        if fault:
            del index["weight_map"]["l1.weight"]

    return reindexed(folder, forget)


@case("tensor-twice")
def _(folder: Path, fault: bool) -> Path:
    names = ("x", "y") if not fault else ("x", "x")
    for shard, name in zip((FIRST, SECOND), names, strict=True):
        save_file({name: torch.ones(2), shard: torch.ones(3)}, folder / shard, PT)
    weight_map = {**dict(zip(names, (FIRST, SECOND), strict=True)), FIRST: FIRST, SECOND: SECOND}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@case("total-size")
def _(folder: Path, fault: bool) -> Path:
    return reindexed(hub(folder), lambda index: index["metadata"].update({"total_size": 7} if fault else {}))


# configs


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


def llama() -> dict[str, torch.Tensor]:
    state = {"model.embed_tokens.weight": torch.randn(11, 8), "lm_head.weight": torch.randn(11, 8),
             "model.norm.weight": torch.randn(8)}  # fmt: skip
    for layer in range(2):
        at = f"model.layers.{layer}."
        state[at + "input_layernorm.weight"] = torch.randn(8)
        for name, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8)):
            state[f"{at}self_attn.{name}_proj.weight"] = torch.randn(rows, 8)
        for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
            state[f"{at}mlp.{name}_proj.weight"] = torch.randn(*shape)
    return state


def configured(folder: Path, state: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    save_file(llama() if state is None else state, folder / "model.safetensors", PT)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@case("config-shape")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, vocab_size=12 if fault else 11)


@case("config-layers")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, num_hidden_layers=3 if fault else 2)


@case("no-head")
def _(folder: Path, fault: bool) -> Path:
    state = llama()
    del state["lm_head.weight"]
    return configured(folder, state, tie_word_embeddings=not fault)


@case("untied")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, tie_word_embeddings=fault)


@case("config-dtype")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, torch_dtype="bfloat16" if fault else "float32")


@case("adapter-rank")
def _(folder: Path, fault: bool) -> Path:
    state = {"q.lora_A.weight": torch.randn(4, 8), "q.lora_B.weight": torch.randn(8, 4)}
    save_file(state, folder / "adapter_model.safetensors", PT)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8 if fault else 4}))
    return folder


# values


@case("crc")
def _(folder: Path, fault: bool) -> Path:
    path = saved(folder, {"n": torch.arange(8)})
    old, new = struct.pack("<2q", 6, 7), struct.pack("<2q", 6, 8)
    return patched(path, lambda data: data.replace(old, new) if fault else data)


@case("no-crc")
def _(folder: Path, fault: bool) -> Path:
    records = torch_records({"n": 1})
    if fault:
        records[-1].crc = 0
    (folder / "m.pt").write_bytes(archive(records))
    return folder / "m.pt"


@case("nan")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.tensor([1.0, float("nan") if fault else 2.0])})


@case("inf")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.tensor([1.0, float("-inf") if fault else 2.0])})


@case("zeros")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.zeros(3, 4) if fault else torch.randn(3, 4)})


@case("constant")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.full((3, 4), 0.5) if fault else torch.randn(3, 4)})


@case("zero-tail")
def _(folder: Path, fault: bool) -> Path:
    state = {"a": torch.randn(10), "b": torch.randn(200_000), "c": torch.randn(200_000)}
    save_file(state, folder / "m.safetensors", PT)
    return patched(folder / "m.safetensors", lambda data: data[:-1_600_000] + bytes(1_600_000) if fault else data)


@case("unchecked")
def _(folder: Path, fault: bool) -> Path:
    """More bytes in views of one storage than anyone would go through."""
    wide = torch.randn(1000)
    views = {f"v{n}": wide.as_strided((2 if not fault else 900, 900), (1, 1), n) for n in range(100)}
    return saved(folder, views if fault else {"v": wide})


ALONG = {
    "far-end": {"trailing-bytes"},
    "no-tensors": set(),
    "no-checkpoint": {"total-size"},
    "shard-count": set(),
    "oddity": set(),
}
"""What else some faults bring along."""

IGNORED = {"no-tensors"}
"""Notes of cases whose files are the smallest that show the fault."""


def _deep(code: str) -> bool:
    from ckpt_cli.ops.checks.values import CHECKS

    return code in {each.code for each in CHECKS}


IDS = [f"{each.code}-{place}" for place, each in enumerate(CASES)]


@pytest.mark.parametrize("each", CASES, ids=IDS)
def test_a_fault_is_found_and_its_twin_is_clean(each: Case, tmp_path: Path) -> None:
    for fault in (False, True):
        folder = tmp_path / str(fault)
        folder.mkdir()
        path = each.make(folder, fault)
        report = deep_check(path) if _deep(each.code) else check(str(path))
        found = codes(report) - (IGNORED - {each.code})
        assert found == ({each.code} if fault else set()), report.findings


def test_every_code_has_a_case() -> None:
    assert {each.code for each in CODES} == {each.code for each in CASES}


def test_no_code_is_there_twice() -> None:
    assert len({each.code for each in CODES}) == len(CODES)


def test_every_code_is_in_the_readme() -> None:
    text = README.read_text()
    assert [each.code for each in CODES if f"| `{each.code}` | {each.severity} |" not in text] == []
