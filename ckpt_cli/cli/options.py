"""Arguments and options that commands share, declared once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckpt_cli.cli import read_again as again
from ckpt_cli.cli.terminal import terminal
from ckpt_cli.errors import CkptError, about
from ckpt_cli.files.elsewhere import names_server
from ckpt_cli.files.hidden_files import journal_path
from ckpt_cli.files.places import SEPARATOR, STANDARD_INPUT, exists, place_of
from ckpt_cli.files.unchanged import unchanged
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor
from ckpt_cli.render.text import escaped

if TYPE_CHECKING:
    from ckpt_cli.formats.salvage.found import Salvaged


class Style(str, Enum):
    """The layout of an answer."""

    auto = "auto"
    table = "table"
    tsv = "tsv"
    csv = "csv"
    json = "json"
    markdown = "markdown"


class FindingStyle(str, Enum):
    """The layout of findings: those of every answer, and SARIF."""

    auto = "auto"
    table = "table"
    tsv = "tsv"
    csv = "csv"
    json = "json"
    markdown = "markdown"
    sarif = "sarif"


def complete_names(ctx: Any, incomplete: str) -> list[str]:
    """Return the names in the file on the command line that begin with the typed text."""
    return [entry.name for entry in _completing(ctx) if entry.name.startswith(incomplete)]


def complete_tensors(ctx: Any, incomplete: str) -> list[str]:
    """Return the names of tensors that begin with the typed text, followed by the `=` of an assignment."""
    names = [entry.name for entry in _completing(ctx) if isinstance(entry, Tensor)]
    return [f"{name}=" for name in names if name.startswith(incomplete)]


def complete_floats(incomplete: str) -> list[str]:
    """Return the floating dtypes that begin with the typed text."""
    from ckpt_cli.edits.cast import floats

    return [name for name in floats() if name.startswith(incomplete)]


def complete_devices(incomplete: str) -> list[str]:
    """Return the devices that begin with the typed text."""
    return [name for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps", "xpu") if name.startswith(incomplete)]


def _completing(ctx: Any) -> list[Entry]:
    """Return the entries that may be offered: those whose names have no special characters of a shell.

    Typer's zsh script evaluates what it is given, so that a name like `$(reboot)` would be run by pressing Tab. A
    file with an edit under way offers nothing, because pressing Tab must neither wait for it nor finish it. Nor does
    a file elsewhere, because pressing Tab must not go to the network.
    """
    path = os.path.expanduser(ctx.params.get("file") or "")
    if names_server(path):
        return []
    try:
        if os.path.lexists(journal_path(path)):
            return []
        checkpoint = open_checkpoint(path)
    except (CkptError, OSError):
        return []
    checkpoint.close()
    return [entry for entry in checkpoint.entries if all(char.isalnum() or char in "._-/" for char in entry.name)]


def _note_name(ctx: typer.Context, path: str) -> str:
    again.named[:] = [path]
    return _reading_input(ctx, path)


def _reading_input(ctx: typer.Context, path: str) -> str:
    """Return a path; `-` is standard input in all commands but those that edit in place."""
    if path == STANDARD_INPUT and not ctx.resilient_parsing and not _edits_in_place(ctx):
        read_standard_input()
    return path


def _edits_in_place(ctx: typer.Context) -> bool:
    return ctx.info_name in ("undo", "index") or any(param.name == "backup" for param in ctx.command.params)


def read_standard_input() -> None:
    """Make `-` the path of standard input until the command has ended."""
    from ckpt_cli.files.standard_input import standard_input

    if not exists(STANDARD_INPUT) or place_of(STANDARD_INPUT).is_local:
        again.kept.enter_context(standard_input())


_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".npy", ".pkl", ".pt2", ".index.json")
"""The ends of a word that is taken for a file, though there is none, where no entry is called so."""


def may_be_file(argument: str) -> bool:
    """True if an argument beside the first file may be another file: a path that exists, or looks like one."""
    if argument in (".", ".."):
        return False
    return argument.endswith(_SUFFIXES) or argument == STANDARD_INPUT or SEPARATOR in argument or exists(argument)


def checkpoint_argument(metavar: str, text: str) -> Any:
    """Return the argument for a checkpoint's path, by the name that its help shows."""
    return typer.Argument(metavar=metavar, help=text, callback=_note_name if metavar == "FILE" else _reading_input)


