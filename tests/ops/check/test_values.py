"""What `ckpt check` says of values: NaN, infinities, checksums, views, compressed records."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from builders.pt import DEFLATED, Record, archive, torch_records
from check_cases.case import PT, codes, deep_check, rezipped, saved
from check_cases.values import CONFIG
from safetensors.torch import save_file

from ckpt_cli.ops.check.run import check

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
