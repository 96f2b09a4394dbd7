"""NAME arguments: an exact name, a prefix, a glob, each with an index in brackets if wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor

if TYPE_CHECKING:
    from ckpt_cli.arrays.indexing import Index, Region

SomeEntry = TypeVar("SomeEntry", bound=Entry)


@dataclass(frozen=True, slots=True)
class Selection:
    """An entry that a NAME argument selects, and the index that goes with it."""

    entry: Entry
    index: Index | None
    exact: bool
    """True if the argument was the entry's own name or that of a part of it, rather than a prefix or glob."""


def select(checkpoint: Checkpoint, arguments: Iterable[str]) -> list[Selection]:
    """The entries that each argument selects, in its order; no argument selects all.

    Raises NameNotFoundError for an argument that selects nothing.
    """
    arguments = list(arguments)
    if not arguments:
        return [Selection(entry, None, exact=False) for entry in checkpoint.entries]
    return [selection for argument in arguments for selection in select_one(checkpoint, argument)]


def select_one(checkpoint: Checkpoint, argument: str) -> list[Selection]:
    """The entries that one NAME argument selects."""
    pattern, found = _selected(checkpoint, argument)
    if not found:
        raise NameNotFoundError(pattern, close_names(pattern, checkpoint.names), path=checkpoint.path)
    return found


def selects(checkpoint: Checkpoint, argument: str) -> bool:
    """True if a NAME argument is valid and selects an entry."""
    try:
        return bool(_selected(checkpoint, argument)[1])
    except UsageError:
        return False


def _selected(checkpoint: Checkpoint, argument: str) -> tuple[str, list[Selection]]:
    """Return a NAME argument without its index, and the entries that it selects, if any."""
    names = checkpoint.names
    pattern, index_text, literal = split_index(argument, names)
    index = None if index_text is None else _parsed(index_text)
    if pattern in names or literal:
        found = [entry for entry in checkpoint.entries if entry.name == pattern]
    else:
        found = _matching(checkpoint.entries, pattern)
    if not found and (part := _part_named(checkpoint.entries, pattern)) is not None:
        return pattern, [Selection(part, index, exact=True)]
    return pattern, [Selection(entry, index, exact=pattern in names) for entry in found]


def select_to_edit(checkpoint: Checkpoint, argument: str) -> list[Selection]:
    """The entries that one NAME argument selects, each to be changed.

    Raises RefusedError where several entries have a name that it selects: a dict may have the keys 0 and "0", or the
    key `a.b` beside the key `b` of its `a`. Looking at them shows all; an edit would have to guess.
    """
    found = select_one(checkpoint, argument)
    counts = checkpoint.names
    for selection in found:
        name = selection.entry.name
        if name not in counts:  # a part of a tensor, which is called by the name of the whole and its own
            name = next((whole for whole, count in counts.items() if count > 1 and name.startswith(f"{whole}.")), name)
        if counts.get(name, 0) > 1:
            raise RefusedError(
                f"several entries are called {name!r}, and it is not clear which one is meant", path=checkpoint.path
            )
    return found


def refuse_index(checkpoint: Checkpoint, argument: str, selections: Iterable[Selection], command: str) -> None:
    """Raise UsageError where a command that is about whole entries is asked for a part of one."""
    if any(selection.index is not None for selection in selections):
        raise UsageError(
            f"{argument!r} is a part of a tensor: {command} is about whole ones",
            path=checkpoint.path,
            hint="ckpt show FILE NAME[INDEX] prints the values of a part",
        )


def _part_named(entries: Sequence[Entry], name: str) -> Tensor | None:
    """The part of a tensor that is made of others by its own name, `emb.weight.values`."""
    for holder in reversed(entries):
        if isinstance(holder, Tensor) and holder.parts and (not holder.name or name.startswith(f"{holder.name}.")):
            part: Tensor | None = holder
            reached = holder.name
            while part is not None and reached != name:
                part, reached = _step(part, reached, name)
            if part is not None:
                return replace(part, name=name)
    return None


def _step(tensor: Tensor, reached: str, name: str) -> tuple[Tensor | None, str]:
    """The part on the way to a name, and the name of that part."""
    for part in tensor.parts:
        full = f"{reached}.{part.name}" if reached else part.name
        if name == full or name.startswith(f"{full}."):
            return part, full
    return None, name


