"""Indexing as arithmetic, against numpy; regions that meet, against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices

from ckpt_cli.arrays.indexing import Region, parse_index, part_at, range_cuts, regions_meet, row_pieces
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.errors import UsageError
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.ops.show import spell_index

BASE = np.arange(4000)

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """A strided region of the base, whatever its strides."""
    shape = draw(shapes)
    stride = tuple(draw(st.integers(0, 40)) for _ in shape)
    return Region(shape, stride, draw(st.integers(0, 100)))


def array_of(region: Region) -> np.ndarray[Any, Any]:
    """The region as a numpy view of the base."""
    strides = [step * BASE.itemsize for step in region.stride]
    return np.lib.stride_tricks.as_strided(BASE[region.offset :], region.shape, strides)


def elements(region: Region) -> list[int]:
    """The places of the region's elements in row-major order."""
    if not region.numel:
        return []
    flat = sum(np.multiply.outer(np.arange(size), step).reshape([-1] + [1] * (len(region.shape) - 1 - dim))
               for dim, (size, step) in enumerate(zip(region.shape, region.stride, strict=True)))  # fmt: skip
    return (np.broadcast_to(flat, region.shape) + region.offset).reshape(-1).tolist()


@settings(max_examples=most(300), deadline=None)
@given(regions(), st.data())
def test_an_index_selects_what_numpy_selects(region: Region, data: st.DataObject) -> None:
    index = data.draw(basic_indices(region.shape, allow_newaxis=False))
    index = index if isinstance(index, tuple) else (index,)
    found, expected = region.at(index), array_of(region)[index]
    assert found.shape == expected.shape
    assert elements(found) == expected.reshape(-1).tolist()
    if found.numel:
        low, high = found.span()
        assert (low, high) == (expected.min(), expected.max() + 1)
    if index:
        assert parse_index(spell_index(index)) == index


@settings(max_examples=most(300), deadline=None)
@given(regions(), st.integers(8, 4000))
def test_pieces_cover_every_element_within_the_bound(region: Region, most: int) -> None:
    found: list[tuple[int, ...]] = []
    places = np.arange(region.numel).reshape(region.shape)
    for part in region.pieces(8, most):
        low, high = region.at(part).span()
        assert (high - low) * 8 <= max(most, 8) or region.at(part).numel == 1
        found.extend(places[part].reshape(-1).tolist())
    assert sorted(found) == list(range(region.numel))


@settings(max_examples=100, deadline=None)
@given(regions(), st.integers(1, 50))
def test_row_pieces_are_in_row_major_order(region: Region, most: int) -> None:
    places = np.arange(region.numel).reshape(region.shape)
    found = [place for part in row_pieces(region, most) for place in places[part].reshape(-1).tolist()]
    assert found == list(range(region.numel))


@settings(max_examples=most(300), deadline=None)
@given(regions(), st.sampled_from([8, 64, 300, 4096]), st.data())
def test_rows_have_every_element_and_little_more(region: Region, page: int, data: st.DataObject) -> None:
    index = data.draw(basic_indices(region.shape, allow_newaxis=False))
    region = region.at(index if isinstance(index, tuple) else (index,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ckpt_cli.arrays.indexing.PAGE", page)
        rows = region.rows(8)
    read = np.concatenate([BASE[begin : begin + rows.length] for begin in rows.begins])
    assert [read[element] for element in elements(rows.region)] == elements(region)
    low, high = region.span()
    assert len(rows.begins) * (8 * rows.length + page) <= 8 * (high - low) + page


def test_a_piece_never_spans_a_gap_of_a_page() -> None:
    column = Region((1000, 1), (4096, 1), 5)
    parts = list(column.pieces(4, 8 << 20))
    assert len(parts) == 1000
    assert all(region.span()[1] - region.span()[0] == 1 for region in map(column.at, parts))


@pytest.mark.parametrize("text", ["", " ", "a", "1.5", "::0", "1:2:3:4", "None", "[0]", "9" * 30, "...,..."])
def test_what_is_no_index_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Region((2, 2), (2, 1), 0).at(parse_index(text))


@pytest.mark.parametrize("index", [(2,), (-3,), (0, 0, 0), (slice(None),) * 3])
def test_an_index_out_of_range_is_refused(index: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        Region((2, 2), (2, 1), 0).at(index)


STORAGE = Storage("0", 10**6)


def tensor_of(region: Region, dtype: str) -> Tensor:
    """A tensor that is the region."""
    return Tensor("t", BY_NAME[dtype], region.shape, region.stride, STORAGE, region.offset)


@settings(max_examples=most(300), deadline=None)
@given(regions(), regions(), st.sampled_from(["uint8", "int16", "float32"]), st.sampled_from(["uint8", "int64"]))
def test_regions_meet_when_they_share_a_byte(a: Region, b: Region, first: str, second: str) -> None:
    x, y = tensor_of(a, first), tensor_of(b, second)
    touched = [
        {element * t.dtype.itemsize + byte for element in elements(r) for byte in range(t.dtype.itemsize)}
        for t, r in ((x, a), (y, b))
    ]
    assert regions_meet(x, y) == bool(touched[0] & touched[1])


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_range_of_elements_is_a_few_basic_indices(shape: list[int], data: st.DataObject) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    begin = data.draw(st.integers(0, numbers.size))
    end = data.draw(st.integers(begin, numbers.size))
    cuts = list(range_cuts(tuple(shape), begin, end))
    found = [number for cut in cuts for number in numbers[part_at(tuple(shape), *cut)].reshape(-1).tolist()]
    assert found == list(range(begin, end))
    assert len(cuts) <= 2 * len(shape) + 1
