"""The verdict on a name that a pickle would import: allowed by torch, harmless, dangerous, or not known.

Only the name is judged here; `scanner/calls.py` judges its use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.graph import Global, Graph
from ckpt_cli.scanner.allowlist import ALLOWED, CALLING, HARMLESS, MEMORY_FORMATS
from ckpt_cli.scanner.denylist import ALIASES, ANYWHERE, INNER, LEADS_TO, MODULES, NAMES
from ckpt_cli.scanner.packages import KNOWN, PACKAGES, is_data, words

if TYPE_CHECKING:
    from ckpt_cli.model.checkpoint import Checkpoint

_WITHIN = words(
    "asyncio collections compression concurrent ctypes curses dbm distutils email encodings ensurepip html http "
    "idlelib importlib json lib2to3 logging msilib multiprocessing os pathlib pydoc_data re sqlite3 string sysconfig "
    "tkinter tomllib turtledemo unittest urllib venv wsgiref xml xmlrpc zipfile zoneinfo _pyrepl"
)
"""Modules of the standard library that have modules within; the others of its names with a dot are somebody else's."""

_LONGEST = 512
"""Characters of a name that is looked at; no real one comes near."""

_DEEPEST = 24
"""Dots in such a name."""

_NAMES = 1 << 13
"""Names whose suffixes are judged once only."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a name."""

    verdict: str
    """`allowed`, `harmless`, `depends` (on its arguments), `dangerous`, `unusual` or `unknown`."""
    reason: str
    """The reason, in a few words."""


_ALLOWED = Judgement("allowed", "torch's weights_only loader takes it")
_HARMLESS = Judgement("harmless", "it only builds data")
_DEPENDS = Judgement("depends", "it is as harmless as what it is given")
_UNUSUAL = Judgement("unusual", "no checkpoint needs this part of Python's standard library")
_UNKNOWN = Judgement("unknown", "its package decides what it does")


def judge(module: str, name: str) -> Judgement:
    """Judge one name as the pickle gives it; names of Python 2 mean what Python 3 makes of them."""
    if len(module) + len(name) > _LONGEST:
        return Judgement("dangerous", "no name is that long")
    if module.count(".") + name.count(".") > _DEEPEST:
        return Judgement("dangerous", "no name has that many parts")
    module, name = modern(module, name)
    full = f"{module}.{name}"
    if full in ALLOWED:
        return _ALLOWED
    if full in CALLING:
        return _DEPENDS
    if full in HARMLESS or full in KNOWN or f"{module}.".startswith("__torch__."):
        return _HARMLESS
    reason = _danger(module, name) or _danger_within(name)
    if reason:
        return Judgement("dangerous", reason)
    top = module.partition(".")[0]
    if top in PACKAGES:
        return _HARMLESS if name in MEMORY_FORMATS or is_data(module, name) else _foreign(top)
    if _is_standard(module, top):
        return _UNUSUAL
    return _unusual_within(name) or _UNKNOWN


def dangerous(names: Iterable[Global]) -> Iterator[Global]:
    """Those of the names that are known to be dangerous, whatever is done with them."""
    return (node for node in names if judge(node.module, node.name).verdict == "dangerous")


def dangerous_of(checkpoint: Checkpoint) -> str | None:
    """Return the first dangerous name in the pickles that were read, or None."""
    document = checkpoint.document
    if isinstance(document, Graph):
        names = list(document.globals)
    else:
        names = [Global(*name.rpartition(".")[::2]) for name in checkpoint.objects]
    node = next(dangerous(names), None)
    return None if node is None else node.qualified


def modern(module: str, name: str) -> tuple[str, str]:
    """The name in Python 3 of what protocols 0 to 2 call by its name in Python 2 (CPython's `_compat_pickle`)."""
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    first, dot, rest = name.partition(".")
    mapped = NAME_MAPPING.get((module, first))
    if mapped is not None:
        return mapped[0], mapped[1] + dot + rest
    return IMPORT_MAPPING.get(module, module), name


def _danger(module: str, name: str) -> str | None:
    """Return the reason that a name is dangerous; None where it is not known to be."""
    parts = name.split(".")
    why = _listed(f"{module}.{name}", len(module))
    if why:
        return why
    for end in _prefixes(module):
        if end in MODULES and _is_that(module, end):
            return f"{end} {MODULES[end]}"
    if module in ("builtins", "__builtins__"):
        return f"{name} of builtins is not data"
    if parts[-1] in ANYWHERE:
        return f"{parts[-1]} runs code"
    leading = next((part for part in parts if part.lstrip("_") in LEADS_TO or part in INNER), None)
    return f"{leading} leads to anything else" if leading else None


def _listed(full: str, beyond: int) -> str | None:
    """Return the reason that a name, or a module within that is longer than `beyond`, is listed as dangerous."""
    for end in _prefixes(full):
        if end in NAMES:
            return f"{end} {NAMES[end]}"
        if len(end) > beyond and "." in end and end in MODULES:
            return f"{end} {MODULES[end]}"
    return None


@lru_cache(_NAMES)
def _danger_within(name: str) -> str | None:
    """Return the reason that one of the suffixes of a name is dangerous."""
    return next(filter(None, map(_danger_through, _suffixes(name))), None)


@lru_cache(_NAMES)
def _unusual_within(name: str) -> Judgement | None:
    """Return the judgement of the first suffix of a name that is unusual."""
    return next(filter(None, map(_unusual_through, _suffixes(name))), None)


def _suffixes(name: str) -> Iterator[str]:
    """Yield what a name with dots may be where any of its parts but the last is a module that another one holds."""
    parts = name.split(".")
    for at in range(len(parts) - 1):
        first = parts[at]
        for module in dict.fromkeys((first, ALIASES.get(first, first.lstrip("_")))):
            yield ".".join((module, *parts[at + 1 :]))


def _danger_through(full: str) -> str | None:
    """Return the reason that the name is dangerous that a module leads to which another one holds."""
    if full in HARMLESS or full in ALLOWED or full in KNOWN:
        return None
    top, _, rest = full.partition(".")
    if top in MODULES:
        return f"{top} {MODULES[top]}"
    if top == "builtins":
        return f"{rest} of builtins is not data"
    return _listed(full, len(top))


def _unusual_through(full: str) -> Judgement | None:
    """Return the judgement of a name of Python's or a known package's that a module of an unknown package leads to."""
    top = full.partition(".")[0]
    if full in HARMLESS or full in ALLOWED or full in KNOWN:
        return None
    return _foreign(top) if top in PACKAGES else _UNUSUAL if top in sys.stdlib_module_names else None


def _foreign(package: str) -> Judgement:
    return Judgement("unusual", f"it is not one of the names of {package} that checkpoints have")


def _prefixes(dotted: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`."""
    at = dotted.find(".")
    while at >= 0:
        yield dotted[:at]
        at = dotted.find(".", at + 1)
    yield dotted


def _is_that(module: str, listed: str) -> bool:
    """True if a module below a listed one can be a part of it: `code.models` is not a part of Python's `code`."""
    top = listed.partition(".")[0]
    return module == listed or top not in sys.stdlib_module_names or top in _WITHIN or "." in listed


def _is_standard(module: str, top: str) -> bool:
    if top == "__main__" or top not in sys.stdlib_module_names:
        return False
    return module == top or top in _WITHIN
