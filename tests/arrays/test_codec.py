"""Stored bytes and values, against torch for every bit pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ckpt_cli.arrays.codec import Codec
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Storage, Tensor

BYTES = [
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "int8",
    "uint8",
    "bool",
]
HALVES = ["float16", "bfloat16", "int16", "uint16"]
WIDE = ["float32", "float64", "int32", "int64", "uint32", "uint64", "complex64", "complex128"]


def codec_of(dtype: str, **facts: Any) -> Codec:
    """The codec of a tensor of a dtype."""
    return Codec(Tensor("t", BY_NAME[dtype], (4,), (1,), Storage("0", 64), **facts))


def elements(codec: Codec, data: bytes) -> np.ndarray[Any, Any]:
    """Bytes as stored elements."""
    count = len(data) // codec.dtype.itemsize
    return codec.array(memoryview(data), Region((count,), (1,), 0), 0)


def patterns(dtype: str) -> bytes:
    """Every bit pattern of a narrow dtype, many of a wide one."""
    if dtype in BYTES:
        return bytes(range(256))
    if dtype in HALVES:
        return np.arange(1 << 16, dtype="<u2").tobytes()
    return np.random.default_rng(0).bytes(1 << 16)


def by_torch(dtype: str, data: bytes) -> torch.Tensor:
    """The same bytes as a tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", BYTES + HALVES + WIDE)
def test_every_bit_pattern_decodes_as_torch_reads_it(dtype: str) -> None:
    data = patterns(dtype)
    found = codec_of(dtype).decode(elements(codec_of(dtype), data))
    expected = by_torch(dtype, data)
    if dtype == "bool":
        expected = by_torch("uint8", data) != 0
    elif dtype.startswith(("float8", "bfloat16")):
        expected = expected.to(torch.float32)
    assert np.array_equal(found, expected.numpy(), equal_nan=found.dtype.kind in "fc")


@pytest.mark.parametrize("dtype", [dtype for dtype in BYTES + HALVES + WIDE if dtype != "bool"])
def test_what_is_decoded_encodes_to_the_same_bytes(dtype: str) -> None:
    codec = codec_of(dtype)
    stored = elements(codec, patterns(dtype))
    values = codec.decode(stored)
    again = codec.encode(values)
    differing = again.view(stored.dtype).reshape(-1).tobytes() != stored.tobytes()
    if not differing:
        return
    unequal = np.frombuffer(again.tobytes(), f"V{codec.dtype.itemsize}") != np.frombuffer(
        stored.tobytes(), f"V{codec.dtype.itemsize}"
    )
    assert np.isnan(values[unequal]).all()  # a NaN may come back as another NaN


def test_booleans_are_written_as_one_and_zero() -> None:
    codec = codec_of("bool")
    assert codec.encode(np.array([True, False])).tobytes() == b"\1\0"


def test_complex32_is_two_halves() -> None:
    codec = codec_of("complex32")
    data = np.array([1, -2, np.inf, 0.5], "<f2").tobytes()
    assert codec.decode(elements(codec, data)).tolist() == [1 - 2j, complex(np.inf, 0.5)]
    assert codec.encode(np.array([1 - 2j, complex(np.inf, 0.5)])).tobytes() == data


def test_packed_float4_is_two_values_the_first_in_the_low_bits() -> None:
    codec = codec_of("float4_e2m1fn_x2")
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    data = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xFE])
    expected = [[values[0], values[1]], [1, 1.5], [2, 3], [4, 6], [-0.0, -0.5], [-4, -6]]
    assert codec.decode(elements(codec, data)).tolist() == expected
    assert codec.encode(np.array(expected)).tobytes() == data


@pytest.mark.parametrize("dtype", ["float32", "int16", "bfloat16", "complex64"])
def test_big_endian_elements_are_read_and_written_so(dtype: str) -> None:
    little, big = codec_of(dtype), codec_of(dtype, big_endian=True)
    values = little.decode(elements(little, np.arange(1, 9, dtype="<u2").tobytes() * 2))
    if dtype == "complex64":
        expected = np.array([[value.real, value.imag] for value in values], ">f4").tobytes()
    else:
        size = BY_NAME[dtype].itemsize
        stored = little.encode(values).tobytes()
        expected = b"".join(stored[i : i + size][::-1] for i in range(0, len(stored), size))
    assert big.encode(values).tobytes() == expected
    assert np.array_equal(big.decode(elements(big, expected)), values)


def test_conjugated_and_negated_views_store_the_opposite() -> None:
    values = np.array([1 + 2j, 3 - 4j])
    stored = codec_of("complex128").encode(values)
    assert codec_of("complex128", conj=True).decode(stored).tolist() == [1 - 2j, 3 + 4j]
    assert codec_of("complex128", neg=True).encode(values).tobytes() == codec_of("complex128").encode(-values).tobytes()


@pytest.mark.parametrize("dtype", ["float4_e2m1fn", "float6_e2m3fn", "quint4x2"])
def test_what_has_no_defined_packing_is_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedError, match="packing"):
        codec_of(dtype)
