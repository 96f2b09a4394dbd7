"""`CKPT_LIMITS` raises every limit but those that say otherwise, and no message promises to raise one of these."""

from __future__ import annotations

import ast
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt_cli
from ckpt_cli import limits

PACKAGE = Path(ckpt_cli.__file__).parent
NAMES = sorted(name for name in vars(limits) if name.isupper() and isinstance(getattr(limits, name), int))


def raised(scale: float) -> dict[str, int]:
    """Every limit as it is with a value of CKPT_LIMITS."""
    code = f"import json; from ckpt_cli import limits; print(json.dumps({{n: getattr(limits, n) for n in {NAMES}}}))"
    env = {**os.environ, "CKPT_LIMITS": str(scale)}
    found: dict[str, int] = json.loads(subprocess.check_output([sys.executable, "-c", code], env=env))
    return found


def test_ten_raises_every_limit_tenfold_but_the_fixed_ones() -> None:
    once, tenfold = raised(1), raised(10)
    assert {name for name in NAMES if tenfold[name] != 10 * once[name]} == limits.FIXED
    assert all(tenfold[name] == once[name] for name in limits.FIXED)


def test_a_fraction_raises_none() -> None:
    once, less = raised(1), raised(0.1)
    assert all(less[name] <= once[name] for name in NAMES)


def test_the_page_names_the_limits_that_are_not_raised() -> None:
    prose = (PACKAGE.parent / "docs" / "limits.md").read_text().partition("<!-- [[[cog")[0]
    assert {name for name in NAMES if f"`{name}`" in prose} == limits.FIXED


def limit_errors() -> list[tuple[str, ast.Call, set[str]]]:
    """Every place that raises a LimitError, with the limits that the statement around it compares with or names."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.If):
                continue
            used = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and each.attr in NAMES}
            for child in node.body:
                call = child.exc if isinstance(child, ast.Raise) else None
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "LimitError":
                    found.append((f"{path.name}:{call.lineno}", call, used))
    return found


def test_errors_of_fixed_limits_do_not_promise_to_be_raised() -> None:
    places = limit_errors()
    assert len(places) > 30
    for where, call, used in places:
        says = any(keyword.arg == "fixed" for keyword in call.keywords)
        assert says == bool(used & limits.FIXED), where


# --- the limits of headers, by files that pass a tenth of each ------------------------------------------------------


def _safetensors(header: dict[str, object], nbytes: int = 4, pad: int = 0) -> bytes:
    raw = json.dumps(header).encode().ljust(pad)
    return struct.pack("<Q", len(raw)) + raw + bytes(nbytes)


FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def long_header(folder: Path) -> Path:
    (folder / "m.safetensors").write_bytes(_safetensors({"a": FLOAT}, pad=11_000_000))
    return folder / "m.safetensors"


def long_metadata(folder: Path) -> Path:
    (folder / "m.safetensors").write_bytes(_safetensors({"__metadata__": {"note": "x" * 2**20}, "a": FLOAT}))
    return folder / "m.safetensors"


def long_name(folder: Path) -> Path:
    (folder / "m.safetensors").write_bytes(_safetensors({"a" * 8_000: FLOAT}))
    return folder / "m.safetensors"


def long_array_header(folder: Path) -> Path:
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }".ljust(2_000) + b"\n"
    (folder / "m.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + bytes(4))
    return folder / "m.npy"


def long_index(folder: Path) -> Path:
    (folder / "model-00001-of-00001.safetensors").write_bytes(_safetensors({"a": FLOAT}))
    index = {"metadata": {"note": "x" * 4_000_000}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("make", [long_header, long_metadata, long_name, long_array_header, long_index])
def test_each_limit_of_a_header_is_raised(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    lowered, usual = (
        subprocess.run(
            [sys.executable, "-m", "ckpt_cli", "ls", path],
            env={**os.environ, "CKPT_LIMITS": scale},
            capture_output=True,
            text=True,
            check=False,
        )
        for scale in ("0.1", "1")
    )
    assert (lowered.returncode, usual.returncode) == (2, 0), usual.stderr
    assert "raise every limit tenfold: CKPT_LIMITS=10" in lowered.stderr
    assert len(lowered.stderr.splitlines()) == 2
