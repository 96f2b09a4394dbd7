"""`ckpt diff`: equal is quiet and 0, a difference is told and 1, whatever formats the two are in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pt
from builders.pickles import tensor
from conftest import Ckpt
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_cli.arrays.compare import Tolerance, apart

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*quantize", "ignore:.*ComplexHalf", "ignore:.*Quantized", "ignore:.*beta", "ignore:.*nested"
)

NAN, INF = math.nan, math.inf


def saved(folder: Path, **states: Any) -> list[Path]:
    paths = []
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
        paths.append(folder / f"{name}.pt")
    return paths


def stated(ckpt: Ckpt, a: Path, b: Path, *options: object) -> dict[str, Any]:
    done = ckpt("diff", a, b, "--json", *options)
    found: dict[str, Any] = json.loads(done.out)
    assert done.code == (0 if found["equal"] else 1), done.err
    return found


def test_equal_is_quiet_across_formats_and_shards(tmp_path: Path, ckpt: Ckpt) -> None:
    base = torch.randn(700, 1000)
    base[0, 0] = NAN
    state = {"t": base.t(), "cut": base[::3, 5:900:7], "row": torch.ones(1, 3).expand(5, 3), "empty": base[:0]}
    plain = {name: view.contiguous().clone() for name, view in reversed(state.items())}
    torch.save(state, tmp_path / "a.pt")
    torch.save(plain, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(plain, tmp_path / "m.safetensors", metadata={"format": "pt"})
    np.savez_compressed(tmp_path / "m.npz", **{name: view.numpy() for name, view in plain.items()})
    np.savez(tmp_path / "big.npz", **{name: view.numpy().astype(">f4") for name, view in plain.items()})
    for other in ("a.pt", "legacy.pt", "m.safetensors", "m.npz"):
        for pair in ((tmp_path / "a.pt", tmp_path / other), (tmp_path / other, tmp_path / "a.pt")):
            done = ckpt("diff", *pair)
            assert (done.code, done.out, done.err) == (0, "", "")
    assert ckpt("diff", tmp_path / "a.pt", tmp_path / "big.npz", "--equal-nan").code == 0


def test_each_kind_of_difference_is_told(tmp_path: Path, ckpt: Ckpt) -> None:
    a, b = saved(
        tmp_path,
        a={"same": torch.ones(2), "gone": torch.ones(1), "shape": torch.ones(2, 3), "dtype": torch.ones(2),
           "value": torch.tensor([[1.0, 2.0], [4.0, 0.0]]), "epoch": 1, "lr": 0.1, "kind": torch.ones(1)},
        b={"same": torch.ones(2), "new": torch.ones(1), "shape": torch.ones(3, 2), "dtype": torch.ones(2).half(),
           "value": torch.tensor([[1.0, 2.5], [4.0, 0.5]]), "epoch": 2, "lr": 0.1, "kind": 3},
    )  # fmt: skip
    found = stated(ckpt, a, b)
    assert (found["only_a"], found["only_b"]) == (["gone"], ["new"])
    shape, dtype, value = found["changed"]
    assert (shape["name"], shape["what"], shape["a"], shape["b"]) == ("shape", "shape", [2, 3], [3, 2])
    assert shape["differing"] is None
    assert (dtype["what"], dtype["a"], dtype["b"], dtype["differing"]) == ("dtype", "float32", "float16", 0)
    assert value == {
        "mean_abs": 0.25, "relative_l2": value["relative_l2"], "cosine": value["cosine"],
        "name": "value", "what": "value", "differing": 2, "numel": 4, "max_abs": 0.5, "max_rel": 1.0,
        "first": [[0, 1], [1, 1]], "a": [2.0, 0.0], "b": [2.5, 0.5],
    }  # fmt: skip
    assert [fact["name"] for fact in found["values"]] == ["epoch", "kind"]
    assert (found["values"][0]["a"], found["values"][0]["b"]) == (1, 2)
    assert ckpt("diff", a, b, "-q").out == ""
    assert ckpt("diff", a, b, "-q").code == 1
    rows = [line.split("\t") for line in ckpt("diff", a, b).lines]
    assert [row[:2] for row in rows] == [
        ["only in a", "gone"], ["only in b", "new"], ["shape", "shape"], ["dtype", "dtype"], ["value", "value"],
        ["entry", "epoch"], ["entry", "kind"],
    ]  # fmt: skip


_KINDS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
_NUMBERS = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, 1.0009765625, -2.0, 6e-8, 65504.0, NAN, INF, -INF]), min_size=1, max_size=12
)


@settings(max_examples=most(150), deadline=None)
@given(_KINDS, _KINDS, _NUMBERS, _NUMBERS, st.sampled_from([0, 1e-3, 1]), st.sampled_from([0, 1e-3]), st.booleans())
def test_floats_differ_where_torch_says_so(
    kind_a: torch.dtype, kind_b: torch.dtype, numbers_a: list[float], numbers_b: list[float],
    atol: float, rtol: float, equal_nan: bool,
) -> None:  # fmt: skip
    count = min(len(numbers_a), len(numbers_b))
    wide = torch.promote_types(*(torch.float32 if kind.itemsize < 4 else kind for kind in (kind_a, kind_b)))
    a = torch.tensor(numbers_a[:count], dtype=torch.float64).to(kind_a).to(wide)
    b = torch.tensor(numbers_b[:count], dtype=torch.float64).to(kind_b).to(wide)
    found = apart(a.numpy(), b.numpy(), None, 0, Tolerance(atol, rtol, equal_nan, 100))
    expected = ~torch.isclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=equal_nan)
    assert found.differing == int(expected.sum())
    assert [place for place, _, _ in found.first] == torch.nonzero(expected).reshape(-1).tolist()
    distance = (a.double() - b.double()).abs()
    distance = distance[~((a == b) | a.isnan() | b.isnan())]
    assert found.max_abs == pytest.approx(max(distance.tolist(), default=0), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_integers_differ_exactly(data: st.DataObject) -> None:
    kinds = st.sampled_from(["i1", "u1", "i4", "u4", "i8", "u8"])
    kind_a, kind_b = data.draw(kinds), data.draw(kinds)
    sides = []
    for kind in (kind_a, kind_b):
        info = np.iinfo(kind)
        ends = st.sampled_from([int(info.min), int(info.max), 0, 1, int(info.max) - 1])
        sides.append(np.array(data.draw(st.lists(ends, min_size=4, max_size=4)), kind))
    found = apart(sides[0], sides[1], None, 10, Tolerance(first=9))
    distances = [abs(int(a) - int(b)) for a, b in zip(*sides, strict=True)]
    assert found.differing == sum(map(bool, distances))
    exact = kind_a[0] == kind_b[0] or "8" not in kind_a + kind_b
    assert found.max_abs == (max(distances) if exact else pytest.approx(max(distances), rel=1e-15))
    assert [place for place, _, _ in found.first] == [10 + place for place, apart in enumerate(distances) if apart]


def test_the_same_bits_are_equal_and_other_nan_only_if_asked(tmp_path: Path, ckpt: Ckpt) -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x3F800000], dtype=torch.int32)
    a, b = saved(tmp_path, a={"w": bits.view(torch.float32)},
                 b={"w": (bits + torch.tensor([0, 1, 1], dtype=torch.int32)).view(torch.float32)})  # fmt: skip
    assert stated(ckpt, a, b)["changed"][0]["first"] == [[1], [2]]
    assert stated(ckpt, a, b, "--equal-nan")["changed"][0]["first"] == [[2]]
    assert stated(ckpt, a, b, "--equal-nan", "--rtol", "1e-6")["equal"]


def test_differences_far_into_large_tensors_are_found(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.arange(2_000_000.0).reshape(1000, 2000)
    other = values.clone()
    for index in ((0, 7), (500, 3), (999, 1999)):
        other[index] += 1
    a, b, c = saved(tmp_path, a={"w": values}, b={"w": other}, c={"w": other.t().contiguous().t()})
    for path in (b, c):
        (change,) = stated(ckpt, a, path, "--first", "2")["changed"]
        assert (change["differing"], change["numel"], change["max_abs"]) == (3, 2_000_000, 1)
        assert change["first"] == [[0, 7], [500, 3]]
    assert stated(ckpt, a, b, "--atol", "1")["equal"]


def test_different_dtypes_are_compared_in_the_wider(tmp_path: Path, ckpt: Ckpt) -> None:
    values = torch.randn(300, 1000)
    a, b = saved(tmp_path, a={"w": values.bfloat16()}, b={"w": values})
    (change,) = stated(ckpt, a, b)["changed"]
    expected = (values.bfloat16().float() - values).abs()
    assert (change["what"], change["differing"]) == ("dtype", int((expected > 0).sum()))
    assert change["max_abs"] == expected.max().item()
    (change,) = stated(ckpt, a, b, "--rtol", "0.01")["changed"]
    assert change["differing"] == 0


def test_the_byte_order_changes_no_difference(tmp_path: Path, ckpt: Ckpt) -> None:
    values = np.random.default_rng(3).standard_normal(20_000).astype("f2")
    other = values + np.where(np.arange(20_000) % 7, 0, 0.1).astype("f2")
    for order in "<>":
        np.savez(tmp_path / f"a{order}.npz", w=values.astype(f"{order}f2"))
        np.savez(tmp_path / f"b{order}.npz", w=other.astype(f"{order}f2"))
    expected = ~np.isclose(values.astype("f8"), other.astype("f8"), rtol=0, atol=0.099999)
    for a, b in product("<>", repeat=2):
        (change,) = stated(ckpt, tmp_path / f"a{a}.npz", tmp_path / f"b{b}.npz", "--atol", "0.099999")["changed"]
        assert change["differing"] == int(expected.sum())


def test_complex_bool_and_packed_values_are_compared(tmp_path: Path, ckpt: Ckpt) -> None:
    def state(step: int) -> dict[str, torch.Tensor]:
        return {
            "c": torch.tensor([1 + 1j, 3 + 4j * step]),
            "half": torch.tensor([1 + 1j, 4j * step], dtype=torch.complex32),
            "b": torch.tensor([True, bool(step)]),
            "x2": torch.tensor([0x21, 0x43 + 0x10 * step], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        }

    a, b = saved(tmp_path, a=state(0), b=state(1))
    changes = {change["name"]: change for change in stated(ckpt, a, b)["changed"]}
    assert (changes["c"]["max_abs"], changes["c"]["a"], changes["c"]["b"]) == (4, [[3, 0]], [[3, 4]])
    assert changes["half"]["max_abs"] == 4
    assert (changes["b"]["differing"], changes["b"]["max_abs"]) == (1, 1)
    assert (changes["x2"]["first"], changes["x2"]["numel"], changes["x2"]["max_abs"]) == ([[1, 1]], 4, 1)


def test_quantized_and_composed_tensors_are_compared_as_what_they_are(tmp_path: Path, ckpt: Ckpt) -> None:
    def state(scale: float, value: float) -> dict[str, torch.Tensor]:
        dense = torch.eye(3) * value
        scales = torch.tensor([scale, 1, 1]).double()
        return {
            "q": torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.quint8),
            "channels": torch.quantize_per_channel(torch.ones(3, 3), scales, torch.zeros(3), 0, torch.qint8),
            "four": torch.quantize_per_channel(torch.ones(3, 3), scales, torch.zeros(3), 0, torch.quint4x2),
            "coo": dense.to_sparse(),
            "nested": torch.nested.nested_tensor([torch.ones(2) * value, torch.zeros(1)]),
            "meta": torch.empty(2, device="meta"),
        }

    a, b, c = saved(tmp_path, a=state(0.5, 1.0), b=state(0.5, 1.0), c=state(0.3, 2.0))
    assert stated(ckpt, a, b)["equal"]
    changes = {change["name"]: change for change in stated(ckpt, a, c)["changed"]}
    assert set(changes) == {"q", "channels", "four", "coo.values", "nested.buffer"}
    assert changes["q"]["max_abs"] == pytest.approx(0.1, rel=1e-6)
    assert changes["channels"]["first"] == [[0, 0], [0, 1], [0, 2]]
    d, e = saved(tmp_path, d={"w": torch.eye(2)}, e={"w": torch.eye(2).to_sparse()})
    assert stated(ckpt, d, e)["changed"][0]["what"] == "layout"


def test_names_are_aligned_and_chosen(tmp_path: Path, ckpt: Ckpt) -> None:
    a, b = saved(tmp_path, a={"module.net.0.w": torch.ones(1), "module.x": torch.ones(1)},
                 b={"net.1.w": torch.ones(1), "x": torch.zeros(1)})  # fmt: skip
    found = stated(ckpt, a, b, "--strip", "module")
    assert (found["only_a"], found["only_b"], len(found["changed"])) == (["net.0.w"], ["net.1.w"], 1)
    found = stated(ckpt, a, b, "--strip", "module.", "--sub", r"net\.\d", "net")
    assert (found["only_a"], found["only_b"], len(found["changed"])) == ([], [], 1)
    assert stated(ckpt, a, b, "net", "--strip", "module", "--sub", r"net\.\d", "net")["equal"]
    assert ckpt("diff", a, b, "nobody").code == 2
    assert ckpt("diff", a, b, "x[0]").code == 2
    assert ckpt("diff", a, b, "--sub", "(", "x").code == 2
    assert ckpt("diff", a, b, "--sub", "x", r"\9").code == 2
    assert "would both be called" in ckpt("diff", a, b, "--sub", ".*", "x").err


def test_all_entries_that_flatten_to_one_name_are_compared(tmp_path: Path, ckpt: Ckpt) -> None:
    one, zero = torch.ones(2), torch.zeros(2)
    a, b, c = saved(tmp_path, a={"x": {"w": one}, "x.w": zero}, b={"x": {"w": zero}, "x.w": zero}, c={"x.w": one})
    assert stated(ckpt, a, a)["equal"]
    assert [change["differing"] for change in stated(ckpt, a, b)["changed"]] == [2]
    assert [stated(ckpt, a, c)["only_a"], stated(ckpt, c, a)["only_b"]] == [["x.w"], ["x.w"]]


def test_ties_and_metadata_are_compared(tmp_path: Path, ckpt: Ckpt) -> None:
    one = torch.ones(2)
    a, b = saved(tmp_path, a={"x": one, "y": one, "z": torch.ones(2)}, b={"x": one, "y": one.clone(), "z": one})
    found = stated(ckpt, a, b)
    assert found["changed"] == []
    assert found["ties"] == [{"names": ["x", "y"], "a": True, "b": False}, {"names": ["x", "z"], "a": False, "b": True}]
    for name in "ab":
        save_file({"w": one}, tmp_path / f"{name}.safetensors", metadata={"by": name, "format": "pt"})
    found = stated(ckpt, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found["metadata"] == [{"key": "by", "a": "a", "b": "b"}]


def test_any_number_of_workers_gives_the_same(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {f"w{i}": torch.randn(900, 2001)[:, :: 1 + i % 2] for i in range(3)}
    other = {name: values + torch.randn(values.shape) * 1e-3 for name, values in state.items()}
    a, b = saved(tmp_path, a=state, b=other)
    assert len({ckpt("diff", a, b, "--json", "-j", jobs).out for jobs in (1, 2, 7)}) == 1


def test_views_that_repeat_few_bytes_without_end_are_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    path = pt.write(tmp_path / "m.pt", {"w": tensor("0", (1 << 40,), stride=(0,), numel=4)}, {"0": bytes(16)})
    assert ckpt("diff", path, path).code == 2


def test_what_no_checkpoint_is_is_trouble_and_not_a_difference(tmp_path: Path, ckpt: Ckpt) -> None:
    (a,) = saved(tmp_path, a={"w": torch.ones(1)})
    (tmp_path / "b.txt").write_text("no checkpoint")
    done = ckpt("diff", a, tmp_path / "b.txt")
    assert done.code == 2
    assert "b.txt" in done.err


def _measured(*arguments: object) -> tuple[int, str, int]:
    """The exit code of a comparison, what it prints, and the kilobytes that its process takes at most."""
    code = (
        "import sys\nfrom ckpt_cli.cli.main import run\ncode = run(['diff', *sys.argv[1:]])\n"
        "sys.stderr.write(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, int(done.stderr)


def test_memory_stays_small_at_any_size(tmp_path: Path) -> None:
    nbytes = 1 << 28
    for name in "ab":
        head = json.dumps({"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + nbytes)
            if name == "b":
                file.seek(-4, 2)
                file.write(np.float32(1).tobytes())
    code, answer, kilobytes = _measured(tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert answer.split("\t")[7] == f"[{nbytes // 4 - 1}]"
    assert kilobytes < 120_000


def test_memory_stays_small_for_any_number_of_tensors(tmp_path: Path) -> None:
    header = {f"w{at}": {"dtype": "F32", "shape": [4], "data_offsets": [at * 16, at * 16 + 16]} for at in range(20_000)}
    head = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(len(head).to_bytes(8, "little") + head + bytes(320_000))
    code, _, kilobytes = _measured(tmp_path / "m", tmp_path / "m")
    assert code == 0
    assert kilobytes < 110_000
