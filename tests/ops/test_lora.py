"""Adapters: the layouts that are read, the names that they mean, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def low(module: str, out: int = 5, inner: int = 3, rank: int = 2, ends: str = "lora_A.weight lora_B.weight") -> State:
    down, up = ends.split()
    return {f"{module}.{down}": torch.randn(rank, inner), f"{module}.{up}": torch.randn(out, rank)}


def adapter(state: State, config: Any = None, name: str = "adapter") -> str:
    Path(name).mkdir(exist_ok=True)
    save_file(state, f"{name}/adapter_model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", "lora_alpha": 4, **config})
        Path(name, "adapter_config.json").write_text(text)
    return name


def rows(ckpt: Ckpt, path: str, *more: str) -> list[dict[str, Any]]:
    answer = ckpt("lora", "info", path, "--json", *more)
    assert answer.code == 0, answer.err
    found: list[dict[str, Any]] = json.loads(answer.out)["modules"]
    return found


@pytest.mark.parametrize(
    ("layout", "module", "ends"),
    [
        ("kohya", "lora_unet_down_blocks_0_to_q", "lora_down.weight lora_up.weight"),
        ("kohya", "down_blocks.0.to_q", "lora_down.weight lora_up.weight"),
        ("diffusers", "unet.down_blocks.0.to_q", "lora_A.weight lora_B.weight"),
        ("diffusers", "unet.down_blocks.0.to_q", "lora.down.weight lora.up.weight"),
        ("diffusers", "unet.down_blocks.0", "processor.to_q_lora.down.weight processor.to_q_lora.up.weight"),
        ("diffusers", "down_blocks.0.to_q", "lora_linear_layer.down.weight lora_linear_layer.up.weight"),
        ("peft", f"{PREFIX}down_blocks.0.to_q", "lora_A.default.weight lora_B.default.weight"),
    ],
)
def test_each_layout_means_the_same_tensor(ckpt: Ckpt, layout: str, module: str, ends: str) -> None:
    base = {"down_blocks.0.to_q.weight": torch.randn(5, 3), "down_blocks.0.to_q.bias": torch.randn(5)}
    save_file(base, "base.safetensors")
    state = low(module, ends=ends)
    down, up = state.values()
    path = adapter(state, {"lora_alpha": 2} if layout == "peft" else None)
    [row] = rows(ckpt, path, "--base", "base.safetensors")
    assert row["tensor"] == "down_blocks.0.to_q.weight"
    assert json.loads(ckpt("lora", "info", path, "--json").out)["layout"] == layout
    assert ckpt("lora", "merge", "base.safetensors", path, "-o", "out.safetensors").code == 0
    torch.testing.assert_close(load_file("out.safetensors")[row["tensor"]], base[row["tensor"]] + up @ down)


def test_alphas_of_the_file_itself_are_divided_by_the_rank(ckpt: Ckpt) -> None:
    state = {**low("lora_te_a", rank=4, ends="lora_down.weight lora_up.weight"), "lora_te_a.alpha": torch.tensor(2.0)}
    [row] = rows(ckpt, adapter(state))
    assert (row["alpha"], row["scaling"]) == (2.0, 0.5)
    save_file({"a.weight": torch.randn(5, 3)}, "base.safetensors")
    refused = ckpt("lora", "merge", "base.safetensors", "adapter", "-o", "out.safetensors", "--alpha", "3")
    assert "says its alpha itself" in refused.err


def test_an_adapter_of_peft_without_its_config_needs_an_alpha(ckpt: Ckpt) -> None:
    save_file({"a.weight": torch.zeros(5, 3)}, "base.safetensors")
    state = low(f"{PREFIX}a")
    path = adapter(state)
    refused = ckpt("lora", "merge", "base.safetensors", path, "-o", "out.safetensors")
    assert refused.code == 2
    assert "--alpha N" in refused.err
    assert ckpt("lora", "merge", "base.safetensors", path, "-o", "out.safetensors", "--alpha", "6").code == 0
    down, up = state.values()
    torch.testing.assert_close(load_file("out.safetensors")["a.weight"], up @ down * 3)


def test_the_first_pattern_that_fits_says_the_alpha(ckpt: Ckpt) -> None:
    names = ["m.layers.1.q", "m.layers.11.q", "m.layers.2.q", "m.q", "head", "m.head"]
    state = {key: value for name in names for key, value in low(f"{PREFIX}{name}").items()}
    patterns = {r"layers\.[12]\.q": 10, "layers.11.q": 20, "layers.1.q": 30, "^head": 40, ".*q": 50}
    found = {row["name"]: row["alpha"] for row in rows(ckpt, adapter(state, {"alpha_pattern": patterns}))}
    assert found == dict(zip(names, [10, 20, 10, 50, 40, 4], strict=True))


def test_names_are_taken_as_they_are_then_by_their_end(ckpt: Ckpt) -> None:
    save_file({"model.q.weight": torch.zeros(5, 3), "q.weight": torch.zeros(5, 3), "k.q.weight": torch.zeros(5, 3),
               "model.only.weight": torch.zeros(5, 3)}, "base.safetensors")  # fmt: skip
    state = low(f"{PREFIX}q") | low(f"{PREFIX}only")
    found = {row["name"]: row["tensor"] for row in rows(ckpt, adapter(state, {}), "--base", "base.safetensors")}
    assert found == {"q": "q.weight", "only": "model.only.weight"}
    save_file({"model.q.weight": torch.zeros(5, 3), "k.q.weight": torch.zeros(5, 3)}, "base.safetensors")
    refused = ckpt("lora", "merge", "base.safetensors", "adapter", "-o", "out.safetensors")
    assert "may mean 2 tensors: k.q.weight, model.q.weight" in refused.err


def test_underscores_that_stand_for_several_names_are_refused(ckpt: Ckpt) -> None:
    save_file({"to.q.weight": torch.zeros(5, 3), "to_q.weight": torch.zeros(5, 3)}, "base.safetensors")
    path = adapter(low("lora_unet_to_q", ends="lora_down.weight lora_up.weight"))
    refused = ckpt("lora", "merge", "base.safetensors", path, "-o", "out.safetensors")
    assert (refused.code, "may mean 2 tensors" in refused.err) == (2, True)


def test_what_the_model_does_not_have_is_refused_or_left_out_on_demand(ckpt: Ckpt) -> None:
    save_file({"a.weight": torch.zeros(5, 3), "lone.weight": torch.zeros(2, 2)}, "base.safetensors")
    path = adapter(low(f"{PREFIX}a") | low(f"{PREFIX}b"), {})
    refused = ckpt("lora", "merge", "base.safetensors", path, "-o", "out.safetensors")
    assert refused.code == 2
    assert refused.err.splitlines()[1:] == ["  b", "hint: --partial merges the others"]
    answer = ckpt("lora", "merge", "base.safetensors", path, "-o", "out.safetensors", "--partial", "--json")
    assert json.loads(answer.out)["unmatched"] == ["b"]
    assert ckpt("lora", "info", path, "--base", "base.safetensors").code == 1
    nothing = ckpt("lora", "merge", "base.safetensors", adapter(low("c.one"), {}, "other"), "-o", "none.safetensors")
    assert nothing.code == 2
    assert "nothing of the adapter is in the model" in nothing.err
    assert "lone.weight, of the model" in nothing.err


A = low(f"{PREFIX}a")
NAN = {**A, f"{PREFIX}a.lora_A.weight": torch.full((2, 3), float("nan"))}
BOMB = "(a+)+b" + "a" * 30
CASES: dict[str, tuple[State, Any, str]] = {
    "another kind": (A, {"peft_type": "IA3"}, "of the kind 'IA3'"),
    "not json": (A, "{", "it is not JSON"),
    "deep json": (A, "[" * 100_000, "it is not JSON"),
    "a list": (A, "[]", "it is not a config"),
    "a large config": (A, {"x": "y" * (1 << 20)}, "far more than a config"),
    "alpha of text": (A, {"lora_alpha": "16"}, "is not a number"),
    "alpha of infinity": (A, '{"peft_type": "LORA", "lora_alpha": Infinity}', "is not a number"),
    "a regex bomb": (A, {"alpha_pattern": {BOMB: 1}}, "could take for ever"),
    "a broken pattern": (A, {"alpha_pattern": {"[a": 1}}, "is not a pattern"),
    "many patterns": (A, {"alpha_pattern": {f"a{n}.*": 1 for n in range(200)}}, "200 patterns"),
    "another model": (A, {"init_lora_weights": "pissa"}, "weights that PEFT changed"),
    "aLoRA": (A, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "one factor": ({f"{PREFIX}a.lora_A.weight": torch.ones(2, 3)}, {}, "does not have both factors"),
    "factors that lie": ({**A, f"{PREFIX}a.lora_B.weight": torch.ones(5, 3)}, {}, "do not fit"),
    "a flat factor": ({**A, f"{PREFIX}a.lora_A.weight": torch.ones(6)}, {}, "saved without its values"),
    "an empty factor": ({**A, f"{PREFIX}a.lora_A.weight": torch.ones(0, 3)}, {}, "saved without its values"),
    "integers": ({name: tensor.int() for name, tensor in A.items()}, {}, "not a factor that can be multiplied"),
    "another shape": (low(f"{PREFIX}a", out=4), {}, "'a.weight' is [5, 3]"),
    "NaN": (NAN, {}, "NaN or infinities among the merged values"),
    "two adapters": ({**A, f"{PREFIX}a.lora_A.x.weight": torch.ones(2, 3), f"{PREFIX}a.lora_B.y.weight":
                      torch.ones(2, 3)}, {}, "are of the same module"),
    "two names": (low(f"{PREFIX}a", ends="lora_A.x.weight lora_B.x.weight") | low(f"{PREFIX}b",
                  ends="lora_A.y.weight lora_B.y.weight"), {}, "several adapters in it: x, y"),
    "LoKr": ({"lora_unet_a.lokr_w1": torch.ones(2, 2)}, None, "LoKr"),
    "no adapter": ({"x": torch.ones(1)}, None, "it is not a LoRA adapter"),
    "lengths that lie": ({**A, f"{PREFIX}a.lora_magnitude_vector": torch.ones(4)}, {}, "has 4 lengths, for 5 lines"),
    "no lengths": (A, {"use_dora": True}, "it has no magnitudes"),
    "a bias of nothing": ({**A, f"{PREFIX}a.lora_B.bias": torch.ones(5)}, {}, "is for a bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_merged_is_said_in_a_line_and_nothing_is_written(ckpt: Ckpt, case: str) -> None:
    state, config, problem = CASES[case]
    save_file({"a.weight": torch.zeros(5, 3)}, "base.safetensors")
    for more in ([], ["-n"]):
        answer = ckpt("lora", "merge", "base.safetensors", adapter(state, config), "-o", "out.safetensors", *more)
        assert (answer.code, answer.out, Path("out.safetensors").exists()) == (2, "", False)
        assert problem in answer.err.splitlines()[0], answer.err


def test_a_quantized_model_is_refused_by_the_name_of_its_scheme(ckpt: Ckpt) -> None:
    packed, scales = torch.zeros(4, 8, dtype=torch.int32), torch.ones(1, 8, dtype=torch.float16)
    save_file({"a.qweight": packed, "a.scales": scales, "b.weight": torch.zeros(5, 3)}, "base.safetensors")
    refused = ckpt("lora", "merge", "base.safetensors", adapter(A, {}), "-o", "out.safetensors")
    assert refused.code == 2
    assert "the model is quantized (GPTQ" in refused.err


def test_a_huge_rank_takes_no_more_memory_than_its_factors(ckpt: Ckpt) -> None:
    save_file({"a.weight": torch.zeros(400, 1)}, "base.safetensors")
    state = low(f"{PREFIX}a", out=400, inner=1, rank=20_000)
    down, up = state.values()
    answer = ckpt("lora", "merge", "base.safetensors", adapter(state, {"lora_alpha": 20_000}), "-o", "out.safetensors")
    assert answer.code == 0, answer.err
    found = load_file("out.safetensors")["a.weight"]
    torch.testing.assert_close(found, up @ down, rtol=1e-3, atol=1e-2)


def test_the_output_is_never_an_adapter_that_is_merged(ckpt: Ckpt) -> None:
    save_file({"a.weight": torch.zeros(5, 3)}, "base.safetensors")
    path = f"{adapter(A, {})}/adapter_model.safetensors"
    for output in (path, "base.safetensors"):
        answer = ckpt("lora", "merge", "base.safetensors", path, "-o", output, "--force")
        assert answer.code == 2
    assert load_file(path).keys() == A.keys()
