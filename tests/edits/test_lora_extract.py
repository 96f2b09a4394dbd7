"""`lora extract` and `lora resize`: the nearest products of a rank, held against torch, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

import ckpt_cli

State = dict[str, torch.Tensor]
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def models(changes: State) -> tuple[State, State]:
    """Write two models that differ by some changes."""
    shapes = {"embed.weight": (12, 8), "q.weight": (20, 8), "q.bias": (20,), "conv.weight": (6, 4, 3, 3), "norm.weight":
              (8,), "wide.weight": (60, 50)}  # fmt: skip
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    tuned = {name: tensor + changes.get(name, 0) for name, tensor in base.items()}
    save_file(base, "base.safetensors")
    save_file(tuned, "tuned.safetensors")
    return base, tuned


def low(rows: int, columns: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, columns)


def extracted(ckpt: Ckpt, *more: str, output: str = "adapter") -> dict[str, Any]:
    answer = ckpt("lora", "extract", "base.safetensors", "tuned.safetensors", "-o", output, "--json", *more)
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_differences_of_a_low_rank_come_back_when_they_are_merged(ckpt: Ckpt, svd: str) -> None:
    changes = {"embed.weight": low(12, 8, 2), "q.weight": low(20, 8, 2), "q.bias": torch.randn(20),
               "conv.weight": low(6, 36, 2).reshape(6, 4, 3, 3), "norm.weight": torch.randn(8)}  # fmt: skip
    _, tuned = models(changes)
    report = extracted(ckpt, "--rank", "2", "--svd", svd)
    assert report["residual"] < 1e-5
    assert sorted(row["name"] for row in report["modules"]) == ["conv", "embed", "q"]
    assert report["whole"] == ["norm.weight"]
    assert f"{PREFIX}embed.lora_embedding_A" in load_file("adapter/adapter_model.safetensors")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_bias"]) == (2, 2, True)
    assert (config["target_modules"], config["modules_to_save"]) == (["conv", "embed", "q"], ["norm"])
    assert ckpt("lora", "merge", "base.safetensors", "adapter", "-o", "back.safetensors").code == 0
    back = load_file("back.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_the_residual_is_that_of_the_dropped_singular_values(ckpt: Ckpt, rank: int) -> None:
    change = torch.randn(60, 50) * torch.logspace(0, -3, 50)
    base, tuned = models({"wide.weight": change})
    values = torch.linalg.svdvals((tuned["wide.weight"] - base["wide.weight"]).double())
    wanted = float((values[rank:] ** 2).sum().sqrt() / (values**2).sum().sqrt())
    for svd in ("exact", "randomized"):
        report = extracted(ckpt, "--rank", str(rank), "--svd", svd, output=svd)
        assert report["residual"] == pytest.approx(wanted, rel=1e-2)
        state = load_file(f"{svd}/adapter_model.safetensors")
        product = state[f"{PREFIX}wide.lora_B.weight"] @ state[f"{PREFIX}wide.lora_A.weight"]
        apart = (product - (tuned["wide.weight"] - base["wide.weight"])).norm() / change.norm()
        assert float(apart) == pytest.approx(wanted, rel=2e-2)


def test_a_seed_says_the_bits_and_ranks_are_no_higher_than_a_matrix(ckpt: Ckpt) -> None:
    models({"wide.weight": torch.randn(60, 50), "q.weight": torch.randn(20, 8)})
    for name, seed in (("one", "3"), ("same", "3"), ("other", "4")):
        extracted(ckpt, "--rank", "10", "--seed", seed, "--dtype", "bfloat16", output=name)
    one, same, other = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    state = load_file("one/adapter_model.safetensors")
    assert state[f"{PREFIX}q.lora_A.weight"].shape == (8, 8)
    assert state[f"{PREFIX}q.lora_A.weight"].dtype == torch.bfloat16
    config = json.loads(Path("one/adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {8, 10}
    assert {row["scaling"] for row in json.loads(ckpt("lora", "info", "one", "--json").out)["modules"]} == {1.0}


def test_what_cannot_be_extracted_is_said_in_a_line_and_nothing_is_written(ckpt: Ckpt) -> None:
    base, tuned = models({"q.weight": torch.randn(20, 8)})
    save_file({**tuned, "more": torch.ones(1)}, "more.safetensors")
    save_file({**base, "norm.weight": torch.ones(8)}, "norm.safetensors")
    save_file({**tuned, "q.weight": torch.full((20, 8), float("nan"))}, "nan.safetensors")
    for tuning, problem in (
        ("more.safetensors", "base.safetensors: it lacks 1 of the 7 names of the other"),
        ("base.safetensors", "there is nothing to extract"),
        ("norm.safetensors", "no matrix differs"),
        ("nan.safetensors", "NaN or infinities among the values of q"),
        ("none.safetensors", "No such file"),
    ):
        for dry in ([], ["-n"]):
            answer = ckpt("lora", "extract", "base.safetensors", tuning, "--rank", "2", "-o", "adapter", *dry)
            assert (answer.code, answer.out, Path("adapter").exists()) == (2, "", False)
            assert problem in answer.err.splitlines()[0]
    Path("full").mkdir()
    Path("full/file").touch()
    answer = ckpt("lora", "extract", "base.safetensors", "tuned.safetensors", "--rank", "2", "-o", "full")
    assert "it is there already" in answer.err
    assert extracted(ckpt, "--rank", "2", "-n")["dry_run"]
    assert not Path("adapter").exists()


# --- resize ---------------------------------------------------------------------------------------------------------


def adapter(state: State, config: Any = None) -> str:
    Path("adapter").mkdir()
    save_file(state, "adapter/adapter_model.safetensors")
    if config is not None:
        Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return "adapter"


def test_a_lower_rank_is_the_nearest_product_scaled_as_before(ckpt: Ckpt) -> None:
    down, up = torch.randn(8, 30), torch.randn(40, 8) * torch.logspace(0, -2, 8)
    small = {f"{PREFIX}b.lora_A.weight": torch.randn(2, 3), f"{PREFIX}b.lora_B.weight": torch.randn(5, 2)}
    state = {f"{PREFIX}a.lora_A.weight": down, f"{PREFIX}a.lora_B.weight": up, **small}
    state[f"{PREFIX}n.weight"] = torch.ones(3)
    path = adapter(state, {"r": 8, "lora_alpha": 16, "rank_pattern": {"b": 2}, "use_rslora": True, "note": "kept"})
    answer = ckpt("lora", "resize", path, "--rank", "4", "-o", "out", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    values = torch.linalg.svdvals((up @ down).double())
    wanted = float((values[4:] ** 2).sum().sqrt() / (values**2).sum().sqrt())
    assert report["modules"] == [{"name": "a", "old_rank": 8, "rank": 4, "residual": pytest.approx(wanted, rel=1e-4)}]
    found = load_file("out/adapter_model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in state.items() if ".a." not in name)
    product = found[f"{PREFIX}a.lora_B.weight"] @ found[f"{PREFIX}a.lora_A.weight"]
    assert float((product - up @ down).norm() / (up @ down).norm()) == pytest.approx(wanted, rel=1e-3)
    scalings = [{row["name"]: row["scaling"] for row in ckpt_cli.lora_info(name)["modules"]} for name in (path, "out")]
    assert scalings[0] == pytest.approx(scalings[1])
    assert json.loads(Path("out/adapter_config.json").read_text())["note"] == "kept"


def test_kohya_s_names_alphas_and_kernels_stay(ckpt: Ckpt) -> None:
    state = {"lora_unet_c.lora_down.weight": torch.randn(6, 4, 3, 3),
             "lora_unet_c.lora_up.weight": torch.randn(5, 6, 1, 1), "lora_unet_c.alpha": torch.tensor(3.0)}  # fmt: skip
    save_file(state, "old.safetensors", metadata={"ss_network_dim": "6"})
    assert ckpt("lora", "resize", "old.safetensors", "--rank", "5", "-o", "new.safetensors").code == 0
    found = load_file("new.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "lora_unet_c.lora_down.weight": (5, 4, 3, 3), "lora_unet_c.lora_up.weight": (5, 5, 1, 1),
        "lora_unet_c.alpha": (),
    }  # fmt: skip
    assert float(found["lora_unet_c.alpha"]) == 2.5
    before, after = (
        each["lora_unet_c.lora_up.weight"].flatten(1) @ each["lora_unet_c.lora_down.weight"].flatten(1)
        for each in (state, found)
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_no_rank_is_made_higher_and_nothing_is_replaced_unasked(ckpt: Ckpt) -> None:
    path = adapter({f"{PREFIX}b.lora_A.weight": torch.randn(2, 3), f"{PREFIX}b.lora_B.weight": torch.randn(5, 2)}, {})
    answer = ckpt("lora", "resize", path, "--rank", "2", "-o", "out")
    assert (answer.code, Path("out").exists()) == (2, False)
    assert "no module of it has a higher rank than 2" in answer.err
    answer = ckpt("lora", "resize", path, "--rank", "1", "-o", path)
    assert "it is there already" in answer.err
    assert ckpt("lora", "resize", path, "--rank", "1", "-o", "out", "-n").code == 0
    assert not Path("out").exists()


def test_the_functions_report_what_the_commands_do(ckpt: Ckpt) -> None:
    models({"q.weight": low(20, 8, 3)})
    done = ckpt_cli.lora_extract("base.safetensors", "tuned.safetensors", "function", rank=3)
    assert done == {**extracted(ckpt, "--rank", "3"), "output": "function"}
    reported = json.loads(ckpt("lora", "resize", "adapter", "--rank", "2", "-o", "small", "--json").out)
    assert ckpt_cli.lora_resize("adapter", "smaller", rank=2) == {**reported, "output": "smaller"}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("small", name).read_bytes() == Path("smaller", name).read_bytes()
