"""Arrays that stand one after another in a file: repeated numpy.save, and Equinox's `.eqx`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt, refused
from npy_files import DTYPES, headed, npy
from safetensors.numpy import load_file

import ckpt_cli
from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Value

HYPERPARAMETERS = {"width": 8, "name": "mlp", "sizes": [1, 2]}


def write(folder: Path, arrays: Iterable[Any], before: bytes = b"", after: bytes = b"") -> Path:
    """A file of arrays as numpy saves them into one open file, with what stands before and after them."""
    path = folder / "m.npy"
    with path.open("wb") as file:
        file.write(before)
        for array in arrays:
            np.save(file, array)
        file.write(after)
    return path


def read_back(path: Path, count: int, before: int = 0) -> list[Any]:
    """The arrays as numpy loads them."""
    with path.open("rb") as file:
        file.seek(before)
        return [np.load(file) for _ in range(count)]


def equinox(folder: Path) -> Path:
    """What `equinox.tree_serialise_leaves` writes after a line of hyperparameters: Python's numbers are arrays too."""
    leaves = [np.arange(6, dtype="f4").reshape(2, 3), np.zeros(3, "f4"), np.asarray(0.5), np.asarray(True)]
    return write(folder, leaves, json.dumps(HYPERPARAMETERS).encode() + b"\n")


# --- what is listed --------------------------------------------------------------------------------------------------


def test_every_array_is_an_entry_that_is_called_by_its_position(tmp_path: Path, ckpt: Ckpt) -> None:
    arrays = [np.full(3, number, code) for number, code in enumerate(DTYPES)]
    path = write(tmp_path, arrays)
    assert [line.split("\t")[0] for line in ckpt("ls", path).out.splitlines()] == [str(n) for n in range(len(DTYPES))]
    with ckpt_cli.open(str(path)) as checkpoint:
        for number, array in enumerate(arrays):
            assert np.array_equal(checkpoint[str(number)].numpy(), array)
    assert "19 numpy arrays, version 1.0" in ckpt("info", path).out
    assert ckpt("check", "--deep", path).code == 0


def test_a_single_array_keeps_its_name(tmp_path: Path) -> None:
    assert [entry.name for entry in open_checkpoint(str(write(tmp_path, [np.ones(2)]))).entries] == ["array"]


def test_versions_orders_and_shapes_may_differ(tmp_path: Path) -> None:
    fortran = np.arange(6).reshape(2, 3).copy(order="F")
    parts = [npy(np.ones(()), (1, 0)), npy(fortran, (2, 0)), npy(np.zeros((0, 4)), (3, 0)), npy(np.ones(1))]
    path = tmp_path / "m.npy"
    path.write_bytes(b"".join(parts))
    with ckpt_cli.open(str(path)) as checkpoint:
        assert [checkpoint[name].shape for name in "0123"] == [(), (2, 3), (0, 4), (1,)]
        assert np.array_equal(checkpoint["1"].numpy(), fortran)
    assert open_checkpoint(str(path)).version == "4 numpy arrays, version 1.0 and 2.0 and 3.0"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "opaque",
    [
        np.array([None, {}]),
        np.array([], object),
        np.array(["ab", "c"]),
        np.array([b"abc"]),
        np.zeros(2, "f4,i8"),
        np.zeros(3, np.dtype([("a", "f4", (2, 2)), ("b", "u1"), ("c", [("d", "M8[s]")])], align=True)),
        np.zeros(2, [("a", object), ("b", "f4")]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros((0, 5), "U7"),
        np.zeros(2, "V5"),
        np.ones(2, np.longdouble),
    ],
)
def test_an_array_without_plain_numbers_is_listed_and_those_after_it_are_read(opaque: Any, tmp_path: Path) -> None:
    path = str(write(tmp_path, [np.ones(2), opaque, np.full(3, 7.0)]))
    first, middle, last = open_checkpoint(path).entries
    assert (first.name, last.name) == ("0", "2")
    assert isinstance(middle, Value)
    if opaque.dtype.kind == "U":
        assert middle.value == opaque.tolist()
    else:
        assert isinstance(middle.value, Opaque)
        shown = repr(opaque.tolist()) if opaque.dtype.kind == "S" else f"numpy.ndarray(shape={opaque.shape}, dtype="
        assert middle.value.text.startswith(shown)
    assert ckpt_cli.open(path)["2"].numpy().tolist() == [7, 7, 7]


