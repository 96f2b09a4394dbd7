"""`python -m ckpt_cli.cli.man FOLDER`: manual pages (`ckpt.1`, `ckpt-ls.1`, …) from the help of the commands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer

from ckpt_cli import __version__
from ckpt_cli.cli.app import COMMANDS, GROUPS, SUBCOMMANDS, SUMMARIES, build

_EXIT = "0: yes. 1: the answer is no. 2: trouble, such as a file that cannot be read."


def pages() -> Iterator[tuple[str, str]]:
    """Yield the name of each page, without its section, and its source for `man`."""
    root = build()
    with typer.Context(root, info_name="ckpt") as ctx:
        groups = [
            line
            for group, commands in GROUPS.items()
            for line in (f".SS {_text(group)}", *_listed((f"ckpt-{name}(1)", text) for name, text in commands.items()))
        ]
        yield "ckpt", _page("ckpt", "look into and edit PyTorch checkpoints", root, ctx, [".SH COMMANDS", *groups])
        for name in COMMANDS:
            command = root.get_command(ctx, name)
            with typer.Context(command, info_name=name, parent=ctx) as own:
                subs = SUBCOMMANDS.get(name, {})
                listing = _listed((f"ckpt-{name}-{sub}(1)", text) for sub, text in subs.items())
                more = [".SH COMMANDS", *listing] if subs else []
                yield f"ckpt-{name}", _page(f"ckpt-{name}", _lower(SUMMARIES[name]), command, own, more)
                for sub, text in subs.items():
                    each = command.get_command(own, sub)
                    with typer.Context(each, info_name=sub, parent=own) as inner:
                        yield f"ckpt-{name}-{sub}", _page(f"ckpt-{name}-{sub}", _lower(text), each, inner, [])


def _lower(summary: str) -> str:
    """Return a sentence as what follows a name."""
    return summary[0].lower() + summary[1:].rstrip(".")


def _page(name: str, summary: str, command: Any, ctx: Any, more: Sequence[str]) -> str:
    """Return one page."""
    params = [(param, record) for param in command.get_params(ctx) if (record := param.get_help_record(ctx))]
    arguments = [record for param, record in params if param.param_type_name == "argument"]
    options = [record for param, record in params if param.param_type_name != "argument"]
    usage = " ".join(command.collect_usage_pieces(ctx))
    others = "ckpt(1)" if name != "ckpt" else ", ".join(f"ckpt-{each}(1)" for each in COMMANDS)
    lines = [
        f'.TH "{_text(name.upper())}" 1 "" "ckpt {_text(__version__)}"',
        *(".SH NAME", f"{_text(name)} \\- {_text(summary)}"),
        *(".SH SYNOPSIS", f".B {_text(name.replace('-', ' '))}", _text(usage)),
        *(".SH DESCRIPTION", *_paragraphs(command.help or "")),
        *([".SH ARGUMENTS", *_listed(arguments)] if arguments else []),
        *([".SH OPTIONS", *_listed(options)] if options else []),
        *more,
        *(".SH EXIT STATUS", _text(_EXIT)),
        *(".SH SEE ALSO", _text(others)),
    ]
    return "\n".join(lines) + "\n"


def _listed(records: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a paragraph with a tag for each pair."""
    for tag, text in records:
        yield from (".TP", f".B {_text(tag)}", _text(text))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help; the lines of one that begins with a backspace stay as they are."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        yield ".PP"
        if lines[0] == "\b" or lines[0].startswith("\b"):
            yield from (".nf", *map(_text, filter(None, (line.lstrip("\b") for line in lines))), ".fi")
        elif lines[0].startswith("Example:"):
            yield from (".nf", *map(_text, lines), ".fi")
        else:
            yield _text(" ".join(lines))


def _text(text: str) -> str:
    """Return a text that means itself to `man`: a hyphen is one, and no line is a request."""
    text = " ".join(text.split()) if "\n" in text else text
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


def main(arguments: Sequence[str]) -> int:
    """Write all pages into a folder, which is created; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m ckpt_cli.cli.man FOLDER, such as ~/.local/share/man/man1\n")
        return 2
    os.makedirs(arguments[0], exist_ok=True)
    for name, source in pages():
        with open(os.path.join(arguments[0], f"{name}.1"), "w", encoding="utf-8") as file:
            file.write(source)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
