"""The `_metadata` of state_dicts: conversions keep it where it has a place, or say that they do not."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn


class Net(nn.Module):
    """A module of a class that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.twice = nn.ModuleList([self.norm, nn.Linear(2, 2)])
        self.nothing = None
        self.register_module("absent", None)


MODULES = {
    "norms": lambda: nn.Sequential(
        nn.Linear(2, 2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2, affine=True), nn.LayerNorm(2)
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.SyncBatchNorm(2), nn.ReLU()), nn.LSTM(2, 2), nn.LSTMCell(2, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2),
    "quantizable": lambda: nn.Sequential(
        torch.ao.nn.intrinsic.qat.ConvBn2d(2, 2, 1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")),
        torch.ao.quantization.observer.MinMaxObserver(),
    ),
    "own": Net,
}


def converted(ckpt: Ckpt, source: Path, target: Path, *options: str) -> dict[str, Any]:
    answer = ckpt("convert", source, target, *options, "--json")
    assert answer.code == 0, answer.err
    done: dict[str, Any] = json.loads(answer.out)
    return done


def saved(value: object, path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_the_state_dict_of_a_module_has_the_metadata_that_torch_gives_it(
    tmp_path: Path, ckpt: Ckpt, name: str, legacy: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = MODULES[name]()
    wanted = module.state_dict()._metadata
    for value, options in ((module, []), ({"ema": module}, ["--select", "ema"])):
        path = saved(value, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
        done = converted(ckpt, path, tmp_path / "o.pt", *options, "--force", "--tensors-only")
        found = torch.load(tmp_path / "o.pt", weights_only=True)
        assert (type(found), found._metadata) == (OrderedDict, wanted)
        assert "_metadata" not in str(done["not_kept"])
        assert bool(done["added"]) == (name == "own")


def test_a_version_that_is_assumed_is_said(tmp_path: Path, ckpt: Ckpt) -> None:
    told = ckpt("convert", saved(Net(), tmp_path / "m.pt"), tmp_path / "o.pt").err
    assert "added: version 1 in _metadata for 1 classes that are not torch's (test_versions.Net)" in told


def test_every_class_of_torch_has_the_version_that_torch_says() -> None:
    from ckpt_cli.nn.state_dict import _version
    from ckpt_cli.pickles.nn_module import Module

    def below(kind: type[nn.Module]) -> set[type[nn.Module]]:
        return {kind}.union(*(below(other) for other in kind.__subclasses__()))

    kinds = [kind for kind in below(nn.Module) if kind.__module__.startswith(("torch.nn", "torch.ao"))]
    assert len(kinds) > 200
    for kind in kinds:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__name__.endswith("Base") or kind.__name__.startswith("_"):
            continue  # nobody makes one
        made = Module(name, scripted=False, settings={}, registered={}, children={})
        assert _version(made) == (kind._version, True), name


def test_a_scripted_module_has_the_metadata_that_torch_gives_it(tmp_path: Path, ckpt: Ckpt) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(MODULES["norms"]()).save(str(tmp_path / "s.pt"))
        wanted = torch.jit.load(str(tmp_path / "s.pt")).state_dict()._metadata
    converted(ckpt, tmp_path / "s.pt", tmp_path / "o.pt")
    assert torch.load(tmp_path / "o.pt", weights_only=True)._metadata == wanted


@pytest.mark.parametrize("target", ["o.safetensors", "o.npz", "hf", "hf-bin", "dcp"])
def test_what_has_no_place_for_it_says_so(tmp_path: Path, ckpt: Ckpt, target: str) -> None:
    module = MODULES["norms"]()
    for value, options in ((module, []), (module.state_dict(), []), ({"s": module.state_dict()}, ["--select", "s"])):
        path = saved(value, tmp_path / "m.pt")
        options += [] if "." in target else ["--to", target]
        done = converted(ckpt, path, tmp_path / target, *options, "--force", "--tensors-only")
        assert "the _metadata of a state_dict (versions of its modules)" in done["not_kept"]


@pytest.mark.parametrize(
    "options", [["--select", "s"], ["--select", "s", "--shared", "clone"], ["--select", "s", "--tensors-only"]]
)
def test_a_selected_state_dict_keeps_its_metadata(tmp_path: Path, ckpt: Ckpt, options: list[str]) -> None:
    state = MODULES["norms"]().state_dict()
    path = saved({"s": state, "other": torch.ones(2)}, tmp_path / "m.pt")
    done = converted(ckpt, path, tmp_path / "o.pt", *options)
    assert torch.load(tmp_path / "o.pt", weights_only=True)._metadata == state._metadata
    assert done["not_kept"] == []


def test_what_is_selected_beside_a_state_dict_lacks_nothing(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved({"s": MODULES["norms"]().state_dict(), "other": {"w": torch.ones(2)}}, tmp_path / "m.pt")
    assert converted(ckpt, path, tmp_path / "o.safetensors", "--select", "other")["not_kept"] == []
