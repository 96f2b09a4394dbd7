"""`ckpt to`: devices in what torch.save wrote, as torch.load without a map_location finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from run_edit import assert_refused, edited
from torch import nn

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.pickles.edit.relocate import locations_of
from ckpt_cli.pickles.graph import Graph

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*quantize.*deprecated"),
]

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Saves as a machine with a GPU does: every storage is said to lie on a device."""

    def saved(value: object, name: str = "m.pt", device: str = "cuda:0", *, is_zip: bool = True) -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(torch.serialization, "location_tag", lambda _: device)
            torch.save(value, tmp_path / name, _use_new_zipfile_serialization=is_zip)
        return tmp_path / name

    return saved


def training() -> dict[str, Any]:
    """A training checkpoint with ties, views, many layers and tensors of several layouts."""
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    model = {"a": shared, "b": shared, "view": shared[1], "p": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    model |= {f"layers.{n}.weight": torch.randn(2, 3) for n in range(300)}
    quantized = torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8)
    return {
        "model": model,
        "sparse": torch.eye(3).to_sparse(),
        "quantized": quantized,
        "epoch": 3,
        "f8": shared.to(torch.float8_e5m2),
    }


def load(path: Path, *, weights_only: bool = True) -> Any:
    """What torch reads, without a map_location."""
    return torch.load(path, weights_only=weights_only)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_of_a_gpu_loads_on_a_machine_without_one(save: Save, ckpt: Ckpt, is_zip: bool) -> None:
    value = training()
    if not is_zip:
        del value["f8"]  # which torch writes so, but does not read
    path = save(value, is_zip=is_zip)
    with pytest.raises(RuntimeError, match="CUDA"):
        load(path)
    assert all("cuda:0" in line.split("\t") for line in ckpt("ls", "-l", path, "model").out.splitlines())
    done = edited(ckpt, "to", path, "cpu")
    assert (done["verb"], done["in_place"], done["left"]) == ("moved", True, [])
    assert done["patched"] == is_zip
    for weights_only in (True, False):
        found = load(path, weights_only=weights_only)
        assert found["model"]["a"].data_ptr() == found["model"]["b"].data_ptr()
        assert found["model"]["view"].data_ptr() == found["model"]["a"][1].data_ptr()
        assert found["model"].keys() == value["model"].keys()
        assert all(torch.equal(each, value["model"][name]) for name, each in found["model"].items())
        assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
        assert torch.equal(found["quantized"].int_repr(), value["quantized"].int_repr())
    assert ckpt("check", "--deep", path).code == 0
    assert_refused(ckpt, path, "torch.load puts every tensor of it on cpu already", "to", "cpu")


def test_the_way_back_gives_the_very_same_pickle(save: Save, ckpt: Ckpt, tmp_path: Path) -> None:
    path = save(training())
    there, back = tmp_path / "there.pt", tmp_path / "back.pt"
    edited(ckpt, "to", path, "cuda:1", "-o", there)
    edited(ckpt, "to", there, "cuda:0", "-o", back)
    assert back.read_bytes() == path.read_bytes()
    assert {row["device"] for row in json.loads(ckpt("ls", there, "--json").out)["entries"]} == {"cuda:1"}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_module_and_its_objects_follow(save: Save, ckpt: Ckpt, is_zip: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 2))
    path = save({"net": net, "mixed": [torch.ones(2), {"deep": torch.zeros(1)}]}, is_zip=is_zip)
    edited(ckpt, "to", path, "cpu")
    found = load(path, weights_only=False)
    assert all(torch.equal(each, net.state_dict()[name]) for name, each in found["net"].state_dict().items())
    assert found["mixed"][1]["deep"].device.type == "cpu"


def test_devices_that_belong_to_no_tensor_stay_and_are_named(save: Save, ckpt: Ckpt) -> None:
    path = save({"w": torch.ones(2), "hparams": {"device": torch.device("cuda", 0), "meta": torch.device("meta")}})
    assert edited(ckpt, "to", path, "cpu")["left"] == ["hparams.device"]
    found = load(path)
    assert found["hparams"]["device"] == torch.device("cuda", 0)
    assert "left as they are: hparams.device" in ckpt("to", path, "cuda:1", "-n").err


class OnDevice:
    """A tensor of a device without storages, as torch pickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        args = np.array([1.0, 2.0]), torch.float64, "xla:0", False
        return torch._utils._rebuild_device_tensor_from_numpy, args


def test_devices_in_the_calls_that_rebuild_tensors_follow(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({"x": OnDevice(), "meta": torch.ones(2, device="meta")}, path)
    graph = open_checkpoint(str(path)).document
    assert isinstance(graph, Graph)
    assert locations_of(graph) == {"xla:0"}
    edited(ckpt, "to", path, "cpu")
    found = load(path, weights_only=False)
    assert (found["x"].tolist(), found["meta"].device.type) == ([1.0, 2.0], "meta")


def test_every_shard_follows_and_files_are_edited_one_by_one(save: Save, tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, shard in names.items():
        shutil.move(save({name: torch.ones(3)}, shard, "cuda:0" if name == "a" else "cpu"), folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    before = (folder / names["b"]).read_bytes()
    assert edited(ckpt, "to", folder, "cpu")["changed"] == ["a"]
    assert load(folder / names["a"])["a"].device.type == "cpu"
    assert (folder / names["b"]).read_bytes() == before
    one, two = save({"w": torch.ones(1)}, "one.pt"), save({"w": torch.ones(1)}, "two.pt")
    answer = ckpt("to", one, tmp_path / "gone.pt", two, "cpu", "--json")
    reports = json.loads(answer.out)
    assert [report.get("changed", report.get("error")) for report in reports] == [
        ["w"],
        "No such file or directory",
        ["w"],
    ]
    assert answer.code == 2
    assert load(one)["w"].tolist() == load(two)["w"].tolist() == [1]
    assert ckpt("to", one, two, "cuda:0", "-o", "x").code == 2


def test_what_records_no_device_is_refused_in_one_line(tmp_path: Path, ckpt: Ckpt) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    for name in ("a.safetensors", "a.npz"):
        assert_refused(ckpt, tmp_path / name, "records no devices that can be changed", "to", "cpu")


@pytest.mark.parametrize(
    ("device", "problem"),
    [("gpu", "is not a device"), ("meta", "keeps no values"), ("cuda:x", "is not a device"), ("", "is not a device")],
)
def test_what_is_not_a_device_is_refused(save: Save, ckpt: Ckpt, device: str, problem: str) -> None:
    assert_refused(ckpt, save({"w": torch.ones(1)}), problem, "to", device)


def test_a_backup_is_the_old_file(save: Save, ckpt: Ckpt) -> None:
    path = save(training())
    before = path.read_bytes()
    edited(ckpt, "to", path, "cpu", "--backup")
    assert ckpt("undo", path).code == 0
    assert path.read_bytes() == before
