"""`ckpt series`: what torch says of the same values from one checkpoint to the next, and each byte read once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from dcp_formats import save_ranks
from safetensors.torch import save_file

from ckpt_cli.files.source import LocalFile

pytestmark = pytest.mark.filterwarnings("ignore:.*ComplexHalf", "ignore:.*quantize", "ignore:.*Quantized")

NAN, INF = math.nan, math.inf


def points_of(ckpt: Ckpt, *arguments: object) -> dict[str, list[dict[str, Any]]]:
    """The points of each row, in order."""
    done = ckpt("series", "--json", *arguments)
    assert done.code == 0, done.err
    found: dict[str, list[dict[str, Any]]] = {}
    for point in json.loads(done.out)["points"]:
        found.setdefault(point["name"], []).append(point)
    return found


def wide(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, complex ones in complex128."""
    if values.is_quantized:
        values = values.dequantize()
    return values.to(torch.complex128 if values.is_complex() else torch.float64).reshape(-1)


def change_of(before: torch.Tensor, now: torch.Tensor) -> float:
    """What the change should be: over what is finite in both, by the norm of what was finite."""
    a, b = wide(before), wide(now)
    both = torch.isfinite(a) & torch.isfinite(b)
    return float((b - a)[both].abs().norm() / a[torch.isfinite(a)].abs().norm())


def agrees(points: list[dict[str, Any]], run: list[torch.Tensor]) -> None:
    """Hold a row to the tensors of the run."""
    assert len(points) == len(run)
    for number, (point, tensor) in enumerate(zip(points, run, strict=True)):
        values = wide(tensor)
        finite = values[torch.isfinite(values)].abs()
        assert point["norm"] == pytest.approx(float(finite.norm()), rel=1e-6)
        assert point["max"] == pytest.approx(float(finite.max()), rel=1e-15 if values.is_complex() else 0)
        assert point["nan"] == int(torch.isnan(values).sum())
        signed = finite if values.is_complex() else values[torch.isfinite(values)]
        assert point["std"] == pytest.approx(float(signed.std()), rel=1e-5)
        if number == 0:
            assert point["change"] is None
        else:
            assert point["change"] == pytest.approx(change_of(run[number - 1], tensor), rel=1e-5)


def runs() -> dict[str, list[torch.Tensor]]:
    """Tensors of many dtypes and views, each through three steps."""
    make = torch.Generator().manual_seed(0)
    base = torch.randn(1300, 700, generator=make)
    noise = [torch.randn(1300, 700, generator=make) * scale for scale in (0, 1e-3, 1e-2)]
    steps = [base + some for some in noise]
    small = [step[:40, :30].clone() for step in steps]
    found = {
        "float32": steps, "turned": [step.t() for step in steps], "every third": [step[:, ::3] for step in steps],
        "turned once": [steps[0], steps[1].t().contiguous().t(), steps[2]],
        "frozen": [base, base.clone(), base.clone()],
        "half frozen": [torch.cat([base, step]) for step in steps],
        "far from zero": [1 + step * 1e-3 for step in steps],
        "tiny": [step * 1e-30 for step in steps], "huge": [step * 1e30 for step in small],
        "complex": [torch.complex(step, step.flip(0)) for step in small],
        "conjugated": [torch.complex(step, step.flip(0)).conj() for step in small],
        "large integers": [(step * 1e3).long() + 2**40 for step in small],
        "precision falls": [steps[0].double(), steps[1], steps[2].bfloat16()],
        "scaled": [torch.quantize_per_tensor(step, 0.05, 3, torch.qint8) for step in small],
        "channels": [torch.quantize_per_channel(
            step, torch.rand(40).double() / 9 + 0.01, torch.zeros(40, dtype=torch.int64), 0, torch.qint8
        ) for step in small],
    }  # fmt: skip
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        found[str(dtype)] = [step.to(dtype) for step in steps]
    for whole in (torch.int64, torch.int32, torch.int16, torch.int8):
        found[str(whole)] = [(step * 20).round().to(whole) for step in steps]
    found["torch.uint8"] = [(step * 20).round().abs().to(torch.uint8) for step in steps]
    found["torch.bool"] = [step > 0 for step in steps]
    marred = [step.clone() for step in steps]
    marred[1][3, 5], marred[1][4, 5], marred[2][3, 5], marred[2][0, 0] = NAN, INF, 1.0, -INF
    found["marred"] = marred
    return found


