"""Checks and their findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ckpt_cli.facts import dataclass

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check` or `scan` found in a checkpoint: something wrong, or worth knowing."""

    severity: str
    """`error`, `warning` or `note`.

    For `check` an error cannot be loaded or is loaded wrongly, and a warning should not be so; for `scan` an error is
    known to be dangerous, and a warning is in no ordinary checkpoint.
    """
    code: str
    """A stable code for the kind of finding, one or two words."""
    where: str
    """The file, record, tensor or pickle."""
    message: str
    hint: str = ""
    """A command or action; empty where there is nothing to do."""
    name: str = ""
    """For `scan` the imported name that it is about; empty where it is about none."""
    file: str = ""
    """The path of the file or folder that it is about."""

    def facts(self) -> dict[str, str]:
        """Return the facts by their names."""
        return {key: getattr(self, key) for key in _FACTS}


_FACTS = ("severity", "code", "where", "message", "hint", "name", "file")


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One place where a check finds what it looks for."""

    where: str
    message: str
    severity: str = ""
    """The severity, where it differs from the check's own."""
    hint: str = ""
    """A hint, where the check's own does not fit."""
    name: str = ""
    """The entry that it is about, for a hint that names it."""


@dataclass(frozen=True, slots=True)
class Check(Generic[Subject]):
    """One code: what it means, and the function that looks for it."""

    code: str
    severity: str
    meaning: str
    """The problem, in words for the documentation."""
    find: Callable[[Subject], Iterator[Occurrence]]
    hint: str = ""
    """A command or action; `FILE` stands for the path and `NAME` for the entry, both quoted for a shell."""
