"""The engine of `match`: would `load_state_dict(strict=True)` of one model take the state_dict of another file?

The rules are those of torch/nn/modules/module.py (`_load_from_state_dict`), with what lazy modules and batch norms add.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_cli.facts import dataclass
from ckpt_cli.ops.match_cures import Cure, cures_of, module_renaming
from ckpt_cli.ops.match_states import Leaf, State, shapes_fit

_TRACKED = "num_batches_tracked"
"""The buffer that batch norms have since version 2 of their state_dict."""

_WEIGHT_NORM = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.original0", re.DOTALL)
"""The name of the first tensor of a module under weight_norm (torch/nn/utils/parametrizations.py)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A name of both whose shape or dtype differs."""

    name: str
    a: object
    """The shape as a list, or the dtype, in the checkpoint."""
    b: object
    """The same in the model."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of loading one state_dict in place of another, in torch's words."""

    missing: Sequence[str]
    """Names that the model has and the checkpoint does not."""
    unexpected: Sequence[str]
    """Names that the checkpoint has and the model does not."""
    sizes: Sequence[Difference]
    """Names of both with different shapes."""
    errors: Sequence[str]
    """What else load_state_dict would stop at."""
    dtypes: Sequence[Difference]
    """Names of both with different dtypes, which loading casts: not an error."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each name at which the two differ: what differs, and the shape or dtype on each side."""
        found: list[tuple[str, str, object, object]] = [("missing", name, None, None) for name in self.missing]
        found += [("unexpected", name, None, None) for name in self.unexpected]
        for what, differences in (("size", self.sizes), ("dtype", self.dtypes)):
            found += [(what, each.name, each.a, each.b) for each in differences]
        found += [("error", problem, None, None) for problem in self.errors]
        return [dict(zip(("what", "name", "a", "b"), row, strict=True)) for row in found]

    @property
    def loads(self) -> bool:
        """True if a strict load works."""
        return not (self.missing or self.unexpected or self.sizes or self.errors)


