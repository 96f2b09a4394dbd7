"""Functions that print the generated blocks of README.md, CONTRIBUTING.md and docs/.

Used by cog: `make readme` writes the blocks, `make lint` checks them. Commands are run for real, on copies of the
sample checkpoints. Each document has one folder of its own for as long as cog works on it, so that a later example
of a document sees what an earlier one changed, and no document depends on another.
"""

from __future__ import annotations

import ast
import atexit
import os
import pty
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import ckpt_cli

ROOT = Path(ckpt_cli.__file__).parent.parent
SAMPLES = ROOT / "sample_checkpoints"
_ENVIRONMENT = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}


def run(*commands: str) -> None:
    """Print shell commands with what they print on a terminal."""
    print("```console")
    for command in commands:
        print(f"$ {command}")
        print(_on_terminal(command), end="")
    print("```")


def prepare(code: str) -> None:
    """Run Python code that makes files for later examples; print nothing."""
    subprocess.run(["python", "-c", code], cwd=_workspace(), check=True, stdout=subprocess.DEVNULL)


def quietly(*commands: str) -> None:
    """Run shell commands that make files for later examples; print nothing, and fail where one of them fails."""
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=_workspace(), check=True, capture_output=True)


def put_adapter() -> None:
    """Put a small model and a LoRA adapter of it beside the samples; print nothing."""
    source = ROOT / "tests" / "samples" / "lora" / "linear"
    shutil.copytree(source / "adapter", _workspace() / "adapter", dirs_exist_ok=True)
    shutil.copy(source / "base.safetensors", _workspace())


def python(code: str) -> None:
    """Print Python code after having run it, so that an example that fails is noticed."""
    prepare(code)
    print(f"```python\n{code.strip()}\n```")


def help_of_every_command() -> None:
    """Print one section for each command: its help."""
    for command in commands():
        print(f"\n### ckpt {command}\n\n```text\n{_help(*command.split())}\n```")


def commands() -> list[str]:
    """Return the names of all commands, in the order of the help."""
    from ckpt_cli.cli.app import COMMAND_LINES

    return list(COMMAND_LINES)


def table_of_check_codes() -> None:
    """Print a table of every code of `ckpt check`."""
    from ckpt_cli.ops.check.run import codes

    _table(("code", "severity", "meaning"), ((f"`{code}`", severity, text) for code, severity, text in codes()))


def table_of_limits() -> None:
    """Print a table of the limits in `ckpt_cli/limits.py`, with the sentence that explains each."""
    from ckpt_cli import limits

    rows = []
    for name, text in _described_constants(ROOT / "ckpt_cli" / "limits.py"):
        rows.append((f"`{name}`", _short(getattr(limits, name)), text))
    _table(("limit", "value", "of what"), rows)


def table_of_remote_costs() -> None:
    """Print a table of the requests and bytes of commands on checkpoints elsewhere, which a test counts."""
    from remote_costs import COSTS

    rows = []
    for cost in COSTS:
        commands = ", ".join(f"`{command}`" for command in cost.commands)
        rows.append((cost.of, commands, str(cost.https), str(cost.s3), str(cost.hf), cost.size))
    _table(("checkpoint", "command", "https", "s3, gs, az", "hf", "bytes"), rows)


def table_of_make_targets() -> None:
    """Print a table of the targets of the Makefile that have a comment."""
    found = re.findall(r"^(\w[\w-]*):.*?##\s*(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    _table(("command", "what it does"), ((f"`make {target}`", text) for target, text in found))


def map_of_the_code() -> None:
    """Print one table for each folder of the package: every file with the first sentence of its docstring."""
    package = ROOT / "ckpt_cli"
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        rows = [
            (f"`{path.name}`", _first_sentence(path))
            for path in sorted(folder.glob("*.py"))
            if path.name != "__init__.py"
        ]
        if rows:
            print(f"\n**`{folder.relative_to(ROOT)}/`** — {_first_sentence(folder / '__init__.py')}\n")
            _table(("file", "what it has"), rows)


@cache
def _workspace_of(document: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"ckpt-{Path(document).stem}-"))
    atexit.register(shutil.rmtree, folder)
    for sample in SAMPLES.iterdir():
        if sample.suffix in (".pt", ".safetensors"):
            shutil.copy(sample, folder)
    return folder


def _workspace() -> Path:
    """Return the folder of the document that cog is working on."""
    import cog  # a module that exists only while cog runs a block

    return _workspace_of(cog.inFile)


def _help(*command: str) -> str:
    answer = subprocess.run(["ckpt", *command, "--help"], env=_ENVIRONMENT, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")


def _short(number: int) -> str:
    """Return a number with a binary prefix where it is a round one: `64 Mi`."""
    for prefix, unit in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if number >= unit and number % unit == 0:
            return f"{number // unit} {prefix}"
    return f"{number:,}"


def _described_constants(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the public constants of a module with the string below each, on one line."""
    body = ast.parse(path.read_text()).body
    for node, following in pairwise(body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if described and not name.startswith("_"):
                yield name, " ".join(str(following.value.value).split())


def _first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring; nothing where it has none."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


def _on_terminal(command: str) -> str:
    """Run a command whose stdout and stderr are one terminal; return its output. Raises if a signal ended it."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            ["bash", "-c", command], cwd=_workspace(), env=_ENVIRONMENT, stdout=theirs, stderr=theirs
        ) as process:
            os.close(theirs)
            pieces = []
            while piece := _read(ours):
                pieces.append(piece)
        while piece := _read(ours):  # Linux can report the end just before a last line arrives
            pieces.append(piece)
    finally:
        os.close(ours)
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    if process.returncode not in (0, 1, 2):
        raise RuntimeError(f"{command} ended with {process.returncode} after printing {text!r}")
    return re.sub(r"[^\n]*\r", "", text)  # what a command that takes long writes of its progress is wiped out again


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux reports that nothing writes to a terminal any more
        return b""
