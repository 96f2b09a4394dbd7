"""Arrays that joblib writes between opcodes are passed over, and nothing hides in them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from builders.pickles import Ops, built, call, named, new, pickled, value
from scanning import HARMFUL, codes, scanned


def _dtype(code: str, order: str = "<", flags: int = 0) -> Ops:
    return built(call("numpy.dtype", code, False, True), (3, order, None, None, None, -1, -1, flags))


def _wrapper(shape: tuple[int, ...], dtype: Ops, **more: object) -> Ops:
    state = {"subclass": named("numpy.ndarray"), "shape": shape, "order": "C", "dtype": dtype, "allow_mmap": True}
    return built(new("joblib.numpy_pickle.NumpyArrayWrapper"), state | more)


def _file(array: bytes, wrapper: Ops, rest: bytes = b"") -> bytes:
    """A pickle of a list of an array, and whatever else stands after it."""
    return b"\x80\x02]" + wrapper + array + b"a" + rest + b"."


def _aligned(elements: bytes, padding: int = 5) -> bytes:
    return bytes([padding]) + b"\xff" * padding + elements


ALIGNED = _wrapper((3,), _dtype("f8"), numpy_array_alignment_bytes=16)
NUMBERS = struct.pack("<3d", 1, 2, 3)


def test_arrays_are_passed_over(tmp_path: Path) -> None:
    for content in (
        _file(_aligned(NUMBERS), ALIGNED),
        _file(NUMBERS, _wrapper((3,), _dtype("f8"))),
        _file(_aligned(b"ab\0\0" * 20), _wrapper((4,), _dtype("U5"), numpy_array_alignment_bytes=16)),
        zlib.compress(_file(NUMBERS, _wrapper((3,), _dtype("f8"), numpy_array_alignment_bytes=None))),
        _file(pickled([1]), _wrapper((1,), _dtype("O8", "|", 63))),
    ):
        found = scanned(tmp_path / "m.joblib", content)
        assert (found.ok, found.findings) == (True, [])


@pytest.mark.parametrize("place", ["after", "in objects", "in an object dtype by its flag"])
def test_what_stands_between_arrays_is_read(tmp_path: Path, place: str) -> None:
    content = {
        "after": _file(_aligned(NUMBERS), ALIGNED, value(call("os.system", "id")) + b"a"),
        "in objects": _file(HARMFUL, _wrapper((1,), _dtype("O8", "|", 63))),
        "in an object dtype by its flag": _file(HARMFUL, _wrapper((1,), _dtype("V8", "|", 27))),
    }[place]
    found = scanned(tmp_path / "m.joblib", content)
    assert any("os.system" in finding.message for finding in found.findings)


def test_opcodes_in_the_place_of_an_array_are_found(tmp_path: Path) -> None:
    run = b"cos\nsystem\n(S'id'\ntR."
    unaligned = _wrapper((len(run),), _dtype("u1", "|"))
    other = _wrapper((len(run),), _dtype("u1", "|"), numpy_array_alignment_bytes=16)
    assert not scanned(tmp_path / "m.joblib", _file(run, unaligned)).ok
    assert not scanned(tmp_path / "m.joblib", _file(run + bytes(200), other)).ok


def test_an_array_whose_size_is_not_known_is_not_called_harmless(tmp_path: Path) -> None:
    for wrapper in (
        _wrapper((3,), named("numpy.float64")),
        _wrapper((3,), _dtype("q?")),
        _wrapper((10**9,), _dtype("f8")),
    ):
        assert codes(scanned(tmp_path / "m.joblib", _file(NUMBERS, wrapper))) >= {"broken-pickle"}


def _framed(content: bytes) -> bytes:
    return b"\x95" + struct.pack("<Q", len(content)) + content


def test_an_array_within_a_frame_is_broken_because_joblib_reads_it_behind_the_frame(tmp_path: Path) -> None:
    """What follows has another memo for joblib: `os.system` is there what is `collections.OrderedDict` here."""
    wrapper = _wrapper((1,), _dtype("O8", "|", 63))
    behind = value("collections") + b"\x94" + value("OrderedDict") + b"\x9400h\0h\1\x93" + value(("id",)) + b"R."
    content = value("os") + b"\x94" + value("system") + b"\x9400" + wrapper + behind
    assert "broken-pickle" in codes(scanned(tmp_path / "m.joblib", b"\x80\x04" + _framed(content) + pickled([1])))
    clean = b"\x80\x04" + _framed(b"]" + wrapper) + pickled([1]) + _framed(b"a.")
    assert scanned(tmp_path / "clean.joblib", clean).ok


def test_a_dtype_that_does_not_say_whether_it_holds_objects_is_broken(tmp_path: Path) -> None:
    short = built(call("numpy.dtype", "V8", False, True), (3, "|", None, None, None, 8, 1))
    for dtype in (short, _dtype("V8", "|", True)):
        content = _file(b"\0" * 8, _wrapper((1,), dtype))
        assert "broken-pickle" in codes(scanned(tmp_path / "m.joblib", content))
