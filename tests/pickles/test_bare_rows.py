"""Tensors of a pickle without a memo, which are read at once, are what the machine makes of their opcodes."""

from __future__ import annotations

import cProfile
import pstats
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
from builders import pickles
from builders.pickles import Ops, pickled
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.pickles import read
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Call, Graph
from ckpt_cli.pickles.read import OPCODES, read_pickle
from ckpt_cli.pickles.write import write_pickle
from ckpt_cli.scanner import restricted_unpickler
from ckpt_cli.scanner.restricted_unpickler import RestrictedUnpickler


class Known:
    """Storages of any bytes, each one object."""

    big_endian = False

    def __init__(self) -> None:
        self._found: dict[str, Storage] = {}

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        return self._found.setdefault(key, Storage(key, nbytes, location))


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Rows are looked for from the first tensor on, as they are in a long pickle."""
    with patch.object(read, "MANY", -1):
        yield


def slowly(data: bytes) -> Graph:
    with patch.object(read, "WITH_ROWS", OPCODES):
        return read_pickle(data)


def written(graph: Graph) -> bytes:
    out = bytearray()
    write_pickle(graph.root, graph.data, out.extend)
    return bytes(out)


def outcome(make: Callable[[], Any]) -> object:
    try:
        return make()
    except FormatError as error:
        return type(error).__name__, error.problem


def facts(graph: Graph) -> list[str]:
    numbers: dict[object, int] = {}
    entries = entries_of(graph, Known())
    for entry in entries:
        numbers.setdefault(getattr(entry, "storage", None), len(numbers))
    return [f"{entry} {numbers[getattr(entry, 'storage', None)]}" for entry in entries]


def rows_of(graph: Graph) -> int:
    return sum(isinstance(node, Call) for node in graph.persistent.nodes)  # type: ignore[attr-defined]


def assert_the_same(data: bytes) -> None:
    quick, slow = outcome(lambda: read_pickle(data)), outcome(lambda: slowly(data))
    if not isinstance(slow, Graph):
        assert quick == slow
        return
    assert isinstance(quick, Graph)
    assert (quick.protocol, quick.nbytes) == (slow.protocol, slow.nbytes)
    assert [name.qualified for name in quick.globals] == [name.qualified for name in slow.globals]
    assert len(quick.persistent) == len(slow.persistent)
    assert outcome(lambda: facts(quick)) == outcome(lambda: facts(slow))
    assert same_graphs(quick.root, data, slow.root, data)


def tensor(number: int, *shape: int, tuples: bool = False, **options: Any) -> Ops:
    """A tensor over a storage of its number; `tuples` as CPython's pickler writes short ones."""
    raw = bytes(pickles.tensor(f"{number}", shape, **options))
    if tuples and 0 < len(shape) < 4:
        size = b"".join(map(pickles.integer, shape))
        raw = raw.replace(b"(" + size + b"t", size + b"\x84\x85\x86\x87"[len(shape) : len(shape) + 1])
    return Ops(raw.replace(b"(tR", b")R") if tuples else raw)


_SOME: list[Any] = [
    lambda n: tensor(n, 3, 2),
    lambda n: tensor(n, 3, 2, tuples=True),
    lambda n: tensor(n),
    lambda n: tensor(n, 1, 2, 1, 300, kind="Half"),
    lambda n: tensor(n, 2, requires_grad=True, offset=70_000, numel=80_000),
    lambda n: tensor(n, 2, version=1),
    lambda n: pickles.parameter(tensor(n, 2)),
    lambda n: {"step": tensor(n), "exp_avg": tensor(n + 1, 2), "exp_avg_sq": tensor(n + 2, 2)},
    lambda n: n,
]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_SOME) - 1), st.integers(0, 120)), max_size=30))
def test_a_pickle_without_a_memo_means_the_same_however_it_is_read(chosen: list[tuple[int, int]]) -> None:
    assert_the_same(pickled({f"n{place}": _SOME[kind](number) for place, (kind, number) in enumerate(chosen)}))


def test_a_broken_pickle_without_a_memo_is_broken_in_the_same_way() -> None:
    whole = pickled({f"n{n}": _SOME[n % len(_SOME)](n % 13) for n in range(40)})
    chosen = random.Random(7)
    for end in range(0, len(whole), 41):
        assert_the_same(whole[:end])
    for _ in range(200):
        data = bytearray(whole)
        data[chosen.randrange(len(data))] = chosen.choice(b"XKt(c\x85\x86\x87J\0\n.")
        assert_the_same(bytes(data))


def test_all_tensors_but_the_first_are_read_at_once() -> None:
    graph = read_pickle(pickled({f"n{n}": tensor(n, 3) for n in range(50)}))
    assert rows_of(graph) == 49


def test_what_torch_would_share_is_shared_in_the_pickle_that_is_written() -> None:
    """`storage` and the location are one object for torch, so that the new pickle is read as rows again."""
    data = pickled({f"n{n}": tensor(n, 3) for n in range(100)})
    graph = read_pickle(data)
    again = read_pickle(written(graph))
    assert rows_of(again) > 50
    assert facts(again) == facts(slowly(data))


def test_keys_of_one_digit_stay_objects_of_their_own() -> None:
    data = pickled({f"n{n}": tensor(0, 3) for n in range(60)})
    graph, again = read_pickle(data), read_pickle(written(read_pickle(data)))
    assert rows_of(graph) == 59
    assert same_graphs(graph.root, data, again.root, again.data)
    assert written(graph).count(b"X\1\0\0\x000") == 60


def test_lines_are_counted_as_if_they_were_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickled({f"n{n}": tensor(n, 3) for n in range(60)})
    monkeypatch.setattr(limits, "PICKLE_LINES", 6 * 60)
    assert rows_of(read_pickle(data)) == 59
    monkeypatch.setattr(limits, "PICKLE_LINES", 6 * 60 - 1)
    with pytest.raises(LimitError, match="lines"):
        read_pickle(data)
    assert_the_same(data)


def test_a_tensor_without_a_memo_takes_few_calls_to_read() -> None:
    few, many = (pickled({f"n{n}": tensor(n % 100, 3) for n in range(count)}) for count in (200, 1200))
    assert (calls_to_read(many) - calls_to_read(few)) / 1000 <= 14


def calls_to_read(data: bytes) -> int:
    with cProfile.Profile() as profile:
        read_pickle(data)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # typeshed does not list it


@pytest.mark.parametrize("root", [
    {f"n{n}": tensor(n, 3) for n in range(60)},
    {f"n{n}": _SOME[n % len(_SOME)](n) for n in range(60)} | {"x": pickles.call("lab.Thing", 1)},
    {f"n{n}": tensor(n, 3) for n in range(30)} | {"x": pickles.call("os.system", "true")},
])  # fmt: skip
def test_torchs_restricted_unpickler_asks_for_the_same_names_however_tensors_are_read(root: dict[str, Any]) -> None:
    data = pickled(root)
    for end in (len(data), len(data) // 2, len(data) - 1):
        quick = RestrictedUnpickler(data[:end])
        answer = quick.load(0), quick.needed, quick.end
        with patch.object(restricted_unpickler, "_LOADING", _one_by_one()):
            slow = RestrictedUnpickler(data[:end])
            assert answer == (slow.load(0), slow.needed, slow.end)


def _one_by_one() -> list[Any]:
    """The handlers of the restricted unpickler without the one that reads rows."""
    return [OPCODES[code] if code == ord("X") else each for code, each in enumerate(restricted_unpickler._LOADING)]
