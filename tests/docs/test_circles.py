"""The shape of the package: no module needs one that needs it, by an import or by name, and no file is long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ckpt_cli
from ckpt_cli.cli.app import COMMANDS

ROOT = Path(ckpt_cli.__file__).parent
MODULES = {
    ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
_DOTTED = re.compile(r"ckpt_cli(\.\w+)+(:\w+)?")


def _names(tree: ast.AST) -> Iterator[str]:
    """What a module imports, anywhere in it but for the type checker, and the modules that its strings name."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            if node.values[0].value == "ckpt_cli.cli.":
                yield from (f"ckpt_cli.cli.{command}" for command in COMMANDS)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            yield node.value.partition(":")[0]
        pending += ast.iter_child_nodes(node)


def _needed(module: str, text: str) -> set[str]:
    """The modules that a module needs; a package only where the name is not one of its modules."""
    names = list(_names(ast.parse(text)))
    below = {name.rpartition(".")[0] for name in names if name in MODULES}
    return {name for name in names if name in MODULES and name != module and name not in below}


def test_no_module_needs_one_that_needs_it() -> None:
    graph = {module: _needed(module, path.read_text()) for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(reversed(error.args[1]))}")


def test_no_file_has_more_than_400_lines() -> None:
    tests = Path(__file__).parent.parent
    lengths = {path: path.read_text().count("\n") for folder in (ROOT, tests) for path in folder.rglob("*.py")}
    assert len(lengths) > 400
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize(
    "text",
    [
        "from ckpt_cli.formats.open import read_one",
        "from ckpt_cli.formats import open",
        "def late():\n    import ckpt_cli.formats.open",
        "TABLE = ['ckpt_cli.formats.open:read_one']",
    ],
)
def test_a_module_that_is_needed_in_any_way_is_seen(text: str) -> None:
    assert _needed("ckpt_cli.formats.sharded.read", text) == {"ckpt_cli.formats.open"}


def test_a_module_that_only_types_need_is_not() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ckpt_cli.formats.open import read_one"
    assert _needed("ckpt_cli.formats.sharded.read", text) == set()
