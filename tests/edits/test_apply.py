"""`apply`: a recipe makes what its commands make one after the other, in one edit; frankenmerges; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_cli

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and one.equal(other)


def model(layers: int = 4, seed: int = 0) -> State:
    torch.manual_seed(seed)
    state = {"embed": torch.randn(8, 4), "head": torch.randn(8, 4)}
    for n in range(layers):
        state |= {f"layers.{n}.q": torch.randn(4, 4), f"layers.{n}.k": torch.randn(2, 4).bfloat16()}
    return state


def saved(state: Any, name: str, ckpt: Ckpt) -> str:
    if name == "shards":
        save_file(state, "whole.safetensors")
        assert ckpt("convert", "whole.safetensors", "shards", "--max-shard", "200B", "--force").code == 0
    elif name.endswith("safetensors"):
        save_file(state, name)
    else:
        torch.save(state, name, _use_new_zipfile_serialization="legacy" not in name)
    return name


def loaded(name: str) -> State:
    if Path(name).is_dir():
        return {key: tensor for path in Path(name).glob("*.safetensors") for key, tensor in load_file(path).items()}
    return load_file(name) if name.endswith("safetensors") else torch.load(name)


def recipe(text: str, name: str = "r.toml") -> str:
    Path(name).write_text("version = 1\n" + text)
    return name


FORMATS = ["m.pt", "legacy.pt", "m.safetensors", "shards"]


@pytest.mark.parametrize("name", FORMATS)
def test_many_edits_are_one(ckpt: Ckpt, name: str) -> None:
    state, other = model(), model(seed=1)
    saved(state, name, ckpt)
    save_file(other, "other.safetensors")
    path = recipe("""
        [[step]]
        new.mean = "(embed + other.safetensors:embed)/2"
        new."layers.0.qk" = "cat(layers.0.q, cast(layers.0.k, float32))"
        [[step]]
        remove = ["layers.0.q", "layers.0.k"]
        [[step]]
        rename = ["layers.{n}.*=h.{n}.*", "embed=wte"]
        [[step]]
        resize = {wte = "10:zero", head = 6}
        [[step]]
        take = "other.safetensors"
        names = ["layers.{n:2-3}.*=extra.{n-2}.*", "head=head2"]
        [[step]]
        cast = "bfloat16"
        names = ["h.1", "wte", "h.0.qk"]
        [[step]]
        tie = ["mean", "again"]
        new = true
    """)
    out = "out" + (".pt" if name.endswith("pt") else ".safetensors" if "." in name else "")
    plan = ckpt("apply", name, path, "-o", out, "-n")
    assert plan.code == 0, plan.err
    assert "step 3: renamed" in plan.err
    assert not Path(out).exists()
    answer = ckpt("apply", name, path, "-o", out, "--json")
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["notes"]) >= 7
    found = loaded(out)
    wanted = {
        "wte": torch.cat([state["embed"], torch.zeros(2, 4)]).bfloat16(), "head": state["head"][:6],
        "h.0.qk": torch.cat([state["layers.0.q"], state["layers.0.k"].float()]).bfloat16(),
        "h.1.q": state["layers.1.q"].bfloat16(), "h.1.k": state["layers.1.k"],
        "mean": (state["embed"] + other["embed"]) / 2, "head2": other["head"],
        **{f"h.{n}.{w}": state[f"layers.{n}.{w}"] for n in (2, 3) for w in "qk"},
        **{f"extra.{n}.{w}": other[f"layers.{n + 2}.{w}"] for n in (0, 1) for w in "qk"},
    }  # fmt: skip
    found.pop("again", None)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert same(found[key], tensor), key
    assert ckpt("ties", out, "mean", "again").code == 0
    assert ckpt("check", out, "--deep").code == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("interleave", [False, True])
def test_layers_are_stacked_as_passthrough_does(ckpt: Ckpt, name: str, interleave: bool) -> None:
    state, other = model(4), {**model(3, seed=1), "layers.2.more": torch.ones(3)}
    saved(state, name, ckpt)
    torch.save(other, "other.pt")
    path = recipe(f"""
        [[step]]
        layers = "layers.{{n}}.*"
        interleave = {str(interleave).lower()}
        slices = [{{range = "1-3"}}, {{from = "other.pt", range = "0-2"}}, {{range = "0-2/-2"}}]
    """)
    out = "out" + (".pt" if name.endswith("pt") else ".safetensors" if "." in name else "")
    answer = ckpt("apply", name, path, "-o", out)
    assert answer.code == 0, answer.err
    slices = [[(state, n) for n in (1, 2, 3)], [(other, n) for n in (0, 1, 2)], [(state, n) for n in (2, 0)]]
    order = [layer for some in slices for layer in some]
    if interleave:
        order = [some[place] for place in range(3) for some in slices if place < len(some)]
    wanted = {"embed": state["embed"], "head": state["head"]}
    for place, (source, number) in enumerate(order):
        inside = f"layers.{number}."
        wanted |= {f"layers.{place}.{k[len(inside) :]}": t for k, t in source.items() if k.startswith(inside)}
    found = loaded(out)
    assert found.keys() == wanted.keys()
    assert all(same(found[key], tensor) for key, tensor in wanted.items())
    assert ckpt("check", out, "--deep").code == 0


STEPS: list[tuple[str, list[str]]] = [
    ('rename = ["layers.{n}.*=layers.{n+1}.*"]', ["rename", "layers.{n}.*=layers.{n+1}.*"]),
    ('rename = ["layers.{n:0-1}.*=layers.{n+2}.*", "layers.{n:2-3}.*=layers.{n-2}.*"]',
     ["rename", "layers.{n:0-1}.*=layers.{n+2}.*", "layers.{n:2-3}.*=layers.{n-2}.*"]),
    ('rename = ["embed=tok.embed"]', ["rename", "embed", "tok.embed"]),
    ('strip = "tok"', ["rename", "--strip", "tok"]),
    ('add = "model"', ["rename", "--add", "model"]),
    ('remove = ["head"]', ["rm", "head"]),
    ('keep = ["layers*", "embed"]', ["keep", "layers*", "embed"]),
    ('cast = "bfloat16"', ["cast", "bfloat16"]),
    ('cast = "float16"\nnames = ["embed"]\nlossy = true', ["cast", "float16", "embed", "--lossy"]),
    ('resize = {embed = 11}', ["resize", "embed=11"]),
    ('resize = {"head" = "9:normal"}\nseed = 4', ["resize", "head=9:normal", "--seed", "4"]),
    ('new = {sum = "embed*2 + head[0:8]"}', ["set", "--new", "sum=embed*2 + head[0:8]"]),
    ('new = {sum = "cat(layers.1.q.T, layers.2.q)"}', ["set", "--new", "sum=cat(layers.1.q.T, layers.2.q)"]),
    ('new = {head = "copy(embed)"}', ["set", "--new", "head=copy(embed)"]),
    ('tie = ["embed", "second"]\nnew = true', ["tie", "--new", "embed", "second"]),
]  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(range(len(STEPS))), min_size=1, max_size=5), st.sampled_from(["m.pt", "m.safetensors"]))
def test_a_recipe_makes_the_bits_of_its_commands_one_after_the_other(ckpt: Ckpt, chosen: list[int], name: str) -> None:
    saved(model(), name, ckpt)
    saved(model(), f"step.{name}", ckpt)
    failed = None
    for place in chosen:
        command, *arguments = STEPS[place][1]
        answer = ckpt(command, f"step.{name}", *arguments)
        assert answer.code in (0, 2), answer.err
        if answer.code:
            failed = answer.err
            break
    path = recipe("".join(f"[[step]]\n{STEPS[place][0]}\n" for place in chosen))
    answer = ckpt("apply", name, path, "-o", f"out.{name}")
    if failed is not None:
        assert answer.code == 2, failed
        return
    if answer.code == 2:  # what one edit cannot say
        assert "would be new where others of that name move" in answer.err, answer.err
        return
    found, wanted = loaded(f"out.{name}"), loaded(f"step.{name}")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert same(found[key], tensor), (key, chosen)


def test_states_of_optimizers_are_carried(ckpt: Ckpt) -> None:
    net = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(net.named_parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, "run.pt")
    path = recipe('[[step]]\nresize = {"model.weight" = 6, "model.bias" = 6}\n[[step]]\nremove = ["model.bias"]\n')
    assert ckpt("apply", "run.pt", path, "-o", "out.pt").code == 0
    found = torch.load("out.pt")
    assert found["epoch"] == 3
    assert found["optimizer"]["state"][0]["exp_avg"].shape == (6, 3)
    assert found["optimizer"]["param_groups"][0]["params"] == [0]
    report = ckpt_cli.apply("run.pt", {"version": 1, "step": [{"remove": ["optimizer"]}]}, "api.pt")
    assert report["output"] == "api.pt"
    assert list(torch.load("api.pt")) == ["model", "epoch"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no steps"),
        ("version = 2", "not TOML"),
        ('[[step]]\nrenam = ["a=b"]', "did you mean rename?"),
        ('[[stepp]]\nremove = ["a"]', "did you mean step?"),
        ('[[step]]\nremove = ["head"]\nkeep = ["embed"]', "step 1 is remove and keep at once"),
        ("[[step]]\nlossy = true", "step 1 does nothing"),
        ('[[step]]\nremove = "head"', "remove is not a list of texts"),
        ('[[step]]\nremove = ["no"]', "step 1, remove: nothing is called 'no'"),
        ('[[step]]\nremove = ["head"]\n[[step]]\nnew = {x = "head*2"}', "step 2, new: nothing is called 'head'"),
        ('[[step]]\nnew = {x = "cat(embed"}', "step 1, new: ')' is missing (character 10"),
        ('[[step]]\nnew = {x = "zeros([99999999999999])"}', "step 1, new: [99999999999999] is not a shape"),
        ('[[step]]\ncast = "float16"\nloss = true', "did you mean lossy?"),
        ('[[step]]\ntake = "none.pt"', "none.pt"),
        ('[[step]]\ntake = "m.pt"\nnames = ["embed"]', "'embed' is there already"),
        ('[[step]]\nlayers = "layers.{n}.*"\nslices = [{range = "0-9"}]', "there is no layer 4"),
        ('[[step]]\nlayers = "layers.{n}.*"\nslices = [{range = "0-999999/1"}]', "has 1,000,000 layers"),
        ('[[step]]\nlayers = "layers.*"\nslices = [{range = "0"}]', "is not PREFIX.{n}.*"),
        ('[[step]]\nlayers = "layers.{n}.*"\nslices = [{rang = "0"}]', "slices is not a list of tables"),
        ("x = " + "[" * 3000 + "]" * 3000, "not TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line(ckpt: Ckpt, text: str, message: str) -> None:
    torch.save(model(), "m.pt")
    answer = ckpt("apply", "m.pt", recipe(text), "-o", "out.pt")
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) <= 2
    assert not Path("out.pt").exists()


def test_a_version_is_needed(ckpt: Ckpt) -> None:
    torch.save(model(), "m.pt")
    for text, message in (
        ("", "it has no version"),
        ("version = 2", "it has version 2"),
        ("version = true", "version"),
    ):
        Path("r.toml").write_text(f'{text}\n[[step]]\nremove = ["head"]\n')
        answer = ckpt("apply", "m.pt", "r.toml", "-o", "out.pt")
        assert answer.code == 2
        assert message in answer.err
