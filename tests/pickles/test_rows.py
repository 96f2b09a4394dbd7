"""Tensors that are read at once are exactly what the machine makes of their opcodes, also in a broken pickle."""

from __future__ import annotations

import gc
import io
import random
import zipfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli import limits
from ckpt_cli.errors import FormatError
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.pickles import read
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Call, Graph
from ckpt_cli.pickles.machine import Machine
from ckpt_cli.pickles.read import OPCODES, read_pickle
from ckpt_cli.pickles.write import write_pickle

_SHAPES = [(), (0,), (3,), (2, 3), (300, 2), (1, 2, 3), (1, 2, 1, 2), (1, 1, 2, 1, 2), (2, 0)]
_DTYPES = [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.uint16]


class _Known:
    """Storages of any bytes, each one object."""

    big_endian = False

    def __init__(self) -> None:
        self.found: dict[str, Storage] = {}

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        return self.found.setdefault(key, Storage(key, nbytes, location))


def _opcode_by_opcode(data: bytes) -> Graph:
    with patch.object(read, "WITH_ROWS", OPCODES):
        return read_pickle(data)


def _pickle_of(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def _written(graph: Graph) -> bytes:
    out = bytearray()
    write_pickle(graph.root, graph.data, out.extend)
    return bytes(out)


def _facts(graph: Graph) -> list[tuple[object, ...]]:
    """The entries, with the number of each storage: ties show in it."""
    numbers: dict[object, int] = {}
    found: list[tuple[object, ...]] = []
    for entry in entries_of(graph, _Known()):
        if isinstance(entry, Tensor):
            storage = entry.storage
            number = numbers.setdefault(storage, len(numbers))
            facts = (storage.key, storage.nbytes, storage.location) if storage else ()
            found.append((entry.name, entry.dtype, entry.shape, entry.stride, entry.storage_offset, entry.kind,
                          entry.requires_grad, entry.conj, entry.neg, entry.layout, number, *facts))  # fmt: skip
        else:
            found.append((entry.name, repr(entry.value)))
    return found


def _outcome(make: Callable[[], Any]) -> object:
    try:
        return make()
    except FormatError as error:
        return type(error).__name__, error.problem


def _assert_the_same(data: bytes) -> None:
    quick, slow = _outcome(lambda: read_pickle(data)), _outcome(lambda: _opcode_by_opcode(data))
    if not isinstance(slow, Graph):
        assert quick == slow
        return
    assert isinstance(quick, Graph)
    assert (quick.protocol, quick.nbytes) == (slow.protocol, slow.nbytes)
    assert [name.qualified for name in quick.globals] == [name.qualified for name in slow.globals]
    assert _outcome(lambda: _facts(quick)) == _outcome(lambda: _facts(slow))
    assert _outcome(lambda: _written(quick)) == _outcome(lambda: _written(slow))
    assert same_graphs(quick.root, data, slow.root, data) == same_graphs(slow.root, data, slow.root, data)
    assert len(quick.persistent) == len(slow.persistent)
    for one, other in zip(quick.persistent, slow.persistent, strict=True):
        assert same_graphs(one, data, other, data)
    assert _outcome(lambda: _written(quick)) == _outcome(lambda: _written(slow))  # now that all has been made


def _rows_of(graph: Graph) -> int:
    """Tensors of a mapping that were read at once."""
    values = graph.root.pairs[1::2]  # type: ignore[attr-defined]  # a dict
    return sum(isinstance(value, Call) and value.row is not None for value in values)


def _other(kind: int, last: torch.Tensor, chosen: random.Random) -> object:
    """A value that is not read as a row, or has to do with one."""
    if kind == 0:
        return last
    if kind == 1:
        return last.reshape(-1)[1:] if last.numel() > 1 else last
    if kind == 2:
        return torch.nn.Parameter(torch.zeros(2))
    if kind == 3:
        return {"step": torch.zeros(()), "exp_avg": torch.ones(2)}
    return chosen.choice([3, "text", None, torch.zeros(3, 2).t(), torch.zeros(2, 3, requires_grad=True)])


@st.composite
def _states(draw: st.DrawFn) -> dict[str, Any]:
    """State dicts of many plain tensors, among which there is something else here and there."""
    chosen = random.Random(draw(st.integers(0, 1 << 32)))
    state: dict[str, Any] = {}
    last = torch.zeros(4)
    for number in range(draw(st.integers(40, 90))):
        name = chosen.choice(["", "layer.", "é.", "long" * 20 + "."]) + str(number)
        kind = chosen.randrange(14)
        if kind < 9:
            last = torch.zeros(chosen.choice(_SHAPES), dtype=chosen.choice(_DTYPES))
            state[name] = last
        else:
            state[name] = _other(kind - 9, last, chosen)
    return state


@settings(max_examples=25, deadline=None)
@given(state=_states(), protocol=st.integers(2, 5))
def test_all_that_torch_saves_is_read_as_opcode_by_opcode(state: dict[str, Any], protocol: int) -> None:
    _assert_the_same(_pickle_of(state, protocol))


def test_plain_tensors_are_read_at_once_and_written_byte_for_byte() -> None:
    data = _pickle_of({f"layer.{number}": torch.zeros(_SHAPES[number % len(_SHAPES)]) for number in range(2500)})
    graph = read_pickle(data)
    assert _rows_of(graph) > 2400
    assert _written(graph) == data
    assert _rows_of(graph) > 2400  # no node of them was made for that


def test_the_nodes_of_a_row_are_made_once() -> None:
    graph = read_pickle(_pickle_of({f"layer.{number}": torch.zeros(2) for number in range(60)}))
    call = graph.root.pairs[-1]  # type: ignore[attr-defined]  # a dict
    args = call.args
    assert call.args is args
    assert call.row is None
    assert args[0] is graph.persistent[-1]


def test_views_of_a_storage_that_was_read_at_once_refer_to_its_key() -> None:
    state: dict[str, Any] = {f"layer.{number}": torch.arange(6.0) for number in range(60)}
    state |= {f"view.{number}": state[f"layer.{number}"][2:4] for number in range(60)}
    _assert_the_same(_pickle_of(state))


_PLAIN = _pickle_of({f"layer.{number}": torch.zeros(_SHAPES[number % len(_SHAPES)]) for number in range(60)})


@settings(max_examples=most(200), deadline=None)
@given(at=st.integers(0, len(_PLAIN) - 1), byte=st.integers(0, 255), inserted=st.booleans())
def test_a_changed_byte_changes_as_much_as_opcode_by_opcode(at: int, byte: int, inserted: bool) -> None:
    _assert_the_same(_PLAIN[:at] + bytes((byte,)) + _PLAIN[at + (not inserted) :])


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, len(_PLAIN) - 1), begin=st.integers(0, len(_PLAIN) - 1), nbytes=st.integers(0, 200))
def test_a_pickle_with_a_part_cut_out_is_read_as_opcode_by_opcode(cut: int, begin: int, nbytes: int) -> None:
    _assert_the_same(_PLAIN[:cut])
    _assert_the_same(_PLAIN[:begin] + _PLAIN[begin + nbytes :])


