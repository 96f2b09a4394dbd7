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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import Ops, call, storage, tensor, value
from builders.pt import DEFLATED, Record, archive, torch_records, write
from builders.st import floats, info
from builders.st import write as write_st
from conftest import Ckpt
from contract import FORMATS, Format
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file, save_model

import ckpt_cli
from ckpt_cli import limits
from ckpt_cli.errors import FormatError
from ckpt_cli.ops.check.run import CODES, Report, check

CODES_PAGE = Path(ckpt_cli.__file__).parent.parent / "docs" / "check.md"
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
    also: frozenset[str] = frozenset()
    """Codes that the way in which it is written brings along."""


CASES: list[Case] = []


def case(code: str, *also: str) -> Callable[[Callable[[Path, bool], Path]], Callable[[Path, bool], Path]]:
    """Add a maker to the cases."""

    def keep(make: Callable[[Path, bool], Path]) -> Callable[[Path, bool], Path]:
        CASES.append(Case(code, make, frozenset(also)))
        return make

    return keep


def two() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(40.0)}


def saved(folder: Path, state: Any = None, name: str = "m.pt") -> Path:
    torch.save(two() if state is None else state, folder / name)
    return folder / name


def padded(header: dict[str, Any] | str, extra: int = 0) -> bytes:
    """A safetensors header that ends at a multiple of 8 bytes, and so many more."""
    raw = header if isinstance(header, str) else json.dumps(header)
    return raw.encode() + b" " * (-len(raw) % 8 + extra)


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


# distributed checkpoints


def distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**two(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return folder


@case("unreadable", "oddity")
def _(folder: Path, fault: bool) -> Path:
    distributed(folder)
    if fault:
        (folder / "__0_0.distcp").unlink()
        return folder
    return folder / ".metadata"


@case("stray-items")
def _(folder: Path, fault: bool) -> Path:
    distributed(folder)
    if fault:
        shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    return folder


@case("unread-bytes")
def _(folder: Path, fault: bool) -> Path:
    np.save(folder / "m.npy", np.ones(2))
    return patched(folder / "m.npy", lambda data: data + b"junk" * fault)


@case("truncated")
def _(folder: Path, fault: bool) -> Path:
    os.truncate(distributed(folder) / "__0_0.distcp", 1000 if fault else (folder / "__0_0.distcp").stat().st_size)
    return folder


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


@case("no-crc", "no-tensors")
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
    wide = torch.randn(10_000)
    return saved(folder, {"v": wide.as_strided((5000, 5000), (1, 1)) if fault else wide})


def _deep(code: str) -> bool:
    from ckpt_cli.ops.check.values import CHECKS

    return code in {each.code for each in CHECKS}


IDS = [f"{each.code}-{place}" for place, each in enumerate(CASES)]


@pytest.mark.parametrize("each", CASES, ids=IDS)
def test_a_fault_is_found_and_its_twin_is_clean(each: Case, tmp_path: Path) -> None:
    for fault in (False, True):
        folder = tmp_path / str(fault)
        folder.mkdir()
        path = each.make(folder, fault)
        report = deep_check(path) if _deep(each.code) else check(str(path))
        found = codes(report) - each.also
        assert found == ({each.code} if fault else set()), report.findings


def test_every_code_has_a_case() -> None:
    assert {each.code for each in CODES} == {each.code for each in CASES}


def test_no_code_is_there_twice() -> None:
    assert len({each.code for each in CODES}) == len(CODES)


def test_every_code_is_documented() -> None:
    text = CODES_PAGE.read_text()
    assert [each.code for each in CODES if f"| `{each.code}` | {each.severity} |" not in text] == []


# --- what libraries write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", FORMATS, ids=lambda each: each.label)
def test_what_every_writer_writes_is_clean(each: Format, tmp_path: Path) -> None:
    path = tmp_path / f"m{each.suffix}"
    each.write(each.sample(), path)
    allowed = {"total-size"} if path.is_dir() else set()  # which the sample's own index has as 1
    assert codes(deep_check(path), "error", "warning") <= allowed


def test_a_folder_of_the_hub_is_clean_without_a_note(tmp_path: Path) -> None:
    state = {f"l{n}.weight": torch.randn(8, 8) for n in range(4)}
    state["tied.weight"] = state["l0.weight"]
    report = deep_check(hub(tmp_path, state))
    assert report.findings == []
    assert (report.files, report.tensors) == (3, 4)  # the tied name is not written


def test_a_folder_of_the_hub_in_pickles_is_clean(tmp_path: Path) -> None:
    state = {f"l{n}.weight": torch.randn(8, 8) for n in range(4)}
    save_torch_state_dict(state, tmp_path, max_shard_size=512, safe_serialization=False)
    assert deep_check(tmp_path).findings == []


@pytest.mark.parametrize(
    "state",
    [
        {
            "big": torch.randn(100),
            "t": torch.arange(6.0).reshape(2, 3).t(),
            "e": torch.zeros(0, 3),
            "n": torch.tensor(1),
        },
        {"s": torch.eye(3).to_sparse()},
        {"m": torch.empty(2, device="meta"), "row": torch.ones(1, 3).expand(2, 3)},
        {"f8": torch.randn(4, 4).to(torch.float8_e4m3fn), "c": torch.randn(3, dtype=torch.complex64).conj()},
    ],
    ids=["plain", "layouts", "meta", "dtypes"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_torch_saves_is_clean(state: dict[str, torch.Tensor], legacy: bool, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    report = deep_check(tmp_path / "m.pt")
    assert report.ok
    assert not codes(report) - {"constant", "misaligned"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*TypedStorage is deprecated")
def test_a_quantized_tensor_is_clean(tmp_path: Path) -> None:
    made_ = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8)
    assert deep_check(saved(tmp_path, {"q": made_})).findings == []


def test_a_quantized_view_with_gaps_is_looked_into_without_a_note(tmp_path: Path) -> None:
    whole = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 3, torch.qint8)
    assert deep_check(saved(tmp_path, {"rows": whole[::2], "columns": whole[:, 1:3]})).findings == []


def test_a_training_checkpoint_and_its_own_classes_are_clean(work: Path) -> None:
    for name in ("train.pt", "mlp.pt", "tied.pt", "mlp.safetensors"):
        assert not codes(deep_check(work / name), "error", "warning"), name


@pytest.mark.parametrize("alignment", [64, 4096])
def test_the_layout_of_torch_is_known_at_every_size_and_alignment(tmp_path: Path, alignment: int) -> None:
    from torch.utils.serialization import config

    sizes = [0, 1, 3, 15, 16, 17, 40, 0, 1000, 5]
    before = config.save.storage_alignment
    config.save.storage_alignment = alignment
    try:
        path = saved(tmp_path, {f"{n}" * (n + 1): torch.ones(size) for n, size in enumerate(sizes)})
    finally:
        config.save.storage_alignment = before
    assert check(str(path)).findings == []


def test_the_layout_is_what_torch_computes_beyond_4_gib(tmp_path: Path) -> None:
    from torch._C import PyTorchFileReader

    from ckpt_cli.formats.torch_zip.offsets import computed_offsets

    reader = PyTorchFileReader(str(saved(tmp_path)))
    full = 0xFFFFFFFF
    for header in (100, full - 64, full, full + 63):
        for nbytes in (0, 5, full - 1, full, full + 9):
            storages = [("m/data/0", 0), ("m/data/1", nbytes), ("m/data/2", 3)]
            _, (_, second), (_, third) = computed_offsets(header, header, storages, 64)
            assert second == reader.get_record_offset_no_read(header, "data/1", nbytes, 64)
            after = second + nbytes + (0 if not nbytes else 24 if header >= full or nbytes >= full else 16)
            assert third == reader.get_record_offset_no_read(after, "data/2", 3, 64)


# --- torch and others as witnesses ------------------------------------------------------------------------------------


def made(code: str, folder: Path) -> Path:
    return next(each for each in CASES if each.code == code).make(folder, True)


@pytest.mark.parametrize("code", ["truncated", "leading-bytes", "no-version", "outside-prefix", "short-storage"])
def test_torch_refuses_what_is_said_to_be_refused(code: str, tmp_path: Path) -> None:
    path = made(code, tmp_path)
    with pytest.raises((RuntimeError, OSError, EOFError, ValueError, UnpicklingError)):
        torch.load(path)


def test_torch_misreads_a_compressed_storage_when_mapped(tmp_path: Path) -> None:
    path = made("compressed", tmp_path)
    assert torch.equal(torch.load(path)["b"], two()["b"])
    assert not torch.equal(torch.load(path, mmap=True)["b"], two()["b"])


def test_torch_computes_wrong_offsets_for_another_layout(tmp_path: Path) -> None:
    path = made("layout", tmp_path)
    where = torch.load(path, map_location="meta")["b"].untyped_storage()._checkpoint_offset
    wanted = struct.pack("<40f", *range(40))
    assert path.read_bytes()[where : where + len(wanted)] != wanted


def test_zipfile_finds_the_same_record_damaged(tmp_path: Path) -> None:
    path = made("crc", tmp_path)
    with zipfile.ZipFile(path) as archive_:
        bad = archive_.testzip()
    (finding,) = deep_check(path).findings
    assert finding.where == f"m.pt/{bad}"
    assert check(str(path)).findings == []


def test_a_damaged_byte_anywhere_in_a_record_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.arange(500_000), "y": torch.arange(3)})
    data = path.read_bytes()
    begin = data.index(struct.pack("<3q", 1, 2, 3))
    for at in (0, 1 << 19, (1 << 19) - 1, 3_999_000):
        damaged = bytearray(data)
        damaged[begin + at] ^= 1
        path.write_bytes(damaged)
        assert codes(deep_check(path)) == {"crc"}


# --- values -----------------------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn,
          torch.float8_e5m2fnuz, torch.float8_e4m3fnuz, torch.float8_e8m0fnu]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinities_are_counted_as_torch_counts_them(dtype: torch.dtype, tmp_path: Path) -> None:
    from ckpt_cli.arrays.tally import tally
    from ckpt_cli.dtypes import BY_NAME

    width = dtype.itemsize
    codes_of = range(256) if width == 1 else range(0, 65536, 7)
    raw = b"".join((code << (8 * (width - min(width, 2)))).to_bytes(width, "little") for code in codes_of)
    raw += b"\xff\xff\x7f\x7f\x00\x00\x80\x7f\x01\x00\x80\xff\x00\x00\x80\xff" * 2
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
    wide = tensor.to(torch.float64)
    found = tally(memoryview(raw), BY_NAME[str(dtype).removeprefix("torch.")])
    assert (found.numel, found.nan, found.inf) == (len(tensor), int(wide.isnan().sum()), int(wide.isinf().sum()))
    for one in range(0, len(tensor), 5):
        piece = memoryview(raw)[one * width : (one + 1) * width]
        told = tally(piece, BY_NAME[str(dtype).removeprefix("torch.")])
        value = wide[one]
        assert (told.nan, told.inf) == (int(value.isnan()), int(value.isinf()))
        assert told.zero == bool(value == 0)


