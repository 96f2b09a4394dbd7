"""numpy's arrays and scalars inside of pickles, in every protocol and container."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from builders import old
from builders.pickles import Ops, built, call, named, pickled, raw_string
from conftest import Ckpt

import ckpt_cli
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Tensor, Value

PROTOCOLS = range(6)
CODES = [
    "f2",
    "f4",
    "f8",
    ">f4",
    ">f8",
    "i1",
    "i2",
    "i4",
    "i8",
    ">i2",
    "u1",
    "u2",
    "u4",
    "u8",
    ">u8",
    "?",
    "c8",
    "c16",
    ">c8",
]


def write(folder: Path, content: bytes) -> str:
    """A file of that content."""
    path = folder / "model.pkl"
    path.write_bytes(content)
    return str(path)


def array(content: Any, shape: tuple[int, ...], code: str = "f4", order: str = "<", *, fortran: Any = False) -> Ops:
    """An array by the opcodes of `_reconstruct`."""
    made = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), (0,), b"b")
    dtype = built(call("numpy.dtype", code, 0, 1), (3, order, None, None, None, -1, -1, 0))
    return built(made, (1, shape, dtype, fortran, content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("code", CODES)
def test_every_dtype_has_its_values_in_every_protocol(code: str, protocol: int, tmp_path: Path) -> None:
    item = np.array([[0, 1, 200], [3, 250, 5]]).astype(np.uint8).astype(code)
    orders = {"c": item, "fortran": np.asfortranarray(item), "scalar": item[1, 1], "one": np.array(item[0, 2]),
              "moved": np.ones((2, 3, 4), code).transpose(1, 0, 2) * item[0, 1], "step": item[:, ::2],
              "none": item[:0]}  # fmt: skip
    path = write(tmp_path, pickle.dumps(orders, protocol))
    oracle = pickle.loads(Path(path).read_bytes())
    with ckpt_cli.open(path) as checkpoint:
        for name in orders.keys() - {"scalar"}:
            found = checkpoint[name]
            assert found.facts.python_type == "numpy.ndarray"
            assert np.array_equal(found.numpy(), oracle[name])
            assert found.shape == oracle[name].shape
            assert found.numpy().dtype == oracle[name].dtype.newbyteorder("=")
        scalar = checkpoint["scalar"]
        assert scalar == (repr(complex(item[1, 1])) if item.dtype.kind == "c" else item[1, 1].item())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dtypes_of_ml_dtypes_are_torchs(protocol: int, tmp_path: Path) -> None:
    path = write(
        tmp_path, pickle.dumps({"b": np.ones(3, ml_dtypes.bfloat16), "f": np.ones(3, ml_dtypes.float8_e5m2)}, protocol)
    )
    with ckpt_cli.open(path) as checkpoint:
        assert (checkpoint["b"].dtype, checkpoint["f"].dtype) == ("bfloat16", "float8_e5m2")
        assert checkpoint["b"].numpy().tolist() == [1, 1, 1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_set_changes_the_array_that_pickle_loads(order: Any, protocol: int, tmp_path: Path, ckpt: Ckpt) -> None:
    item = np.zeros((300, 100), ">f4", order=order)
    path = write(tmp_path, pickle.dumps({"a": item, "tied": item, "small": np.zeros(1), "end": 7}, protocol))
    done = ckpt("set", path, "a[2,1]=5", "a[-1,-1]=6", "small[0]=1")
    assert "tied also changed" in done.err
    found = pickle.loads(Path(path).read_bytes())
    item[2, 1], item[-1, -1] = 5, 6
    assert found["a"] is found["tied"]
    assert np.array_equal(found["a"], item)
    assert (found["small"][0], found["end"]) == (1, 7)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_set_says_in_one_line_that_text_is_not_to_be_patched(protocol: int, tmp_path: Path, ckpt: Ckpt) -> None:
    path = write(tmp_path, pickle.dumps({"a": np.arange(3.0)}, protocol))
    done = ckpt("set", path, "a[0]=1")
    assert done.code == 2
    assert "the pickle has these bytes as text (protocols 0 to 2)" in done.err.splitlines()[0]
    assert done.err.splitlines()[1:] == ["hint: pickle it again with protocol 4"]


def test_arrays_in_every_container_of_torch_are_read(tmp_path: Path) -> None:
    item = {"a": np.arange(200_000.0), "t": torch.ones(2), "n": np.int16(-3)}
    for new in (True, False):
        for protocol in (2, 4):
            path = tmp_path / f"{new}{protocol}.pt"
            torch.save(item, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
            with ckpt_cli.open(path) as checkpoint:
                assert checkpoint["a"].numpy()[-3:].tolist() == [199997, 199998, 199999]
                assert checkpoint["n"] == -3
    path = tmp_path / "tar.pt"
    path.write_bytes(old.tar({"a": array(bytes(8), (2,))}, [], []))
    assert ckpt_cli.open(path)["a"].numpy().tolist() == [0, 0]


def test_torch_makes_a_tensor_of_such_an_array(tmp_path: Path) -> None:
    torch.save({"a": np.arange(3.0)}, tmp_path / "a.pt")
    assert ckpt_cli.load(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2]


def test_what_python_2_pickled_is_read_and_set(tmp_path: Path, ckpt: Ckpt) -> None:
    import struct

    made = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), (0,), raw_string(b"b"))
    dtype = built(call("numpy.dtype", raw_string(b"f4"), 0, 1), (3, raw_string(b"<"), None, None, None, -1, -1, 0))
    raw = raw_string(struct.pack("<2f", 1, 2))
    path = write(tmp_path, pickled({"a": built(made, (1, (2,), dtype, False, raw))}))
    assert pickle.loads(Path(path).read_bytes(), encoding="latin1")["a"].tolist() == [1, 2]
    assert ckpt("set", path, "a[0]=7").code == 0
    assert pickle.loads(Path(path).read_bytes(), encoding="latin1")["a"].tolist() == [7, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("item", "told"),
    [
        (np.array([None]), "numpy.ndarray(shape=(1,), dtype=object)"),
        (np.array(["ab"]), "numpy.ndarray(shape=(1,), dtype=U2)"),
        (np.array([b"ab"]), "numpy.ndarray(shape=(1,), dtype=S2)"),
        (np.zeros(2, [("x", "f4"), ("y", "i8")]), "numpy.ndarray(shape=(2,), dtype=fields ('x', 'y'))"),
        (np.array(["2020-01-01"], "M8[D]"), "numpy.ndarray(shape=(1,), dtype=datetime64)"),
        (np.complex64(1j), "1j"),
    ],
)
def test_what_is_no_numbers_is_told_in_short(item: Any, told: str, protocol: int, tmp_path: Path) -> None:
    path = write(tmp_path, pickle.dumps({"a": item}, protocol))
    assert open_checkpoint(path).entries == [Value("a", Opaque(told))]


def test_scalars_are_python_values(tmp_path: Path) -> None:
    item = {"f": np.float64(1.5), "b": np.bool_(True), "s": np.str_("höhe"), "i": np.uint64(2**64 - 1)}
    for protocol in PROTOCOLS:
        entries = open_checkpoint(write(tmp_path, pickle.dumps(item, protocol))).entries
        assert [(entry.name, entry.value) for entry in entries if isinstance(entry, Value)] == [
            ("f", 1.5), ("b", True), ("s", "höhe"), ("i", 2**64 - 1)]  # fmt: skip


def test_an_array_whose_bytes_are_kept_elsewhere_is_listed(tmp_path: Path, ckpt: Ckpt) -> None:
    path = write(tmp_path, pickle.dumps({"a": np.arange(3.0)}, 5, buffer_callback=lambda _: False))
    (tensor,) = open_checkpoint(path).tensors
    assert (tensor.layout, tensor.shape) == ("array", (3,))
    assert ckpt("show", path, "a").code == 2


def test_arrays_of_other_devices_are_tensors(tmp_path: Path, ckpt: Ckpt) -> None:
    made = array(bytes(8), (2,))
    numpy = call("torch._utils._rebuild_device_tensor_from_numpy", made, named("torch.float32"), "xla:0", True)
    half = call("torch._utils._rebuild_xla_tensor", made, named("torch.bfloat16"), "xla:0", False)
    path = write(tmp_path, pickled({"same": numpy, "other": half}, 3))
    first, second = open_checkpoint(path).tensors
    assert (first.layout, first.device, first.requires_grad, first.python_type) == ("strided", "xla:0", True, None)
    assert (second.layout, second.dtype.name, second.parts[0].dtype.name) == ("array", "bfloat16", "float32")
    assert ckpt("set", path, "same[1]=2").code == 0
    assert ckpt_cli.open(path)["same"].numpy().tolist() == [0, 2]


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (array(bytes(7), (2,)), "needs 8 bytes, its pickle has 7 bytes"),
        (array(bytes(9), (2,)), "needs 8 bytes, its pickle has 9 bytes"),
        (array(bytes(8), (1 << 40, 1 << 40)), "more elements than 64 bits"),
        (array(bytes(8), (-2,)), "holds -2"),
        (array(8, (2,)), "needs 8 bytes, its pickle has 8"),
        (array(old.latin1(b"\xff" * 7), (2,)), "needs 8 bytes"),
        (array(Ops(named("_codecs.encode") + pickled(("\u0100", "latin1"))[2:-1] + b"R"), (1,), "u1"), "needs 1 bytes"),
        (
            call(
                "numpy._core.numeric._frombuffer",
                bytes(8),
                built(call("numpy.dtype", "f4", 0, 1), (3, "<")),
                (2,),
                "K",
                (1,),
            ),
            "its axes are ordered as (1,)",
        ),
        (call("numpy._core.numeric._frombuffer", bytes(8)), "arguments that it does not take"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(made: Ops, problem: str, tmp_path: Path) -> None:
    with pytest.raises(CkptError) as refused:
        open_checkpoint(write(tmp_path, pickled({"a": made}, 3)))
    assert problem in str(refused.value)


def test_text_that_stands_for_other_bytes_than_it_may_is_refused_when_shown(tmp_path: Path, ckpt: Ckpt) -> None:
    for text, count, problem in (
        ("ab\u0100" * 30_000, 100_000, "stands for none"),
        ("ÿ" * 90_000, 100_000, "are needed"),
    ):
        encoded = Ops(named("_codecs.encode") + pickled((text, "latin1"))[2:-1] + b"R")
        path = write(tmp_path, pickled({"a": array(encoded, (count,), "u1")}))
        assert ckpt("ls", path).code == 0
        done = ckpt("show", path, "a")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert problem in done.err


def test_an_array_of_one_node_twice_is_one_tensor(tmp_path: Path) -> None:
    item = np.ones(3)
    for protocol in PROTOCOLS:
        first, second = open_checkpoint(write(tmp_path, pickle.dumps([item, item], protocol))).tensors
        assert first.view == second.view
        assert isinstance(first, Tensor)
