"""Renames by patterns with the numbers of layers: arithmetic, ranges, several at once, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from hypothesis import given
from hypothesis import strategies as st

import ckpt_cli
from ckpt_cli.ops.rename_patterns import by_patterns


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def layers(count: int = 4) -> dict[str, torch.Tensor]:
    return {"embed": torch.ones(1)} | {f"h.{n}.{w}": torch.full((1,), n) for n in range(count) for w in ("a", "b.c")}


def moved(ckpt: Ckpt, *arguments: str) -> dict[str, int]:
    """Return the layer that each name has the values of, after a renaming."""
    torch.save(layers(), "m.pt")
    answer = ckpt("rename", "m.pt", *arguments)
    assert answer.code == 0, answer.err
    return {name: int(tensor) for name, tensor in torch.load("m.pt").items() if name != "embed"}


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        ("h.{n}.*=h.{n+2}.*", lambda n: n + 2),
        ("h.{n}.*=h.{n*2}.*", lambda n: n * 2),
        ("h.{n}.*=h.{n*2+1}.*", lambda n: n * 2 + 1),
        ("h.{n:1-2}.*=h.{n + 10}.*", lambda n: n + 10 if n in (1, 2) else n),
        ("h.{n:2-}.*=h.{n-2+0}.*" if False else "h.{n:3-}.*=h.{n+5}.*", lambda n: n + 5 if n >= 3 else n),
        ("h.{n:0-2/2}.*=h.{n+9}.*", lambda n: n + 9 if n in (0, 2) else n),
    ],
)
def test_numbers_of_layers_are_computed(ckpt: Ckpt, pattern: str, new: Callable[[int], int]) -> None:
    assert moved(ckpt, pattern) == {f"h.{new(n)}.{w}": n for n in range(4) for w in ("a", "b.c")}


def test_permutations_are_done_at_once(ckpt: Ckpt) -> None:
    swapped = {f"h.{(n + 2) % 4}.{w}": n for n in range(4) for w in ("a", "b.c")}
    assert moved(ckpt, "h.{n:0-1}.*=h.{n+2}.*", "h.{n:2-3}.*=h.{n-2}.*") == swapped
    assert moved(ckpt, "--pattern", "h.{n:0-1}.*=h.{n+2}.*", "--pattern", "h.{n:2-3}.*=h.{n-2}.*") == swapped
    torch.save(layers(), "m.pt")
    report = ckpt_cli.rename("m.pt", pattern=["h.{n:0-1}.*=h.{n+2}.*", "h.{n:2-3}.*=h.{n-2}.*"], dry_run=True)
    assert report["renamed"]["h.3.b.c"] == "h.1.b.c"


def test_stars_and_several_numbers_keep_their_places(ckpt: Ckpt) -> None:
    torch.save({"blocks.1.experts.2.w": torch.ones(1), "blocks.1.other.w": torch.ones(1)}, "m.pt")
    assert ckpt("rename", "m.pt", "blocks.{b}.*.{e}.*=layers.{b+1}.moe.{e*2}.*.*").code == 0
    assert list(torch.load("m.pt")) == ["layers.2.moe.4.experts.w", "blocks.1.other.w"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("h.{n}.*=h.0.*", "would both be called"),
        ("h.{n:0-2}.*=h.{n+1}.*", "would both be called"),
        ("h.{n}.*=h.{n-1}.*", "'{n-1}' would be -1 for 0"),
        ("h.{n}.*=h.{m}.*", "'{m}' is not one of {n}"),
        ("h.{n}.*=h.{n}", "has 1 stars on the left, and 0 on the right"),
        ("x.{n}.*=h.{n}.*", "no name would change"),
        ("h.{n:5}.*=h.{n}.*", "a number is {n}"),
        ("h.{n}.*=h.{n//0}.*", "divides by 0"),
        ("{a}" * 9 + "=x", "more than 8"),
        ("h.{n:0-1/0}.*=h.{n}.*", "has a step of 0"),
    ],
)
def test_what_collides_or_is_not_a_pattern_is_refused(ckpt: Ckpt, pattern: str, message: str) -> None:
    torch.save(layers(), "m.pt")
    before = Path("m.pt").read_bytes()
    answer = ckpt("rename", "m.pt", pattern)
    assert answer.code == 2
    assert message in answer.err
    assert Path("m.pt").read_bytes() == before


@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 5), st.integers(0, 9))
def test_any_arithmetic_is_python_s(n: int, k: int, times: int, more: int) -> None:
    rename = by_patterns([f"a.{{n}}.*=b.{{n*{times}+{k}}}.c{more}.*"])
    assert rename(f"a.{n}.x.y") == f"b.{n * times + k}.c{more}.x.y"
    assert rename(f"a.0{n}.x") == f"a.0{n}.x"
