"""Recipes of `apply`: a versioned TOML of steps, each of which is what one command does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import open_file

VERSION = 1

_TOP = ("version", "step", "optimizer")

_KEYS: Mapping[str, Mapping[str, str]] = {
    "rename": {"rename": "texts"},
    "strip": {"strip": "text"},
    "add": {"add": "text"},
    "map": {"map": "names"},
    "remove": {"remove": "texts", "exclude": "texts"},
    "keep": {"keep": "texts", "exclude": "texts"},
    "cast": {"cast": "text", "names": "texts", "exclude": "texts", "lossy": "bool"},
    "new": {"new": "names", "lossy": "bool"},
    "resize": {"resize": "sizes", "std": "number", "seed": "integer"},
    "tie": {"tie": "texts", "new": "bool", "force": "bool"},
    "take": {"take": "text", "names": "texts", "replace": "bool"},
    "layers": {"layers": "text", "slices": "slices", "interleave": "bool"},
}
"""The keys of each kind of step, the first of which says the kind, and the kinds of their values."""

KINDS = tuple(_KEYS)

_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "texts": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)),
    "names": ("a table of texts", lambda value: isinstance(value, dict)
              and all(isinstance(v, str) for v in value.values())),
    "sizes": ("a table of numbers or texts", lambda value: isinstance(value, dict)
              and all(isinstance(v, str | int) and not isinstance(v, bool) for v in value.values())),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "number": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)
               and 0 <= value < 1e30),
    "integer": ("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "slices": ("a list of tables with from and range", lambda value: isinstance(value, list) and bool(value)
               and all(isinstance(v, dict) and isinstance(v.get("range"), str) for v in value)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecipeStep:
    """One step of a recipe."""

    number: int
    """Its place, from 1 on."""
    kind: str
    """One of `KINDS`."""
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key."""
        return self.values.get(key, default)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that was read and checked; names and files in it are not looked up yet."""

    path: str
    steps: Sequence[RecipeStep]
    optimizer: str | None = None


def read_recipe(path: str) -> Recipe:
    """Read and check a recipe; raises UsageError for what it must not have, with the nearest key, and OSError."""
    with closing(open_file(path)) as file:
        if file.size > limits.RECIPE_BYTES:
            raise UsageError(f"a recipe of {file.size:,} bytes is too long", path=path)
        raw = bytes(file.read(0, file.size))
    return recipe_of(_parsed(path, raw), path)


def _parsed(path: str, raw: bytes) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not TOML: {str(error)[:200] or 'it nests too deeply'}", path=path) from None
    return found


def recipe_of(document: Mapping[str, Any], path: str = "recipe") -> Recipe:
    """Check a recipe that was parsed; raises UsageError."""
    _require_known(document, _TOP, "", path)
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        said = "no version" if version is None else f"version {str(version)[:40]!s}"
        raise UsageError(f"it has {said}", path=path, hint=f"version = {VERSION} is the one that this ckpt reads")
    steps = document.get("step", [])
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise UsageError("it has no steps", path=path, hint='[[step]] and then, say, remove = ["optimizer"]')
    if len(steps) > limits.RECIPE_STEPS:
        raise UsageError(f"it has {len(steps):,} steps", path=path, hint=f"at most {limits.RECIPE_STEPS:,}")
    optimizer = document.get("optimizer")
    if optimizer is not None and not isinstance(optimizer, str):
        raise UsageError("optimizer is trust, drop or leave", path=path)
    return Recipe(path, [_step(number, step, path) for number, step in enumerate(steps, 1)], optimizer)


def _step(number: int, step: Mapping[str, Any], path: str) -> RecipeStep:
    kinds = [kind for kind in KINDS if kind in step]
    if "tie" in kinds and "new" in kinds:
        kinds.remove("new")
    every = tuple(dict.fromkeys(key for keys in _KEYS.values() for key in keys))
    if len(kinds) != 1:
        _require_known(step, every, f"step {number}", path)
        what = "does nothing" if not kinds else f"is {' and '.join(kinds)} at once"
        raise UsageError(f"step {number} {what}", path=path, hint=f"a step has one of {', '.join(KINDS)}")
    keys = _KEYS[kinds[0]]
    _require_known(step, tuple(keys), f"step {number} ({kinds[0]})", path)
    for key, value in step.items():
        words, holds = _KINDS[keys[key]]
        if not holds(value):
            raise UsageError(f"step {number}: {key} is not {words}", path=path)
    for each in step.get("slices", ()):
        _require_known(each, ("from", "range"), f"step {number}, slices", path)
        if not isinstance(each.get("from", ""), str):
            raise UsageError(f"step {number}, slices: from is not a text", path=path)
    return RecipeStep(number, kinds[0], step)


def _require_known(table: Mapping[str, Any], known: Sequence[str], where: str, path: str) -> None:
    """Raise UsageError for a key that is not known, with the nearest one that is."""
    import difflib

    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"keys are {', '.join(known)}"
            raise UsageError(f"{f'{where}: ' if where else ''}it has no key {key[:60]!r}", path=path, hint=hint)
