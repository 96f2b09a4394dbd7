"""Names shortened in the middle: they fit, stay distinct, and alike ones are laid out once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cli.render import shorten
from ckpt_cli.render.fit import fitted
from ckpt_cli.render.screen import Screen, width_of
from ckpt_cli.render.shorten import Shortener
from ckpt_cli.render.table import Column

PART = st.text(st.sampled_from("ab1_-é字\u0301"), max_size=8)
NAMES = st.lists(st.lists(PART, max_size=8).map(".".join), min_size=1, max_size=12)


@given(NAMES, st.integers(8, 40))
def test_shortened_names_fit_and_are_told_apart(names: list[str], columns: int) -> None:
    found = Shortener(names).shortened(columns)
    if found is not None:
        assert found.keys() == set(names)
        assert len(set(found.values())) == len(found)
        assert all(width_of(text) <= columns for text in found.values())
        assert all(text == name for name, text in found.items() if width_of(name) <= columns)


@given(NAMES)
def test_names_are_shown_whole_where_they_fit(names: list[str]) -> None:
    shortener = Shortener(names)
    widest = max(map(width_of, names))
    assert shortener.least(8) <= widest
    assert shortener.shortened(widest) == {name: name for name in names}


def test_the_tokens_that_tell_names_apart_are_shown() -> None:
    names = [f"model.layers.{at}.self_attention.{kind}_proj.weight" for at in range(12) for kind in ("q", "k")]
    found = Shortener(names).shortened(24)
    assert found is not None
    assert found[names[0]] == "model.…0.….q_proj.weight"
    assert found[names[-1]].endswith("k_proj.weight")


def test_names_that_differ_in_numbers_alone_are_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fit = shorten._Name.fit

    def counted(name: shorten._Name, columns: int) -> bool:
        calls.append(columns)
        return fit(name, columns)

    monkeypatch.setattr(shorten._Name, "fit", counted)
    long = "a.long.middle." * 20
    names = [f"{long}{at}.{long}{kind}.weight" for at in range(5000) for kind in ("up", "down")]
    found = Shortener(names).shortened(40)
    assert found is not None
    assert len(set(found.values())) == 10_000
    assert len(calls) <= 20


def test_names_without_anything_in_common_are_laid_out_once_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fit = shorten._Name.fit

    def counted(name: shorten._Name, columns: int) -> bool:
        calls.append(columns)
        return fit(name, columns)

    monkeypatch.setattr(shorten._Name, "fit", counted)
    chars = random.Random(0)
    names = ["".join(chars.choices("abcdefgh._0123456789", k=100)) for _ in range(300)]
    text = "".join(fitted([Column("name"), Column("dtype")], [[name, "float32"] for name in names], Screen(80, False)))
    assert len(set(text.splitlines())) == 302
    assert len(calls) == 300
