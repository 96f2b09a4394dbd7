"""The facts of one entry, as `info FILE NAME` shows them, as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.model.checkpoint import Value
from ckpt_cli.ops.entry import ContainerFacts, EntryFacts, Place, TensorFacts, ValueFacts
from ckpt_cli.render.json import LongList, entry_json, tensor_json
from ckpt_cli.render.stats import row_json
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import bytes_text, count_text, escaped, name_text, shape_text, short, value_text

if TYPE_CHECKING:
    from ckpt_cli.ops.summaries import Row

_LINE = 400
"""Characters of a fact on a terminal."""

_NO_GRADIENT = "None: torch does not store gradients"

_NUMBERS = (("min", "least"), ("max", "most"), ("mean", "mean"), ("std", "std"))
_COUNTS = ("nan", "inf")


def to_json(facts: EntryFacts) -> dict[str, object]:
    """Return the facts as docs/json.md describes them."""
    if isinstance(facts, TensorFacts):
        return _tensor_json(facts)
    if isinstance(facts, ValueFacts):
        return {**entry_json(facts.value), "class": facts.python_class, "of_module": facts.of_module}
    return {
        "name": facts.name,
        "type": "container",
        "class": facts.python_class,
        **{name: value for name, value in asdict(facts).items() if name not in ("name", "python_class", "names")},
        "names": LongList(lambda: ([name] for name in facts.names)),
    }


def _tensor_json(facts: TensorFacts) -> dict[str, object]:
    tensor = facts.tensor
    rows = [row_json(row) for row in facts.values]
    return {
        **tensor_json(tensor, {tensor.name: [tensor.name, *facts.tied_with]}),
        "class": facts.python_class,
        "gradient": facts.gradient,
        "storage_nbytes": None if tensor.storage is None else tensor.storage.nbytes,
        "places": [asdict(place) for place in facts.places],
        **_flat(rows),
        "values": rows,
    }


def _flat(rows: Sequence[dict[str, object]]) -> dict[str, object]:
    """Return the numbers of a tensor's own values; None for one that is made of others."""
    own = rows[0] if len(rows) == 1 else {}
    return {name: own.get(name) for name in ("min", "max", "mean", "std", "norm", "zeros", "nan", "inf")}


def entries_text(found: Sequence[EntryFacts], style: str) -> Iterator[str]:
    """Yield a row for each fact; on a terminal an empty line between entries."""
    for number, facts in enumerate(found):
        human = style == "table"
        rows = _rows(facts, human=human)
        if human:
            width = max(len(label) for label, _ in rows)
            yield from (f"{label:{width}}  {short(text, _LINE)}\n" for label, text in rows)
            if number < len(found) - 1:
                yield "\n"
        else:
            yield from table_text((Column("fact"), Column("value")), rows, style)


def _rows(facts: EntryFacts, *, human: bool) -> list[tuple[str, str]]:
    if isinstance(facts, TensorFacts):
        return _tensor_rows(facts, human=human)
    if isinstance(facts, ValueFacts):
        return _value_rows(facts.value, facts)
    return _container_rows(facts, human=human)


def _tensor_rows(facts: TensorFacts, *, human: bool) -> list[tuple[str, str]]:
    tensor = facts.tensor
    sizes = bytes_text if human else str
    rows = [
        ("name", name_text(tensor.name)),
        ("class", escaped(facts.python_class)),
        ("kind", tensor.kind),
        ("dtype", tensor.dtype.name),
        ("shape", shape_text(tensor.shape)),
        ("elements", f"{tensor.numel:,}" if human else str(tensor.numel)),
        ("bytes", sizes(tensor.nbytes)),
        ("stride", shape_text(tensor.stride)),
        ("layout", tensor.layout),
        ("requires_grad", str(tensor.requires_grad)),
        ("gradient", _NO_GRADIENT if facts.gradient is None else name_text(facts.gradient)),
        ("device", escaped(tensor.device)),
    ]
    if tensor.storage is not None:
        whole = sizes(tensor.storage.nbytes) if human else count_text(tensor.storage.nbytes, "byte")
        offset = f", view from element {tensor.storage_offset:,}" if tensor.storage_offset else ""
        rows.append(("storage", f"{escaped(tensor.storage.key)}, {whole}{offset}"))
    rows += [("place", _place(place)) for place in facts.places]
    if tensor.storage is not None and not facts.places and tensor.numel:
        rows.append(("place", "compressed, or gathered from several places"))
    rows.append(("tied with", " ".join(map(name_text, facts.tied_with)) or "nothing"))
    if tensor.parts:
        rows.append(("parts", " ".join(name_text(part.name) for part in tensor.parts)))
    for row in facts.values:
        rows += _statistics(row, "" if row.name == tensor.name else f" of {name_text(row.name)}", human=human)
    return rows


def _place(place: Place) -> str:
    return f"{escaped(place.path)}, bytes {place.offset} to {place.offset + place.nbytes}"


def _statistics(row: Row, of: str, *, human: bool) -> list[tuple[str, str]]:
    if row.moments is None:
        return [(f"values{of}", escaped(row.note))]
    if not row.moments.count:
        return [(f"values{of}", "none is finite" if row.numel else "none"), *_odd(row, of)]
    numbers = [(f"{label}{of}", getattr(row.moments, name)) for label, name in _NUMBERS]
    return [*((label, _number(number, human=human)) for label, number in numbers), *_odd(row, of)]


def _odd(row: Row, of: str) -> list[tuple[str, str]]:
    """Return the counts of NaN and infinities, where there are any."""
    counts = [(f"{name}{of}", getattr(row.moments, name)) for name in _COUNTS]
    return [(label, str(count)) for label, count in counts if count]


def _number(number: object, *, human: bool) -> str:
    return f"{number:.5g}" if human and isinstance(number, float) else str(number)


def _value_rows(value: Value, facts: ValueFacts) -> list[tuple[str, str]]:
    rows = [("name", name_text(value.name)), ("class", escaped(facts.python_class)), ("value", value_text(value.value))]
    if facts.of_module:
        rows.append(("kind", "setting of a module, not in its state_dict"))
    return rows


def _container_rows(facts: ContainerFacts, *, human: bool) -> list[tuple[str, str]]:
    rows = [("name", name_text(facts.name))]
    if facts.python_class is not None:
        rows.append(("class", escaped(facts.python_class)))
    rows += [
        ("tensors", f"{facts.tensors:,}" if human else str(facts.tensors)),
        ("elements", f"{facts.numel:,}" if human else str(facts.numel)),
        ("tensor bytes", bytes_text(facts.nbytes) if human else str(facts.nbytes)),
        ("dtypes", " ".join(facts.dtypes)),
        ("other entries", str(facts.values)),
        ("names", " ".join(map(name_text, facts.names[:_LINE] if human else facts.names))),
    ]
    return [(label, text) for label, text in rows if text]