@pytest.mark.parametrize("big", [False, True])
def test_complex_numbers_and_other_byte_orders_are_looked_into(big: bool) -> None:
    from ckpt_cli.arrays.tally import tally
    from ckpt_cli.dtypes import BY_NAME

    raw = struct.pack(f"{'>' if big else '<'}8f", 1, float("nan"), 0, float("inf"), 0, 0, 1, 2)
    found = tally(memoryview(raw), BY_NAME["complex64"], big_endian=big)
    assert (found.numel, found.nan, found.inf, found.same) == (4, 1, 1, False)
    assert tally(memoryview(raw[8:16] * 3), BY_NAME["complex64"], big_endian=big).same
    assert not tally(memoryview(raw[8:16] + raw[:8]), BY_NAME["complex64"], big_endian=big).same


def test_a_tally_of_pieces_is_that_of_the_whole() -> None:
    from ckpt_cli.arrays.tally import merged, tally
    from ckpt_cli.dtypes import BY_NAME

    dtype = BY_NAME["float16"]
    for values in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, float("nan"), float("inf"), 0], [-0.0, 0, 0, -0.0]):
        raw = memoryview(struct.pack("<4e", *values))
        for cut in range(0, 9, 2):
            assert merged(tally(raw[:cut], dtype), tally(raw[cut:], dtype)) == tally(raw, dtype)


def test_crcs_of_pieces_combine() -> None:
    import zlib

    from ckpt_cli.files.crc32 import combine

    data = os.urandom(1000)
    for cut in (0, 1, 499, 1000):
        assert combine(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), 1000 - cut) == zlib.crc32(data)


