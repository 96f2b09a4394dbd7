"""`ckpt show`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import AsFiles, File, Format, Json, Names, Style, opened
from ckpt_cli.cli.output import answer, style_of, talk
from ckpt_cli.errors import UsageError
from ckpt_cli.model.checkpoint import Value
from ckpt_cli.ops.show import Item, Shown, save_npy, show
from ckpt_cli.render.json import json_text
from ckpt_cli.render.show import to_json, values_rows, values_text
from ckpt_cli.render.text import count_text, escaped, name_text


def show_command(
    file: File,
    names: Names = None,
    precision: Annotated[int, typer.Option("--precision", min=0, max=17, help="Digits after the point.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Print every element, also of large tensors.")] = False,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE.npy", help="Write one tensor as a numpy file.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Print the integers of quantized tensors, not what they stand for.")
    ] = False,
    every: Annotated[
        bool, typer.Option("-a", "--all", help="Also the settings of a pickled module, such as training.")
    ] = False,
    as_files: AsFiles = False,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Print values, as torch prints them.

    A prefix prints every tensor below it, no NAME prints the whole checkpoint: of a pickled module what its state_dict
    has; its settings, such as training, with -a or by their names. NAME[...] takes integers, slices and
    ... as numpy does, and only the bytes of that part are read.

    Example: ckpt show model.pt 2.bias '0.weight[0,:2]'
    """
    layout = style_of(style, json=json)
    with opened(file, as_files=as_files) as checkpoint:
        items = show(checkpoint, names or (), raw=raw, settings=every)
        if output is not None:
            written = count_text(save_npy(_only_tensor(items), output), "byte")
            talk(f"{escaped(file)}: {name_text(_only_tensor(items).label)} written to {escaped(output)}, {written}\n")
        elif layout == "json":
            answer(json_text(to_json(items)), checkpoint)
        elif style is Style.auto:
            bare = names is not None and len(names) == 1 and len(items) == 1 and _is_named(items[0], names[0])
            on_terminal = layout == "table"
            answer(values_text(items, bare=bare, precision=precision, full=full, terminal=on_terminal), checkpoint)
        else:
            answer(values_rows(items, style.value), checkpoint)


def _is_named(item: Item, argument: str) -> bool:
    """True if the item is what the argument names itself, rather than the one thing below a prefix."""
    name = item.name if isinstance(item, Value) else item.tensor.name
    return argument.lstrip("\"'").startswith(name)


def _only_tensor(items: list[Item]) -> Shown:
    if len(items) == 1 and isinstance(items[0], Shown):
        return items[0]
    raise UsageError("-o writes one tensor: name one", hint="ckpt show FILE NAME -o FILE.npy")
