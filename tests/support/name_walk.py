"""Judge every name of the packages that are installed, and report those that do something and are no finding.

    python tests/support/name_walk.py [PACKAGE…]

Every module of the known packages and of the standard library is imported, and every attribute of it is judged, those
of the modules and classes that it holds too. A name for which `ckpt scan` reports no error or warning must not open,
run, load, remove or import anything, as far as its bytecode says (`code_effects.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import random
import sys
import types
import warnings
from collections.abc import Iterable, Iterator

from code_effects import effect

from ckpt_cli.scanner.allowlist import ALLOWED, HARMLESS
from ckpt_cli.scanner.judge import judge
from ckpt_cli.scanner.packages import KNOWN, PACKAGES

FOUND = ("dangerous", "unusual")
"""Verdicts that are an error or a warning."""

NOT_IMPORTED = {
    word
    for words in (
        "__main__ antigravity this idlelib test tests turtledemo turtle tkinter lib2to3 conftest testing _testing "
        "msvcrt winreg nt externals bottleneck",
    )
    for word in words.split()
}
"""Modules whose import does something, or that hold tests."""

HOPS = 5
"""Modules that a long name goes through."""


def modules_of(package: str) -> Iterator[tuple[str, types.ModuleType]]:
    """Yield a module and those below it, imported one by one; those that cannot be imported are left out."""
    if package.rpartition(".")[2] in NOT_IMPORTED:
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module = importlib.import_module(package)
    except (Exception, SystemExit):
        return
    yield package, module
    for found in list(pkgutil.iter_modules(getattr(module, "__path__", ()))):
        if not found.name.startswith("test_"):
            yield from modules_of(f"{package}.{found.name}")


def names_of(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """Yield the names of a module, and those of the modules and classes that it holds, with what they stand for."""
    for name, value in list(vars(module).items()):
        yield name, value
        if _is_module(value) or type(value) is type:
            for inner, leaf in list(vars(value).items()):
                yield f"{name}.{inner}", leaf


def long_name(module: types.ModuleType, choice: random.Random) -> str | None:
    """Return a name that goes through modules which hold each other; None where the module holds none."""
    names: list[str] = []
    for _ in range(HOPS):
        held = [name for name, value in vars(module).items() if _is_module(value)]
        if not held:
            break
        names.append(choice.choice(held))
        module = vars(module)[names[-1]]
    return ".".join([*names, choice.choice(list(vars(module)))]) if names else None


def _is_module(value: object) -> bool:
    return issubclass(type(value), types.ModuleType)  # isinstance would ask the value, which may warn


class Walk:
    """The names judged so far."""

    def __init__(self) -> None:
        self.judged = 0
        self.quiet = 0
        self._looked: set[int] = set()
        self._random = random.Random(1)

    def module(self, path: str, module: types.ModuleType) -> Iterator[str]:
        """Judge every name of a module; yield a line for each that is wrongly quiet."""
        for name, value in names_of(module):
            self.judged += 1
            verdict = judge(path, name).verdict
            if verdict == "unknown":
                yield f"{path}.{name}: a name of a known package that is only a note"
            elif verdict not in FOUND:
                self.quiet += 1
                yield from self._doing(f"{path}.{name}", value)
        yield from self._through(path, module)

    def _through(self, path: str, module: types.ModuleType) -> Iterator[str]:
        """Judge names that lead to this module through one of an unknown package, or through others that it holds."""
        for name in list(vars(module)):
            full = f"{path}.{name}"
            if not (full in KNOWN or full in HARMLESS or full in ALLOWED) and judge("lab", full).verdict not in FOUND:
                yield f"lab.{full}: a name of a known package that is quiet through an unknown one"
        for _ in range(20):
            name = long_name(module, self._random) or ""
            self.judged += 1
            if name and judge(path, name).verdict not in FOUND and f"{path}.{name}" not in HARMLESS | KNOWN:
                yield f"{path}.{name}: quiet through modules"

    def _doing(self, full: str, value: object) -> Iterator[str]:
        """A line if a name that is quiet is a module, or does something."""
        if _is_module(value):
            yield f"{full}: a module"
        elif callable(value) and id(value) not in self._looked:
            self._looked.add(id(value))
            doing = effect(value)
            if doing is not None:
                yield f"{full}: {doing}"


def walk(packages: Iterable[str]) -> tuple[Walk, list[str]]:
    """Walk packages; return the walk and what is wrong."""
    state = Walk()
    wrong = [line for package in packages for found in modules_of(package) for line in state.module(*found)]
    return state, wrong


def main(packages: list[str]) -> int:
    """Walk the packages given, or all."""
    warnings.simplefilter("ignore")
    state, wrong = walk(packages or sorted({*PACKAGES, *sys.stdlib_module_names}))
    print(*wrong, sep="\n")
    print(f"{state.judged} names judged, {state.quiet} are quiet, {len(wrong)} of them wrongly")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