def test_norms_and_changes_are_those_of_torch_whatever_the_dtype_and_view(tmp_path: Path, ckpt: Ckpt) -> None:
    expected = runs()
    for step in range(3):
        state = {name: run[step] for name, run in expected.items()}
        torch.save({"net": state, "global_step": step}, tmp_path / f"{step}.pt")
    found = points_of(ckpt, *(tmp_path / f"{step}.pt" for step in range(3)))
    assert found.keys() == {f"net.{name}" for name in expected}
    for name, run in expected.items():
        agrees(found[f"net.{name}"], run)


def test_formats_and_shardings_of_a_run_may_differ(tmp_path: Path, ckpt: Ckpt) -> None:
    steps = [torch.arange(1_000_000.0).reshape(1000, 1000) * (1 + number) for number in range(5)]
    torch.save({"2.weight": steps[0]}, tmp_path / "0.pt")
    save_file({"2.weight": steps[1]}, tmp_path / "1.safetensors")
    save_ranks({"2.weight": steps[2]}, tmp_path / "2")
    np.savez_compressed(tmp_path / "3.npz", **{"2.weight": steps[3].numpy()})
    np.savez(tmp_path / "4.npz", **{"2.weight": steps[4].numpy().astype(">f4")})
    agrees(points_of(ckpt, *sorted(tmp_path.iterdir()))["2.weight"], steps)


def test_a_change_from_nothing_is_infinite_and_from_nothing_to_nothing_none(tmp_path: Path, ckpt: Ckpt) -> None:
    for step, values in enumerate((torch.zeros(3), torch.zeros(3), torch.ones(3), torch.zeros(3))):
        torch.save({"w": values, "empty": torch.empty(0)}, tmp_path / f"{step}.pt")
    found = points_of(ckpt, *(tmp_path / f"{step}.pt" for step in range(4)))
    assert [point["change"] for point in found["w"]] == [None, 0, "Infinity", 1]
    assert [(point["norm"], point["max"], point["std"]) for point in found["empty"]] == [(0, None, None)] * 4


def test_a_name_may_have_an_index_which_the_row_keeps(tmp_path: Path, ckpt: Ckpt) -> None:
    steps = [torch.randn(30, 40) for _ in range(3)]
    for number, step in enumerate(steps):
        torch.save({"w": step, "b": step[0]}, tmp_path / f"{number}.pt")
    found = points_of(ckpt, *sorted(tmp_path.iterdir()), "w[:,3]", "b", "w[-1]", "*")
    assert list(found) == ["w[:,3]", "b", "w[-1]", "w"]
    agrees(found["w[:,3]"], [step[:, 3] for step in steps])
    agrees(found["w[-1]"], [step[-1] for step in steps])


def test_folded_layers_are_one_row_of_all_their_elements(tmp_path: Path, ckpt: Ckpt) -> None:
    steps = [[torch.randn(5, 7) + layer for layer in range(3)] for _ in range(3)]
    for number, layers in enumerate(steps):
        state = {f"h.{layer}.w": values for layer, values in enumerate(layers)} | {"out": layers[0]}
        torch.save(state, tmp_path / f"{number}.pt")
    found = points_of(ckpt, *sorted(tmp_path.iterdir()), "--fold")
    assert list(found) == ["h.{0..2}.w", "out"]
    agrees(found["h.{0..2}.w"], [torch.stack(layers) for layers in steps])
    assert [point["numel"] for point in found["h.{0..2}.w"]] == [105] * 3


