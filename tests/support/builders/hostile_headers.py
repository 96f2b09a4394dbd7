"""safetensors files made to harm whoever opens them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builders.st import file, info

Case = tuple[str, Callable[[], bytes], str | None]

MILLION = 1_000_000
_SOUND = info("F32", [4], 0, 16)


def _one(name: str = "a", **fields: Any) -> Callable[[], bytes]:
    """A file of one tensor of 16 bytes, sound but for some fields."""
    return lambda: file({name: {**_SOUND, **fields}}, bytes(16))


def _raw(text: str, data: bytes = b"") -> Callable[[], bytes]:
    return lambda: file(text, data)


_LARGE = 20 * MILLION
"""Bytes of a header that is long but within what the format allows."""


def _long(piece: str) -> Callable[[], bytes]:
    """A header whose only value is a list of one piece over and over."""
    return lambda: file('{"a":[' + ",".join([piece] * (_LARGE // (len(piece) + 1))) + "]}")


HEADERS: list[Case] = [
    ("header_of_2**63_bytes", lambda: file({"a": _SOUND}, length=2**63), "is said to have 9223372036854775808 bytes"),
    ("header_of_100_mb_and_one", lambda: file("{}", length=100_000_001), "100000000 is the most"),
    ("header_beyond_the_end", lambda: file({"a": _SOUND}, length=99 * MILLION), "the file has"),
    ("header_that_ends_in_bytes", lambda: file({"a": _SOUND}, bytes(16), length=20), "is not JSON"),
    ("header_deep", _raw('{"a":' + "[" * MILLION), "nest"),
    ("header_deep_in_objects", _raw('{"a":' * 200_000), "nest"),
    ("header_of_ten_million_digits", _raw('{"a":' + "9" * 10 * MILLION + "}"), "is not JSON"),
    ("header_of_nan", _raw('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), "is not JSON"),
    ("header_of_empty_lists", _long("[]"), "MiB of memory"),
    ("header_of_empty_objects", _long("{}"), "MiB of memory"),
    ("header_of_short_strings", _long('"ab"'), "of memory"),
    ("header_of_wide_strings", _long('"é"'), "of memory"),
    ("header_of_numbers", _long("999"), "MiB of memory"),
    ("header_of_floats", _long("1.5"), "MiB of memory"),
    ("header_that_is_a_list", _raw("[" * 8), "not a checkpoint of a kind"),
    ("header_with_escapes_in_names", lambda: file({"\x1b[2J\n\0‮": _SOUND}, bytes(16)), None),
    ("header_with_half_a_surrogate", lambda: file({"\ud800": _SOUND}, bytes(16)), "surrogates not allowed"),
    ("header_with_escapes_in_dtype", _one(dtype="\x1b[2J"), "which safetensors does not know"),
    ("header_with_a_dtype_of_a_list", _one(dtype=[["F32"]]), "which safetensors does not know"),
    ("header_metadata_deep", _raw('{"__metadata__":{"a":' + "[" * 900 + "]" * 900 + "}}"), "not a map of strings"),
    ("header_offsets_overlap", lambda: file({"a": _SOUND, "b": info("F32", [4], 8, 24)}, bytes(24)), "an overlap at"),
    ("header_offsets_with_a_gap", lambda: file({"a": _SOUND, "b": info("F32", [4], 20, 36)}, bytes(36)), "a gap"),
    ("header_offsets_backwards", _one(data_offsets=[16, 0]), "not valid counts"),
    ("header_offsets_negative", _one(data_offsets=[-16, 0]), "not valid counts"),
    ("header_offsets_beyond_the_end", _one(shape=[2**40], data_offsets=[0, 2**42]), "need 4398046511104 bytes"),
    ("header_offsets_of_2**64", _one(data_offsets=[0, 2**64]), "not valid counts"),
    ("header_shape_overflows", _one(shape=[2**32, 2**32, 2**32]), "overflows"),
    ("header_shape_negative", _one(shape=[-4]), "not valid counts"),
    ("header_shape_of_bools", _one(shape=[True, 4]), "not valid counts"),
    ("header_shape_of_floats", _one(shape=[4.0]), "not valid counts"),
    ("header_shape_of_a_million", _one(shape=[1] * MILLION), "has 1000000 dimensions"),
    ("header_shape_overflows_before_0", _one(shape=[2**63, 2**63, 0], data_offsets=[0, 0]), "overflows"),
    ("header_of_100_000_tensors", lambda: file({f"{n}": info("U8", [0], 0, 0) for n in range(100_000)}), None),
]  # fmt: skip
"""Name, file, and a part of the error or None where it may open."""
