"""The states of optimizers beside their parameters as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_cli.ops.optimizer_listing import OptimizerFacts, OptimizerListing, State
from ckpt_cli.render.json import rows as rows_json
from ckpt_cli.render.json import value_json
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import count_text, escaped, name_text, shape_text, value_text

_COLUMNS = (
    Column("name"),
    Column("dtype"),
    Column("shape"),
    Column("state"),
    Column("step", right=True),
    Column("group", right=True),
    Column("lr", right=True),
    Column("weight_decay", right=True),
    Column("by", stays=True),
)


def states_block(listing: OptimizerListing, style: str) -> Block:
    """Return a row for each parameter; a table ends with a line about each optimizer."""
    after = "".join(f"{line}\n" for facts in listing.optimizers for line in _summary(facts))
    return Block(_COLUMNS, map(_cells, listing.states), after if style == "table" else "")


def _cells(state: State) -> list[str]:
    return [
        name_text(state.path) if state.path else escaped(state.name or state.place),
        state.dtype,
        shape_text(state.shape) if state.parameter is not None or state.shape is not None else "",
        escaped(",".join(state.states)),
        *("" if value is None else value_text(value) for value in (state.step, state.group, state.lr)),
        "" if state.weight_decay is None else value_text(state.weight_decay),
        state.how or "",
    ]


def _summary(facts: OptimizerFacts) -> Iterator[str]:
    name = escaped(facts.prefix) or "the optimizer"
    known = f"{facts.paired:,} of {count_text(facts.parameters, 'parameter')}"
    if facts.how is None:
        yield f"{name}: {count_text(facts.parameters, 'parameter')}, not paired: {escaped(facts.reason)}"
    elif facts.how == "order":
        yield f"{name}: {known} paired by order ({escaped(facts.hypothesis or '')}): the shapes fit, which is no proof"
    else:
        how = "by the names in the file" if facts.how == "named" else "by shape: one assignment fits"
        yield f"{name}: {known} paired {how}"


def notes(listing: OptimizerListing) -> list[str]:
    """Return what is said on stderr about optimizers of which no pairing is known."""
    return [line for facts in listing.optimizers if facts.how is None for line in _summary(facts)]


def to_json(listing: OptimizerListing) -> dict[str, object]:
    """Return the listing as docs/json.md describes it."""
    return {
        "path": listing.path,
        "format": listing.format,
        "optimizers": [
            {
                "optimizer": facts.prefix, "model": facts.model, "how": facts.how, "hypothesis": facts.hypothesis,
                "reason": facts.reason or None, "groups": facts.groups, "parameters": facts.parameters,
                "paired": facts.paired,
            }
            for facts in listing.optimizers
        ],
        "entries": rows_json(lambda: (_row_json(row) for row in listing.states if row.path and row.how)),
        "unmatched_parameters": [row.path for row in listing.states if row.path and not row.how],
        "unmatched_states": rows_json(lambda: (_unmatched_json(row) for row in listing.states if not row.path)),
    }  # fmt: skip


def _row_json(row: State) -> dict[str, object]:
    return {
        "name": row.name,
        "parameter": row.path,
        "optimizer": row.optimizer,
        "dtype": row.dtype,
        "shape": None if row.shape is None else list(row.shape),
        **_settings(row),
        "how": row.how,
        "hypothesis": row.hypothesis,
    }


def _unmatched_json(row: State) -> dict[str, object]:
    return {
        "name": row.name or None,
        "optimizer": row.optimizer,
        "path": row.place,
        "shape": None if row.shape is None else list(row.shape),
        **_settings(row),
    }


def _settings(row: State) -> dict[str, object]:
    return {
        "state": dict(row.states),
        "step": value_json(row.step),
        "group": row.group,
        "lr": value_json(row.lr),
        "weight_decay": value_json(row.weight_decay),
    }
