"""What dotted names lie in is found as by looking at every prefix of every name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt_cli.edits.rm import whole_containers
from ckpt_cli.model.names import Below, Holders, prefixes_of

NAMES = st.lists(st.text("ab.", max_size=7), max_size=8)


def prefixes(name: str) -> list[str]:
    """The prefixes of a name that end before a dot, the outermost first."""
    return [name[:at] for at, char in enumerate(name) if char == "."]


@given(NAMES, NAMES)
def test_names_are_below_the_prefixes_that_they_begin_with(some: list[str], names: list[str]) -> None:
    below = Below(some)
    assert [name in below for name in names] == [bool({*prefixes(name)} & {*some}) for name in names]
    assert bool(below) == bool(some)


@given(NAMES, NAMES)
def test_holders_are_the_prefixes_of_their_names(names: list[str], asked: list[str]) -> None:
    found = {prefix for name in names for prefix in prefixes(name)}
    holders = Holders(names)
    assert [name in holders for name in asked] == [name in found for name in asked]
    assert {*prefixes_of(names)} == found


@given(NAMES, NAMES)
def test_whole_containers_are_the_outermost_without_a_name_that_is_kept(dropped: list[str], kept: list[str]) -> None:
    needed = {prefix for name in kept for prefix in prefixes(name)}
    firsts = (next((prefix for prefix in prefixes(name) if prefix not in needed), None) for name in dropped)
    assert whole_containers(dropped, kept) == {first for first in firsts if first is not None}


def test_a_name_of_thousands_of_parts_is_offered_by_its_first_prefixes() -> None:
    assert len(list(prefixes_of(["a." * 30_000 + "b"]))) == 100
