"""The facts of a checkpoint as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING

from ckpt_cli.render.json import value_json
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column, facts_text, table_text
from ckpt_cli.render.text import (
    bytes_text,
    count_text,
    escaped,
    name_text,
    shape_text,
    short,
    value_beginning,
    value_text,
)

if TYPE_CHECKING:
    from ckpt_cli.ops.info import Largest, QuantizedShare, Summary
    from ckpt_cli.ops.parts import Part

_LINE = 400
"""Characters of a fact."""

_METADATA = 1000
"""Entries of the metadata that are shown."""


def to_json(summary: Summary) -> dict[str, object]:
    """Return the facts as docs/json.md describes them."""
    training = summary.training
    left_out = ("training", *(name for name in ("revision", "quantization") if not getattr(summary, name)))
    return {
        **{name: value for name, value in asdict(summary).items() if name not in left_out},
        "gradients": summary.gradients,
        "training": {
            "writer": training.writer,
            "epoch": value_json(training.epoch),
            "global_step": value_json(training.global_step),
            "learning_rates": [value_json(rate) for rate in training.learning_rates],
            "hyper_parameters": {key: value_json(value) for key, value in (training.hyper_parameters or {}).items()},
        },
    }


def summary_text(summary: Summary, style: str) -> Iterator[str]:
    """Yield a row for each fact."""
    if style == "table":
        yield from facts_text(_facts(summary, human=True))
    else:
        yield from table_text((Column("fact"), Column("value")), _facts(summary, human=False), style)


_ROW = (
    Column("format"),
    *(Column(word, right=True) for word in ("tensors", "parameters", "bytes")),
    Column("dtypes"),
    Column("step", right=True),
    Column("epoch", right=True),
)


def summary_block(summary: Summary, style: str) -> Block:
    """Return the facts that several checkpoints are compared by as one row; `bytes` are those of all tensors."""
    human = style == "table"
    row = [
        summary.format,
        str(summary.tensors),
        f"{summary.parameters:,}" if human else str(summary.parameters),
        bytes_text(summary.nbytes) if human else str(summary.nbytes),
        ",".join(summary.dtypes),
        *("" if number is None else str(number) for number in (summary.training.global_step, summary.training.epoch)),
    ]
    return Block(_ROW, [row])


def _format(summary: Summary) -> str:
    """Return the format's name with the version that the container states."""
    version = escaped(summary.version)
    return version if version.startswith(summary.format) else f"{summary.format} ({version})"


def _facts(summary: Summary, *, human: bool) -> list[tuple[str, str]]:
    """Return the label and the text of every fact that the checkpoint has."""
    sizes = bytes_text if human else str
    counts = (lambda number: f"{number:,}") if human else str
    facts = [
        ("path", escaped(summary.path)),
        *([("revision", summary.revision)] if summary.revision else []),
        ("format", _format(summary)),
        ("file size", sizes(summary.file_nbytes)),
        ("shards", counts(summary.shards)),
        ("tensors", counts(summary.tensors)),
        ("parameters", counts(summary.parameters)),
        ("tensor bytes", sizes(summary.nbytes)),
    ]
    elements = "element" if summary.is_training else "parameter"
    facts += [
        (f"dtype {name}", f"{count_text(share.tensors, 'tensor')}, {count_text(share.numel, elements)}")
        for name, share in summary.dtypes.items()
    ]
    facts += [("quantization", _quantized(share)) for share in summary.quantization]
    if summary.values:
        facts.append(("other entries", counts(summary.values)))
    names = _some_names if human else _all_names
    if summary.top_level:
        facts.append(("top level", names(summary.top_level)))
    if summary.ties:
        facts.append(("ties", f"{count_text(summary.ties, 'group')}, {sizes(summary.tie_nbytes)} saved"))
    if summary.waste_nbytes:
        facts.append(("waste", f"{sizes(summary.waste_nbytes)} that no tensor uses"))
    facts += _metadata_facts(summary) if human else _whole_metadata(summary)
    if summary.objects:
        facts.append(("objects", names(summary.objects)))
    return [*facts, *_answers(summary, human=human)]