def test_any_number_of_workers_says_the_same(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(1000 * n, 7) for n in range(1, 30)}
    state["w5"][3, 3] = float("nan")
    state["view"] = state["w29"][::2, 1:3]
    state["turned"] = state["w28"].t()
    state["view"][5, 1] = float("inf")
    state["big"] = torch.randn(5_000_000)
    state["big"][-1] = float("nan")
    path = saved(tmp_path, state)
    one, two_, seven = (deep_check(path, workers) for workers in (1, 2, 7))
    assert one.findings == two_.findings == seven.findings
    assert {finding.where for finding in one.findings} == {f"m.pt: {name}" for name in ("w5", "w29", "view", "big")}


def test_views_with_gaps_are_looked_into_and_no_further(tmp_path: Path) -> None:
    whole = torch.randn(100, 100)
    whole[1] = float("nan")
    report = deep_check(saved(tmp_path, {"even": whole[::2], "odd": whole[1::2, ::3]}))
    assert [finding.where for finding in report.findings] == ["m.pt: odd"]


def test_tensors_in_compressed_records_are_looked_into(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.tensor([1.0, float("nan")] * 500)})
    rezipped(path, lambda name: "/.format" not in name, zipfile.ZIP_DEFLATED)
    assert codes(deep_check(path)) == {"compressed", "nan"}


def test_a_compressed_record_that_does_not_inflate_is_found(tmp_path: Path) -> None:
    records = torch_records({"n": 1})
    records.append(Record("archive/data/9", b"x" * 100, DEFLATED, data=b"\xff\xff\xff"))
    (tmp_path / "m.pt").write_bytes(archive(records))
    assert "crc" in codes(deep_check(tmp_path / "m.pt"))


def test_a_mask_may_have_infinities(tmp_path: Path) -> None:
    mask = torch.full((3, 3), float("-inf")).triu(1)
    report = deep_check(saved(tmp_path, {"attn.causal_mask": mask}))
    assert codes(report, "note") == {"inf"}
    assert report.ok


def test_an_adapter_need_not_have_every_layer(tmp_path: Path) -> None:
    state = {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.randn(4, 8)}
    save_file(state, tmp_path / "adapter_model.safetensors", PT)
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert check(str(tmp_path)).findings == []


def test_tied_tensors_are_told_once(tmp_path: Path) -> None:
    bad = torch.tensor([float("nan")])
    assert len(deep_check(saved(tmp_path, {"a": bad, "b": bad})).findings) == 1


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 12), ("hidden_size", 16), ("intermediate_size", 13), ("num_attention_heads", 2), ("head_dim", 4),
     ("num_key_value_heads", 4)],
)  # fmt: skip
def test_each_number_of_a_config_is_compared(key: str, value: int, tmp_path: Path) -> None:
    changes = {key: value}
    if key == "num_attention_heads":
        changes["head_dim"] = 2
    assert "config-shape" in codes(check(str(configured(tmp_path, **changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"bits": 4}, "hidden_size": 8, "intermediate_size": 99},
        {"vocab_size": None, "hidden_size": "wide", "num_hidden_layers": -1},
        {"torch_dtype": None, "dtype": "float32"},
        {"text_config": {"vocab_size": 11}, "vocab_size": 999},
    ],
)
def test_what_a_config_does_not_say_is_no_contradiction(changes: dict[str, Any], tmp_path: Path) -> None:
    assert check(str(configured(tmp_path, **changes))).findings == []