def test_a_slot_of_a_row_that_is_filled_once_more_is_what_was_put_last() -> None:
    """Four opcodes before the end: None, put where a row has its size, and both are asked for."""
    end = _PLAIN.rindex(b"u.")
    for slot in range(300, 330):
        number = slot.to_bytes(4, "little")
        for between in (b"Nr" + number + b"0", b"j" + number + b"0", b"j" + number + b"0Nr" + number + b"0"):
            _assert_the_same(_PLAIN[:end] + between + b"X\1\0\0\0aj" + number + b"u.")


def test_slots_that_are_filled_over_and_over_are_looked_through_once() -> None:
    """The nodes of rows are made before the first slot is filled once more, not before each."""
    end = _PLAIN.rindex(b"u.")
    again = b"N" + b"r\0\1\0\0" * 1000 + b"0"
    with patch.object(Machine, "_settle", autospec=True, side_effect=Machine._settle) as settle:
        read_pickle(_PLAIN[:end] + again + b"u.")
    assert settle.call_count == 1


def test_rows_count_as_the_opcodes_that_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _pickle_of({f"layer.{number}": torch.zeros(2, 3) for number in range(3000)})
    monkeypatch.setattr(limits, "PICKLE_OPCODES", 60_000)
    with pytest.raises(FormatError, match="has more than 60000 opcodes"):
        read_pickle(data)


def test_rows_count_with_the_memory_that_their_nodes_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _pickle_of({f"layer.{number}": torch.zeros(2, 3) for number in range(3000)})
    gc.collect()
    monkeypatch.setattr(limits, "PICKLE_BLOCKS", 10_000)
    for read_it in (read_pickle, _opcode_by_opcode):
        with pytest.raises(FormatError, match="builds far more objects"):
            read_it(data)


def test_opcodes_of_a_row_are_counted_exactly() -> None:
    import pickletools

    for shape in _SHAPES:
        data = _pickle_of({f"layer.{number}": torch.zeros(shape) for number in range(100)})
        graph = read_pickle(data)
        row: Any = graph.root.pairs[-1].row  # type: ignore[attr-defined]  # a dict
        if row is None:
            continue
        begin, end = data.index(b"X\x08\0\0\0layer.97"), data.index(b"X\x08\0\0\0layer.98")
        said = [position for _, _, position in pickletools.genops(data) if begin <= position < end]
        assert row.opcodes == len(said), shape
