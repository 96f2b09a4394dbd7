"""The tensor renderer, with torch's own repr as the oracle."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli.render.array_repr import EDGE_ITEMS, tensor_text

THRESHOLD = 1000
"""Elements above which torch summarises a tensor."""

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
FLOATS = ("float16", "float32", "float64", "bfloat16", *FLOAT8)
INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
PARTS = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
DTYPES = (*FLOATS, *INTS, "bool", *PARTS)

# Each is a kind of number that torch treats apart; a tensor mixes one to three of them.
FLAVOURS = (
    st.integers(-9, 9).map(float),
    st.integers(-100_000, 100_000).map(float),
    st.floats(-1.5, 1.5),
    st.floats(-2000, 2000),
    st.sampled_from((1e-5, 9.9e-5, 1e-4, 0.99999, 1.0, 1000.0, 1000.5, 1001.0, 1e8, 1.0000001e8, 1e9)),
    st.sampled_from((0.0, -0.0)),
    st.sampled_from((math.nan, math.inf, -math.inf)),
    st.floats(),
)

shapes = st.lists(st.integers(1, 5), max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= 64)
long_rows = st.tuples(st.integers(1, 3), st.integers(7, 60))
empty_shapes = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple).filter(lambda shape: 0 in shape)
straddling_shapes = st.sampled_from(
    (
        (999,), (1000,), (1001,), (1, 1001), (1001, 1), (6, 167), (7, 143), (7, 142), (167, 6), (2, 3, 170),
        (10, 10, 10), (11, 10, 10), (7, 7, 7, 3), (4, 4, 4, 4, 4), (3, 7, 1, 7, 8), (2, 2, 2, 2, 70),
    )
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_complex32_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf support")
        yield


def float_tensors(draw: st.DrawFn, dtype: str, numel: int) -> torch.Tensor:
    flavour = st.one_of(draw(st.lists(st.sampled_from(FLAVOURS), min_size=1, max_size=3)))
    values = draw(st.lists(flavour, min_size=min(numel, 64), max_size=min(numel, 64)))
    repeated = (values * (numel // 64 + 1))[:numel]
    return torch.tensor(repeated, dtype=torch.float64).to(getattr(torch, dtype))


def raw_tensors(draw: st.DrawFn, dtype: str, numel: int) -> torch.Tensor:
    """Draw any bytes as elements: every magnitude, subnormals, nans with payloads."""
    itemsize = getattr(torch, dtype).itemsize
    raw = draw(st.binary(min_size=min(numel, 64) * itemsize, max_size=min(numel, 64) * itemsize))
    repeated = bytearray((raw * (numel // 64 + 1))[: numel * itemsize])
    if dtype == "bool":
        repeated = bytearray(byte % 2 for byte in repeated)
    return torch.frombuffer(repeated, dtype=torch.uint8).view(getattr(torch, dtype))


def int_tensors(draw: st.DrawFn, dtype: str, numel: int) -> torch.Tensor:
    limits = torch.iinfo(getattr(torch, dtype))
    bound = draw(st.sampled_from((9, 1000, limits.max)))
    ints = st.integers(max(limits.min, -bound), min(limits.max, bound))
    values = draw(st.lists(ints, min_size=min(numel, 64), max_size=min(numel, 64)))
    return torch.tensor((values * (numel // 64 + 1))[:numel], dtype=getattr(torch, dtype))


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES, of: Any = shapes) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(dtypes)), draw(of)
    numel = math.prod(shape)
    if dtype == "bool" or draw(st.integers(0, 3)) == 0:
        flat = raw_tensors(draw, dtype, numel)
    elif dtype in INTS:
        flat = int_tensors(draw, dtype, numel)
    elif dtype in PARTS:
        real, imag = (float_tensors(draw, PARTS[dtype], numel) for _ in range(2))
        flat = torch.stack((real, imag), dim=-1).view(getattr(torch, dtype))
    else:
        flat = float_tensors(draw, dtype, numel)
    return flat.reshape(shape)


def edges(values: Any, shape: tuple[int, ...]) -> Any:
    """Reduce nested lists to the items that torch prints of a summarised tensor."""
    if not shape:
        return values
    if shape[0] > 2 * EDGE_ITEMS:
        values = values[:EDGE_ITEMS] + values[-EDGE_ITEMS:]
    return [edges(value, shape[1:]) for value in values]


def text_of(tensor: torch.Tensor, threshold: float = THRESHOLD, **options: Any) -> str:
    """Render a tensor with our renderer, given no more than torch's data."""
    shape, values = tuple(tensor.shape), tensor.tolist()
    summarized = tensor.numel() > threshold
    return tensor_text(
        edges(values, shape) if summarized else values,
        shape=shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        summarized=summarized,
        requires_grad=tensor.requires_grad,
        is_parameter=isinstance(tensor, torch.nn.Parameter),
        **options,
    )


def torch_options(**options: Any) -> Any:
    return torch._tensor_str.printoptions(**options)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tensor_text_equals_the_repr_of_torch_for_every_dtype(dtype: str, data: st.DataObject) -> None:
    tensor = data.draw(tensors((dtype,)))
    assert text_of(tensor) == repr(tensor)


@settings(max_examples=most(200), deadline=None)
@given(tensor=tensors(of=long_rows))
def test_long_rows_wrap_where_torch_wraps_them(tensor: torch.Tensor) -> None:
    assert text_of(tensor) == repr(tensor)


