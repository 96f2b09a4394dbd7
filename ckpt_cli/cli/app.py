"""The `ckpt` command and the list of its commands, each imported when it is called."""

from __future__ import annotations

import importlib
from copy import copy
from functools import cache
from typing import Annotated, Any

import typer

from ckpt_cli.cli.repeated_options import OrderedCommand
from ckpt_cli.cli.terminal import Colour, terminal
from ckpt_cli.cli.typer_parts import OneParser, TyperGroup, completions

GROUPS = {
    "Look": {
        "ls": "List names, dtypes, shapes and bytes.",
        "info": "Summarize a checkpoint in a dozen lines, or describe one entry.",
        "tree": "Show the module tree as print(net) does.",
        "show": "Print values, as torch prints them.",
        "ties": "Show which names are one tensor.",
        "stats": "Summarize the values of each tensor.",
        "series": "Follow tensors through the checkpoints of a run.",
        "check": "Check that a checkpoint is complete and valid.",
        "hash": "Hash the content of each tensor, and of all.",
        "scan": "Show the code that would run if something else loaded it.",
    },
    "Compare": {
        "diff": "Compare two checkpoints by value.",
        "match": "Say whether load_state_dict would take FILE in place of OTHER.",
    },
    "Change": {
        "set": "Set elements, slices or whole tensors, and other values.",
        "rename": "Rename entries: one, a prefix, or many at once.",
        "rm": "Take entries out.",
        "keep": "Take all entries out but some.",
        "cast": "Give floating tensors another dtype.",
        "resize": "Give embeddings, heads and biases more or fewer rows.",
        "to": "Change the device that torch.load puts tensors on.",
        "tie": "Make several names one tensor.",
        "untie": "Give tensors storages of their own.",
        "meta": "Show, set and remove strings of a safetensors file's __metadata__.",
        "compact": "Write each storage no larger than its tensors need.",
        "undo": "Restore the newest backup that an edit kept.",
    },
    "Combine": {
        "avg": "Average checkpoints of one model.",
        "mix": "Mix models that were trained from one base.",
        "merge": "Write the union of several checkpoints.",
        "graft": "Put tensors of another checkpoint in the places of old ones.",
        "delta": "Write what changed between checkpoints, and apply it.",
        "lora": "Merge, describe, extract and resize LoRA adapters.",
        "apply": "Carry out a recipe of many edits in one pass.",
    },
    "Write": {
        "dequantize": "Write quantized weights as plain floats.",
        "convert": "Write a checkpoint in another format.",
        "index": "Write the index of a folder of shards, from the shards.",
    },
}
"""The commands by what they are for, each with the first sentence of its help, so that the list imports none."""

SUMMARIES = {name: summary for group in GROUPS.values() for name, summary in group.items()}

COMMANDS = tuple(SUMMARIES)
"""Each is the function of the same name in the module of the same name, imported when it is called."""

SUBCOMMANDS: dict[str, dict[str, str]] = {
    "delta": {
        "create": "Write what changed from one checkpoint to another.",
        "apply": "Write the checkpoint that a delta was made of, from its base.",
    },
    "lora": {
        "merge": "Merge LoRA adapters into the weights of a model.",
        "info": "Describe a LoRA adapter: rank, alpha and scaling of each module.",
        "extract": "Extract a LoRA adapter from what a training changed.",
        "resize": "Give the modules of a LoRA adapter a lower rank.",
    },
}
"""The commands that are groups: each of their commands is a function of the module of the group."""

COMMAND_LINES = tuple(
    line for name in COMMANDS for line in [f"{name} {sub}" for sub in SUBCOMMANDS.get(name, ())] or [name]
)
"""All commands as they are typed, those of groups after the group's name."""

