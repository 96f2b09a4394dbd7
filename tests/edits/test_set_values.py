"""Which values each dtype takes, which it refuses, and that `--cast` converts as torch does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from set_elements import edit

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.formats import open_checkpoint

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
FLOATS = ["float64", "float32", "float16", "bfloat16", *FLOAT8]
COMPLEX = ["complex128", "complex64", "complex32"]
INTS = ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]


@pytest.fixture(autouse=True)
def _no_complex32_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf support")
        warnings.filterwarnings("ignore", message="Casting complex values to real")
        yield


def zeros(dtype: str, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32).to(getattr(torch, dtype))


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor's elements, every NaN told as one."""
    width = tensor.dtype.itemsize
    if tensor.dtype.is_complex:
        part = {"complex32": torch.float16, "complex64": torch.float32, "complex128": torch.float64}
        tensor = tensor.contiguous().view(part[str(tensor.dtype).removeprefix("torch.")])
        width = tensor.dtype.itemsize
    codes = tensor.contiguous().view(torch.uint8).reshape(-1, width).numpy().view(f"<u{width}").reshape(-1).tolist()
    if not tensor.dtype.is_floating_point:
        return codes
    is_nan = tensor.to(torch.float64).isnan().reshape(-1).tolist()
    return [-1 if nan else code for code, nan in zip(codes, is_nan, strict=True)]


def set_to(folder: Path, ckpt: Ckpt, dtype: str, values: np.ndarray, *args: str) -> torch.Tensor:
    """A tensor of zeros after `set` has put an array into it."""
    np.save(folder / "v.npy", values)
    torch.save({"x": zeros(dtype, *values.shape)}, folder / "a.pt")
    answer = ckpt("set", folder / "a.pt", f"x=@{folder / 'v.npy'}", *args)
    assert answer.code == 0, answer.err
    found: torch.Tensor = torch.load(folder / "a.pt")["x"]
    return found


