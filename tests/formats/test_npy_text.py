"""Arrays of text and bytes in numpy's files show what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Ckpt

import ckpt_cli

TEXTS = {
    "plain": np.array(["ab", "c", ""]),
    "wide": np.array(["héllo", "日本", "😀"]),
    "big": np.array(["ab", "c"], dtype=">U3"),
    "matrix": np.array([["a", "b", "c"], ["d", "e", "f"]]),
    "fortran": np.asfortranarray([["a", "b", "c"], ["d", "e", "f"]]),
    "scalar": np.array("one"),
    "empty": np.empty((0, 2), "<U4"),
    "nothing": np.empty(2, "<U0"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["plain", "compressed"])
def test_an_array_of_text_in_an_npz_is_its_text(here: Path, ckpt: Ckpt, save: object) -> None:
    save(here / "m.npz", number=np.ones(2), **TEXTS)  # type: ignore[operator]
    listing = json.loads(ckpt("ls", "-a", "m.npz", "--json").out)
    values = {entry["name"]: entry["value"] for entry in listing["entries"] if entry["type"] == "value"}
    assert values == {name: np.load("m.npz")[name].tolist() for name in TEXTS}
    assert ckpt("show", "m.npz", "plain").out == "['ab', 'c', '']\n"
    with ckpt_cli.open("m.npz") as checkpoint:
        assert checkpoint["wide"] == ["héllo", "日本", "😀"]


@pytest.mark.parametrize("name", TEXTS)
def test_an_array_of_text_in_an_npy_is_its_text(here: Path, ckpt: Ckpt, name: str) -> None:
    np.save(here / "m.npy", TEXTS[name])
    shown = json.loads(ckpt("show", "m.npy", "--json").out)
    assert shown[0]["value"] == TEXTS[name].tolist()


def test_an_array_of_bytes_is_shown_as_bytes(here: Path, ckpt: Ckpt) -> None:
    np.savez(here / "m.npz", raw=np.array([b"ab", b"\xff"]))
    assert ckpt("show", "m.npz", "raw").out == "[b'ab', b'\\xff']\n"


def test_a_large_array_of_text_is_shown_by_its_shape_and_dtype(here: Path, ckpt: Ckpt) -> None:
    np.savez(here / "m.npz", many=np.full(100_000, "ab"))
    assert ckpt("show", "m.npz", "many").out == "numpy.ndarray(shape=(100000,), dtype=<U2)\n"
