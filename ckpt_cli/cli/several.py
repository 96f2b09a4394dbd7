"""Commands on several files: which arguments are files, one answer of all, and the worst exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_cli.budget import Budget
from ckpt_cli.cli import read_again as again
from ckpt_cli.cli.boundary import problem_of, report_error
from ckpt_cli.cli.options import may_be_file, read_standard_input
from ckpt_cli.cli.output import Reply, answer, carried_out, edit, report, report_edit
from ckpt_cli.errors import CkptError
from ckpt_cli.files.places import STANDARD_INPUT
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.select import selects
from ckpt_cli.render.json import json_text
from ckpt_cli.render.several import Block, block_text, blocks_text, to_json

if TYPE_CHECKING:
    from ckpt_cli.edits.plan import EditOptions, Planner

Shapes = Sequence[tuple[str, dict[str, object]]]
"""The JSON of each file, with its path."""


def all_files(file: str, more: Sequence[str] | None) -> list[str]:
    """Return the files of a command line that has no NAMEs."""
    if STANDARD_INPUT in (more or ()):
        read_standard_input()
    return [file, *(more or ())]


def parted(
    file: str, arguments: Sequence[str] | None, is_path: Callable[[str], bool] = may_be_file
) -> tuple[list[str], list[str]]:
    """Return the files and the NAMEs of a command line: what selects something in the first file is a NAME.

    Of the other arguments, those are files that may be paths by `is_path`.
    """
    if not arguments or not any(map(is_path, arguments)):
        return [file], list(arguments or ())
    paths = [argument for argument in arguments if is_path(argument)]
    names = [*(argument for argument in arguments if argument not in paths), *_selecting(file, paths)]
    files = [argument for argument in arguments if argument not in names]
    if STANDARD_INPUT in files:
        read_standard_input()
    return [file, *files], [argument for argument in arguments if argument in names]


def _selecting(file: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments that select an entry; none where the file cannot be opened."""
    try:
        checkpoint = open_checkpoint(file)
    except (CkptError, OSError):
        return []
    checkpoint.close()
    return [argument for argument in arguments if selects(checkpoint, argument)]


def reply_about(
    files: Sequence[str],
    layout: str,
    ask: Callable[[str], Reply],
    merged: Callable[[Shapes], object] | None = None,
) -> int:
    """Print the answer about one file or several, and return the exit code; `merged` is that of `_answer_each`."""
    if len(files) > 1:
        return _answer_each(files, layout, ask, merged)
    reply = ask(files[0])
    if layout in ("json", "sarif"):
        answer(json_text(reply.to_json()))
    else:
        answer(reply.text if reply.text is not None else block_text(reply.block, layout))
    reply.aside()
    return reply.code


def _answer_each(
    files: Sequence[str],
    layout: str,
    ask: Callable[[str], Reply],
    merged: Callable[[Shapes], object] | None,
) -> int:
    """Print one answer about several files and return the highest exit code.

    A file that fails has a line on stderr, and the others are answered. `merged` makes one JSON value of those of all
    files, where a list of them is not wanted.
    """
    each = _Each(files, ask)
    if layout not in ("json", "sarif"):
        answer(blocks_text(each.blocks(), layout))
    elif merged is not None:
        answer(json_text(merged(list(each.shapes()))))
    else:
        answer(json_text(to_json(each.shapes)))
    for aside in each.asides:
        aside()
    return each.code


class _Each:
    """The answers about several files, each made when its turn comes."""

    def __init__(self, files: Sequence[str], ask: Callable[[str], Reply]) -> None:
        self._files = files
        self._ask = ask
        self.code = 0
        """The highest exit code so far."""
        self.asides: list[Callable[[], None]] = []
        """Print what is said on stderr about each file."""

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Yield the rows of each file that has an answer."""
        for path in self._files:
            if isinstance(reply := self._asked(path), Reply):
                yield path, reply.block

    def shapes(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Yield the JSON of each file, or its error."""
        for path in self._files:
            reply = self._asked(path)
            yield path, reply.to_json() if isinstance(reply, Reply) else {"path": path, "error": reply}

    def _asked(self, path: str) -> Reply | str:
        """Return the answer about one file, or the error that was printed."""
        again.named[:] = [path]
        Budget().begun()
        try:
            reply = again.retried(lambda: self._ask(path))
        except Exception as error:  # whatever it is, the other files are answered
            self.code = max(self.code, report_error(error))
            return problem_of(error).removeprefix(f"{path}: ")
        self.code = max(self.code, reply.code)
        self.asides.append(reply.aside)
        return reply


def edit_each(files: Sequence[str], plan: Planner, options: EditOptions, *, json: bool, verbose: bool) -> int:
    """Carry out an edit of one checkpoint, or of each of several by itself, and report it; returns the exit code.

    A checkpoint that fails has a line on stderr, and the others are edited.
    """
    if len(files) == 1:
        edit(files[0], plan, options, json=json, verbose=verbose)
        return 0
    from ckpt_cli.render.edits import to_json as edit_json

    shapes: list[dict[str, object]] = []
    code = 0
    for path in files:
        again.named[:] = [path]
        Budget().begun()
        try:
            done = carried_out(path, plan, options)
        except Exception as error:  # whatever it is, the other checkpoints are edited
            code = max(code, report_error(error))
            shapes.append({"path": path, "error": problem_of(error).removeprefix(f"{path}: ")})
            continue
        shapes.append(edit_json(done))
        if not json:
            report_edit(done, verbose=verbose)
    if json:
        report(json_text(shapes))
    return code
