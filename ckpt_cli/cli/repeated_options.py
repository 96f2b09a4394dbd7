"""Options that are given several times: carried out in the order given, or refused, but never dropped."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ckpt_cli.cli.typer_parts import OneParser, TyperCommand, parsed_in_order, unknown_option
from ckpt_cli.cli.typer_parts import UsageError as TyperUsageError
from ckpt_cli.errors import UsageError, quoted

if TYPE_CHECKING:
    from ckpt_cli.ops.rename_rules import Rule

_KEY = "ckpt.renaming"

_RENAMING = ("--strip", "--add", "--sub", "--map", "--pattern")
"""Options that make new names of old ones, whose order matters also between one and another."""


class OrderedCommand(OneParser, TyperCommand):
    """A command that keeps the order of its renaming options; click keeps that of each option alone."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for param in self.params:
            if param.opts[0] == "--sub":  # typer has no list of pairs: a list of strings that takes two each time
                param.nargs = 2

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line; raises UsageError where an option has two values and takes one."""
        if not ctx.resilient_parsing:
            try:
                ctx.meta[_KEY] = self._in_order(ctx, args)
            except TyperUsageError as error:
                _explain(error, ctx, args)
                raise
        return super().parse_args(ctx, args)

    def _in_order(self, ctx: Any, args: list[str]) -> list[tuple[str, Any]]:
        """The renaming options and their values in the order in which they stand on the command line."""
        values, order = parsed_in_order(self, ctx, args)
        for param, count in Counter(order).items():
            if count > 1 and not (param.multiple or getattr(param, "is_flag", False)):
                raise UsageError(f"{max(param.opts, key=len)} is given {count} times, and takes one value")
        renaming = [param for param in order if param.opts[0] in _RENAMING and not getattr(param, "is_flag", False)]
        given = {id(param): iter(values[param.name or ""]) for param in renaming}
        return [(param.opts[0].removeprefix("--"), next(given[id(param)])) for param in order if id(param) in given]


def _explain(error: Any, ctx: Any, args: list[str]) -> None:
    """Raise UsageError with a hint where an unknown option is one that changed, or may be a name."""
    option = unknown_option(error)
    if option is None:
        return
    if option == "-n" and ctx.info_name == "diff":
        raise UsageError(error.format_message(), hint="--first N says how many places of a tensor are shown")
    word = next((arg for arg in args if arg.startswith(option) and not arg.startswith("--")), None)
    words = args[: args.index(word)] if word is not None else []
    if any(not before.startswith("-") for before in words):
        line = " ".join(map(quoted, ["ckpt", ctx.info_name, *words, "--", *args[len(words) :]]))
        raise UsageError(error.format_message(), hint=f"{line}, if it is a name; else ckpt {ctx.info_name} --help")


def rules_of(ctx: Any) -> list[Rule]:
    """The renaming options of the command line, in their order."""
    from ckpt_cli.ops.rename_rules import Rule

    return [Rule(kind, value) for kind, value in ctx.meta[_KEY]]