def test_bfloat16_as_ml_dtypes_has_it_is_a_tensor(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    path = str(write(tmp_path, [np.array([1, -2.5], ml_dtypes.bfloat16), np.zeros(2, "V2")]))
    found, raw = open_checkpoint(path).entries
    assert isinstance(raw, Value)
    tensor = ckpt_cli.load(path)[found.name]
    assert (tensor.dtype, tensor.tolist()) == (torch.bfloat16, [1, -2.5])


def test_equinox_leaves_are_entries_and_its_hyperparameters_the_metadata(tmp_path: Path, ckpt: Ckpt) -> None:
    path = equinox(tmp_path)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.format == "npy"
    assert [entry.name for entry in checkpoint.entries] == ["0", "1", "2", "3"]
    assert checkpoint.metadata == {"width": "8", "name": "mlp", "sizes": "[1, 2]"}
    assert ckpt("show", path, "2").out == "tensor(0.5000, dtype=torch.float64)\n"
    assert ckpt("check", path).code == 0


@pytest.mark.parametrize("text", [b'{"abcd":{"x":1}}', b"{%s}" % (b" " * 5000), b'{\n "a": 1\n}', b"{}"])
def test_json_before_the_arrays_is_recognized_whatever_it_holds(text: bytes, tmp_path: Path) -> None:
    path = str(write(tmp_path, [np.ones(2)], text + b"\n"))
    assert open_checkpoint(path).format == "npy"
    assert not open_checkpoint(path).notes


@pytest.mark.parametrize("text", [b"{'a': 1}", b"{" + b"[" * 90_000])
def test_text_before_the_arrays_that_is_not_json_is_said(text: bytes, tmp_path: Path, ckpt: Ckpt) -> None:
    path = write(tmp_path, [np.ones(2)], text + b"\n")
    assert f"{len(text) + 1} bytes of text before the first array that are not JSON" in ckpt("ls", path).err


# --- arrays of objects -----------------------------------------------------------------------------------------------


def records() -> Any:
    """A structured array that has objects in it."""
    made = np.zeros(2, [("a", object), ("b", "f4")])
    made["a"][0], made["a"][1] = {"w": np.ones(3)}, np.ones(2)
    return made


def lists() -> Any:
    """An array of lists and tuples."""
    made = np.empty(2, object)
    made[0], made[1] = [np.ones(3)], (1, {"k": np.ones(2)})
    return made


def test_what_is_in_an_array_of_objects_goes_by_the_position_of_the_array(tmp_path: Path, ckpt: Ckpt) -> None:
    arrays = [np.ones(2), np.array({"w": np.arange(2.0), "n": 1}, object), records(), lists(), np.zeros(1)]
    path = write(tmp_path, arrays)
    names = [entry.name for entry in open_checkpoint(str(path)).entries]
    assert names == ["0", "1.w", "1.n", "2.0.0.w", "2.0.1", "2.1.0", "2.1.1", "3.0.0", "3.1.0", "3.1.1.k", "4"]
    assert open_checkpoint(str(path)).top_level == ["0", "1", "2", "3", "4"]
    assert ckpt("set", path, "1.w[1]=7", "3.1.1.k[0]=5", "4=2").code == 0
    with path.open("rb") as file:
        _, first, _, third, last = [np.load(file, allow_pickle=True) for _ in arrays]
    assert (first.item()["w"].tolist(), third[1][1]["k"].tolist(), last.tolist()) == ([0, 7], [5, 1], [2])


def test_an_array_of_plain_objects_is_one_value(tmp_path: Path) -> None:
    plain = np.empty(3, object)
    plain[0], plain[1], plain[2] = [1, "a"], None, "text"
    assert [entry.name for entry in open_checkpoint(str(write(tmp_path, [plain, plain]))).entries] == ["0", "1"]


def test_an_npz_names_what_is_in_its_arrays_of_objects_and_reads_past_what_is_no_pickle(
    tmp_path: Path, ckpt: Ckpt
) -> None:
    path = tmp_path / "m.npz"
    whole = npy(np.array({"w": np.ones(2)}, object))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", whole + b"more")
        archive.writestr("b.npy", whole[:128] + b"(" * 20 + b"\xff")
        archive.writestr("c.npy", npy(records()))
    assert [line.split("\t")[0] for line in ckpt("ls", path, "-a").out.splitlines()] == [
        "a.w", "b", "c.0.0.w", "c.0.1", "c.1.0", "c.1.1",
    ]  # fmt: skip
    said = ckpt("check", path).out
    assert "4 bytes after the array in record 'a.npy'" in said
    assert "the objects of array 'b', whose pickle cannot be read" in said


# --- what follows that is not an array -------------------------------------------------------------------------------


@pytest.mark.parametrize("arrays", [1, 3])
@pytest.mark.parametrize("junk", [b"\0", b"junk" * 10, b"\x93NUMP"])
def test_what_is_not_an_array_is_a_finding_and_a_warning(arrays: int, junk: bytes, tmp_path: Path, ckpt: Ckpt) -> None:
    path = write(tmp_path, [np.ones(2)] * arrays, after=junk)
    said = f"{len(junk)} bytes after the last array that are not an array (byte {144 * arrays})"
    checked = ckpt("check", path)
    assert checked.code == 1
    assert "unread-bytes" in checked.out
    assert said in checked.out
    for command in ("ls", "info", "hash"):
        assert f"warning: {path}: {said}" in ckpt(command, path).err
    assert said in ckpt("convert", path, tmp_path / "out.safetensors").err


def test_a_pickle_that_does_not_end_leaves_the_rest_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    path.write_bytes(npy(np.array([None]))[:128] + b"(" * 20 + npy(np.ones(2)))
    checkpoint = open_checkpoint(str(path))
    assert [entry.name for entry in checkpoint.entries] == ["array"]
    (said,) = checkpoint.unread
    assert "in which the end of an array's elements was not found" in said


def test_an_element_of_unknown_size_leaves_the_rest_unread(tmp_path: Path) -> None:
    header = b"{'descr': '<y7', 'fortran_order': False, 'shape': (2,)}"
    path = tmp_path / "m.npy"
    path.write_bytes(headed(header, bytes(14)) + npy(np.ones(2)))
    assert open_checkpoint(str(path)).unread


def test_a_later_array_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    whole = npy(np.ones(2)) * 2
    for length in range(150, len(whole)):
        error = refused(str(write(tmp_path, [], whole[:length])))
        assert isinstance(error, TruncatedError)
        assert "array 1, which begins at byte 144" in error.problem


def test_text_and_records_that_are_cut_short_are_an_error_too(tmp_path: Path) -> None:
    for array in (np.array(["abc"]), np.zeros(2, "f4,i8")):
        assert isinstance(refused(str(write(tmp_path, [], npy(array)[:-1]))), TruncatedError)


# --- edits -----------------------------------------------------------------------------------------------------------


def test_set_changes_elements_in_place_and_nothing_else(tmp_path: Path, ckpt: Ckpt) -> None:
    arrays = [np.zeros((2, 2), "f4"), np.asfortranarray(np.zeros((2, 3), ">i2")), np.array(["x"]), np.asarray(1.5)]
    before = b'{"a": 1}\n'
    path = write(tmp_path, arrays, before, b"tail")
    assert ckpt("set", path, "0[1,0]=5", "1[1,2]=-3", "3=2.5").code == 0
    arrays[0][1, 0], arrays[1][1, 2], arrays[3][...] = 5, -3, 2.5
    other = tmp_path / "other"
    other.mkdir()
    assert path.read_bytes() == write(other, arrays, before, b"tail").read_bytes()


def test_diff_finds_a_change_in_a_later_array(tmp_path: Path, ckpt: Ckpt) -> None:
    path, other = equinox(tmp_path), tmp_path / "other.eqx"
    other.write_bytes(path.read_bytes())
    assert ckpt("diff", path, other).code == 0
    assert ckpt("set", other, "1[2]=9").code == 0
    assert ckpt("diff", path, other).code == 1
    one, two = (ckpt("hash", each).out.splitlines() for each in (path, other))
    assert [line != changed for line, changed in zip(one, two, strict=True)][:4] == [False, True, False, False]


def test_every_array_and_the_hyperparameters_come_along_in_a_conversion(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = equinox(tmp_path), tmp_path / "out.safetensors"
    assert ckpt("convert", path, out).code == 0
    found, size = load_file(out), len(json.dumps(HYPERPARAMETERS)) + 1
    for number, array in enumerate(read_back(path, 4, size)):
        assert np.array_equal(found[str(number)], array)
        assert found[str(number)].dtype == array.dtype
    assert open_checkpoint(str(out)).metadata["name"] == "mlp"


# --- hostile ones ----------------------------------------------------------------------------------------------------


def test_more_arrays_or_headers_than_a_limit_allows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, most in (("NPY_ARRAYS", 2), ("NPY_HEADERS", 300)):
        with monkeypatch.context() as patch:
            patch.setattr(limits, limit, most)
            error = refused(str(write(tmp_path, [np.ones(1)] * 3)))
            assert isinstance(error, LimitError)
            assert "over 2 arrays stand one after another" in error.problem


def test_a_million_tiny_arrays_are_refused_before_all_of_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    path.write_bytes(npy(np.asarray(True)) * 1_000_000)
    assert isinstance(refused(str(path)), LimitError)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}", MalformedError),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}" % (1 << 61), TruncatedError),
        (b"{'descr': '<U999999999999', 'fortran_order': False, 'shape': (%d,)}" % (1 << 61), TruncatedError),
        (b"{'descr': [('a', '<f4', (%d, 9))], 'fortran_order': False, 'shape': (2,)}" % (1 << 61), TruncatedError),
        (b" " * 20_000, LimitError),
        (b"(" * 5000, MalformedError),
    ],
)
def test_a_later_header_with_false_numbers_is_refused(header: bytes, kind: type[Exception], tmp_path: Path) -> None:
    later = headed(header, version=2)
    assert isinstance(refused(str(write(tmp_path, [np.ones(2)], after=later))), kind)