@settings(max_examples=100, deadline=None)
@given(tensor=tensors(of=straddling_shapes))
def test_tensors_around_the_threshold_are_summarised_as_torch_does(tensor: torch.Tensor) -> None:
    assert text_of(tensor) == repr(tensor)


@settings(max_examples=15, deadline=None)
@given(tensor=tensors(of=straddling_shapes))
def test_large_tensors_print_in_full_when_not_summarised(tensor: torch.Tensor) -> None:
    with torch_options(threshold=math.inf):
        assert text_of(tensor, threshold=math.inf) == repr(tensor)


@settings(max_examples=most(150), deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=empty_shapes, requires_grad=st.booleans())
def test_empty_tensors_name_their_size_and_dtype(dtype: str, shape: tuple[int, ...], requires_grad: bool) -> None:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    tensor.requires_grad_(requires_grad and (tensor.is_floating_point() or tensor.is_complex()))
    assert text_of(tensor) == repr(tensor)


@settings(max_examples=most(150), deadline=None)
@given(tensor=tensors((*FLOATS, *PARTS)), precision=st.integers(0, 10))
def test_precision_counts_the_digits_after_the_point(tensor: torch.Tensor, precision: int) -> None:
    with torch_options(precision=precision):
        assert text_of(tensor, precision=precision) == repr(tensor)


@settings(max_examples=100, deadline=None)
@given(tensor=tensors(("float32", "float16", "float64", "bfloat16", "complex64")), requires_grad=st.booleans())
def test_parameters_are_announced_and_show_requires_grad(tensor: torch.Tensor, requires_grad: bool) -> None:
    parameter = torch.nn.Parameter(tensor, requires_grad=requires_grad)
    assert text_of(parameter) == repr(parameter)


@settings(max_examples=30, deadline=None)
@given(tensor=tensors(INTS))
def test_integer_parameters_print_without_requires_grad(tensor: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assert text_of(parameter) == repr(parameter)


@settings(max_examples=most(150), deadline=None)
@given(
    tensor=tensors(("float16", "float32", "bfloat16", "float64", "complex128"), of=st.one_of(long_rows, shapes)),
    requires_grad=st.booleans(),
)
def test_suffixes_wrap_in_the_order_device_size_dtype_requires_grad(tensor: torch.Tensor, requires_grad: bool) -> None:
    tensor.requires_grad_(requires_grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_get_default_device", lambda: "cuda")
        assert text_of(tensor, extra=("device='cpu'",)) == repr(tensor)


@pytest.mark.parametrize("length", range(1, 30))
def test_suffixes_wrap_at_every_column_as_torch_does(length: int) -> None:
    for digit in (1, 10, 100, 0.5):
        tensor = torch.full((length,), digit, dtype=torch.float16, requires_grad=True)
        assert text_of(tensor) == repr(tensor)


@pytest.mark.parametrize("ndim", range(1, 33))
def test_a_wrapped_size_leaves_the_room_that_torch_leaves_for_the_dtype(ndim: int) -> None:
    for dtype in (torch.float32, torch.float8_e4m3fn, torch.int64):
        tensor = torch.empty((0,) * ndim, dtype=dtype)
        assert text_of(tensor) == repr(tensor)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_value_prints_as_in_torch_alone_and_beside_others(dtype: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    assert text_of(values) == repr(values)
    for value, pair in zip(values.unbind(), values.reshape(128, 2).unbind(), strict=False):
        assert text_of(value) == repr(value)
        assert text_of(pair) == repr(pair)


def test_float4_pairs_print_as_their_bytes() -> None:
    raw = torch.tensor([[0, 7, 16], [34, 127, 255]], dtype=torch.uint8)
    expected = repr(raw.view(torch.float4_e2m1fn_x2))
    assert tensor_text(raw.tolist(), shape=(2, 3), dtype="float4_e2m1fn_x2") == expected


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0], "tensor([1., 2.])"),
        ([1.0, 2.5], "tensor([1.0000, 2.5000])"),
        ([1.0, 1000.0], "tensor([   1., 1000.])"),
        ([1.0, 1001.0], "tensor([1.0000e+00, 1.0010e+03])"),
        ([1e8], "tensor([100000000.])"),
        ([2e8], "tensor([2.0000e+08])"),
        ([0.0, math.nan, -math.inf], "tensor([0., nan, -inf])"),
        ([1e-5, 0.0], "tensor([1.0000e-05, 0.0000e+00])"),
        ([-0.1352], "tensor([-0.1352])"),
    ],
)
def test_notation_follows_the_magnitudes(values: list[float], text: str) -> None:
    assert tensor_text(values, shape=(len(values),), dtype="float32") == text
    assert repr(torch.tensor(values)) == text


@pytest.mark.parametrize("limits", [(1e-4,), (1.5, 1e8), (0.5, 500.0), (0.001, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scientific_notation_starts_one_ulp_past_its_limits(limits: tuple[float, ...], dtype: torch.dtype) -> None:
    exact = torch.tensor(limits, dtype=dtype)
    for toward in (0.0, math.inf):
        tensor = exact.clone()
        tensor[-1] = torch.nextafter(exact[-1], torch.tensor(toward, dtype=dtype))
        assert text_of(tensor) == repr(tensor)
    assert text_of(exact) == repr(exact)


def test_sixty_four_dimensions_are_no_trouble() -> None:
    tensor = torch.full((1,) * 63 + (2,), 1.5)
    assert text_of(tensor) == repr(tensor)


def test_the_renderer_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, ckpt_cli.render.array_repr; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
