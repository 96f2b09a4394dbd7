"""The engine of `merge`: the union of several checkpoints, in which a name that several have must be the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import field

from ckpt_cli.edits.convert_plan import metadata_of
from ckpt_cli.edits.derive import Derived, DeriveOptions, derive
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.taken import Taken
from ckpt_cli.errors import RefusedError, UsageError, about, listed, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import canonical
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Tensor, Value
from ckpt_cli.model.names import prefixes_of
from ckpt_cli.ops.aliasing import digest_of_all

MERGE = Verb("merged", "merge")

FIRST, LAST = "first", "last"
PREFERENCES = (FIRST, LAST)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of `merge`."""

    prefer: str | None = None
    """`first` or `last` if the entry of that checkpoint is taken where they differ; None to refuse that."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """The prefix that the names of a checkpoint get, by its path."""
    output: DeriveOptions = field(default_factory=DeriveOptions)


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a merge, or of its dry run."""

    inputs: Sequence[tuple[str, int]]
    """Each checkpoint, and the number of the tensors that are from it."""
    equal: Sequence[str]
    """Tensors that several have, with the same elements."""
    preferred: Sequence[tuple[str, str]]
    """Each name of which several have different entries, and the checkpoint whose one was taken."""
    skipped: Sequence[tuple[str, str]]
    """Each entry that could not be taken, and its checkpoint."""
    derived: Derived


def merge(paths: Sequence[str], output: str, options: MergeOptions) -> Merged:
    """Write the union of some checkpoints as `output`, all or nothing.

    It is the first one with the tensors and plain values that only others have. Raises RefusedError where entries of
    one name differ, and none is preferred; UsageError for options that do not go together.
    """
    if len(paths) < 2:
        raise UsageError("a merge takes two checkpoints at least", path=paths[0] if paths else None)
    twice = {canonical(path) for path in paths}
    if len(twice) < len(paths):
        raise UsageError("one checkpoint is named twice", hint="name each once")
    unknown = [path for path in options.prefixes if path not in paths]
    if unknown:
        raise UsageError(f"--prefix is for {unknown[0]!r}, which is not among the files", hint="--prefix FILE=PREFIX")
    with ExitStack() as stack:
        others = [stack.enter_context(closing(_opened(path))) for path in paths[1:]]
        plan = _Plan(paths, others, options)
        derived = derive(paths[0], output, plan.make, options.output)
    inputs = [(path, plan.counts[number]) for number, path in enumerate(paths)]
    return Merged(inputs, plan.equal, plan.preferred, plan.skipped, derived)


def _opened(path: str) -> Checkpoint:
    with about(path):
        return open_checkpoint(path)