def with_values(tensor: Tensor, seen: set[object]) -> Iterator[Tensor]:
    """Yield the tensor and its attributes, or the tensors that it is made of, each set of parts once."""
    if not tensor.parts or tensor.storage is not None:
        yield tensor
    parts = tensor.parts if tensor.storage is None else tensor.attributes
    view = (tensor.view, tuple(part.storage for part in parts)) if tensor.view is not None else None
    if parts and (view is None or view not in seen):
        seen.add(view)
        for part in parts:
            yield from with_values(replace(part, name=f"{tensor.name}.{part.name}"), seen)


def part_of(tensor: Tensor, index: Index | None) -> Region:
    """The part of a tensor that an index selects, or all of it; raises UsageError where it does not fit."""
    from ckpt_cli.arrays.indexing import Region

    whole = Region.of(tensor)
    try:
        return whole.at(index) if index else whole
    except UsageError as error:
        raise UsageError(f"tensor {tensor.name!r}: {error.problem}") from None


def _parsed(text: str) -> Index:
    from ckpt_cli.arrays.indexing import parse_index

    return parse_index(text)


def whole_tensors(checkpoint: Checkpoint, names: Sequence[str], command: str) -> list[Tensor]:
    """Return the tensors that NAMEs select, each once; no NAME selects all.

    Raises UsageError for a NAME with an index: the command is about whole tensors.
    """
    if not names:
        return checkpoint.tensors
    found: dict[int, Tensor] = {}
    for name in names:
        selections = select_one(checkpoint, name)
        refuse_index(checkpoint, name, selections, command)
        found.update((id(each.entry), each.entry) for each in selections if isinstance(each.entry, Tensor))
    return list(found.values())


def left(checkpoint: Checkpoint, entries: Sequence[SomeEntry], exclude: Iterable[str]) -> list[SomeEntry]:
    """Return the entries without those that arguments of `--exclude` select.

    Raises NameNotFoundError for an argument that selects nothing in the checkpoint, UsageError for a part of a tensor.
    """
    excluded = excluded_names(checkpoint, exclude)
    return [entry for entry in entries if entry.name not in excluded] if excluded else list(entries)


def excluded_names(checkpoint: Checkpoint, exclude: Iterable[str]) -> frozenset[str]:
    """Return the names of the entries that arguments of `--exclude` select, which are names, prefixes and globs."""
    found: set[str] = set()
    for argument in exclude:
        selections = select_one(checkpoint, argument)
        if any(selection.index is not None for selection in selections):
            raise UsageError(f"--exclude {argument}: a part of a tensor cannot be left out", path=checkpoint.path)
        found.update(selection.entry.name for selection in selections)
    return frozenset(found)


def is_glob(pattern: str) -> bool:
    """True where an argument is matched against names, rather than being one or a prefix."""
    return "*" in pattern or "?" in pattern


def _matching(entries: Sequence[Entry], pattern: str) -> list[Entry]:
    """The entries below a prefix, or those that a glob matches."""
    if is_glob(pattern):
        from fnmatch import translate  # to an expression that never backtracks, however long a hostile name is

        glob = re.compile(translate(pattern.replace("[", "[[]")))
        return [entry for entry in entries if glob.fullmatch(entry.name)]
    prefix = pattern.removesuffix(".") + "."
    return [entry for entry in entries if entry.name.startswith(prefix)]


def split_index(argument: str, names: Iterable[str] = ()) -> tuple[str, str | None, bool]:
    """`NAME[…]` as (name, index text, whether quotes make it literal); a known name that ends in a bracket wins."""
    if argument[:1] in ('"', "'"):
        name, quote, rest = argument[1:].partition(argument[0])
        if not quote or (rest and not (rest.startswith("[") and rest.endswith("]"))):
            raise UsageError(f"{argument!r} has no matching quote, or something after it that is not an [index]")
        return name, rest[1:-1] if rest else None, True
    if argument in names or not argument.endswith("]") or "[" not in argument:
        return argument, None, False
    name, _, index = argument.removesuffix("]").rpartition("[")
    return name, index, False


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Up to three known names that the user may have meant."""
    import difflib

    pool = list(names)[:20_000]
    last = name.rpartition(".")[2]
    same_end = [known for known in pool if known.endswith(f".{name}")] if name else []
    return (
        same_end[:3]
        or difflib.get_close_matches(name, pool, 3, 0.7)
        or [known for known in pool if last and known.rpartition(".")[2] == last][:3]
    )
