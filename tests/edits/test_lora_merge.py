"""`lora merge`: held against what PEFT merged, and against the formula; formats, ties, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

import ckpt_cli

SAMPLES = Path(os.environ.get("LORA_SAMPLES") or Path(__file__).parent.parent / "samples" / "lora")
"""Written by tests/oracles/lora_samples.py, with PEFT; `make oracles` writes others."""

State = dict[str, torch.Tensor]
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors are the same bit for bit."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and one.equal(other)


@pytest.mark.parametrize("case", sorted(path.name for path in SAMPLES.iterdir()))
def test_it_is_what_peft_merges(ckpt: Ckpt, case: str) -> None:
    folder = SAMPLES / case
    answer = ckpt("lora", "merge", folder / "base.safetensors", folder / "adapter", "-o", "out.safetensors")
    assert answer.code == 0, answer.err
    found, wanted = load_file("out.safetensors"), load_file(folder / "merged.safetensors")
    base = load_file(folder / "base.safetensors")
    assert found.keys() == wanted.keys()
    assert any(not same(base[name], found[name]) for name in base)
    for name, tensor in wanted.items():
        if case == "embedding-bfloat16" and name == "embed.weight":  # PEFT rounds the product, then the sum
            apart = (found[name].float() - tensor.float()).abs()
            product = tensor.float() - base[name].float()
            assert (apart <= 2**-7 * torch.maximum(product.abs(), tensor.float().abs())).all()
        else:
            assert same(found[name], tensor), name


def model(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> State:
    torch.manual_seed(seed)
    shapes = {"a.weight": (600, 700), "a.bias": (600,), "b.weight": (5, 3), "c.weight": (4, 3, 3, 3), "norm": (3,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def factors(rank: int, seed: int = 1, modules: tuple[str, ...] = ("a", "b", "c")) -> State:
    torch.manual_seed(seed)
    shapes = {"a": ((rank, 700), (600, rank)), "b": ((rank, 3), (5, rank)), "c": ((rank, 3, 3, 3), (4, rank, 1, 1))}
    found = {}
    for name in modules:
        for letter, shape in zip("AB", shapes[name], strict=True):
            found[f"{PREFIX}{name}.lora_{letter}.weight"] = torch.randn(shape)
    return found


def write_adapter(folder: str, state: State, **config: Any) -> str:
    Path(folder).mkdir()
    save_file(state, f"{folder}/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    Path(folder, "adapter_config.json").write_text(json.dumps(settings))
    return folder


def product(state: State, module: str, scaling: float) -> torch.Tensor:
    up, down = (state[f"{PREFIX}{module}.lora_{letter}.weight"] for letter in "BA")
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]) * scaling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("base", ["base.pt", "base.safetensors", "shards", "dcp"])
def test_the_sum_is_made_in_float32_and_rounded_once_in_any_format(ckpt: Ckpt, dtype: str, base: str) -> None:
    state, added = model(getattr(torch, dtype)), factors(4)
    torch.save(state, "base.pt")
    if base != "base.pt":
        options = {"shards": ["--max-shard", "1MB"], "dcp": ["--to", "dcp"]}.get(base, [])
        assert ckpt("convert", "base.pt", base, *options).code == 0
    write_adapter("adapter", added)
    to = ["--to", "dcp"] if base == "dcp" else []
    assert ckpt("lora", "merge", base, "adapter", "-o", f"new-{base}", *to).code == 0
    assert ckpt("convert", f"new-{base}", "back.pt").code == 0
    found = torch.load("back.pt")
    wide = torch.float64 if dtype == "float64" else torch.float32
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        wanted = tensor
        if module != name:
            term = product({key: value.to(wide) for key, value in added.items()}, module, 2)
            wanted = (tensor.to(wide) + term).to(tensor.dtype)
            torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6)
            assert (found[name] != wanted).sum() <= 1e-4 * wanted.numel() + (dtype == "float64") * wanted.numel()
        else:
            assert same(found[name], wanted)


@pytest.mark.parametrize("jobs", ["1", "2", "5"])
def test_the_bits_do_not_depend_on_threads_or_shards(ckpt: Ckpt, jobs: str) -> None:
    torch.save(model(), "base.pt")
    write_adapter("adapter", factors(40))
    assert ckpt("convert", "base.pt", "shards", "--max-shard", "10KB").code == 0
    assert ckpt("lora", "merge", "base.pt", "adapter", "-o", "one.pt", "-j", "1").code == 0
    assert ckpt("lora", "merge", "shards", "adapter", "-o", "more", "-j", jobs).code == 0
    assert ckpt("convert", "more", "more.pt").code == 0
    one, more = torch.load("one.pt"), torch.load("more.pt")
    assert all(same(one[name], more[name]) for name in one)


def test_several_adapters_are_added_before_anything_is_rounded(ckpt: Ckpt) -> None:
    state, first, second = model(), factors(1), factors(1, seed=2)
    save_file(state, "base.safetensors")
    write_adapter("first", first, lora_alpha=1)
    write_adapter("second", second, lora_alpha=3)
    arguments = ["first:0.5", "second", "--scale", "2", "-o", "out.safetensors", "--json"]
    answer = ckpt("lora", "merge", "base.safetensors", *arguments)
    assert answer.code == 0, answer.err
    found = load_file("out.safetensors")
    for module in "abc":
        wide = state[f"{module}.weight"].float() + product(first, module, 1) + product(second, module, 6)
        assert same(found[f"{module}.weight"], wide.bfloat16())
    report = json.loads(answer.out)
    assert report["adapters"] == [
        {"path": "first", "layout": "peft", "scale": 1.0}, {"path": "second", "layout": "peft", "scale": 2.0},
    ]  # fmt: skip
    assert [row["scaling"] for row in report["merged"] if row["name"] == "a.weight"] == [1.0, 6.0]


def test_the_factors_may_be_in_half_precision_and_transposed_in_the_file(ckpt: Ckpt) -> None:
    state, added = model(), {name: tensor.bfloat16() for name, tensor in factors(2).items()}
    save_file(state, "base.safetensors")
    turned = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in added.items()}
    Path("adapter").mkdir()
    torch.save(turned, "adapter/adapter_model.bin")
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    assert ckpt("lora", "merge", "base.safetensors", "adapter", "-o", "out.safetensors").code == 0
    found = load_file("out.safetensors")
    wide = {name: tensor.float() for name, tensor in added.items()}
    for module in "abc":
        wanted = (state[f"{module}.weight"].float() + product(wide, module, 1)).bfloat16()
        assert (found[f"{module}.weight"] != wanted).sum() <= 1e-4 * wanted.numel()


def test_a_folder_keeps_its_config_and_a_training_checkpoint_everything_else(ckpt: Ckpt) -> None:
    state = model()
    write_adapter("adapter", factors(2))
    torch.save(state, "base.pt")
    assert ckpt("convert", "base.pt", "folder", "--max-shard", "1MB").code == 0
    Path("folder/config.json").write_text("{}")
    assert ckpt("lora", "merge", "folder", "adapter", "-o", "out").code == 0
    assert {path.name for path in Path("out").iterdir()} == {path.name for path in Path("folder").iterdir()}
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, "train.pt")
    assert ckpt("lora", "merge", "train.pt", "adapter", "-o", "after.pt").code == 0
    found = torch.load("after.pt")
    assert found["epoch"] == 3
    assert not same(found["model"]["a.weight"], state["a.weight"])
    assert same(found["model"]["norm"], state["norm"])


def test_a_dry_run_writes_nothing(ckpt: Ckpt) -> None:
    save_file(model(), "base.safetensors")
    write_adapter("adapter", factors(2))
    answer = ckpt("lora", "merge", "base.safetensors", "adapter", "-o", "out.safetensors", "-n")
    assert answer.code == 0
    assert "would be merged into 3 tensors" in answer.err
    assert not Path("out.safetensors").exists()


# --- ties -----------------------------------------------------------------------------------------------------------


def tied() -> None:
    weight = torch.randn(8, 6)
    torch.save({"embed.weight": weight, "head.weight": weight, "q.weight": torch.randn(6, 6)}, "base.pt")
    state = {f"{PREFIX}head.lora_A.weight": torch.randn(2, 6), f"{PREFIX}head.lora_B.weight": torch.randn(8, 2)}
    write_adapter("adapter", state)


def test_a_tied_weight_is_untied_or_changed_with_the_others_only_on_demand(ckpt: Ckpt) -> None:
    tied()
    refused = ckpt("lora", "merge", "base.pt", "adapter", "-o", "out.pt")
    assert (refused.code, Path("out.pt").exists()) == (2, False)
    assert "head.weight is tied to embed.weight" in refused.err
    assert "--keep-tied" in refused.err
    assert ckpt("lora", "merge", "base.pt", "adapter", "-o", "apart.pt", "--untie").code == 0
    assert ckpt("lora", "merge", "base.pt", "adapter", "-o", "both.pt", "--keep-tied").code == 0
    before, apart, both = (torch.load(f"{name}.pt") for name in ("base", "apart", "both"))
    assert same(apart["embed.weight"], before["embed.weight"])
    assert not same(apart["head.weight"], before["head.weight"])
    assert both["embed.weight"].data_ptr() == both["head.weight"].data_ptr()
    assert same(both["head.weight"], apart["head.weight"])


def test_a_tie_that_only_the_config_says_is_not_passed_over(ckpt: Ckpt) -> None:
    Path("base").mkdir()
    save_file({"model.embed_tokens.weight": torch.randn(8, 6)}, "base/model.safetensors")
    Path("base/config.json").write_text('{"tie_word_embeddings": true}')
    state = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(2, 8),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(6, 2),
    }
    write_adapter("adapter", state)
    refused = ckpt("lora", "merge", "base", "adapter", "-o", "out")
    assert refused.code == 2
    assert "head of the model too" in refused.err
    assert ckpt("lora", "merge", "base", "adapter", "-o", "out", "--keep-tied").code == 0


# --- whole tensors --------------------------------------------------------------------------------------------------


def test_a_longer_vocabulary_of_the_adapter_takes_the_place_of_the_model_s(ckpt: Ckpt) -> None:
    save_file({"embed.weight": torch.randn(8, 6).bfloat16(), "q.weight": torch.randn(6, 6)}, "base.safetensors")
    whole, down, up = torch.randn(10, 6), torch.randn(2, 10), torch.randn(6, 2)
    write_adapter("whole", {f"{PREFIX}embed.weight": whole, f"{PREFIX}q.lora_A.weight": torch.randn(2, 6),
                            f"{PREFIX}q.lora_B.weight": torch.randn(6, 2)})  # fmt: skip
    answer = ckpt("lora", "merge", "base.safetensors", "whole", "-o", "out.safetensors")
    assert answer.code == 0, answer.err
    assert "from 8 to 10" in answer.err
    assert same(load_file("out.safetensors")["embed.weight"], whole.bfloat16())
    low = {f"{PREFIX}embed.lora_embedding_A": down, f"{PREFIX}embed.lora_embedding_B": up}
    write_adapter("low", low, lora_alpha=2)
    refused = ckpt("lora", "merge", "base.safetensors", "low", "-o", "low.safetensors")
    assert "has 8 rows, and the adapter is for 10" in refused.err
    write_adapter("copied", {**low, f"{PREFIX}embed.base_layer.weight": whole}, lora_alpha=2)
    assert ckpt("lora", "merge", "base.safetensors", "copied", "-o", "low.safetensors").code == 0
    found = load_file("low.safetensors")["embed.weight"]
    torch.testing.assert_close(found, (whole + (up @ down).t()).bfloat16(), rtol=1e-2, atol=1e-2)


def test_a_copy_of_the_base_must_be_equal_to_it(ckpt: Ckpt) -> None:
    state = {"q.weight": torch.randn(6, 6).bfloat16()}
    save_file(state, "base.safetensors")
    low = {f"{PREFIX}q.lora_A.weight": torch.randn(2, 6), f"{PREFIX}q.lora_B.weight": torch.randn(6, 2)}
    copy = state["q.weight"].float()
    write_adapter("equal", {**low, f"{PREFIX}q.base_layer.weight": copy})
    write_adapter("other", {**low, f"{PREFIX}q.base_layer.weight": copy + 1})
    assert ckpt("lora", "merge", "base.safetensors", "equal", "-o", "out.safetensors").code == 0
    refused = ckpt("lora", "merge", "base.safetensors", "other", "-o", "other.safetensors")
    assert refused.code == 2
    assert "it was trained on another model" in refused.err


def test_the_functions_report_and_write_what_the_commands_do(ckpt: Ckpt) -> None:
    shutil.copytree(SAMPLES / "dora", "lora")
    base, adapter = "lora/base.safetensors", Path("lora/adapter")
    reported = json.loads(ckpt("lora", "merge", base, f"{adapter}:0.5", "-o", "command.safetensors", "--json").out)
    done = ckpt_cli.lora_merge(base, {adapter: 0.5}, "function.safetensors")
    assert done == {**reported, "output": "function.safetensors"}
    assert Path("command.safetensors").read_bytes() == Path("function.safetensors").read_bytes()
    assert ckpt_cli.lora_info(adapter, base) == json.loads(ckpt("lora", "info", adapter, "--base", base, "--json").out)


def test_what_the_format_cannot_hold_is_left_out_where_that_is_allowed(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    linear = Path(__file__).parent.parent / "samples" / "lora" / "linear"
    save_file(load_file(linear / "base.safetensors"), "base.safetensors", {"note": "mine"})
    command = ["lora", "merge", "base.safetensors", str(linear / "adapter"), "-o", "out.pt"]
    answer = ckpt(*command)
    assert (answer.code, "--tensors-only leaves them out" in answer.err, Path("out.pt").exists()) == (2, True, False)
    assert ckpt(*command, "--tensors-only").code == 0
    assert torch.load("out.pt").keys() == load_file("base.safetensors").keys()