@pytest.mark.parametrize("text", ["[1]", "{", "", "[" * 100_000, '{"vocab_size": [1e999]}'])
def test_a_config_that_is_none_is_passed_over(text: str, tmp_path: Path) -> None:
    configured(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert check(str(tmp_path)).findings == []


def test_a_shard_alone_is_not_blamed_for_what_the_others_have(tmp_path: Path) -> None:
    save_torch_state_dict(llama(), tmp_path, max_shard_size=1000)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert check(str(tmp_path)).findings == []
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert codes(check(str(shards[0]))) == {"oddity"}


def test_a_folder_without_an_index_is_held_against_its_own_config(tmp_path: Path) -> None:
    save_torch_state_dict(llama(), tmp_path, max_shard_size=1000)
    next(tmp_path.glob("*.index.json")).unlink()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 12}))
    assert codes(check(str(tmp_path))) == {"no-index", "config-shape"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_notes_alone_are_exit_0_and_warnings_exit_1(ckpt: Ckpt, tmp_path: Path) -> None:
    assert ckpt("check", made("no-tensors", tmp_path)).code == 0
    assert ckpt("check", made("trailing-bytes", tmp_path)).code == 1
    assert ckpt("check", made("truncated", tmp_path)).code == 1


@pytest.mark.parametrize("content", [b"", b"remember the milk\n", bytes(1000), b"<!DOCTYPE html><html>"])
def test_what_is_no_checkpoint_is_trouble(content: bytes, ckpt: Ckpt, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    answer = ckpt("check", "--deep", tmp_path / "m.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"ckpt: {tmp_path}/m.pt: ")


def test_what_is_not_there_and_folders_of_several_are_trouble(ckpt: Ckpt, tmp_path: Path) -> None:
    assert ckpt("check", tmp_path / "none.pt").code == 2
    assert ckpt("check", tmp_path).code == 2
    saved(tmp_path, name="a.pt")
    saved(tmp_path, name="b.pt")
    assert "name one of them" in ckpt("check", tmp_path).err


def test_a_cut_file_is_told_how_much_is_missing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.randn(10_000)})
    whole = path.stat().st_size
    os.truncate(path, 20_000)
    (finding,) = check(str(path)).findings
    missing = int(finding.message.split("; ")[1].split()[0])
    assert whole - 20_000 - 2000 < missing <= whole - 20_000


def test_the_rest_of_a_broken_set_is_checked(tmp_path: Path) -> None:
    hub(tmp_path, {f"l{n}.weight": torch.full((8, 8), float("nan")) for n in range(4)})
    (tmp_path / SECOND).unlink()
    assert codes(deep_check(tmp_path)) == {"missing-shard", "nan"}


def test_json_has_the_stable_shape(ckpt: Ckpt, tmp_path: Path) -> None:
    path = made("nan", tmp_path)
    answer = json.loads(ckpt("check", "--json", "--deep", path).out)
    (finding,) = answer.pop("findings")
    assert answer == {"path": str(path), "ok": False, "deep": True}
    assert finding == {"severity": "error", "code": "nan", "where": "m.pt: x", "message": "1 of 2 elements are NaN",
                       "hint": f"ckpt show {path} x"}  # fmt: skip


def test_findings_of_one_code_are_bounded(tmp_path: Path) -> None:
    nan = {f"n{number}": torch.tensor([float("nan"), float(number)]) for number in range(3 * limits.CHECK_FINDINGS)}
    report = deep_check(saved(tmp_path, nan))
    assert len(report.findings) == limits.CHECK_FINDINGS + 1
    assert report.findings[-1].message == f"and {2 * limits.CHECK_FINDINGS} more"


def test_names_are_escaped(ckpt: Ckpt, tmp_path: Path) -> None:
    path = saved(tmp_path, {"\x1b[31mred\n": torch.tensor([float("nan")])})
    for style in ("tsv", "table"):
        assert "\x1b" not in ckpt("check", "--deep", "-f", style, path).out


def test_the_file_is_not_changed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    deep_check(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt"]


def _crashes() -> Iterator[Path]:
    yield from sorted((Path(__file__).parent.parent / "crashes").iterdir())[::7]


def test_what_once_broke_a_reader_breaks_no_check(tmp_path: Path) -> None:
    for path in _crashes():
        with suppress(FormatError, OSError):
            deep_check(path)


def test_mutations_of_a_file_break_no_check(tmp_path: Path) -> None:
    import random

    chance = random.Random(5)
    whole = saved(tmp_path, {"x": torch.randn(30), "y": torch.randn(2, 3)}).read_bytes()
    path = tmp_path / "mutant.pt"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: len(data) - chance.randrange(100) * chance.randrange(2)])
        with suppress(FormatError):
            deep_check(path)


def test_save_model_is_clean_but_for_the_format(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    save_model(net, str(tmp_path / "m.safetensors"))
    assert codes(deep_check(tmp_path / "m.safetensors")) <= {"no-format"}
