"""`ckpt stats`: what torch says of the same values, whatever the dtype and the view."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pt
from builders.pickles import tensor
from conftest import Ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_cli.arrays import moments as summing
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.stats import stats

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*ComplexHalf", "ignore:.*Quantized")


NAN, INF = math.nan, math.inf

FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn,
    torch.float8_e5m2fnuz, torch.float8_e4m3fnuz, torch.float8_e8m0fnu,
]  # fmt: skip
INTEGERS = [
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool
]  # fmt: skip


def rows_of(ckpt: Ckpt, path: Path, *options: object) -> dict[str, Any]:
    done = ckpt("stats", path, "--json", *options)
    assert done.code == 0, done.err
    return {row["name"]: row for row in json.loads(done.out)["tensors"]}


def agrees(row: dict[str, Any], values: np.ndarray[Any, Any]) -> None:
    """Hold one row to float64 values, or exact integers, that mean the same."""
    values = values.reshape(-1)
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    assert row["nan"] == (int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0)
    assert row["inf"] == (int(np.isinf(values).sum()) if values.dtype.kind == "f" else 0)
    assert row["zeros"] == int((finite == 0).sum())
    assert sum(row["histogram"]["counts"]) == finite.size
    if not finite.size:
        assert (row["min"], row["max"], row["mean"], row["std"]) == (None, None, None, None)
        return
    assert (row["min"], row["max"]) == (finite.min().item(), finite.max().item())
    exact = [int(value) if values.dtype.kind != "f" else float(value) for value in finite]
    mean = math.fsum(exact) / len(exact)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in exact) / max(len(exact) - 1, 1))
    scale = max(abs(float(finite.min())), abs(float(finite.max())))
    assert row["mean"] == pytest.approx(mean, rel=1e-6, abs=1e-7 * spread + 1e-15 * scale)
    if len(exact) == 1:
        assert row["std"] == "NaN"
    else:
        assert row["std"] == pytest.approx(spread, rel=1e-6, abs=1e-15 * scale)
    assert row["norm"] == pytest.approx(math.sqrt(math.fsum(value * value for value in exact)), rel=1e-6)
    edges, counts = row["histogram"]["edges"], row["histogram"]["counts"]
    assert edges == sorted(edges)
    for bar, (low, high) in enumerate(pairwise(edges)):
        top = finite <= high if bar == len(counts) - 1 else finite < high
        assert counts[bar] == int(((finite >= low) & top).sum())


def wide(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """What the values are, in float64, or as integers of their own kind."""
    if values.dtype == torch.bool:
        return values.to(torch.uint8).numpy()
    if not values.dtype.is_floating_point:
        return np.asarray(values.numpy())
    return values.to(torch.float32).double().numpy() if values.dtype != torch.float64 else values.numpy()


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_bit_pattern_is_summed_as_torch_has_it(dtype: torch.dtype, tmp_path: Path, ckpt: Ckpt) -> None:
    generator = np.random.default_rng(0)
    size = torch.empty((), dtype=dtype).element_size()
    count = {1: 256, 2: 65536}.get(size, 100_000)
    data = np.arange(count, dtype=f"u{size}") if size <= 2 else generator.integers(0, 256, count * size, "u1")
    values = torch.from_numpy(data.view("u1").copy()).view(dtype)
    if dtype == torch.bool:
        values = torch.tensor([True, False, True])
    if dtype == torch.float64:
        values = torch.from_numpy(generator.standard_normal(count) * 10.0 ** generator.integers(-140, 140, count))
        values[::1000], values[1::1000], values[2::1000] = NAN, INF, -INF
    torch.save({"w": values}, tmp_path / "m.pt")
    agrees(rows_of(ckpt, tmp_path / "m.pt")["w"], wide(values))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-8, 6e-8, -1e-5, 6.1e-5, 65504.0, NAN, INF, -INF])
        | st.floats(-1e4, 1e4, width=16),
        max_size=40,
    ),
)
def test_edge_values_are_summed_exactly(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, numbers: list[float]
) -> None:
    path = tmp_path_factory.mktemp("edge") / "m.pt"
    values = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    torch.save({"w": values}, path)
    agrees(_json(path)["w"], wide(values))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint8]), st.data())
def test_integers_are_exact_to_their_extremes(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, data: st.DataObject
) -> None:
    info = torch.iinfo(dtype)
    near = st.integers(0, 3).map(lambda step: info.max - step) | st.integers(0, 3).map(lambda step: info.min + step)
    numbers = data.draw(st.lists(near | st.integers(int(info.min), int(info.max)), min_size=1, max_size=30))
    path = tmp_path_factory.mktemp("ints") / "m.pt"
    values = torch.tensor(numbers, dtype=dtype)
    torch.save({"w": values}, path)
    agrees(_json(path)["w"], wide(values))


def _json(path: Path) -> dict[str, Any]:
    from ckpt_cli.render.stats import to_json

    with ThreadPoolExecutor(1) as executor:
        checkpoint = open_checkpoint(str(path))
        found = json.loads(json.dumps(to_json(stats(checkpoint, (), executor)), default=list))
        checkpoint.close()
    return {row["name"]: row for row in found["tensors"]}


def test_ids_that_differ_in_their_last_digits_keep_their_spread(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.arange(100_000) + 9_000_000_000_000_000_000
    torch.save({"w": values}, tmp_path / "m.pt")
    assert rows_of(ckpt, tmp_path / "m.pt")["w"]["std"] == pytest.approx(torch.arange(100_000.0).double().std().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("offset", "spread"), [(1000.0, 0.01), (-3e7, 100.0), (1e-20, 1e-22), (1e20, 1e18), (0.0, 1.0), (5.0, 0.0)]
)
def test_a_mean_far_larger_than_the_spread_costs_no_digits(
    dtype: torch.dtype, offset: float, spread: float, tmp_path: Path, ckpt: Ckpt
) -> None:
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal(1_000_000))
    values = (noise * spread + offset).to(dtype)
    torch.save({"w": values}, tmp_path / "m.pt")
    row = rows_of(ckpt, tmp_path / "m.pt")["w"]
    assert row["mean"] == pytest.approx(values.double().mean().item(), rel=1e-6, abs=1e-6 * spread)
    assert row["std"] == pytest.approx(values.double().std().item(), rel=1e-6)
    assert row["norm"] == pytest.approx(values.double().norm().item(), rel=1e-6)


def test_values_that_the_sample_missed_cost_no_digits(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.from_numpy(np.random.default_rng(1).standard_normal(1_000_000)).float()
    values[1000:140_000] += 1e6
    values[200_000:270_000] = 1e-25
    torch.save({"w": values}, tmp_path / "m.pt")
    row = rows_of(ckpt, tmp_path / "m.pt")["w"]
    assert row["std"] == pytest.approx(values.double().std().item(), rel=1e-6)
    assert row["mean"] == pytest.approx(values.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("values", [[1e300, -1e300], [1e308, 1e308, 1.0], [1e200] * 5000 + [-1e200] * 5000])
def test_numbers_whose_squares_overflow_spread_without_end(values: list[float], tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.tensor(values, dtype=torch.float64)}, tmp_path / "m.pt")
    row = rows_of(ckpt, tmp_path / "m.pt")["w"]
    assert (row["std"], row["norm"]) == ("Infinity", "Infinity")
    assert row["mean"] == pytest.approx(math.fsum(value / len(values) for value in values))


def test_numbers_further_apart_than_a_float_reaches_have_a_mean(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({name: torch.full((5,), sign * 1.7e308, dtype=torch.float64) for name, sign in (("a", 1), ("b", -1))},
               tmp_path / "m.pt")  # fmt: skip
    found = json.loads(ckpt("stats", tmp_path / "m.pt", "--total", "--json").out)
    assert [(row["mean"], row["std"]) for row in found["tensors"]] == [(1.7e308, 0), (-1.7e308, 0)]
    assert [found["total"][key] for key in ("mean", "std", "norm")] == [0, "Infinity", "Infinity"]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_total_has_a_histogram_of_all_values_of_whatever_dtype(tmp_path: Path, ckpt: Ckpt, workers: int) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {
        "f": torch.randn(300_000, generator=generator), "d": torch.randn(70_000, generator=generator).double() * 1.7,
        "h": torch.randn(2_000, generator=generator).half(),
        "b": (torch.randn(9_000, generator=generator) + 1).bfloat16(),
        "f8": torch.randn(5_000, generator=generator).to(torch.float8_e4m3fn), "i": torch.arange(-9, 40),
        "i8": torch.arange(-128, 127, dtype=torch.int8), "bool": torch.tensor([True, False, True]),
        "odd": torch.tensor([math.nan, math.inf, 1e9, -1e9]), "none": torch.empty(0), "nan": torch.tensor(math.nan),
    }  # fmt: skip
    state["tied"] = state["f"]
    torch.save(state, tmp_path / "m.pt")
    total = json.loads(ckpt("stats", tmp_path / "m.pt", "--total", "--json", "-j", workers).out)["total"]
    every = torch.cat([values.double().reshape(-1) for name, values in state.items() if name != "tied"])
    every = every[every.isfinite()]
    edges, counts = total["histogram"]["edges"], total["histogram"]["counts"]
    assert (edges[0], edges[-1], len(counts), sum(counts)) == (-1e9, 1e9, 8, every.numel())
    below = [int((every < edge).sum()) for edge in edges[1:-1]]
    assert counts == [after - before for before, after in pairwise([0, *below, every.numel()])]
    assert max(counts) < every.numel() * 0.6


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "<i4", ">i4", "<u8", ">u8"])
def test_the_byte_order_costs_no_digits(kind: str, tmp_path: Path, ckpt: Ckpt) -> None:
    numbers = np.random.default_rng(5).standard_normal(100_000) * 3 + 20
    values = {"w": numbers.astype(kind), "one": np.ones(1000, kind), "f": np.linspace(0.5, 1.6, 9999, dtype="f4")}
    np.savez(tmp_path / "m.npz", **values)
    done = json.loads(ckpt("stats", tmp_path / "m.npz", "--total", "--json").out)
    for row in done["tensors"]:
        own = values[row["name"]]
        agrees(row, own.astype("f8" if own.dtype.kind == "f" else own.dtype.newbyteorder("=")))
    every = np.concatenate([array.astype("f8") for array in values.values()])
    edges, counts = done["total"]["histogram"]["edges"], done["total"]["histogram"]["counts"]
    below = [int((every < edge).sum()) for edge in edges[1:-1]]
    assert counts == [after - before for before, after in pairwise([0, *below, every.size])]


def test_a_negated_view_of_narrow_floats_costs_no_digits(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.from_numpy(np.random.default_rng(5).standard_normal(50_000)).half()
    torch.save({"w": torch._neg_view(values)}, tmp_path / "m.pt")
    agrees(rows_of(ckpt, tmp_path / "m.pt")["w"], wide(-values))


def test_a_total_of_one_value_or_of_none_has_the_bars_there_are(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.full((5,), 2.5)}, tmp_path / "one.pt")
    torch.save({"w": torch.tensor([math.nan])}, tmp_path / "none.pt")
    found = [json.loads(ckpt("stats", tmp_path / name, "--total", "--json").out) for name in ("one.pt", "none.pt")]
    assert [answer["total"]["histogram"] for answer in found] == [
        {"edges": [2.5, 2.5], "counts": [5]}, {"edges": [], "counts": []},
    ]  # fmt: skip


@pytest.mark.parametrize("beside", [-8, -1, 0, 1, 8, 4095, 4096])
@pytest.mark.parametrize("whole", [8, 4096, 255 * 4096, 2 * 255 * 4096])
def test_counts_hold_wherever_words_and_bytes_are_full(whole: int, beside: int) -> None:
    values = np.full(max(whole + beside, 1), -1, np.float32)
    values[::1000] = np.arange(-3, 3)[np.arange(len(values[::1000])) % 6]
    edges = (-9.0, -1.0, -0.5, 0.0, 2.0, 9.0)
    zeros, below = summing._places(values, edges, np.float32(-3), np.float32(2))
    assert zeros == int((values == 0).sum())
    assert below == tuple(int((values < edge).sum()) for edge in edges)


def test_merging_keeps_six_digits_of_a_thousand_million_elements() -> None:
    chunk = (np.random.default_rng(2).standard_normal(1 << 16) * 0.01 + 1000).astype(np.float32)
    plan = summing.plan_of(chunk[:4096])
    one = found = summing.moments(chunk, plan)
    for _ in range(15_258):
        found = summing.merged(found, one)
    exact = chunk.astype(np.float64)
    assert found.count > 999_000_000
    assert found.mean == pytest.approx(exact.mean(), rel=1e-9)
    assert found.std == pytest.approx(exact.std(), rel=1e-6)


def test_complex_numbers_count_by_their_magnitude(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.tensor([3 + 4j, complex(NAN, INF), complex(0, -INF), 0, 1e30 + 1e30j], dtype=torch.complex64)
    torch.save({"w": values, "d": values.to(torch.complex128), "c": values[:4].to(torch.complex32)}, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt")
    expected = np.array([5, NAN, INF, 0, abs(complex(np.float32(1e30), np.float32(1e30)))])
    agrees(rows["w"], expected)
    agrees(rows["d"], expected)
    agrees(rows["c"], expected[:4])


def test_views_are_summed_as_they_are_and_ties_once(tmp_path: Path, ckpt: Ckpt) -> None:
    base = torch.arange(600_000.0).reshape(600, 1000)
    state = {
        "t": base.t(), "cut": base[::3, 5:900:7], "row": torch.ones(1, 3).expand(5, 3), "scalar": base[0, 7],
        "empty": base[:0], "one": base[1, :1], "tied": base.t(), "conj": torch.tensor([1 + 1j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
    }  # fmt: skip
    torch.save(state, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt")
    for name, values in state.items():
        plain = values.resolve_conj().resolve_neg()
        agrees(rows[name], np.abs(plain.to(torch.complex128).numpy()) if plain.is_complex() else plain.double().numpy())
    assert rows["scalar"]["shape"] == []
    total = json.loads(ckpt("stats", tmp_path / "m.pt", "t", "tied", "--total", "--json").out)["total"]
    assert total["numel"] == 600_000
    assert total["mean"] == pytest.approx(299_999.5)


def test_an_index_sums_a_part(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.arange(20.0).reshape(4, 5)
    torch.save({"w": values}, tmp_path / "m.pt")
    row = rows_of(ckpt, tmp_path / "m.pt", "w[1:3,::2]")["w[1:3,::2]"]
    assert row["shape"] == [2, 3]
    agrees(row, values[1:3, ::2].double().numpy())


def test_quantized_tensors_are_what_they_stand_for(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.linspace(-3, 7, 24_000).reshape(40, 600)
    scales, zeros = torch.linspace(0.05, 0.4, 600).double(), torch.arange(600) % 5
    state = {
        "q": torch.quantize_per_tensor(values, 0.1, 10, torch.quint8),
        "wide": torch.quantize_per_tensor(values, 1e-4, 3, torch.qint32),
        "channels": torch.quantize_per_channel(values, scales, zeros, 1, torch.qint8),
    }
    torch.save(state, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt")
    for name, quantized in state.items():
        agrees(rows[name], quantized.dequantize().double().numpy())


def test_packed_float4_counts_both_values_of_a_byte(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.tensor([0x10, 0x7F], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "m.pt")
    agrees(rows_of(ckpt, tmp_path / "m.pt")["w"], np.array([0.0, 0.5, -6.0, 6.0]))


def test_what_is_made_of_others_is_told_by_its_parts(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"s": torch.eye(3).to_sparse(), "m": torch.empty(2, device="meta")}, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt")
    assert rows["s.values"]["mean"] == 1
    assert rows["m"]["min"] is None
    assert "meta" in rows["m"]["note"]


def test_the_answer_is_the_same_in_any_format_and_company(tmp_path: Path, ckpt: Ckpt) -> None:
    generator = torch.Generator().manual_seed(4)
    state = {f"w{i}": torch.randn(400 + 700 * i, 1001, generator=generator) for i in range(4)}
    torch.save(state, tmp_path / "m.pt")
    save_file({name: state[name] for name in ("w3", "w1")}, tmp_path / "m.safetensors")
    rows = rows_of(ckpt, tmp_path / "m.pt")
    assert rows["w3"] == rows_of(ckpt, tmp_path / "m.safetensors")["w3"]
    assert rows["w1"] == rows_of(ckpt, tmp_path / "m.pt", "w1")["w1"]


def test_compressed_and_sharded_files_are_summed_too(tmp_path: Path, ckpt: Ckpt) -> None:
    values = np.random.default_rng(5).standard_normal(400_000)
    np.savez_compressed(tmp_path / "m.npz", w=values, f=np.asfortranarray(values.reshape(400, 1000)))
    rows = rows_of(ckpt, tmp_path / "m.npz")
    agrees(rows["w"], values)
    agrees(rows["f"], values)
    np.save(tmp_path / "big.npy", values[:1000].astype(">f4"))
    agrees(rows_of(ckpt, tmp_path / "big.npy")["array"], values[:1000].astype("f4").astype("f8"))


def test_rows_are_sorted_and_chosen(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"a": torch.ones(2), "b": torch.tensor([NAN, 3]), "c": torch.tensor([-INF, 2])}, tmp_path / "m.pt")
    first = [line.split("\t")[0] for line in ckpt("stats", tmp_path / "m.pt", "--sort", "max").lines]
    assert first == ["b", "c", "a"]
    assert [line.split("\t")[0] for line in ckpt("stats", tmp_path / "m.pt", "--nan").lines] == ["b", "c"]


def test_views_that_repeat_few_bytes_without_end_are_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    pt.write(tmp_path / "m.pt", {"w": tensor("0", (1 << 40,), stride=(0,), numel=4)}, {"0": bytes(16)})
    done = ckpt("stats", tmp_path / "m.pt")
    assert done.code == 2
    assert "too many to go through" in done.err
