"""The entry point of the command line: nothing is imported before interrupts are handled."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NoReturn

INTERRUPTED = 130
"""The exit code that a shell reports for a process that SIGINT ended."""


def run(args: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    try:
        from ckpt_cli.cli.app import build
        from ckpt_cli.cli.boundary import guarded
        from ckpt_cli.files.elsewhere import admitted

        words = list(args) or ["--help"]
        return guarded(lambda: build().main(list(map(admitted, words)), prog_name="ckpt", standalone_mode=False))
    except KeyboardInterrupt:
        return INTERRUPTED


def main() -> NoReturn:
    """The entry point of the console script."""
    gc.disable()  # a command ends before garbage could matter, and collecting costs a third of opening a large pickle
    try:
        from ckpt_cli.cli.standard_streams import finish, prepare

        prepare()
        code = run(sys.argv[1:])
        finish()
    except KeyboardInterrupt:
        code = INTERRUPTED
    os._exit(code)  # without tearing down modules and graphs one by one


if __name__ == "__main__":
    main()