def test_tensors_that_come_go_or_change_are_said(tmp_path: Path, ckpt: Ckpt) -> None:
    whole = torch.ones(4)
    states: list[dict[str, torch.Tensor]] = [
        {"always": whole, "goes": whole, "shape": whole, "dtype": whole, "back": whole, "h.0": whole, "h.1": whole},
        {"always": whole, "goes": whole, "shape": whole, "dtype": whole, "new": whole, "h.0": whole},
        {"always": whole, "shape": torch.ones(5), "dtype": whole.half() * 2, "back": whole, "new": whole, "h.0": whole},
    ]
    for number, state in enumerate(states):
        torch.save({"m": state, "step": 10 * number}, tmp_path / f"{number}.pt")
    files = [tmp_path / f"{number}.pt" for number in range(3)]
    rows = {row["name"]: row["events"] for row in json.loads(ckpt("series", "--json", *files).out)["tensors"]}
    assert {name: [(event["step"], event["what"]) for event in events] for name, events in rows.items()} == {
        "m.always": [],
        "m.goes": [(20, "is gone")],
        "m.shape": [(20, "shape [4] → [5]")],
        "m.dtype": [(20, "dtype float32 → float16")],
        "m.back": [(10, "is gone"), (20, "appears")],
        "m.new": [(10, "appears")],
        "m.h.0": [],
        "m.h.1": [(10, "is gone")],
    }
    found = points_of(ckpt, *files)
    assert [point["change"] for point in found["m.shape"]] == [None, 0, None]
    assert [point["change"] for point in found["m.dtype"]] == [None, 0, 1]
    assert [(point["step"], point["change"]) for point in found["m.back"]] == [(0, None), (20, None)]
    table = ckpt("series", "-f", "table", "--fold", *files).out
    assert "m.h.1: is gone at 10" in table
    states[1].pop("h.0")
    torch.save({"m": states[1], "step": 10}, files[1])
    assert "m.h.1: appears" not in ckpt("series", "-f", "table", "--fold", *files).out
    assert "  is gone at 10; m.h.0: appears at 20" in ckpt("series", "-f", "table", "--fold", *files).out
    assert "shape [4] → [5] at 20" in table


def test_tensors_without_values_have_a_row_that_says_why(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2), "meta": torch.empty(3, device="meta")}, tmp_path / "a.pt")
    rows = json.loads(ckpt("series", "--json", tmp_path / "a.pt").out)["tensors"]
    assert [(row["name"], [event["what"] for event in row["events"]]) for row in rows] == [
        ("w", []),
        ("meta", ["is meta: it has no values"]),
    ]


def test_every_byte_is_read_once(tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(6):
        weight = torch.randn(1500, 1000)
        state = {"w": weight, "tied": weight, "t": torch.randn(900, 800).t(), "b": weight.bfloat16(), "v": weight[:9]}
        save_file({name: values.clone().contiguous() for name, values in state.items()}, tmp_path / f"{step}.st")
        torch.save({name: values for name, values in state.items() if name != "v"}, tmp_path / f"{step}.pt")
    read: list[tuple[str, int, int]] = []
    read_into = LocalFile.read_into

    def counted(file: LocalFile, buffer: memoryview, offset: int) -> None:
        read.append((file.path, offset, len(buffer)))
        read_into(file, buffer, offset)

    monkeypatch.setattr(LocalFile, "read_into", counted)
    for suffix in ("st", "pt"):
        read.clear()
        assert ckpt("series", *(tmp_path / f"{step}.{suffix}" for step in range(6))).code == 0
        read.sort()
        overlaps = [(one, two) for one, two in pairwise(read) if one[0] == two[0] and one[1] + one[2] > two[1]]
        assert overlaps == []
        per_file = 4 * (1_500_000 + 720_000) + 2 * 1_500_000 + (4 * 1_509_000 if suffix == "st" else 0)
        assert sum(nbytes for _, _, nbytes in read) == 6 * per_file


def test_memory_stays_small_however_many_and_large_they_are(tmp_path: Path) -> None:
    for step in range(50):
        nbytes = 24 << 20
        head = json.dumps({"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
        with (tmp_path / f"{step}.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + nbytes)
            file.seek(100_000 + step * 4)
            file.write(b"\0\0\x80\x3f")
        np.savez_compressed(tmp_path / f"{step}.npz", w=np.full(1 << 19, step, np.float64))
    code = (
        "import sys\nfrom ckpt_cli.cli.main import run\ncode = run(sys.argv[1:])\n"
        "sys.stderr.write(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\nsys.exit(code)"
    )
    for suffix in ("safetensors", "npz"):
        files = [str(tmp_path / f"{step}.{suffix}") for step in range(50)]
        command = [sys.executable, "-c", code, "series", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 50
        assert int(done.stderr) < 200_000
