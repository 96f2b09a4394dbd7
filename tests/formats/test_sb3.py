"""Zip files of Stable-Baselines3: their files are one checkpoint, whose values are set where they are."""

from __future__ import annotations

import base64
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt, refused
from containers import SB3_DATA, read_sb3, write_sb3
from torch import nn

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A policy after one step, with its optimizer and a tensor beside."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-4)
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    path = tmp_path / "ppo.zip"
    files = {
        "pytorch_variables": {"log_ent_coef": torch.ones(1)},
        "policy": net.state_dict(),
        "policy.optimizer": optimizer.state_dict(),
        "actor.optimizer": optimizer.state_dict(),
    }
    write_sb3(files, path)
    return path


def test_its_files_are_one_checkpoint_with_the_values_of_the_run(path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    names = {tensor.name for tensor in checkpoint.tensors}
    policy = {f"policy.{name}" for name in read_sb3(path)}
    assert policy < names
    assert {"optimizer.state.0.exp_avg", "actor.optimizer.state.0.exp_avg", "pytorch_variables.log_ent_coef"} < names
    assert checkpoint.version == "Stable-Baselines3 2.3.2"
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    for name in ("num_timesteps", "learning_rate", "_last_obs", "net_arch"):
        assert values[f"data.{name}"] == SB3_DATA[name]
    assert values["data.policy_class"] == Opaque("<class 'abc.ABCMeta'>, pickled")
    assert values["optimizer.param_groups.0.lr"] == 3e-4


def test_the_policy_is_what_ls_lists_and_convert_writes(path: Path, ckpt: Ckpt) -> None:
    expected = [f"policy.{name}" for name in read_sb3(path)]
    assert [line.split("\t")[0] for line in ckpt("ls", path).lines] == expected
    out = path.with_name("out.pt")
    assert ckpt("convert", path, out, "--tensors-only").code == 0
    found = torch.load(out)
    assert list(found) == list(read_sb3(path))
    assert all(torch.equal(found[name], tensor) for name, tensor in read_sb3(path).items())


def test_elements_are_set_in_the_inner_file_with_the_checksums_of_both(path: Path, ckpt: Ckpt) -> None:
    size = path.stat().st_size
    done = ckpt("set", path, "policy.2.bias[0]=5", "optimizer.state.1.exp_avg=0")
    assert (done.code, path.stat().st_size) == (0, size)
    assert float(read_sb3(path)["2.bias"][0]) == 5
    assert not read_sb3(path, "policy.optimizer")["state"][1]["exp_avg"].any()
    assert ckpt("check", "--deep", path).code == 0
    for arguments in (["rename", path, "--strip", "policy"], ["set", path, "optimizer.param_groups.0.lr=1"]):
        done = ckpt(*arguments)
        assert done.code == 2
        assert done.err.splitlines()[1] == f"hint: ckpt convert {path} OUT.pt makes one that can be changed freely"


def test_scan_still_looks_into_its_json(path: Path, ckpt: Ckpt) -> None:
    pickled = base64.b64encode(pickle.dumps(print)).decode()
    write_sb3({"policy": read_sb3(path)}, path, data={"a": {":type:": "x", ":serialized:": pickled}})
    found = json.loads(ckpt("scan", "-a", "--json", path).out)
    assert any("print" in str(finding) for finding in found["findings"])


def test_what_is_compressed_or_not_whole_is_one_line(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    write_sb3({"policy": state}, tmp_path / "deflated.zip", method=zipfile.ZIP_DEFLATED)
    error = refused(str(tmp_path / "deflated.zip"))
    assert "'policy.pth' in it is compressed" in str(error)
    assert "unzip " in str(error.hint)
    for name, data in (("list", [1]), ("deep", None)):
        write_sb3({"policy": state}, tmp_path / f"{name}.zip", data=data)
        assert "not a JSON object" in str(refused(str(tmp_path / f"{name}.zip")))
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("policy.pth", "hello" * 100)
    assert "record 'policy.pth' is not a file that torch.save wrote" in str(refused(str(tmp_path / "text.zip")))
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "arrays.zip", "w") as archive:
        archive.write(tmp_path / "arrays.npz", "policy.pth")
    assert "is not a file that torch.save wrote" in str(refused(str(tmp_path / "arrays.zip")))


def test_the_tree_has_modules_in_the_policy_alone(path: Path, ckpt: Ckpt) -> None:
    lines = [line.strip() for line in ckpt("tree", path).lines]
    assert "(policy): Sequential(  # inferred from names and shapes" in lines
    assert "(pytorch_variables): dict(1 tensor)" in lines
    assert "(actor): dict(12 tensors)" in lines
