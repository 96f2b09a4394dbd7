"""Printing: results on stdout, all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.cli import read_again as again
from ckpt_cli.cli.options import FindingStyle, Style
from ckpt_cli.cli.terminal import terminal
from ckpt_cli.errors import OutputError
from ckpt_cli.facts import dataclass
from ckpt_cli.render.json import json_text

if TYPE_CHECKING:
    from ckpt_cli.edits.plan import EditOptions, EditResult, Planner
    from ckpt_cli.formats.salvage.found import Salvaged
    from ckpt_cli.model.checkpoint import Checkpoint
    from ckpt_cli.render.several import Block


def style_of(style: Style | FindingStyle, *, json: bool) -> str:
    """Return the layout of an answer: the one asked for, or the one that suits a terminal or a pipe.

    From then on a table is made for the terminal, if there is one.
    """
    layout = "json" if json else str(style.value)
    if layout == "auto":
        layout = "table" if sys.stdout.isatty() else "tsv"
    terminal.make_for(layout)
    return layout


def ascii_only() -> bool:
    """Return True if stdout takes ASCII alone, so that nothing is drawn with other characters."""
    return "utf" not in (sys.stdout.encoding or "").lower()


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer about one file, made but not printed."""

    block: Block
    """Its rows."""
    to_json: Callable[[], dict[str, object]]
    code: int = 0
    """The exit code."""
    aside: Callable[[], None] = lambda: None
    """Prints what is said on stderr after the answer."""
    text: Iterable[str] | None = None
    """What is printed instead of the rows where one file was asked for."""


_BEFORE = 1 << 20
"""Characters of an answer that are made before any is printed, if files are read for it."""


def answer(pieces: Iterable[str], checkpoint: Checkpoint | None = None) -> None:
    """Print an answer. Of a small one nothing is printed if the files of `checkpoint` changed while it was made."""
    if checkpoint is not None:
        pieces = _made_before(iter(pieces), checkpoint)
    for _ in terminal.print(pieces):
        again.printed = True


def _made_before(pieces: Iterator[str], checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the same pieces; the first `_BEFORE` characters are made before the first piece is yielded."""
    from ckpt_cli.files.unchanged import settle

    made, size = [], 0
    for piece in pieces:
        made.append(piece)
        size += len(piece)
        if size > _BEFORE:
            break
    settle(checkpoint.container.files)
    yield from made
    yield from pieces


def report(pieces: Iterable[str]) -> None:
    """Print the JSON report of a command that was carried out; an error in printing states that it was."""
    try:
        answer(pieces)
        sys.stdout.flush()
    except OutputError as error:
        raise OutputError(f"{error.problem}; the command itself was carried out") from error


def warn_of_danger(checkpoint: Checkpoint) -> None:
    """Print a warning if a checkpoint, which was opened safely, would not be safe to load elsewhere."""
    if checkpoint.document is None and not checkpoint.objects:
        return
    from ckpt_cli.pickles.graph import Graph
    from ckpt_cli.pickles.tensors.calls import has_tensors_alone

    if isinstance(checkpoint.document, Graph) and has_tensors_alone(checkpoint.document):
        return  # as of nearly every file: the scanner need not be imported
    from ckpt_cli.scanner.judge import dangerous_of

    name = dangerous_of(checkpoint)
    if name is not None:
        from ckpt_cli.render.text import escaped, short

        path = escaped(checkpoint.path)
        run = short(escaped(name))
        talk(f"warning: {path}: its pickle would run {run} if something else loaded it; see ckpt scan {path}\n")


def report_lost(cut: Salvaged | None) -> int:
    """Print what is lost of a file that was cut, and return the exit code: 1 for one, 0 for a file that is whole."""
    if cut is None:
        return 0
    from ckpt_cli.render.salvage import lost_text

    talk(lost_text(cut))
    return 1


def talk(text: str) -> None:
    """Print on stderr what is not the answer: notes, warnings and reports."""
    sys.stdout.flush()
    terminal.say(text, again.named)


def edit(file: str, plan: Planner, options: EditOptions, *, json: bool, verbose: bool = False) -> None:
    """Carry out an edit and report it: on stderr, or as JSON on stdout."""
    from ckpt_cli.render.edits import to_json

    done = carried_out(file, plan, options)
    if json:
        report(json_text(to_json(done)))
    else:
        report_edit(done, verbose=verbose)


def carried_out(file: str, plan: Planner, options: EditOptions) -> EditResult:
    """Carry out an edit, with a progress line where it takes a while."""
    from ckpt_cli.cli.progress import watched
    from ckpt_cli.edits.transaction import transaction

    with watched() as on_progress:
        return transaction(file, plan, replace(options, on_progress=on_progress))


def report_edit(done: EditResult, *, verbose: bool) -> None:
    """Report an edit on stderr."""
    from ckpt_cli.render.edits import edit_text

    talk(edit_text(done, verbose=verbose))