def any_float64() -> np.ndarray:
    """Bit patterns of all kinds: random ones, small numbers, halves between neighbours, edges of every dtype."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 1 << 64, 2000, dtype=np.uint64, endpoint=False).view(np.float64)
    small = generator.normal(0, 1, 2000) * 2.0 ** generator.integers(-30, 30, 2000)
    halves = np.arange(-2000, 2000) / 16 + 2.0**-40 * generator.integers(-1, 2, 4000)
    singles = generator.integers(0, 1 << 32, 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 448, 464, 464.01, 57344, 61440, 240, 248, 3e38]
    with np.errstate(all="ignore"):
        return np.concatenate([patterns, small, halves, singles.astype(np.float64), np.array(edges)])


@pytest.mark.parametrize("dtype", [*FLOATS, "bool"])
def test_a_cast_from_float64_gives_torchs_bits(tmp_path: Path, ckpt: Ckpt, dtype: str) -> None:
    values = any_float64()
    found = set_to(tmp_path, ckpt, dtype, values, "--cast")
    assert bits(found) == bits(torch.from_numpy(values).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", COMPLEX)
def test_a_cast_from_complex128_gives_torchs_bits(tmp_path: Path, ckpt: Ckpt, dtype: str) -> None:
    values = np.append(any_float64(), any_float64()).view(np.complex128)
    found = set_to(tmp_path, ckpt, dtype, values, "--cast")
    assert bits(found) == bits(torch.from_numpy(values.copy()).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, "bool", "complex64"])
def test_a_cast_from_int64_gives_torchs_bits(tmp_path: Path, ckpt: Ckpt, dtype: str) -> None:
    generator = np.random.default_rng(1)
    values = generator.integers(-(1 << 63), (1 << 63) - 1, 2000) >> generator.integers(0, 64, 2000)
    found = set_to(tmp_path, ckpt, dtype, values, "--cast")
    assert bits(found) == bits(torch.from_numpy(values).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", INTS)
def test_a_cast_from_fractions_drops_them_as_torch_does(tmp_path: Path, ckpt: Ckpt, dtype: str) -> None:
    values = np.arange(-128 if dtype.startswith("i") else 0, 127, 0.25)
    found = set_to(tmp_path, ckpt, dtype, values, "--cast")
    assert torch.equal(found, torch.from_numpy(values).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
def test_a_cast_from_complex_drops_the_imaginary_part_as_torch_does(tmp_path: Path, ckpt: Ckpt, dtype: str) -> None:
    values = np.array([1 + 2j, -3.5 - 1j, 7])
    found = set_to(tmp_path, ckpt, dtype, values, "--cast")
    assert torch.equal(found, torch.from_numpy(values).to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, "bool", *COMPLEX])
def test_every_value_of_a_dtype_can_be_set_without_a_cast(tmp_path: Path, ckpt: Ckpt, dtype: str) -> None:
    generator = np.random.default_rng(2)
    raw = torch.from_numpy(generator.integers(0, 256, 4096, dtype=np.uint8))
    every = (raw % 2).bool() if dtype == "bool" else raw.view(getattr(torch, dtype))
    torch.save({"x": every}, tmp_path / "b.pt")
    assert ckpt("show", tmp_path / "b.pt", "x", "-o", tmp_path / "v.npy").code == 0
    found = set_to(tmp_path, ckpt, dtype, np.load(tmp_path / "v.npy"))
    assert bits(found) == bits(every)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("float64", ["1+1j", "10**400"]),
        ("float32", ["1e39", "-1e39", "1e-46", "1+1j"]),
        ("float16", ["65520", "1e6", "1e-8", "-1e-8"]),
        ("bfloat16", ["3.4e38", "1e39", "1e-41"]),
        ("float8_e4m3fn", ["465", "inf", "-inf", "1e-4"]),
        ("float8_e5m2", ["61441", "1e6", "1e-6"]),
        ("float8_e4m3fnuz", ["inf", "256", "1e-4"]),
        ("float8_e5m2fnuz", ["inf", "65536", "1e-6"]),
        ("complex64", ["1e39", "1e39j", "1e-46j"]),
        ("complex32", ["65520", "1e6j"]),
        ("int64", [str(2**63), str(-(2**63) - 1), "1e19", "0.5", "nan", "inf", "1+1j"]),
        ("int32", [str(2**31), str(-(2**31) - 1), "1e10"]),
        ("int8", ["128", "-129", "1.5", "nan"]),
        ("uint8", ["256", "-1", "0.5"]),
        ("uint16", ["65536", "-1"]),
        ("uint32", [str(2**32), "-1"]),
        ("uint64", [str(2**64), "-1", "0.5"]),
        ("bool", ["2", "-1", "0.5", "nan"]),
    ],
)
def test_a_value_that_a_dtype_cannot_hold_is_refused(tmp_path: Path, ckpt: Ckpt, dtype: str, values: list[str]) -> None:
    torch.save({"x": zeros(dtype, 2)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    for value in values:
        text = str(10**400) if value == "10**400" else value
        answer = ckpt("set", tmp_path / "a.pt", f"x[1]={text}")
        assert (answer.code, answer.out) == (2, ""), value
        assert "cannot hold" in answer.err.splitlines()[0]
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int64", [-(2**63), 2**63 - 1, -1]),
        ("uint64", [2**64 - 1, 2**63, 2**53 + 1]),
        ("int32", [-(2**31), 2**31 - 1]),
        ("int8", [-128, 127]),
        ("uint8", [0, 255]),
        ("uint16", [0, 65535]),
        ("uint32", [0, 2**32 - 1]),
    ],
)
def test_the_extremes_of_integers_are_exact(tmp_path: Path, ckpt: Ckpt, dtype: str, values: list[int]) -> None:
    torch.save({"x": zeros(dtype, len(values)), "y": zeros(dtype, len(values))}, tmp_path / "a.pt")
    singly = [f"y[{index}]={value}" for index, value in enumerate(values)]
    assert ckpt("set", tmp_path / "a.pt", f"x={values}", *singly).code == 0
    after = torch.load(tmp_path / "a.pt")
    assert after["x"].tolist() == after["y"].tolist() == values
    assert ckpt("show", "--json", tmp_path / "a.pt", "x").out.endswith(f'"values": {values}}}]\n')


@pytest.mark.parametrize(
    ("dtype", "start", "operation", "expected"),
    [
        ("int64", 2**62, "+=4611686018427387903", 2**63 - 1),
        ("int64", 2**62, "*=2", None),
        ("int64", -(2**63), "-=1", None),
        ("int64", 2**53 + 1, "*=1.0", 2**53 + 1),
        ("uint64", 2**63, "+=9223372036854775807", 2**64 - 1),
        ("uint64", 2**63, "*=2", None),
        ("uint8", 200, "+=55", 255),
        ("uint8", 200, "+=56", None),
        ("uint8", 3, "-=4", None),
        ("int8", -128, "*=-1", None),
        ("int32", 7, "/=2", None),
        ("int32", 8, "/=2", 4),
        ("int32", 8, "/=-4.0", -2),
        ("int32", 8, "*=0.5", 4),
        ("int32", 8, "/=0", None),
        ("int32", 8, "+=nan", None),
        ("int32", 8, "+=1j", None),
        ("int32", 2**31 - 1, "*=4611686018427387904", None),
    ],
)
def test_integer_arithmetic_is_exact_or_refused(
    tmp_path: Path, ckpt: Ckpt, dtype: str, start: int, operation: str, expected: int | None
) -> None:
    torch.save({"x": torch.tensor([start], dtype=getattr(torch, dtype))}, tmp_path / "a.pt")
    answer = ckpt("set", tmp_path / "a.pt", f"x{operation}")
    assert answer.code == (2 if expected is None else 0), answer.err
    assert len(answer.err.splitlines()) <= 3
    assert torch.load(tmp_path / "a.pt")["x"].tolist() == [start if expected is None else expected]


@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
@pytest.mark.parametrize("dtype", [*FLOATS[:4], "complex64", "complex128"])
def test_arithmetic_with_an_array_gives_torchs_bits(tmp_path: Path, ckpt: Ckpt, dtype: str, operator: str) -> None:
    generator = torch.Generator().manual_seed(3)
    kind = getattr(torch, dtype)
    drawn = torch.randn(2, 500, generator=generator, dtype=torch.complex128)
    a, b = (drawn if kind.is_complex else drawn.real).to(kind).clone().unbind()
    torch.save({"x": a, "y": b}, tmp_path / "a.pt")
    ckpt("show", tmp_path / "a.pt", "y", "-o", tmp_path / "b.npy")
    assert ckpt("set", tmp_path / "a.pt", f"x{operator}=@{tmp_path / 'b.npy'}").code == 0
    wide = torch.float32 if kind.itemsize == 2 else kind
    expected = {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}[operator](a.to(wide), b.to(wide))
    found = torch.load(tmp_path / "a.pt")["x"]
    if kind.is_complex and operator in "*/":  # torch fuses what numpy rounds twice
        assert torch.allclose(found, expected.to(kind), rtol=4 * torch.finfo(kind).eps)
    else:
        assert bits(found) == bits(expected.to(kind))


def test_arithmetic_that_leaves_a_float_is_refused_unless_cast(tmp_path: Path, ckpt: Ckpt) -> None:
    inf = float("inf")
    state = {"h": torch.tensor([60000.0, 1.0]).half(), "f": torch.tensor([3e38, inf]), "t": torch.tensor([1e-7]).half()}
    torch.save(state, tmp_path / "a.pt")
    for assignment in ("h*=2", "f+=3e38", "f[0]/=0", "t/=8"):
        answer = ckpt("set", tmp_path / "a.pt", assignment)
        assert answer.code == 2
        assert "is out of the range of float" in answer.err or " cannot hold " in answer.err
        assert "\nhint: --cast " in answer.err
    assert ckpt("set", tmp_path / "a.pt", "f[1]+=1").code == 0
    assert ckpt("set", tmp_path / "a.pt", "h*=2", "f+=3e38", "t/=8", "--cast").code == 0
    after = torch.load(tmp_path / "a.pt")
    assert after["h"].tolist() == [inf, 2]
    assert after["f"].tolist() == [inf, inf]
    assert after["t"].tolist() == [0]


# --- packed pairs ----------------------------------------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def pairs(codes: list[int]) -> torch.Tensor:
    return torch.tensor(codes, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def test_a_float4_is_shown_and_set_as_a_pair_with_the_low_half_first(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"x": pairs([0x21, 0xF7, 0x80])}, tmp_path / "a.pt")
    assert ckpt("show", "-f", "tsv", tmp_path / "a.pt", "x").lines == [
        "x[0]\t0.5\t1.0",
        "x[1]\t6.0\t-6.0",
        "x[2]\t0.0\t-0.0",
    ]
    assert ckpt("set", tmp_path / "a.pt", "x[0]=[6,-0.5]", "x[1]*=0.5", "x[2]+=[1,2]").code == 0
    assert torch.load(tmp_path / "a.pt")["x"].view(torch.uint8).tolist() == [0x97, 0xD5, 0x42]
    assert ckpt("set", tmp_path / "a.pt", "x=1.5").code == 0
    assert torch.load(tmp_path / "a.pt")["x"].view(torch.uint8).tolist() == [0x33] * 3


@pytest.mark.parametrize("value", ["inf", "nan", "0.1", "[1,2,3]"])
def test_a_float4_refuses_what_it_cannot_hold(tmp_path: Path, ckpt: Ckpt, value: str) -> None:
    torch.save({"x": pairs([0x21])}, tmp_path / "a.pt")
    assert ckpt("set", tmp_path / "a.pt", f"x={value}").code == 2


def test_all_sixteen_values_of_a_float4_come_back(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "v.npy", np.array(E2M1, np.float32).reshape(8, 2))
    torch.save({"x": pairs([0xFF] * 8)}, tmp_path / "a.pt")
    assert ckpt("set", tmp_path / "a.pt", f"x=@{tmp_path / 'v.npy'}").code == 0
    codes = torch.load(tmp_path / "a.pt")["x"].view(torch.uint8).tolist()
    assert [half for code in codes for half in (code & 15, code >> 4)] == list(range(16))


# --- which names change along ----------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn, numel: int = 24) -> torch.Tensor:
    """A view of 24 elements by strides of all kinds."""
    shape, stride, room = [], [], numel - 1
    offset = draw(st.integers(0, room))
    room -= offset
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 6))
        size = draw(st.integers(1, min(room // step + 1, 4) if step else 3))
        room -= (size - 1) * step
        shape.append(size)
        stride.append(step)
    return torch.arange(float(numel)).as_strided(shape, stride, offset)


def elements(region: Region) -> set[int]:
    """The elements of the storage that a region is made of."""
    found = {region.offset} if region.numel else set()
    for size, step in zip(region.shape, region.stride, strict=True):
        found = {base + number * step for base in found for number in range(size)}
    return found


@settings(max_examples=most(150), deadline=None)
@given(st.data(), st.lists(views(), min_size=2, max_size=5))
def test_also_changed_names_exactly_the_views_that_share_an_element(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, drawn: list[torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("views") / "a.pt"
    flat = torch.arange(24.0)
    state = {
        f"v{number}": flat.as_strided(view.shape, view.stride(), view.storage_offset())
        for number, view in enumerate(drawn)
    }
    torch.save(state, path)
    first = state["v0"]
    index = data.draw(st.integers(0, first.shape[0] - 1)) if first.ndim else ...
    done = edit(path, f"v0[{'...' if index is ... else index}]=-1")
    checkpoint = open_checkpoint(str(path))
    regions = {tensor.name: Region.of(tensor) for tensor in checkpoint.tensors}
    checkpoint.close()
    changed = elements(regions["v0"].at((index,)))
    assert done.changed == ("v0",)
    assert set(done.also_changed) == {
        name for name, region in regions.items() if name != "v0" and elements(region) & changed
    }
    flat[list(changed)] = -1
    after = torch.load(path)
    assert all(torch.equal(after[name], state[name]) for name in state)
