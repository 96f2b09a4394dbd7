"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a checkpoint, or worth knowing."""

    severity: str
    """`error` for what cannot be loaded or is loaded wrongly, `warning` for what should not be so, `note`."""
    code: str
    """What kind of thing it is, in a word or two that do not change."""
    where: str
    """The file, with the record or tensor in it."""
    message: str
    hint: str
    """What to run or do; empty where there is nothing to be done."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One place where a check finds what it looks for."""

    where: str
    message: str
    severity: str = ""
    """Where it is another than the check's own."""
    hint: str = ""
    """What to do, where the check's own hint does not say it."""
    name: str = ""
    """The entry that it is about, for a hint that names it."""


@dataclass(frozen=True, slots=True)
class Check(Generic[Subject]):
    """One code: what it means, and the function that looks for it."""

    code: str
    severity: str
    meaning: str
    """What is the matter, in words for the README."""
    find: Callable[[Subject], Iterator[Spot]]
    hint: str = ""
    """What to run or do; `FILE` stands for the path and `NAME` for the entry, both quoted for a shell."""
