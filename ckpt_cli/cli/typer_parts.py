"""Parts of typer beyond its documented functions. This is the only file that depends on how a release is built.

Works with typer 0.26, which carries a copy of click in a private module, up to 0.29. A part that a later release hides
or moves has a fallback here; `make environments` runs the tests of the command line with the newest release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
import typer.core
from typer.core import TyperCommand, TyperGroup

__all__ = ["OneParser", "TyperCommand", "TyperGroup", "UsageError", "completions", "parsed_in_order", "unknown_option"]


_COMPDEF = "compdef %(complete_func)s %(prog_name)s"
_FIRST_TAB = f"""if [ "$funcstack[1]" = "_%(prog_name)s" ]; then
  %(complete_func)s "$@"
else
  {_COMPDEF}
fi"""
"""zsh runs an installed script when Tab is first pressed: it must then complete, and not only be ready to.

Its first line must be `#compdef`.
"""


def _mend_zsh() -> None:
    """Make the first Tab in zsh work, where typer's script is the one that this was tried with."""
    try:
        from typer import _completion_classes as classes
        from typer import _completion_shared as shared

        scripts, shell = shared._completion_scripts, classes.ZshComplete
        if shell.source_template.rstrip().endswith(_COMPDEF):
            shell.source_template = scripts["zsh"] = shell.source_template.replace(_COMPDEF, _FIRST_TAB).lstrip()
    except (ImportError, AttributeError, KeyError):
        return


_mend_zsh()


class OneParser:
    """A command that makes its parser once, rather than for each reading of each command line.

    What a parser keeps of a command line is its context, for the errors.
    """

    _parser: Any = None

    def make_parser(self, ctx: Any) -> Any:
        """Return the parser."""
        if self._parser is None:
            self._parser = super().make_parser(ctx)  # type: ignore[misc]
        self._parser.ctx = ctx
        return self._parser


def _usage_error() -> Any:
    """Return the base class of all errors in a command line, which typer raises but does not export.

    It is found as a base of the exported BadParameter; BadParameter itself is the fallback.
    """
    bases = (base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
    return getattr(typer, "UsageError", None) or next(bases, typer.BadParameter)


UsageError: Any = _usage_error()
"""The class of errors in a command line. It has `format_message()`, and `ctx` if the command is known."""


def completions(group: TyperGroup, ctx: Any, incomplete: str, summaries: Mapping[str, str]) -> list[Any]:
    """Return what Tab offers for the first word: commands with their summaries, and options.

    Without this, typer would import every command for its summary; that is the fallback.
    """
    item = getattr(typer.core, "CompletionItem", None)
    if item is None:
        return TyperGroup.shell_complete(group, ctx, incomplete)
    found = [item(name, help=text) for name, text in summaries.items() if name.startswith(incomplete)]
    return [*found, *super(TyperGroup, group).shell_complete(ctx, incomplete)]


def unknown_option(error: Any) -> str | None:
    """Return the option that a usage error is about, where no option is called so and none is near; else None."""
    return None if getattr(error, "possibilities", None) else getattr(error, "option_name", None)


def parsed_in_order(command: Any, ctx: Any, args: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Parse a command line without converting its values.

    Returns the values by parameter name, and the parameters in the order in which they were given.
    """
    values, _, order = command.make_parser(ctx).parse_args(list(args))
    return values, order
