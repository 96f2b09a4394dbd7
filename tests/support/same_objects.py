"""Objects as training scripts save them, and whether two of them are the same, storages and sharing included."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

State = dict[str, Any]


class Stage(enum.Enum):
    """Where training is."""

    WARM = 1


class Meter:
    """An object with slots and a dict of its own."""

    def __init__(self) -> None:
        self.total, self.history = 3.5, [1, 2, 3]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Meter) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def net() -> nn.Module:
    """A network with a tie, buffers and several dtypes."""
    torch.default_generator.manual_seed(0)
    shared = nn.Linear(4, 4)
    made = nn.Sequential(shared, nn.ReLU(), shared, nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.float64))
    made.register_buffer("steps", torch.tensor(7))
    return made


def flat() -> Any:
    """A state_dict as torch makes it."""
    return net().state_dict()


def training() -> State:
    """A training checkpoint with all that people keep."""
    model = net()
    optimizer = torch.optim.Adam(model[3].parameters())
    model[3](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], name="x"),
        "stage": Stage.WARM,
        "meter": Meter(),
        "best": np.float64(0.5),
        "seen": np.arange(6).reshape(2, 3),
        "loss": functools.partial(int, base=2),
        "history": collections.deque([1.0, 2.0], maxlen=5),
        "names": {"a", "b"},
        "raw": b"\xff\0bytes",
        "pair": (torch.ones(2), 5),
    }


def odd() -> State:
    """Tensors in every guise."""
    torch.default_generator.manual_seed(1)
    big = torch.randn(20, 6)
    shared = torch.randn(3, 3)
    return {
        "a.shared": shared,
        "b.shared": shared,
        "b.view": shared[1],
        "slice": torch.randn(200, 6)[2:4],
        "columns": big.t()[1:3],
        "parameter": nn.Parameter(torch.randn(3), requires_grad=False),
        "sparse": torch.eye(3).to_sparse(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "half": torch.randn(5).half(),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "wide": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "meta": torch.empty(2, 2, device="meta"),
    }


FIXTURES: dict[str, Callable[[], Any]] = {"flat": flat, "training": training, "odd": odd}


def load(path: Path) -> Any:
    """What torch makes of a file that we wrote ourselves."""
    return torch.load(path, weights_only=False)


def storages(value: Any) -> list[tuple[int, ...]]:
    """What tells which tensors share storages: the place of each one's storage among those seen first to last."""
    seen: dict[int, int] = {}
    found = []
    for tensor in tensors(value):
        if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel():
            key = tensor.untyped_storage().data_ptr()
            found.append((seen.setdefault(key, len(seen)), tensor.storage_offset(), *tensor.stride()))
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in an object, in its order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal object for object: types, order, values bit for bit, attributes."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert_same_tensor(found, wanted, where)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
        assert_same(getattr(found, "__dict__", None), getattr(wanted, "__dict__", None), f"{where}.__dict__")
    elif isinstance(wanted, list | tuple | collections.deque):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}.{index}")
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype, where
        assert (found == wanted).all(), where
    elif isinstance(wanted, functools.partial):
        assert (found.func, found.args, found.keywords) == (wanted.func, wanted.args, wanted.keywords), where
    else:
        assert found == wanted, where


def assert_same_tensor(found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    """Equal in dtype, shape, layout, gradient and every bit."""
    for fact in ("dtype", "shape", "layout", "device", "requires_grad"):
        assert getattr(found, fact) == getattr(wanted, fact), f"{where}: {fact}"
    if wanted.device.type == "meta":
        return
    if wanted.layout is not torch.strided:
        assert torch.equal(found.indices(), wanted.indices()), where
        assert torch.equal(found.values().view(torch.uint8), wanted.values().view(torch.uint8)), where
        return
    one, other = (tensor.detach().resolve_conj().contiguous().flatten() for tensor in (found, wanted))
    assert torch.equal(
        one.view(torch.uint8) if one.numel() else one, other.view(torch.uint8) if other.numel() else other
    ), where


def records(path: Path) -> dict[str, bytes]:
    """Every record by its name below the prefix."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
