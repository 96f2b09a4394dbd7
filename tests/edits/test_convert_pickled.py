"""Conversions of what is pickled: legacy streams object for object, modules and scripts as their state_dict."""

from __future__ import annotations

import argparse
import collections
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from reference_readers import assert_same_state
from same_objects import assert_same, load, storages, training
from torch import nn


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_legacy_stream_becomes_a_zip_object_for_object(tmp_path: Path, ckpt: Ckpt, protocol: int) -> None:
    path, out = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save(training(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    answer = ckpt("convert", path, out)
    assert answer.code == 0, answer.err
    found, wanted = load(out), training()
    assert_same(found, wanted)
    assert storages(found) == storages(wanted)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None


def test_a_legacy_stream_becomes_what_torch_saves_today(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "new.pt")
    (tmp_path / "sub").mkdir()
    assert ckpt("convert", tmp_path / "old.pt", tmp_path / "sub" / "new.pt").code == 0
    ours, theirs = (zipfile.ZipFile(path) for path in (tmp_path / "sub" / "new.pt", tmp_path / "new.pt"))
    with ours, theirs:
        assert ours.namelist() == theirs.namelist()
        for name in theirs.namelist():
            if not name.endswith("serialization_id"):
                assert ours.read(name) == theirs.read(name), name
                assert ours.getinfo(name).header_offset == theirs.getinfo(name).header_offset


def test_a_part_of_a_legacy_stream_is_cast_and_keeps_its_objects(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "old.pt", tmp_path / "new.pt"
    saved = {"a": {"w": torch.ones(2), "args": argparse.Namespace(x=1)}, "b": torch.zeros(3)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert ckpt("convert", path, out, "--select", "a", "--dtype", "bf16").code == 0
    found = load(out)
    assert found["args"] == argparse.Namespace(x=1)
    assert found["w"].dtype == torch.bfloat16
    assert list(found) == ["w", "args"]


class Counted(nn.Module):
    """A module with all that a state_dict leaves out or says twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again = self.first
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.loose = torch.full((2,), 3.0)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_module_gives_its_state_dict(tmp_path: Path, ckpt: Ckpt, protocol: int, legacy: bool) -> None:
    path, out = tmp_path / "net.pt", tmp_path / "out.pt"
    net = Counted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class whose source torch looks for
        torch.save(net, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    answer = ckpt("convert", path, out)
    assert (answer.code, "attributes of modules left out" in answer.err) == (0, True)
    found = torch.load(out)
    assert type(found) is collections.OrderedDict
    assert_same_state(found, net.state_dict())


def test_a_module_within_a_training_checkpoint_gives_its_state_dict(tmp_path: Path, ckpt: Ckpt) -> None:
    net = Counted()
    torch.save({"net": net, "epoch": 3}, tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "b.pt", "--select", "net").code == 0
    assert_same_state(torch.load(tmp_path / "b.pt"), net.state_dict())


def test_a_script_gives_its_state_dict(tmp_path: Path, ckpt: Ckpt) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "b.pt").code == 0
    found = torch.load(tmp_path / "b.pt")
    assert type(found) is collections.OrderedDict
    assert_same_state(found, net.state_dict())
