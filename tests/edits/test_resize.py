"""`resize`: rows of embeddings, heads and biases, with what is tied to them and the states of optimizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt_cli
from ckpt_cli.parallel import made


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Model(nn.Module):
    """An embedding with a head, tied to it or not, and a bias of the head."""

    def __init__(self, rows: int, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.head = nn.Linear(4, rows)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def step(model: Model, optimizer: torch.optim.Optimizer) -> None:
    loss = model(torch.tensor([1, 3, 5])).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("piece", [11, 256 << 10])
def test_new_rows_are_the_mean_zeros_or_normal_numbers(
    ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, dtype: str, piece: int
) -> None:
    monkeypatch.setattr(made, "PIECE", piece)
    torch.manual_seed(0)
    w, b = torch.randn(50, 6).to(getattr(torch, dtype)), torch.randn(50).to(getattr(torch, dtype))
    torch.save({"w": w, "z": w.clone(), "n": w.clone(), "b": b, "less": w.clone()}, "m.pt")
    answer = ckpt(
        "resize", "m.pt", "w=70", "z=70:zero", "n=70:normal", "b=60:mean", "less=7", "--seed", 3, "-o", "o.pt"
    )
    assert answer.code == 0, answer.err
    found = torch.load("o.pt")
    for name, old in (("w", w), ("z", w), ("n", w), ("b", b)):
        assert same(found[name][:50], old)
    mean = w.double().mean(0)
    torch.testing.assert_close(found["w"][50:], mean.to(w.dtype).expand(20, 6), rtol=2e-7, atol=0)
    assert not found["z"][50:].any()
    torch.testing.assert_close(found["b"][50:], b.double().mean().to(b.dtype).expand(10), rtol=2e-7, atol=0)
    assert 0.015 < found["n"][50:].float().std() < 0.025
    assert same(found["less"], w[:7])
    assert ckpt("resize", "m.pt", "n=70:normal", "--seed", 3, "-j", 1, "-o", "p.pt").code == 0
    assert same(torch.load("p.pt")["n"], found["n"])


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "legacy.pt"])
def test_tied_names_follow(ckpt: Ckpt, name: str) -> None:
    model = Model(9, tied=True)
    if name.endswith("safetensors"):
        torch.save(model.state_dict(), "m.pt")
        assert ckpt("convert", "m.pt", name).code == 0
    else:
        torch.save(model.state_dict(), name, _use_new_zipfile_serialization=name == "m.pt")
    answer = ckpt("resize", name, "embed.weight=12", "head.bias=12:zero", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert sorted([*report["changed"], *report["also_changed"]]) == ["embed.weight", "head.bias", "head.weight"]
    assert ckpt("ties", name, "embed.weight", "head.weight").code == 0
    if not name.endswith("safetensors"):
        Model(12, tied=True).load_state_dict(torch.load(name))
    else:
        assert load_file(name)["head.bias"].shape == (12,)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_the_states_of_an_optimizer_follow_and_training_goes_on(
    ckpt: Ckpt, make: Callable[[Any], torch.optim.Optimizer], tied: bool
) -> None:
    torch.manual_seed(1)
    model = Model(9, tied=tied)
    optimizer = make(model.named_parameters())
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "run.pt")
    sizes = ["model.embed.weight=12:zero", "model.head.weight=12:zero", "model.head.bias=12:zero"]
    answer = ckpt("resize", "run.pt", *sizes, "-o", "big.pt")
    assert answer.code == 0, answer.err
    assert "resized too (paired by name)" in answer.err
    big = torch.load("big.pt")
    other = Model(12, tied=tied)
    other.load_state_dict(big["model"])
    resumed = make(other.named_parameters())
    resumed.load_state_dict(big["optimizer"])
    step(other, resumed)
    step(model, optimizer)
    for key, value in optimizer.state_dict()["state"].items():
        for name, tensor in value.items():
            after = resumed.state_dict()["state"][key][name]
            assert after.shape[0] == 12 if tensor.dim() else after == tensor
    torch.testing.assert_close(other.embed.weight[:9][[0, 1, 3, 5]], model.embed.weight[[0, 1, 3, 5]])


def test_states_that_are_not_known_are_refused_with_the_choices(ckpt: Ckpt) -> None:
    model = Model(9, tied=False)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "run.pt")
    answer = ckpt("resize", "run.pt", "model.embed.weight=12")
    assert answer.code == 2
    assert "it is not known which states of 'optimizer' belong to what is resized" in answer.err
    assert "--optimizer trust goes by that order, drop takes the optimizer out" in answer.err
    sizes = ["model.embed.weight=12", "model.head.weight=12", "model.head.bias=12"]
    assert ckpt("resize", "run.pt", *sizes, "--optimizer", "trust", "-o", "trust.pt").code == 0
    state = torch.load("trust.pt")["optimizer"]["state"]
    assert [state[key]["exp_avg"].shape[0] for key in state] == [12, 12, 12]
    assert ckpt("resize", "run.pt", *sizes, "--optimizer", "leave", "-o", "leave.pt").code == 0
    assert torch.load("leave.pt")["optimizer"]["state"][0]["exp_avg"].shape == (9, 4)
    assert ckpt("resize", "run.pt", *sizes, "--optimizer", "drop", "-o", "drop.pt").code == 0
    assert list(torch.load("drop.pt")) == ["model"]


def test_the_config_and_others_with_as_many_rows_are_noted(ckpt: Ckpt) -> None:
    Path("model").mkdir()
    save_file({"embed": torch.ones(100, 2), "head": torch.ones(100, 2)}, "model/model.safetensors")
    Path("model/config.json").write_text(json.dumps({"vocab_size": 100}))
    answer = ckpt("resize", "model", "embed=128", "-o", "out", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["notes"] == [
        "config.json says vocab_size 100, and the rows are 128 now", "with as many rows as before: head"
    ]  # fmt: skip
    report = ckpt_cli.resize("model", {"embed": 128, "head": "128:zero"})
    assert report["notes"] == ["config.json says vocab_size 100, and the rows are 128 now"]
    assert load_file("model/model.safetensors")["head"][100:].sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w"], "'w' is not NAME=ROWS or NAME=ROWS:INIT"),
        (["w=-3"], "is not NAME=ROWS"),
        (["w=3:best"], "INIT is mean, zero, normal"),
        (["w=4"], "every one of them has that many rows already"),
        (["s=2"], "has no dimensions"),
        (["i=9"], "tensor 'i' is int64"),
        (["v=9"], "share their bytes, and not as one tensor"),
        (["w=999999999999999"], "would have"),
        (["w=5", "tied=6"], "are one tensor, and would have different rows"),
        (["no=5"], "nothing is called 'no'"),
        (["epoch=5"], "is not the name of a tensor"),
    ],
)
def test_what_cannot_be_resized_is_refused(ckpt: Ckpt, arguments: list[str], message: str) -> None:
    w, base = torch.ones(4, 3), torch.ones(6, 2)
    state = {"w": w, "tied": w, "s": torch.tensor(1.0), "i": torch.arange(3), "v": base[1:], "base": base, "epoch": 3}
    torch.save(state, "m.pt")
    before = Path("m.pt").read_bytes()
    answer = ckpt("resize", "m.pt", *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert Path("m.pt").read_bytes() == before