class _Plan:
    """Plans the union once the first checkpoint is open."""

    def __init__(self, paths: Sequence[str], others: Sequence[Checkpoint], options: MergeOptions) -> None:
        self._paths = paths
        self._others = others
        self._options = options
        self._differ: list[str] = []
        self.equal: list[str] = []
        self.preferred: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []
        self.counts: dict[int, int] = dict.fromkeys(range(len(paths)), 0)

    def make(self, base: Checkpoint) -> EditPlan:
        """Return the plan for the first checkpoint; raises RefusedError where entries of one name differ."""
        checkpoints = [base, *self._others]
        winners: dict[str, tuple[int, Entry]] = {}
        for number, checkpoint in enumerate(checkpoints):
            prefix = self._prefix(number)
            for entry in checkpoint.entries:
                name = prefix + entry.name
                held = winners.get(name)
                if held is None or self._is_better(checkpoints, name, held, (number, entry)):
                    winners[name] = number, entry
        metadata = self._metadata(checkpoints)
        if self._differ:
            raise RefusedError(
                f"{len(self._differ)} names are in several of them, with different entries",
                details=some_of(self._differ),
                hint="--prefer first|last says whose are taken; --prefix FILE=PREFIX keeps both apart",
            )
        _refuse_nested(winners, base)
        return EditPlan(MERGE, tuple(winners), changes=self._changes(checkpoints, winners, metadata))

    def _prefix(self, number: int) -> str:
        """Return what the names of one checkpoint begin with from now on."""
        prefix = self._options.prefixes.get(self._paths[number], "")
        return f"{prefix.removesuffix('.')}." if prefix else ""

    def _is_better(
        self, checkpoints: Sequence[Checkpoint], name: str, held: tuple[int, Entry], found: tuple[int, Entry]
    ) -> bool:
        """True if an entry takes the place of another one of the same name."""
        if _are_equal(checkpoints[held[0]], held[1], checkpoints[found[0]], found[1]):
            if isinstance(found[1], Tensor):
                self.equal.append(name)
            return False
        if self._options.prefer is None:
            self._differ.append(f"{name} of {self._paths[held[0]]} and {self._paths[found[0]]}")
            return False
        is_last = self._options.prefer == LAST
        self.preferred.append((name, self._paths[found[0] if is_last else held[0]]))
        return is_last

    def _metadata(self, checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
        """Return the strings of all of them; those that differ are noted as such."""
        found: dict[str, tuple[int, str]] = {}
        for number, checkpoint in enumerate(checkpoints):
            for key, value in metadata_of(checkpoint).items():
                held = found.setdefault(key, (number, value))
                if held[1] == value:
                    continue
                if self._options.prefer is None:
                    self._differ.append(f"metadata {key} of {self._paths[held[0]]} and {self._paths[number]}")
                elif self._options.prefer == LAST:
                    found[key] = number, value
        return {key: value for key, (_, value) in found.items()}

    def _changes(
        self, checkpoints: Sequence[Checkpoint], winners: Mapping[str, tuple[int, Entry]], metadata: Mapping[str, str]
    ) -> Changes:
        """Return what the first checkpoint becomes."""
        base, executor = checkpoints[0], self._options.output.executor
        holds_values = format_of(base).is_pickle or format_of(base).is_distributed
        prefix = self._prefix(0)
        own = {prefix + entry.name: entry for entry in base.entries}
        taken = [Taken(checkpoint, executor) for checkpoint in checkpoints]
        tensors: dict[str, Tensor] = {}
        added: dict[str, object] = {}
        values: dict[str, object] = {}
        for name, (number, entry) in winners.items():
            old = own.get(name)
            if isinstance(entry, Tensor):
                self.counts[number] += 1
            if number == 0:
                continue
            if isinstance(entry, Value):
                if old is not None and isinstance(old, Value) and not isinstance(entry.value, Opaque):
                    values[old.name] = entry.value
                elif old is None and not isinstance(entry.value, Opaque) and holds_values:
                    added[name] = entry.value
                else:
                    self.skipped.append((name, self._paths[number]))
            elif old is None:
                added[name] = taken[number].tensor(entry, name)
            elif isinstance(old, Tensor):
                tensors[old.name] = taken[number].tensor(entry, old.name)
            else:
                raise RefusedError(f"{name!r} is a tensor in {self._paths[number]} only", path=base.path)
        contents = {storage: content for one in taken for storage, content in one.contents().items()}
        new_strings = {key: text for key, text in metadata.items() if metadata_of(base).get(key) != text}
        if not format_of(base).keeps_strings:
            self.skipped += [
                (f"metadata {key}", self._paths[number])
                for number, checkpoint in enumerate(checkpoints)
                for key in metadata_of(checkpoint)
                if key in new_strings and key != "format"
            ]
            new_strings = {}
        return Changes(
            names={entry.name: name for name, entry in own.items()} if prefix else {},
            rename=(lambda name: prefix + name) if prefix else None,
            tensors=tensors,
            contents=contents,
            values=values,
            added=added,
            metadata={**base.metadata, **new_strings} if new_strings else None,
        )


def _are_equal(ours: Checkpoint, a: Entry, theirs: Checkpoint, b: Entry) -> bool:
    """True if two entries are the same: tensors bit for bit, values by what they are."""
    if isinstance(a, Value) or isinstance(b, Value):
        return isinstance(a, Value) and isinstance(b, Value) and _plain(a) == _plain(b)
    if (a.dtype.name, a.shape, a.layout) != (b.dtype.name, b.shape, b.layout):
        return False
    return digest_of_all(ours, a) == digest_of_all(theirs, b)


def _plain(entry: Value) -> object:
    """Return what a value is compared by: bits of floats, so that NaN is itself."""
    return repr(entry.value)


def _refuse_nested(names: Mapping[str, object], base: Checkpoint) -> None:
    """Raise RefusedError where something would lie in what is an entry itself; flat names may do so."""
    if not format_of(base).is_pickle:
        return
    nested = [name for name in dict.fromkeys(prefixes_of(names)) if name in names]
    if nested:
        raise RefusedError(
            f"{listed(nested, 3)} would be an entry with other entries in it",
            hint="--prefix FILE=PREFIX keeps them apart",
        )
