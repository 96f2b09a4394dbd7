"""`python -m ckpt_cli.cli.each_file COMMAND [OPTION]... FILE...`: a command for each file, as pre-commit needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ckpt_cli.cli.main import run

_WITH_VALUE = ("--allow", "--baseline", "-f", "--format", "-j", "--jobs")
"""The options of `scan` and `check` that are followed by a value."""


def run_each(args: Sequence[str]) -> int:
    """Run a command, the first of the arguments, for each file among the others; returns the highest exit code."""
    command, *rest = args
    options: list[str] = []
    files: list[str] = []
    values = iter(rest)
    for arg in values:
        if arg == "--":
            files += values
        elif arg.startswith("-"):
            options.append(arg)
            options += [value for value in (next(values, None),) if value is not None] if arg in _WITH_VALUE else []
        else:
            files.append(arg)
    return max((run([command, *options, "--", file]) for file in files), default=0)


if __name__ == "__main__":
    sys.exit(run_each(sys.argv[1:]))
