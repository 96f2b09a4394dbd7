"""Names of a checkpoint's entries: counted once, in the file's order, and again for a checkpoint made from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

from ckpt_cli.model.checkpoint import Checkpoint, Value
from ckpt_cli.ops.select import select


class Counted(Sequence[Value]):
    """Entries that count how often they are gone through."""

    def __init__(self, names: str) -> None:
        self._entries = [Value(name, 0) for name in names]
        self.passes = 0

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Value]:
        self.passes += 1
        return iter(self._entries)


def of(entries: Sequence[Value]) -> Checkpoint:
    """A checkpoint of entries, in no file."""
    return Checkpoint("m.pt", "zip", entries, None)  # type: ignore[arg-type]  # none is asked for its container


def test_names_are_counted_in_the_order_of_the_file() -> None:
    assert list(of(Counted("bab")).names.items()) == [("b", 2), ("a", 1)]


def test_names_are_counted_once_however_many_are_selected() -> None:
    entries = Counted("abc")
    assert [found.entry.name for found in select(of(entries), list("abc"))] == ["a", "b", "c"]
    assert entries.passes == 1 + 3  # to count, and to find each


def test_a_checkpoint_with_other_entries_has_other_names() -> None:
    checkpoint = of(Counted("ab"))
    assert set(checkpoint.names) == {"a", "b"}
    assert set(replace(checkpoint, entries=[Value("c", 0)]).names) == {"c"}