_HELP = """Look into and edit PyTorch checkpoints: nothing is loaded, nothing in them is run.

\b
ckpt ls model.pt                        names, dtypes, shapes
ckpt show model.pt 2.bias               values
ckpt ties model.pt                      which names are one tensor
ckpt check model.pt                     whether it is complete and valid
ckpt stats model.pt                     min, max, mean, std, NaN of every tensor
ckpt diff model.pt old.pt               what changed, by value
ckpt hash model.pt                      digests of contents, whatever the format
ckpt scan model.pt                      what would run if something else loaded it
ckpt set model.pt '2.weight[0,0]=100'   edit in place, tied names follow

ckpt FILE is ckpt info FILE, ckpt help COMMAND is ckpt COMMAND --help.
"""
"""Not a docstring, because click takes the control character for "leave these lines as they are"."""


class LazyCommands(OneParser, TyperGroup):
    """A group that imports the module of the one command that was called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)  # the names; get_command makes the values

    def list_commands(self, _ctx: Any) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return list(COMMANDS)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and report an interrupt, of which typer would make only an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            from ckpt_cli.cli.boundary import report_interrupt

            report_interrupt(error)
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names: `info` for a file; `help` stands for `--help`."""
        if args[:1] == ["help"]:
            args = [*args[1 : 3 if args[1:2] and args[1] in SUBCOMMANDS else 2], "--help"]
            if len(args) == 1:
                typer.echo(ctx.get_help())
                raise typer.Exit
        if args and args[0] not in self.commands:
            from ckpt_cli.cli.misspelt import require_file

            require_file(args[0], self.commands)
            args = ["info", *args]
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        """Write the commands by groups."""
        for group, commands in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(len("compact")), summary) for name, summary in commands.items()])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the commands and options that begin with the typed text."""
        return completions(self, ctx, incomplete, SUMMARIES)

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        """Import and build one command; None for a name that is not a command."""
        if cmd_name not in self.commands:
            return None
        if self.commands[cmd_name] is None:
            module = importlib.import_module(f"ckpt_cli.cli.{cmd_name}")
            single = _typer(add_completion=False)
            names = SUBCOMMANDS.get(cmd_name)
            if names is not None:
                single.callback(help=f"{SUMMARIES[cmd_name]}")(_group)
            for name in names or [cmd_name]:
                single.command(name, cls=OrderedCommand)(getattr(module, f"{name}_command"))
            command = typer.main.get_command(single)
            for each in command.commands.values() if isinstance(command, TyperGroup) else [command]:
                each.params += [_after_the_command(param) for param in self.params if param.name in _ANYWHERE]
            self.commands[cmd_name] = command
        return self.commands[cmd_name]


def _group() -> None:
    """Do nothing before a command of a group."""


_ANYWHERE = ("color", "no_pager")
"""Options that may also stand after the command's name."""


def _after_the_command(option: Any) -> Any:
    """Return an option of the group for a command: not in its help, and of effect only where it is given."""
    own = copy(option)
    own.hidden, own.expose_value, own.default = True, False, None
    own.callback = _set_terminal
    return own


def _set_terminal(_ctx: Any, option: Any, value: Any) -> None:
    """Take the value of an option that was given after the command's name."""
    if value and option.name == "no_pager":
        terminal.paged = False
    elif value:
        terminal.colour = Colour(value)


def _typer(**settings: Any) -> typer.Typer:
    """Return a Typer without rich, whose import would take longer than the rest of a command."""
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, **settings)


def _print_version(value: bool) -> None:
    if value:
        from ckpt_cli import __version__

        typer.echo(f"ckpt {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    color: Annotated[
        Colour, typer.Option("--color", help="Colours; auto is on a terminal, unless NO_COLOR is set.")
    ] = Colour.auto,
    no_pager: Annotated[
        bool, typer.Option("--no-pager", help="Print what is more than a screen without a pager.")
    ] = False,
) -> None:
    """Read the options before the command's name."""
    terminal.colour = color
    terminal.paged = not no_pager


@cache
def build() -> Any:
    """Return the group of all commands, made once for all command lines of a process."""
    root = _typer(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
    root.callback(help=_HELP)(_root)
    return typer.main.get_command(root)
