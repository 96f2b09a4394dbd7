"""The dataclasses of facts do what those of the standard library do."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import ckpt_cli.facts
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.files.source import Extent
from ckpt_cli.model.checkpoint import Storage, Tensor


def classes(dataclass: Callable[..., Any]) -> dict[str, type]:
    """The same classes, made by one of the two decorators."""

    @dataclass(frozen=True, slots=True)
    class Fact:
        name: str
        sizes: tuple[int, ...] = ()
        more: list[int] = dataclasses.field(default_factory=list, compare=False, repr=False)

    @dataclass(frozen=True)
    class Open:
        name: object

    @dataclass(slots=True)
    class Counted:
        count: int = 0

    @dataclass(slots=True, eq=False)
    class Identified:
        name: str

    @dataclass(slots=True, unsafe_hash=True)
    class Hashed:
        name: str
        size: int

    @dataclass(frozen=True)
    class Own:
        name: str

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Own) and self.name[0] == other.name[0]

        def __hash__(self) -> int:
            return 7

    @dataclass(frozen=True)
    class Empty:
        pass

    return {made.__name__: made for made in (Fact, Open, Counted, Identified, Hashed, Own, Empty)}


OURS, STANDARD = classes(ckpt_cli.facts.dataclass), classes(dataclasses.dataclass)
VALUES: dict[str, list[tuple[Any, ...]]] = {
    "Fact": [("a",), ("a", (1,)), ("a", (1,), [2]), ("b", ())],
    "Open": [("a",), (float("nan"),), (1,), (1.0,)],
    "Counted": [(), (0,), (1,)],
    "Identified": [("a",), ("a",)],
    "Hashed": [("a", 1), ("a", 1), ("b", 1)],
    "Own": [("ab",), ("ac",), ("b",)],
    "Empty": [(), ()],
}


def hashed(fact: object) -> object:
    try:
        return hash(fact)
    except TypeError:
        return "unhashable"


@pytest.mark.parametrize("name", OURS)
def test_facts_compare_and_hash_as_standard_dataclasses(name: str) -> None:
    ours = [OURS[name](*values) for values in VALUES[name]]
    standard = [STANDARD[name](*values) for values in VALUES[name]]
    compared = [[one == other for other in ours] for one in ours]
    assert compared == [[one == other for other in standard] for one in standard]
    assert ours[0] != standard[0]
    if name != "Identified":  # whose hash is where it is in memory
        assert list(map(hashed, ours)) == list(map(hashed, standard))


@pytest.mark.parametrize("name", OURS)
def test_facts_print_and_are_taken_apart_as_standard_dataclasses(name: str) -> None:
    ours = [OURS[name](*values) for values in VALUES[name]]
    standard = [STANDARD[name](*values) for values in VALUES[name]]
    assert list(map(repr, ours)) == list(map(repr, standard))
    assert list(map(dataclasses.asdict, ours)) == list(map(dataclasses.asdict, standard))
    assert list(map(dataclasses.replace, ours)) == ours or name == "Identified"
    assert OURS[name].__match_args__ == STANDARD[name].__match_args__
    assert getattr(OURS[name], "__slots__", None) == getattr(STANDARD[name], "__slots__", None)


def test_a_fact_that_holds_itself_prints_once() -> None:
    fact = OURS["Counted"]([])
    fact.count.append(fact)
    assert repr(fact).endswith("Counted(count=[...])")


def test_a_fact_is_the_same_in_another_process() -> None:
    storage = Storage("3", 8, "cuda:0")
    for fact in (Extent(1, 2, 3), Tensor("a", BY_NAME["float32"], (2,), (1,)), storage):
        again = pickle.loads(pickle.dumps(fact))
        assert dataclasses.astuple(again) == dataclasses.astuple(fact)


def test_a_class_whose_post_init_nothing_would_call_is_refused() -> None:
    class Late:
        value: int

        def __post_init__(self) -> None:
            self.value = 1

    with pytest.raises(TypeError, match="Late: facts have no __post_init__"):
        ckpt_cli.facts.dataclass()(Late)
