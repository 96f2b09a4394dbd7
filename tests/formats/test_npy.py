"""numpy's own files: one array (.npy) and several in a zip (.npz)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ckpt, refused
from npy_files import DTYPES, headed, npy

import ckpt_cli
from ckpt_cli import limits
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Tensor, Value


def write(folder: Path, content: bytes, name: str = "x.npy") -> str:
    """A file of that content."""
    path = folder / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_dtype_and_order_is_shown_and_set_as_numpy_has_it(
    code: str, order: str, tmp_path: Path, ckpt: Ckpt
) -> None:
    array = np.array([[0, 1, 0], [1, 0, 1]]).astype(code, order=order)  # type: ignore[call-overload]
    path = write(tmp_path, npy(array))
    with ckpt_cli.open(path) as checkpoint:
        assert checkpoint.format == "npy"
        assert np.array_equal(checkpoint["array"].numpy(), array)
    assert ckpt("set", path, "array[1,1]=1").code == 0
    array[1, 1] = 1
    assert Path(path).read_bytes() == npy(array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(version: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path, npy(np.arange(3), version))
    assert open_checkpoint(path).version == f"numpy array, version {version[0]}.0"
    assert ckpt_cli.open(path)["array"].numpy().tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1, 1), (2, 0, 2)])
def test_scalars_and_empty_arrays_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    found = ckpt_cli.open(write(tmp_path, npy(np.ones(shape))))["array"]
    assert found.shape == shape
    assert found.numpy().shape == shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.array([None, {}]), "numpy.ndarray(shape=(2,), dtype=object)"),
        (np.full(70_000, "ab"), "numpy.ndarray(shape=(70000,), dtype=<U2)"),
        (np.zeros(2, "f4,i8"), "numpy.ndarray(shape=(2,), dtype=[('f0', '<f4'), ('f1', '<i8')])"),
        (np.array(["2020-01-01"], "M8[D]"), "numpy.ndarray(shape=(1,), dtype=<M8[D])"),
    ],
)
def test_what_holds_no_numbers_is_listed_and_not_opened(array: Any, told: str, tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path, npy(array))).entries == [Value("array", Opaque(told))]


@pytest.mark.parametrize(
    ("content", "kind", "problem"),
    [
        (headed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"), TruncatedError, "needs bytes"),
        (headed(b"{'descr': '<f4', 'fortran_order': False}"), MalformedError, "lacks its dtype, order or shape"),
        (headed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"), MalformedError, "holds -3"),
        (headed(b"{'descr': '<f4', 'fortran_order': False, 'shape': 'x'}"), MalformedError, "not a tuple"),
        (headed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 62,)}"), MalformedError, "not a literal"),
        (
            headed(b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}" % (1 << 62)),
            TruncatedError,
            "needs bytes",
        ),
        (headed(b"__import__('os').abort()"), MalformedError, "not a literal"),
        (headed(b"(" * 5000), MalformedError, "not a literal"),
        (headed(b"-" * 9000 + b"1"), MalformedError, "not a literal"),
        (headed(b"[" * 150 + b"]" * 150), MalformedError, "lacks"),
        (headed(b"{" + b"[]:1," * 9 + b"}"), MalformedError, "not a literal"),
        (headed(b"1" * 9000), MalformedError, "not a literal"),
        (headed(b" " * 20_000, version=2), LimitError, "a header of 20012 bytes"),
        (headed(b"\xff\xfe", version=3), MalformedError, "not a literal"),
        (b"\x93NUMPY\4\0" + bytes(20), MalformedError, "version 1, 2 or 3"),
    ],
)
def test_a_header_that_numpy_does_not_write_is_refused(
    content: bytes, kind: type[CkptError], problem: str, tmp_path: Path
) -> None:
    error = refused(write(tmp_path, content))
    assert isinstance(error, kind)
    assert problem in error.problem


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    content = npy(np.arange(6.0))
    for length in range(len(content)):
        refused(write(tmp_path, content[:length]))


# --- npz -------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_members(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.ones(2), **{"layer/w.0": np.zeros((2, 2)), "text": np.array(["a"])})
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.format, [entry.name for entry in checkpoint.entries]) == ("npz", ["layer/w.0", "text", "arr_0"])
    assert isinstance(checkpoint.entries[1], Value)


@pytest.mark.parametrize("code", DTYPES)
def test_set_keeps_the_crc_that_numpy_checks(code: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3, code), b=np.ones(2, order="F"))
    assert ckpt("set", path, "a[1]=1", "b=0").code == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with np.load(path) as found:
        assert (found["a"].tolist(), found["b"].tolist()) == ([0, 1, 0], [0, 0])
        assert found["a"].dtype == np.dtype(code)


def test_a_compressed_one_is_shown_and_refused_to_set(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "x.npz"
    generator = np.random.default_rng(0)
    array = generator.random((200, 300))
    np.savez_compressed(path, a=array, zeros=np.zeros(100_000), b=np.arange(3))
    with ckpt_cli.open(path) as checkpoint:
        assert np.array_equal(checkpoint["a"].numpy(), array)
        assert checkpoint["b"].numpy().tolist() == [0, 1, 2]
    done = ckpt("set", path, "b[0]=1")
    assert done.code == 2
    assert done.err.splitlines()[0].endswith("array 'b' is compressed, so its bytes cannot be changed in place")


def test_members_that_are_no_arrays_or_do_not_fit_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(np.ones(2)))
        archive.writestr("note.txt", "hello")
    first, second = open_checkpoint(str(path)).entries
    assert isinstance(first, Tensor)
    assert second == Value("note.txt", Opaque("<record of 5 bytes>"))
    for content in (b"", b"\x93NUMPY\1\0", npy(np.ones(9))[:-1], npy(np.ones(9))[:40]):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with zipfile.ZipFile(path, "w", method) as archive:
                archive.writestr("a.npy", content)
            assert isinstance(refused(str(path)), MalformedError)


def test_more_arrays_than_a_limit_allows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.ones(2))
    monkeypatch.setattr(limits, "NPZ_ARRAYS", 1)
    assert isinstance(refused(str(tmp_path / "x.npz")), LimitError)


def test_nothing_of_numpy_is_imported_to_list(tmp_path: Path) -> None:
    import subprocess
    import sys

    np.savez(tmp_path / "x.npz", a=np.ones(2))
    code = "import sys; from ckpt_cli.cli.main import run; run(['ls', sys.argv[1]]); print('numpy' in sys.modules)"
    for path in (write(tmp_path, npy(np.ones(2))), str(tmp_path / "x.npz")):
        assert subprocess.check_output([sys.executable, "-c", code, path], text=True).endswith("False\n")
