"""`ckpt match`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import File, Format, Json, Of, OtherOf, Style, checkpoint_argument, opened
from ckpt_cli.cli.output import answer, style_of
from ckpt_cli.errors import about
from ckpt_cli.ops.match import match
from ckpt_cli.ops.match_states import State, listing_of, state_of
from ckpt_cli.render.json import json_text
from ckpt_cli.render.match import match_text, to_json

Other = Annotated[
    str, checkpoint_argument("OTHER", "The model: its state_dict, a pickled module, or what ckpt ls --json printed.")
]


def model_at(path: str, prefix: str | None) -> State:
    """Return the names that the model in a file has, or those of a listing."""
    with about(path):
        listing = listing_of(path, prefix)
    if listing is not None:
        return listing
    with opened(path) as checkpoint:
        return state_of(checkpoint, prefix, aliases=True)


def match_command(
    file: File,
    other: Other,
    of: Of = None,
    other_of: OtherOf = None,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Say whether load_state_dict would take FILE in place of OTHER.

    Names that are missing or unexpected, sizes that differ, in torch's words; dtypes that a load would cast. Then the
    rename command that makes the most names fit; a guess is marked as one, and equally good ones are all shown.
    Exit 0 means that a strict load works, 1 that it does not, 2 trouble.

    Example: ckpt match model.pt old.pt
    """
    layout = style_of(style, json=json)
    with opened(file) as checkpoint:
        found = match(state_of(checkpoint, of), model_at(other, other_of))
    answer(json_text(to_json(found)) if layout == "json" else match_text(found, layout))
    raise typer.Exit(0 if found.loads else 1)
