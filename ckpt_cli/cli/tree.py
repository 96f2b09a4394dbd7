"""`ckpt tree`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ckpt_cli.cli.options import File, Json, Style, complete_names, opened
from ckpt_cli.cli.output import answer, style_of
from ckpt_cli.nn.tree import tree_of
from ckpt_cli.render.json import json_text
from ckpt_cli.render.tree import View, to_json, tree_text

_NAME = 500
"""Characters of a tensor's name up to which its modules are offered."""


def complete_modules(ctx: Any, incomplete: str) -> list[str]:
    """Return the names of modules in the file on the command line that begin with the typed text."""
    prefixes: dict[str, None] = {}
    for name in complete_names(ctx, ""):
        parts = name.split(".") if len(name) <= _NAME else []
        prefixes.update((".".join(parts[:count]), None) for count in range(1, len(parts)))
    return [prefix for prefix in prefixes if prefix.startswith(incomplete)]


def tree_command(
    file: File,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The module whose tree it is.", autocompletion=complete_modules),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=0, metavar="N", help="Show N levels below the first.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Write out equal neighbours and tied modules.")] = False,
    bare: Annotated[
        bool,
        typer.Option(
            "--bare", help="Print what print(net) would: no marks, sizes, ties or settings of unknown classes."
        ),
    ] = False,
    style: Annotated[
        Style,
        typer.Option(
            "-f", "--format", help="Layout; auto is a tree, with sizes on a terminal; tsv, csv and markdown have rows."
        ),
    ] = Style.auto,
    json: Json = False,
) -> None:
    """Show the module tree as print(net) does.

    Pickled and scripted modules with their true classes and settings, read without running them; for a state_dict
    the layers that its names and shapes suggest, marked as inferred. A tied module points at the one it is.

    Example: ckpt tree model.pt --depth 1
    """
    with opened(file) as checkpoint:
        tree = tree_of(checkpoint, name)
    view = View(depth=depth, full=full, bare=bare)
    layout = style_of(style, json=json)
    if layout == "json":
        answer(json_text(to_json(tree, view)))
    else:
        bare_tree = style is Style.auto and layout == "tsv"
        answer(tree_text(tree, view, "auto" if bare_tree else layout))