@pytest.mark.parametrize("field", [("a",), ("a", "<f4", -1), ("a", "<f4", "x"), ("a", 5), 7, ("a", [("b", "<y3")])])
def test_fields_that_numpy_does_not_write_are_listed_with_the_rest_unread(field: Any, tmp_path: Path) -> None:
    header = repr({"descr": [field], "fortran_order": False, "shape": (1,)}).encode()
    path = write(tmp_path, [], headed(header), b"more")
    checkpoint = open_checkpoint(str(path))
    assert isinstance(checkpoint.entries[0], Value)
    assert checkpoint.unread


# --- bytes after the arrays of an npz, and after a pickle ------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bytes_after_an_array_in_an_npz_are_said(method: int, tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", npy(np.ones(2)) + npy(np.zeros(2)))
        archive.writestr("b.npy", npy(np.array(["x"])))
    said = "144 bytes after the array in record 'a.npy'"
    assert said in ckpt("ls", path).err
    assert ckpt("check", path).code == 1
    assert said in ckpt("convert", path, tmp_path / "o.safetensors", "--tensors-only").err


def test_bytes_after_a_save_are_a_finding_and_are_told_of_by_convert(tmp_path: Path, ckpt: Ckpt) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "m.pt"
    path.write_bytes(buffer.getvalue() + b"more")
    said = "4 bytes after the last pickle that are not a pickle"
    assert said in ckpt("ls", path).err
    assert ckpt("check", path).code == 1
    assert said in ckpt("convert", path, tmp_path / "o.pt").err
