"""How answers reach stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ckpt_cli.cli.options import Style


def style_of(style: Style, *, json: bool) -> str:
    """The style that an answer gets: what was asked for, or what suits where stdout goes."""
    if json:
        return "json"
    if style is Style.auto:
        return "table" if sys.stdout.isatty() else "tsv"
    return str(style.value)


def answer(pieces: Iterable[str]) -> None:
    """Print an answer."""
    sys.stdout.writelines(pieces)


def talk(text: str) -> None:
    """Print what is not the answer."""
    sys.stdout.flush()
    sys.stderr.write(text)
