"""What ckpt needs of typer beyond its documented functions, and what it does where a release hides it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from ckpt_cli.cli import typer_parts

PACKAGE = Path(typer_parts.__file__).parent.parent


def test_the_class_of_command_line_errors_is_the_base_of_those_that_typer_exports() -> None:
    assert typer_parts.UsageError.__name__ == "UsageError"
    assert issubclass(typer.BadParameter, typer_parts.UsageError)


def test_a_typer_that_exports_the_class_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer, "UsageError", KeyError, raising=False)
    assert typer_parts._usage_error() is KeyError


def test_the_class_of_bad_parameters_takes_the_place_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class LonelyError(Exception):
        pass

    monkeypatch.setattr(typer, "BadParameter", LonelyError)
    assert typer_parts._usage_error() is LonelyError


def test_no_other_file_knows_how_typer_is_built() -> None:
    private = re.compile(r"typer\._|typer\.core|\b_click\b|import click|from click|typer\.\w+\.__mro__")
    found = [path.name for path in sorted(PACKAGE.rglob("*.py")) if private.search(path.read_text())]
    assert found == ["typer_parts.py"]
