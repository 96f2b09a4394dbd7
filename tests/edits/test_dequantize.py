"""`dequantize`: the values that each scheme's own tool gives, bit for bit, in every format, and what is refused.

The samples are written by tests/oracles/quantized.py with those tools, or by the formulas in their sources.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

import ckpt_cli

SAMPLES = Path(os.environ.get("QUANTIZED_SAMPLES") or Path(__file__).parents[1] / "samples/quantized")
CASES = sorted(folder.name for folder in SAMPLES.iterdir())

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source(case: str) -> Path:
    """Return the quantized checkpoint of a sample."""
    return next(path for path in (SAMPLES / case).glob("model.*"))


def expected(case: str) -> State:
    """Return the plain tensors of a sample, as the scheme's own tool gives them."""
    return load_file(SAMPLES / case / "expected.safetensors")


def same(found: State, wanted: State) -> bool:
    """True if two states have the same names, dtypes, shapes and bits."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype
        and found[name].shape == wanted[name].shape
        and found[name].reshape(-1).view(torch.uint8).equal(wanted[name].reshape(-1).view(torch.uint8))
        for name in wanted
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_values_are_those_of_the_scheme_s_own_tool(ckpt: Ckpt, case: str, jobs: str) -> None:
    answer = ckpt("dequantize", str(source(case)), "-o", "out.safetensors", "-j", jobs)
    assert answer.code == 0, answer.err
    assert same(load_file("out.safetensors"), expected(case))


@pytest.mark.parametrize("case", ["deepseek", "gpt-oss", "compressed-int4-asymmetric"])
def test_a_folder_gets_shards_an_index_and_a_config_without_the_quantization(ckpt: Ckpt, case: str) -> None:
    shutil.copytree(SAMPLES / case, "model")
    Path("model/expected.safetensors").unlink()
    Path("model/tokenizer.json").write_text("{}")
    assert ckpt("convert", "model", "shards", "--max-shard", "3kB").code == 0
    answer = ckpt("dequantize", "shards", "-o", "plain")
    assert answer.code == 0, answer.err
    assert Path("plain/tokenizer.json").is_file()
    config = json.loads(Path("plain/config.json").read_text())
    assert config == {"model_type": "oracle", "dtype": "bfloat16"}
    index = json.loads(Path("plain/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected(case).keys()
    found = {}
    for shard in set(index["weight_map"].values()):
        found |= load_file(f"plain/{shard}")
    assert same(found, expected(case))
    assert ckpt("check", "plain").code == 0


@pytest.mark.parametrize("output", ["out.pt", "dcp --to dcp", "bin --to hf-bin", "one --to hf"])
@pytest.mark.parametrize("form", ["pt", "nested", "dcp", "legacy"])
def test_every_format_gives_the_same_bits(ckpt: Ckpt, form: str, output: str) -> None:
    state = load_file(source("compressed-nvfp4"))
    shutil.copy(SAMPLES / "compressed-nvfp4/config.json", "config.json")
    torch.save({"model": state, "step": 3} if form == "nested" else state, "in.pt",
               _use_new_zipfile_serialization=form != "legacy")  # fmt: skip
    if form == "dcp":
        assert ckpt("convert", "in.pt", "in", "--to", "dcp").code == 0
    answer = ckpt("dequantize", "in" if form == "dcp" else "in.pt", "-o", *output.split())
    if form == "nested" and output not in ("out.pt", "dcp --to dcp"):
        assert answer.code == 2
        assert not Path(output.split()[0]).exists()
        return
    assert answer.code == 0, answer.err
    inside = "model." if form == "nested" else ""
    with ckpt_cli.open(output.split()[0]) as checkpoint:
        found = {tensor.name.removeprefix(inside): tensor.torch().clone() for tensor in checkpoint.tensors}
    assert found.keys() == expected("compressed-nvfp4").keys()
    wanted = expected("compressed-nvfp4")
    assert all(found[name].to(wanted[name].dtype).equal(wanted[name]) for name in wanted)
    if output == "out.pt":
        loaded = torch.load("out.pt")
        assert (loaded["model"] if form == "nested" else loaded).keys() == wanted.keys()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_product_is_rounded_once_to_another_dtype(ckpt: Ckpt, dtype: str) -> None:
    weight = (torch.randn(5, 300) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(5, 1) * 0.01
    save_file({"a.weight": weight, "a.weight_scale": scale}, "in.safetensors")
    assert ckpt("dequantize", "in.safetensors", "-o", "out.safetensors", "--dtype", dtype).code == 0
    wanted = (weight.to(torch.float32) * scale).to(getattr(torch, dtype))
    assert same(load_file("out.safetensors"), {"a.weight": wanted})
    assert ckpt("dequantize", "in.safetensors", "-o", "out.npz", "--dtype", dtype).code == 0
    with np.load("out.npz") as arrays:
        assert arrays["a.weight"].tobytes() == wanted.numpy().tobytes()


@pytest.mark.parametrize("turned", [False, True])
def test_views_of_any_stride_are_read_as_what_they_mean(ckpt: Ckpt, turned: bool) -> None:
    weight = torch.randint(-127, 128, (60, 70), dtype=torch.int8)
    scale = torch.rand(60, 1)
    stored = weight.t().contiguous().t() if turned else torch.cat([weight, weight], 1)[:, :70]
    torch.save({"a.weight": stored, "a.weight_scale": scale, "epoch": 1}, "in.pt")
    assert ckpt("dequantize", "in.pt", "-o", "out.pt", "--dtype", "float32").code == 0
    found = torch.load("out.pt")
    assert found.keys() == {"a.weight", "epoch"}
    assert found["a.weight"].equal(weight * scale)


def test_experts_may_have_a_scale_each_and_blocks_that_are_cut_off(ckpt: Ckpt) -> None:
    weight = (torch.randn(3, 130, 140) * 50).to(torch.float8_e4m3fn)
    blocks, one = torch.rand(3, 2, 2), torch.rand(3, 1, 1)
    Path("config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [128, 128]}}))
    save_file({"a.w": weight, "a.w_scale_inv": blocks, "b.w": weight.clone(), "b.w_scale": one}, "in.safetensors")
    assert ckpt("dequantize", "in.safetensors", "-o", "out.safetensors", "--dtype", "float32").code == 0
    found, wide = load_file("out.safetensors"), weight.to(torch.float32)
    spread = blocks.repeat_interleave(128, 1)[:, :130].repeat_interleave(128, 2)[:, :, :140]
    assert same(found, {"a.w": wide * spread, "b.w": wide * one})


def test_a_dry_run_says_what_would_be_and_writes_nothing(ckpt: Ckpt) -> None:
    answer = ckpt("dequantize", str(source("deepseek")), "-o", "out.safetensors", "-n", "--json")
    assert answer.code == 0, answer.err
    report: Any = json.loads(answer.out)
    assert report["dry_run"] is True
    assert {row["name"] for row in report["dequantized"]} == expected("deepseek").keys() - {"model.norm.weight"}
    assert all(name.endswith("_scale_inv") for name in report["dropped"])
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("case", CASES)
def test_info_names_the_scheme_and_counts_what_the_weights_stand_for(ckpt: Ckpt, case: str) -> None:
    answer = json.loads(ckpt("info", "--json", str(source(case))).out)
    plain = expected(case)
    odd = sum(tensor.numel() % 2 for tensor in plain.values() if case.startswith(("bnb-nf4", "bnb-fp4")))
    assert answer["parameters"] == sum(tensor.numel() for tensor in plain.values()) + odd
    assert sum(share["weights"] for share in answer["quantization"]) == len(json.loads(
        ckpt("dequantize", str(source(case)), "-o", "out", "-n", "--json").out)["dequantized"])  # fmt: skip
    assert f"quantization\t{answer['quantization'][0]['scheme']}" in ckpt("info", str(source(case))).out


@pytest.mark.parametrize("case", CASES)
def test_check_finds_nothing_wrong_with_what_the_tools_wrote(ckpt: Ckpt, case: str) -> None:
    found = json.loads(ckpt("check", "--json", str(source(case))).out)["findings"]
    assert [each for each in found if each["severity"] == "error"] == []
