"""JSON files of a run, such as the trainer_state.json of Hugging Face's Trainer: their values as entries, and edits.

The names of values are the keys that lead to them, joined by dots, as those of a pickle are; a list of plain values is
one value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Value

NAME = "json"

Path = tuple["str | int", ...]
"""The keys and places that lead to a value."""

_COSTS = ((b"{", 300), (b"[", 64), (b",", 40), (b'"', 28))
"""Bytes of memory that what begins, goes on or ends with a character takes when parsed."""

UNLISTED = "…"
"""The name of the value that stands for those that are not listed."""

_DEPTH = 100
"""Containers within containers."""


class JsonFile(PlainFile):
    """The container: a file without storages, and the data in it."""

    def __init__(self, file: SourceFile, data: dict[str, object]) -> None:
        super().__init__(file)
        self.data = data


def read_json(file: SourceFile) -> Checkpoint:
    """Open a JSON file as a checkpoint that has values only.

    Raises MalformedError for what is not a JSON object, LimitError for one that is too large.
    """
    data = _parsed(file)
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=list(values_of(data)),
        container=JsonFile(file, data),
        version="JSON",
        top_level=list(data),
    )


def _parsed(file: SourceFile) -> dict[str, object]:
    if file.size > limits.RUN_JSON:
        raise LimitError(
            f"a JSON file of {file.size:,} bytes is far larger than the state of a trainer", path=file.path
        )
    raw = file.read(0, file.size)
    cost = (2 if raw.isascii() else 8) * len(raw) + sum(raw.count(char) * nbytes for char, nbytes in _COSTS)
    if cost > limits.RUN_JSON_PARSED:
        raise LimitError(f"its JSON would take about {cost >> 20} MiB of memory", path=file.path)
    try:
        found = json.loads(raw.decode().removeprefix("\ufeff"))
    except RecursionError:
        raise MalformedError("its JSON nests too deeply", path=file.path) from None
    except ValueError as error:  # bad JSON, bad UTF-8, an integer of thousands of digits
        raise MalformedError(f"it is not JSON: {error}", path=file.path) from None
    if not isinstance(found, dict):
        raise MalformedError("it is not a JSON object", path=file.path)
    return found


def repeats_keys(file: SourceFile) -> bool:
    """True if an object in a JSON file that was read has one key twice: readers take the last."""
    found: list[str] = []

    def noting(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            found.append("")
        return made

    json.loads(file.read(0, file.size).decode().removeprefix("\ufeff"), object_pairs_hook=noting)
    return bool(found)


def values_of(data: dict[str, object]) -> Iterator[Value]:
    """Yield the values of JSON data; from a limit on, a container is one value that only says what it is."""
    left = limits.RUN_VALUES
    for name, _, value in leaves(data):
        left -= 1
        if left < 0:
            yield Value(UNLISTED, Opaque(f"more than {limits.RUN_VALUES:,} values, the others are not listed"))
            return
        yield Value(name, value)


def leaves(data: dict[str, object]) -> Iterator[tuple[str, Path, object]]:
    """Yield the name, the path and the value of every leaf, in the order of the file."""
    stack: list[tuple[str, Path, Iterator[tuple[str | int, object]]]] = [("", (), iter(data.items()))]
    while stack:
        name, path, items = stack[-1]
        found = next(items, None)
        if found is None:
            stack.pop()
            continue
        key, value = found
        inner, here = f"{name}.{key}" if name else str(key), (*path, key)
        if isinstance(value, dict) and value and len(stack) < _DEPTH:
            stack.append((inner, here, iter(value.items())))
        elif isinstance(value, list) and not is_plain(value) and len(stack) < _DEPTH:
            stack.append((inner, here, iter(enumerate(value))))
        else:
            yield inner, here, value if is_plain(value) or value == {} else Opaque(json.dumps(value)[:1000])


def is_plain(value: object) -> bool:
    """True for a scalar, and for a list of scalars."""
    return not isinstance(value, dict | list) or (
        isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
    )