def _names_argument(metavar: str) -> Any:
    """Return the argument for names, optional where the metavar is in brackets."""
    text = "A name, a prefix (a submodule's name), or a glob with * and ?."
    if "FILE" in metavar:
        text = text.replace(", or", ",").replace("?.", "?; or another checkpoint.")
    return typer.Argument(metavar=metavar, help=text, autocompletion=complete_names)


File = Annotated[str, checkpoint_argument("FILE", "The checkpoint; its content decides the format, not its suffix.")]
Names = Annotated[list[str] | None, _names_argument("[NAME]...")]
NamesAndFiles = Annotated[list[str] | None, _names_argument("[NAME|FILE]...")]
SomeNames = Annotated[list[str], _names_argument("NAME...")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="GLOB", help="Leave out a name, prefix or glob; repeatable.", autocompletion=complete_names
    ),
]
MoreFiles = Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More checkpoints.")]
Format = Annotated[
    Style, typer.Option("-f", "--format", help="Layout; auto is a table on a terminal, else bare tab-separated rows.")
]
FindingFormat = Annotated[
    FindingStyle,
    typer.Option("-f", "--format", help="Layout; auto is a table on a terminal, else bare tab-separated rows."),
]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="JSON", help="Leave out the findings in JSON, which --json printed before."),
]
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="Write OUT and leave FILE as it is.")]
JsonReport = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Report all names, however many there are.")]
DryRun = Annotated[bool, typer.Option("-n", "--dry-run", help="Say what would change; write nothing.")]
Raw = Annotated[bool, typer.Option("--raw", help="Cast the stored numbers of scaled and packed weights as they are.")]
Backup = Annotated[bool, typer.Option("--backup", help="Keep the old file as FILE.bak, for ckpt undo.")]

Optimizer = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        metavar="trust|drop|leave",
        help="Where states cannot be carried for certain: trust the order, drop or leave the optimizer.",
    ),
]
Salvage = Annotated[
    bool,
    typer.Option(
        "--salvage", help="Of a cut file, or shards that are cut or missing, take the tensors that are there."
    ),
]
AsFiles = Annotated[
    bool,
    typer.Option("--files", help="Of rank files, take each as it is, not the model that they are joined to."),
]
Of = Annotated[
    str | None,
    typer.Option("--of", metavar="PREFIX", help="The state_dict in FILE, '' for the whole; else the model's is found."),
]
OtherOf = Annotated[str | None, typer.Option("--other-of", metavar="PREFIX", help="The same in OTHER.")]
WeightsOnly = Annotated[
    bool, typer.Option("--weights-only", help="Do not copy config, tokenizer and such into a new folder.")
]


@contextmanager
def opened(path: str, *, as_files: bool = False) -> Iterator[Checkpoint]:
    """Context manager: open the checkpoint at a path; errors that do not name their file get its name.

    With `as_files`, the files of ranks are opened as they are, and not as the model that they are joined to. Its notes
    and warnings are printed on stderr. Raises ChangedError if another process changed values that were read.
    """
    with (
        about(path),
        closing(open_checkpoint(path, files=as_files)) as checkpoint,
        unchanged(checkpoint.container.files),
    ):
        said = [f"note: {escaped(path)}: {escaped(note)}\n" for note in checkpoint.notes]
        said += [f"warning: {escaped(path)}: {escaped(part)}\n" for part in checkpoint.unread]
        for line in said:
            if line not in again.said:
                terminal.say(line, again.named)
                again.said.add(line)
        yield checkpoint


@contextmanager
def opened_or_salvaged(
    path: str, *, salvage: bool, as_files: bool = False
) -> Iterator[tuple[Checkpoint, Salvaged | None]]:
    """Context manager: open a checkpoint, or with `salvage` what is left of a cut one, with what is lost of it.

    The second value is None for a checkpoint that is whole, which opens as without `salvage`.
    """
    if salvage:
        from ckpt_cli.formats import open_salvaged

        with about(path), closing(open_salvaged(path)) as found:
            if not found.is_whole:
                yield found.checkpoint, found
                return
    with opened(path, as_files=as_files) as checkpoint:
        yield checkpoint, None
