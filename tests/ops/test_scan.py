"""`ckpt scan` finds nothing in an ordinary checkpoint; what the command says, and how it ends."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import call, get, named, new, pickled, put
from builders.pt import write
from conftest import Ckpt
from scanning import codes, scanned, stacked

from ckpt_cli.ops.scan import scan


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 0


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        self.act = torch.nn.functional.gelu
        self.colour = Colour.RED

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _training() -> dict[str, Any]:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.LSTM(8, 2))
    adam = torch.optim.AdamW(net.parameters())
    net[0](torch.zeros(2, 4)).sum().backward()
    adam.step()
    return {
        "state_dict": net.state_dict(),
        "optimizer_states": [adam.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(adam, 3).state_dict()],
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best": pathlib.PurePosixPath("a/b"), "score": torch.tensor(1.0)}
        },
        "hyper_parameters": argparse.Namespace(lr=0.1, when=datetime.datetime(2026, 1, 1), level=Level.LOW),
        "rng": (
            torch.get_rng_state(),
            np.random.default_rng(0),
            np.random.RandomState(0).get_state(),
            random.getstate(),
        ),
        "numpy": [np.arange(100), np.float64(3), np.array([{}, None], dtype=object), np.zeros(2, dtype="f4,i8")],
        "containers": [collections.defaultdict(list), collections.Counter("ab"), collections.deque([1]), {1, 2}],
        "numbers": [decimal.Decimal(1), 1 + 2j, 10**50, b"\x80\x02 not a pickle", "code\nof\na model."],
        "net": Net(),
        "dtypes": [torch.float8_e4m3fn, torch.strided, torch.device("cpu"), torch.Size([1])],
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, and in files none the less
        return _training()


@pytest.mark.parametrize("protocol", range(6))
def test_a_training_checkpoint_of_any_protocol_is_clean(
    tmp_path: Path, training: dict[str, Any], protocol: int
) -> None:
    torch.save(training, tmp_path / "m.pt", pickle_protocol=protocol)
    assert codes(scan(str(tmp_path / "m.pt"))) == set()
    if protocol:  # torch writes what it cannot load itself by protocol 0
        torch.save(training, tmp_path / "l.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        assert codes(scan(str(tmp_path / "l.pt"))) == set()
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(training, protocol=protocol))
    assert codes(scan(str(tmp_path / "b.pkl"))) == set()


@pytest.mark.parametrize("protocol", [2, 3])
def test_an_enum_of_python_3_11_0_and_a_nested_class_are_notes_at_most(tmp_path: Path, protocol: int) -> None:
    owner = named("lab.Colour")
    function = put(0, named("builtins.getattr"))
    root = [call(function, owner, "RED"), call(get(0), owner, "BLUE"), new(call(get(0), owner, "Inner"))]
    found = scanned(tmp_path / "m.pkl", pickled(root, protocol))
    assert found.ok
    assert codes(found, "note") == {"unknown-global"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_writes_elsewhere_is_clean(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 3), torch.zeros(1, 3)), tmp_path / "ts.pt")
    torch.save(torch.nn.Linear(3, 3), tmp_path / "module.pt")
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.array([None, 1], dtype=object))
    np.save(tmp_path / "O.npy", np.zeros(3))
    tensors = {"u": torch.frombuffer(bytearray(b"\x80\x02" + bytes(range(200))), dtype=torch.uint8)}
    torch.save(tensors, tmp_path / "chance.pt")
    for path in tmp_path.iterdir():
        assert codes(scan(str(path))) == set(), path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_saved_in_parts_is_clean(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"net": Net().state_dict(), "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = scan(str(tmp_path / "dcp"))
    assert codes(found) == set()
    assert found.pickles > 3


# --- the command ------------------------------------------------------------------------------------------------------


def test_scan_says_yes_to_the_samples(work: Path, ckpt: Ckpt) -> None:
    for path in ("mlp.pt", "tied.pt", "train.pt", "tied.safetensors"):
        answer = ckpt("scan", path)
        assert answer.code == 0
        assert all(line.startswith("note\tunknown-global\t") for line in answer.lines)


def test_scan_says_no_and_nothing_is_run(tmp_path: Path, ckpt: Ckpt) -> None:
    marker = tmp_path / "ran"
    write(tmp_path / "m.pt", call("os.system", f"touch {marker}"))
    answer = ckpt("scan", tmp_path / "m.pt")
    assert answer.code == 1
    assert answer.lines[0].split("\t")[:2] == ["error", "dangerous-global"]
    assert not marker.exists()


def test_all_adds_the_names_that_do_no_harm(work: Path, ckpt: Ckpt) -> None:
    lines = ckpt("scan", "-a", "mlp.pt").lines
    assert {tuple(line.split("\t")[:2]) for line in lines} == {("ok", "allowed")}
    assert any("torch._utils._rebuild_tensor_v2" in line for line in lines)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"remember the milk\n", b"cmod\n\xf8\n", b""])
def test_what_can_hold_no_pickle_is_trouble(tmp_path: Path, ckpt: Ckpt, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    answer = ckpt("scan", tmp_path / "m.pt")
    assert answer.code == 2
    assert answer.err.startswith(f"ckpt: {tmp_path / 'm.pt'}: ")


@pytest.mark.parametrize("command", ["ls", "info"])
def test_ls_and_info_warn_in_one_line(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    path = write(tmp_path / "m.pt", {"a": call("posix.system", "id")})
    answer = ckpt(command, path)
    assert answer.code == 0
    assert answer.err == (
        f"warning: {path}: its pickle would run posix.system if something else loaded it; see ckpt scan {path}\n"
    )
    assert ckpt(command, write(tmp_path / "n.pt", {"a": call("lab.f", 1)})).err == ""


def test_text_of_the_file_is_escaped(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "m.pkl").write_bytes(stacked("os", "\x1b[31msystem", "\x1b[0m"))
    answer = ckpt("scan", tmp_path / "m.pkl")
    assert "\x1b" not in answer.out
    assert answer.code == 1


def test_scan_imports_nothing_heavy(work: Path) -> None:
    code = "import sys; from ckpt_cli.cli.main import run; run(['scan', 'train.pt']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.replace("'", "").strip("[]\n").split(", "))
    assert not modules & {"torch", "numpy", "rich", "ml_dtypes", "safetensors"}
