"""Parts of typer beyond its documented functions. This is the only file that depends on how a release is built.

Works with typer 0.26, which carries a copy of click in a private module, up to 0.29. A part that a later release hides
or moves has a fallback here; `make environments` runs the tests of the command line with the newest release.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["TyperCommand", "TyperGroup", "UsageError", "parsed_in_order"]


def _usage_error() -> Any:
    """Return the base class of all errors in a command line, which typer raises but does not export.

    It is found as a base of the exported BadParameter; BadParameter itself is the fallback.
    """
    bases = (base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
    return getattr(typer, "UsageError", None) or next(bases, typer.BadParameter)


UsageError: Any = _usage_error()
"""The class of errors in a command line. It has `format_message()`, and `ctx` if the command is known."""


def parsed_in_order(command: Any, ctx: Any, args: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Parse a command line without converting its values.

    Returns the values by parameter name, and the parameters in the order in which they were given.
    """
    values, _, order = command.make_parser(ctx).parse_args(list(args))
    return values, order