def _quantized(share: QuantizedShare) -> str:
    """Return how many weights are of a scheme, and what they stand for."""
    known = "" if share.parameters is None else f" of {count_text(share.parameters, 'parameter')}"
    return f"{escaped(share.scheme)}, {count_text(share.weights, 'weight')}{known}"


def _answers(summary: Summary, *, human: bool) -> list[tuple[str, str]]:
    """Return the facts of what the checkpoint is for: its parts, the training, the largest tensors, and advice."""
    facts = [] if len(summary.parts) == 1 and not summary.beside and summary.parts[0].role == "model" else [
        *(_part(part, human=human) for part in summary.parts),
        *(_part(part, human=human) for part in summary.beside),
    ]  # fmt: skip
    if summary.tensors:
        facts.append(("gradients", "stored" if summary.gradients else "not stored"))
    facts += _training(summary)
    if human:
        facts += [("largest", _largest(row)) for row in summary.largest if len(summary.largest) > 1 or row.count > 1]
    facts += [("advice", f"{advice.message}: {escaped(advice.command)}") for advice in summary.advice]
    return facts


def _part(part: Part, *, human: bool) -> tuple[str, str]:
    """Return one part: its role, and how much it is."""
    noun = "parameter" if part.role in ("model", "EMA") else "element"
    count = count_text(part.parameters - part.buffers, noun)
    buffers = f" and {count_text(part.buffers, 'element')} of buffers" if part.buffers else ""
    nbytes = bytes_text(part.nbytes) if human else count_text(part.nbytes, "byte")
    label = "optimizer state" if part.role == "optimizer" else part.role
    where = f" in {name_text(part.name[:_LINE])}" if part.name else ""
    return label, f"{count}{buffers}, {count_text(part.tensors, 'tensor')}, {nbytes}{where}"


def _training(summary: Summary) -> list[tuple[str, str]]:
    """Return what is known of the training; the writer alone is not worth a row where it is torch itself."""
    training = summary.training
    facts = []
    if training.writer and not (training.writer == "torch" and training.is_empty and not summary.is_training):
        facts.append(("writer", escaped(training.writer)))
    for label, value in (("epoch", training.epoch), ("global_step", training.global_step)):
        if value is not None:
            facts.append((label, value_text(value)))
    if training.learning_rates:
        facts.append(("learning rate", short(" ".join(map(value_text, training.learning_rates[:_LINE])), _LINE)))
    settings = [
        f"{name_text(name[:_LINE])}={value_beginning(value)}"
        for name, value in islice((training.hyper_parameters or {}).items(), _LINE)
    ]
    return [*facts, ("hyper-parameters", short(" ".join(settings), _LINE))] if settings else facts


def _largest(row: Largest) -> str:
    """Return one row of the largest tensors: `4 × layers.[N].weight, float32 [8,8], 1.0 kB`."""
    times = f"{row.count} × " if row.count > 1 else ""
    return f"{times}{name_text(row.name[:_LINE])}, {row.dtype} {shape_text(row.shape)}, {bytes_text(row.nbytes)}"


def _metadata_facts(summary: Summary) -> list[tuple[str, str]]:
    """Return the first strings of the metadata, each as far as it fits on a line."""
    facts = [
        (f"metadata {name_text(key[:_LINE])}", short(escaped(text[: _LINE + 1]), _LINE))
        for key, text in islice(summary.metadata.items(), _METADATA)
    ]
    if len(summary.metadata) > _METADATA:
        facts.append(("metadata", f"{len(summary.metadata) - _METADATA} more"))
    return facts


def _whole_metadata(summary: Summary) -> list[tuple[str, str]]:
    """Return all strings of the metadata as they are: what is not for a terminal is not cut."""
    return [(f"metadata {name_text(key)}", escaped(text)) for key, text in summary.metadata.items()]


def _all_names(names: Sequence[str]) -> str:
    """Return all names."""
    return " ".join(map(name_text, names))


def _some_names(names: Sequence[str]) -> str:
    """Return the first names that fit on a line."""
    return short(" ".join(name_text(name[:_LINE]) for name in names[:_LINE]), _LINE)