@dataclass(frozen=True, slots=True)
class Match:
    """The answer."""

    a: State
    """The state_dict that would be loaded."""
    b: State
    """The state_dict that the model has."""
    verdict: Verdict
    cures: Sequence[Cure]
    """Renamings that mend the most, the best first; several that mend equally much are equally good."""

    @property
    def loads(self) -> bool:
        """True if a strict load works as it is."""
        return self.verdict.loads

    @property
    def commands(self) -> list[str]:
        """The `ckpt rename` command that carries out each of `cures`, as one types it."""
        return [shlex.join(command_of(self, cure)) for cure in self.cures]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each name at which the two differ, for a DataFrame."""
        return self.verdict.rows()


def match(a: State, b: State) -> Match:
    """Compare two state_dicts as `load_state_dict` does, and find the renamings that would make them fit."""
    verdict = compare(a, b)
    cures: Sequence[Cure] = ()
    if not verdict.loads:
        cures = [_judged(cure, a, b) for cure in cures_of(a, b)]
    return Match(a, b, verdict, cures)


def _judged(cure: Cure, a: State, b: State) -> Cure:
    """Return a cure with what is still wrong after it."""
    after = compare(renamed(a, cure.names), b)
    return Cure(cure.rules, cure.names, cure.mends, cure.guess, cure.equal,
                loads=after.loads, left=(len(after.missing), len(after.unexpected), len(after.sizes)))  # fmt: skip


def compare(a: State, b: State) -> Verdict:
    """Compare two state_dicts as `load_state_dict(strict=True)` does, with names in the order of each."""
    a = _respelled(a, b)
    sizes, errors, dtypes = [], [], []
    for name, wanted in b.leaves.items():
        given = a.leaves.get(name)
        if given is None or wanted.is_value:
            continue
        problem = _problem(given, wanted)
        if problem:
            errors.append(problem)
        elif not shapes_fit(given, wanted):
            sizes.append(Difference(name, list(given.shape or ()), list(wanted.shape or ())))
        elif given.dtype != wanted.dtype and wanted.kind == given.kind == "tensor":
            dtypes.append(Difference(name, given.dtype, wanted.dtype))
    errors += [f'"{key}" is a dict, where load_state_dict expects a tensor' for key in a.nested]
    expected = {name for name, leaf in b.leaves.items() if not leaf.is_value or leaf.is_extra}
    missing = [name for name in b.leaves if name in expected and name not in a.leaves and not _made_up(name, a)]
    unexpected = [name for name in a.leaves if name not in expected]
    return Verdict(missing, unexpected, sizes, errors, dtypes)


def _respelled(a: State, b: State) -> State:
    """Return the state_dict as weight_norm reads it: it takes the spelling of before torch 2.0 for its own."""
    names: dict[str, str] = {}
    for name in b.leaves:
        found = _WEIGHT_NORM.fullmatch(name)
        if found is not None and f"{found[1]}parametrizations.{found[2]}.original1" in b.leaves:
            old = [f"{found[1]}{found[2]}{letter}" for letter in ("_g", "_v")]
            if all(one in a.leaves and one not in b.leaves for one in old):
                names |= {one: f"{name[:-1]}{number}" for number, one in enumerate(old)}
    return renamed(a, names) if names else a


def _problem(given: Leaf, wanted: Leaf) -> str | None:
    """Return what stops a name from being copied, apart from its shape."""
    if given.is_value:
        return (
            f'While copying the parameter named "{given.name}", expected torch.Tensor or Tensor-like object from '
            "checkpoint but received a value that is not a tensor"
        )
    if given.kind == "lazy" and wanted.kind != "lazy":
        return f'While copying the parameter named "{given.name}", it is uninitialized in the checkpoint: no shape'
    return None


def _made_up(name: str, a: State) -> bool:
    """True for the counter of batches that a batch norm makes up for a state_dict of a version before 2, or of none."""
    module, _, last = f".{name}".rpartition(".")
    if last != _TRACKED:
        return False
    version = a.versions.get(module.removeprefix("."))
    return not isinstance(version, int) or version < 2


def renamed(state: State, names: Mapping[str, str]) -> State:
    """Return a state_dict with new names for some of its own; versions follow the modules that they belong to."""
    leaves: dict[str, Leaf] = {}
    for old, leaf in state.leaves.items():
        new = names.get(old, old)
        leaves[new] = Leaf(new, leaf.shape, leaf.dtype, leaf.kind)
    module = module_renaming(names)
    versions = {module(name): version for name, version in state.versions.items()}
    return State(state.path, state.prefix, leaves, versions, state.nested, state.outside)


# --- the command that carries a renaming out ------------------------------------------------------------------------


def command_of(found: Match, cure: Cure) -> list[str]:
    """Return the words of the `ckpt rename` command that carries out a cure.

    Where no options of `rename` say it, or they would also change other names of the file, it is `--like`.
    """
    a, path = found.a, found.a.path
    subs = [_whole(sub, a.prefix) for sub in cure.rules]
    if not subs or any(not name.isprintable() for sub in subs for name in sub) or _touches_others(subs, a):
        parts = [word for option, prefix in (("--of", a.prefix), ("--other-of", found.b.prefix)) if prefix
                 for word in (option, prefix)]  # fmt: skip
        return ["ckpt", "rename", path, "--like", found.b.path, *parts, *(["--guess"] if cure.guess else [])]
    simple = _simple(subs[0], a.prefix) if len(subs) == 1 else None
    return ["ckpt", "rename", path, *(simple or [word for sub in subs for word in ("--sub", *sub)])]


def _whole(sub: tuple[str, str], prefix: str) -> tuple[str, str]:
    """Return a substitution on the full names of the checkpoint."""
    pattern, replacement = sub
    if not prefix or not pattern.startswith("^"):
        return sub
    escaped = prefix.replace("\\", r"\\")
    return f"^{re.escape(prefix)}\\.{pattern[1:]}", f"{escaped}.{replacement}"


def _touches_others(subs: Sequence[tuple[str, str]], a: State) -> bool:
    """True if substitutions change entries that are not in the state_dict."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in subs]
    return any(pattern.sub(replacement, name) != name for pattern, replacement in compiled for name in a.outside)


def _simple(sub: tuple[str, str], prefix: str) -> list[str] | None:
    """Return a substitution of a prefix by the simpler arguments that `rename` has for it."""
    pattern, new = sub
    if not prefix and pattern == "^":
        return ["--add", new.removesuffix(".")]
    body = pattern.removeprefix("^").removesuffix(r"\.")
    old = re.sub(r"\\(.)", r"\1", body)
    plain = pattern == f"^{re.escape(old)}\\." and "\\" not in new and not old.startswith("-")
    if not plain or (new and not new.endswith(".")):
        return None
    return [old, new.removesuffix(".")] if new else ["--strip", old]
