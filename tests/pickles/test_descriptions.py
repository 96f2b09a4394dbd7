"""The text of a node of a graph is short and on one line."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Extension, Global, Inline, OutOfBand, PersistentId, RawString, Set

pytestmark = pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")


DEEP: Any = ()
for _ in range(100_000):
    DEEP = (DEEP,)

DESCRIBED: list[tuple[Any, str]] = [
    ("it's", '"it\'s"'),
    ("a" * 121, repr("a" * 120) + "…"),
    (b"a" * 121, repr(b"a" * 120) + "…"),
    (RawString(b"caf\xe9"), "'café'"),
    (1 << 5000, "<integer of 5001 bits>"),
    (float("nan"), "nan"),
    (Inline("bytes", 0, 70_000), "<bytes of 70000 bytes>"),
    (Global("os", "system"), "os.system"),
    (Global("os\n", "system"), "'os\\n.system'"),
    (Global("a" * 130, "b"), "a" * 120 + "…"),
    (Extension(7), "<extension 7>"),
    (OutOfBand(), "<buffer kept elsewhere>"),
    (PersistentId(("a", 1)), "<persistent id ('a', 1)>"),
    ((1,), "(1,)"),
    (list(range(9)), "[0, 1, 2, 3, 4, 5, 6, 7, …]"),
    (Set([1, 2], frozen=False), "{1, 2}"),
    (Set([], frozen=True), "frozenset(set())"),
    (Dict(["a", 1, 2, []]), "{'a': 1, 2: []}"),
    (DEEP, "((((…,),),),)"),
    (["x" * 100] * 8, "[" + ", ".join([repr("x" * 100)] * 6) + ", …]"),
    (Call("reduce", Global("a", "b"), (1, "c")), "a.b(1, 'c')"),
    (Call("reduce", Global("a", "b"), 1), "a.b(1)"),
    (Call("reduce", Global("copyreg", "_reconstructor"), (Global("a", "B"), 1, None)), "a.B()"),
    (Call("reduce", Global("copy_reg", "_reconstructor"), (Global("a", "B"), 1, None)), "a.B()"),
]


@pytest.mark.parametrize("place", range(len(DESCRIBED)))
def test_a_description_is_short_and_on_one_line(place: int) -> None:
    node, text = DESCRIBED[place]
    assert describe(node) == text
    assert text.isprintable()


def test_a_description_of_an_object_has_what_was_done_to_it() -> None:
    made = Call("new", Global("a", "B"), (1,))
    made.items, made.pairs, made.states = [2], ["k", 3], [Dict(["x", 4]), None, (5,)]
    assert describe(made) == "a.B(1, [2], {'k': 3}, x=4, (5,))"
