"""Only files/ asks the operating system what a path is and opens files: the other rooms ask places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckpt_cli

ROOMS = ("formats", "scanner", "ops", "edits")

FORBIDDEN = {
    *("open", "LocalFile"),
    *("os.open", "os.stat", "os.lstat", "os.listdir", "os.scandir", "os.walk", "os.access"),
    *(
        f"os.path.{name}"
        for name in ("exists", "lexists", "isfile", "isdir", "islink", "samefile", "samestat", "getsize", "realpath")
    ),
    *("io.open", "Path", "pathlib.Path"),
}
"""Calls, as they are written."""


def called(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each function that is called, or passed to `map` and `filter`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)
            yield from ((each.lineno, ast.unparse(each)) for each in node.args if isinstance(each, ast.Attribute))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_asks_places_and_not_the_system(room: str) -> None:
    folder = Path(ckpt_cli.__file__).parent / room
    found = [
        f"{path.relative_to(folder.parent)}:{line}: {name}"
        for path in sorted(folder.rglob("*.py"))
        for line, name in called(path.read_text())
        if name in FORBIDDEN
    ]
    assert not found
