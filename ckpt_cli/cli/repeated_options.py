"""Options that are given several times: carried out in the order given, or refused, but never dropped."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ckpt_cli.cli.typer_parts import TyperCommand, parsed_in_order
from ckpt_cli.errors import UsageError

if TYPE_CHECKING:
    from ckpt_cli.ops.rename_rules import Rule

_KEY = "ckpt.renaming"

_RENAMING = ("--strip", "--add", "--sub", "--map")
"""Options that make new names of old ones, whose order matters also between one and another."""


class OrderedCommand(TyperCommand):
    """A command that keeps the order of its renaming options; click keeps that of each option alone."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for param in self.params:
            if param.opts[0] == "--sub":  # typer has no list of pairs: a list of strings that takes two each time
                param.nargs = 2

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line; raises UsageError where an option has two values and takes one."""
        if not ctx.resilient_parsing:
            ctx.meta[_KEY] = self._in_order(ctx, args)
        return super().parse_args(ctx, args)

    def _in_order(self, ctx: Any, args: list[str]) -> list[tuple[str, Any]]:
        """The renaming options and their values in the order in which they stand on the command line."""
        values, order = parsed_in_order(self, ctx, args)
        for param, count in Counter(order).items():
            if count > 1 and not (param.multiple or getattr(param, "is_flag", False)):
                raise UsageError(f"{max(param.opts, key=len)} is given {count} times, and takes one value")
        given = {id(param): iter(values[param.name or ""]) for param in order if param.opts[0] in _RENAMING}
        return [(param.opts[0].removeprefix("--"), next(given[id(param)])) for param in order if id(param) in given]


def rules_of(ctx: Any) -> list[Rule]:
    """The renaming options of the command line, in their order."""
    from ckpt_cli.ops.rename_rules import Rule

    return [Rule(kind, value) for kind, value in ctx.meta[_KEY]]
