"""The engine of `delta apply`: a base with what `delta create` found to have changed, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.edits.delta import KEY, SPARSE, TIED, VERSION, WHOLE
from ckpt_cli.edits.derive import Derived, DeriveOptions, derive
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.taken import Taken
from ckpt_cli.errors import MalformedError, RefusedError, UnsupportedError, about, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import Extent
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.changes import Changes, Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, Value
from ckpt_cli.ops.hash import hash_tensors
from ckpt_cli.parallel.map import workers

if TYPE_CHECKING:
    from concurrent.futures import Executor

APPLY = Verb("changed", "change")


@dataclass(frozen=True, slots=True)
class Applied:
    """The result of a base with a delta, or of its dry run."""

    base: str
    delta: str
    changed: Sequence[str]
    removed: Sequence[str]
    derived: Derived


def apply(base: str, delta: str, output: str, options: DeriveOptions) -> Applied:
    """Write a base with a delta as `output`: the checkpoint that the delta was made of.

    Raises RefusedError for another base than the one that it was made for, MalformedError for what is no delta.
    """
    with about(delta):
        opened = open_checkpoint(delta)
    with closing(opened):
        with about(delta):
            facts = _facts_of(opened)
        plan = _Plan(opened, facts, options.executor)
        derived = derive(base, output, plan.make, options)
    return Applied(base, delta, list(facts["changed"]), facts["removed"], derived)


def _facts_of(delta: Checkpoint) -> dict[str, Any]:
    """Return what a delta says of itself; raises MalformedError where it does not fit."""
    text = delta.metadata.get(KEY)
    if text is None:
        raise MalformedError("it is not a delta", hint="ckpt delta create BASE TUNED -o FILE makes one")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError(f"{KEY} in its metadata is not JSON") from None
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise UnsupportedError(f"it is a delta of another version than {VERSION}")
    kinds = {"base": dict, "changed": dict, "removed": list, "values": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]
    wrong += (
        [f"changed.{name}" for name, change in facts["changed"].items() if not _is_change(change)] if not wrong else []
    )
    if wrong or not all(isinstance(name, str) for name in facts["removed"]):
        raise MalformedError(f"{KEY} in its metadata is not as it should be: {(wrong or ['removed'])[0]}")
    return facts


def _is_change(change: object) -> bool:
    """True if the description of a change has what it needs."""
    if not isinstance(change, dict):
        return False
    if change.get("how") == SPARSE:
        shape = change.get("shape")
        sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
        return sizes and isinstance(change.get("at"), str)
    return change.get("how") == WHOLE or (change.get("how") == TIED and isinstance(change.get("to"), str))


class _Plan:
    """Plans the new checkpoint once the base is open."""

    def __init__(self, delta: Checkpoint, facts: Mapping[str, Any], executor: Executor | None) -> None:
        self._delta = delta
        self._facts = facts
        self._executor = executor
        self._taken = Taken(delta, executor)
        self._stored = {tensor.name: tensor for tensor in delta.tensors}

    def make(self, base: Checkpoint) -> EditPlan:
        """Return the plan; raises RefusedError where the base is another one."""
        self._require_base(base)
        old = {entry.name: entry for entry in base.entries}
        tensors: dict[str, Tensor] = {}
        added: dict[str, object] = {}
        contents: dict[Storage, Content] = {}
        made: dict[str, Tensor] = {}
        of_base = Taken(base, self._executor)
        for name, change in self._facts["changed"].items():
            was = old.get(name)
            tensor = self._made(name, change, was, made, of_base)
            made[name] = tensor
            if isinstance(was, Tensor):
                tensors[name] = tensor
            else:
                added[name] = tensor
            if tensor.storage is not None:
                contents[tensor.storage] = content_of(tensor.storage)
        values = {name: value for name, value in self._facts["values"].items() if isinstance(old.get(name), Value)}
        added |= {name: value for name, value in self._facts["values"].items() if name not in old}
        dropped = frozenset(name for name in self._facts["removed"] if name in old)
        changes = Changes(dropped=dropped, tensors=tensors, contents=contents, values=values, added=added, cast=True)
        return EditPlan(APPLY, (*tensors, *values, *added, *dropped), changes=changes)

    def _require_base(self, base: Checkpoint) -> None:
        with nullcontext(self._executor) if self._executor is not None else workers(1) as executor:
            found = hash_tensors(base, "blake3", executor).tensors
        wanted: Mapping[str, object] = self._facts["base"]
        other = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        if other:
            raise RefusedError(
                f"the delta was made for another base: {len(other)} tensors are not those",
                path=base.path,
                details=some_of(other),
            )

    def _made(
        self, name: str, change: Mapping[str, Any], was: object, made: Mapping[str, Tensor], of_base: Taken
    ) -> Tensor:
        """Return one tensor of the new checkpoint."""
        if change["how"] == TIED:
            other = made.get(change["to"])
            if other is None:
                raise self._malformed(name)
            return replace(other, name=name)
        stored = self._stored.get(name)
        if stored is None:
            raise self._malformed(name)
        if change["how"] == WHOLE:
            return self._taken.tensor(stored, name, like=was if isinstance(was, Tensor) else None)
        at, shape = self._stored.get(change["at"]), tuple(change["shape"])
        fits = isinstance(was, Tensor) and was.shape == shape and was.dtype is stored.dtype
        if not isinstance(was, Tensor) or at is None or not fits or at.dtype.name not in ("int32", "int64"):
            raise self._malformed(name)
        if len(stored.shape or ()) != 1 or at.shape != stored.shape or stored.storage is None or at.storage is None:
            raise self._malformed(name)
        plain = of_base.tensor(was, name)
        assert plain.storage is not None
        source = _Patched(self._delta.path, plain.storage, at, stored)
        storage = Storage(name, was.nbytes, plain.storage.location, source)
        return replace(plain, storage=storage)

    def _malformed(self, name: str) -> MalformedError:
        return MalformedError(f"its change of {name!r} is not as it should be", path=self._delta.path)


_PLACES = 64 << 10
"""Places that are read at a time."""


class _Patched:
    """The bytes of a tensor of the base with other elements in some places; best read from the beginning to the end."""

    composed = True

    def __init__(self, path: str, base: Storage, at: Tensor, values: Tensor) -> None:
        self._path = path
        self._base = base
        self._at = at
        self._values = values
        self._count = at.numel
        self._cursor = 0
        self._reached = 0

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        import numpy as np

        size = self._values.dtype.itemsize
        first, last = begin // size, -(-(begin + nbytes) // size)
        found = np.array(np.frombuffer(self._base.view(first * size, (last - first) * size), np.uint8)).reshape(
            -1, size
        )
        if first != self._reached:
            self._cursor = self._first_from(first)
        before = first - 1
        while self._cursor < self._count:
            places = self._places(self._cursor)
            if (
                int(places[0]) <= before
                or bool((np.diff(places) <= 0).any())
                or int(places[-1]) * size >= self._base.nbytes
            ):
                raise MalformedError(f"the places of {self._values.name!r} are not ascending", path=self._path)
            count = int(np.searchsorted(places, last))
            found[places[:count] - first] = self._elements(self._cursor, count)
            self._cursor += count
            if count < len(places):
                break
            before = int(places[-1])
        self._reached = last
        return found.reshape(-1).data.cast("B")[begin - first * size :][:nbytes]

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Raise UnsupportedError: its bytes are in no file."""
        del begin, nbytes
        raise UnsupportedError("its bytes are made while they are read, and are in no file")

    def _places(self, number: int, most: int = _PLACES) -> Any:
        """Return some places, from a number on."""
        import numpy as np

        size = self._at.dtype.itemsize
        count = min(most, self._count - number)
        data = _bytes_of(self._at, number * size, count * size)
        return np.frombuffer(data, f"<i{size}").astype(np.int64)

    def _elements(self, number: int, count: int) -> Any:
        """Return the bytes of some new elements, a row for each."""
        import numpy as np

        size = self._values.dtype.itemsize
        return np.frombuffer(_bytes_of(self._values, number * size, count * size), np.uint8).reshape(-1, size)

    def _first_from(self, element: int) -> int:
        """Return the number of the first place that is not before an element."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if int(self._places(middle, 1)[0]) < element:
                low = middle + 1
            else:
                high = middle
        return low


def _bytes_of(tensor: Tensor, begin: int, nbytes: int) -> memoryview:
    """Return bytes of a contiguous tensor."""
    assert tensor.storage is not None
    return tensor.storage.view(tensor.span[0] + begin, nbytes)
