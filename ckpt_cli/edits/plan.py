"""The facts of an edit: the plan that a command makes, the options that every edit has, and the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, NamedTuple

from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.patches import Overlay
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckpt_cli.edits.files_beside import Beside
    from ckpt_cli.edits.folded import Folded


MANY = 8
"""Names that a report spells out."""


class Verb(NamedTuple):
    """The verb for the names that an edit changes."""

    past: str
    """In the past tense: `renamed`."""
    infinitive: str
    """After "would", in a dry run: `rename`."""
    between: str = "to"
    """The word between an old name and its new one."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer of `load_state_dict(strict=True)` once names are those of a model, as far as a renaming mends them."""

    model: str
    loads: bool
    missing: tuple[str, ...]
    """Names of the model that are still not there."""
    unexpected: tuple[str, ...]
    """Names, without the prefix of the state_dict, that the model still does not have."""
    sizes: tuple[str, ...]
    """Names of both with different shapes."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What becomes of an optimizer as parameters of its model go or get other names."""

    optimizer: str
    """The prefix of its entries."""
    action: str
    """`removed` for states that go with their parameters, `renamed`, or `dropped` for an optimizer that goes whole."""
    parameters: tuple[str, ...] = ()
    """The parameters whose states these are, by their old names in the model."""
    how: str | None = None
    """How it is known whose they are: `named`, `unique` or `order`."""
    hypothesis: str | None = None
    """For `order`, the order."""


@dataclass(frozen=True, slots=True)
class EditPlan:
    """The changes that an edit makes: new bytes of elements, changes of the structure, or both."""

    verb: Verb
    changed: Sequence[str] = ()
    """The names that were asked for."""
    also_changed: Sequence[str] = ()
    """Tied and overlapping names that also change."""
    changes: Changes = field(default_factory=Changes)
    """Changes of entries; if there are none, only bytes are patched."""
    patch: Callable[[Checkpoint, Overlay], None] | None = None
    """Puts the new bytes of elements into an overlay of a checkpoint's files: of the checkpoint that was planned for,
    or of its rewritten copy."""
    check: Callable[[], None] | None = None
    """Raises, once all is written and before it takes its place, where the result must not stand. A dry run makes all
    new bytes and calls it too."""
    left: Sequence[str] = ()
    """Names that were asked for too, but stay as they are: those that a cast cannot cast."""
    placed: Mapping[str, str] = field(default_factory=dict)
    """In which files of a set each key of metadata changes, in words."""
    remaining: Sequence[str] = ()
    """Names that still have the bytes of what was taken out."""
    fit: Fit | None = None
    """For `rename --like`, whether the model would load the result."""
    carried: Sequence[Carried] = ()
    """What becomes of the optimizers in the file."""
    following: Collection[str] = ()
    """Names that change because of that, not because they were asked for."""
    beside: Mapping[str, bytes | None] = field(default_factory=dict)
    """New contents of config files beside the weights, for a new folder; None for those that it does not get."""
    notes: Sequence[str] = ()
    """Other facts that whoever edits should know, a line each."""

    @property
    def renamed(self) -> Mapping[str, str]:
        """The new names that were asked for."""
        names = self.changes.names
        return {old: new for old, new in names.items() if old not in self.following} if self.following else names

    @property
    def is_structural(self) -> bool:
        """True if the document is rewritten, because more changes than bytes of elements."""
        return self.patch is None or self.changes != Changes()


Planner = Callable[[Checkpoint], EditPlan]
"""Plans an edit of a checkpoint that was just opened; raises CkptError where it cannot be done."""


@dataclass(frozen=True, slots=True)
class EditOptions:
    """Options that every edit has."""

    output: str | None = None
    """The file or folder to write the result to; None to edit in place."""
    dry_run: bool = False
    backup: bool = False
    """True if the old files are kept; for edits in place only."""
    on_progress: OnProgress | None = None
    """Called with bytes done and bytes in all, once the edit takes a while."""
    weights_only: bool = False
    """True if a new folder gets no copies of the files beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """The result of an edit, or of its dry run."""

    path: str
    output: str
    """The file that has the result: `path` itself, or the one it was written to."""
    changed: tuple[str, ...]
    also_changed: tuple[str, ...]
    """Tied and overlapping names that also changed."""
    bytes_written: int
    """Bytes of the result that were written: the patches in place, or the whole of a new file."""
    in_place: bool
    dry_run: bool
    """True if nothing was written."""
    backups: tuple[str, ...] = ()
    """The paths at which all old files were kept."""
    verb: Verb
    """The verb for the names that changed."""
    patched: bool = False
    """True if an edit in place changed a part of the file only, rather than replacing it by a new one."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The new name of each that got one."""
    removed: tuple[str, ...] = ()
    """Shards of which nothing was left, and that were removed."""
    left: tuple[str, ...] = ()
    """Names that were asked for too, but stay as they are: those that a cast cannot cast."""
    placed: Mapping[str, str] = field(default_factory=dict)
    """In which files of a set each key of metadata changed, in words."""
    beside: Beside | None = None
    """The result for the files beside a model's weights, where a new folder was written."""
    other_names: int = 0
    """Further names (hard links) of files that were replaced by new ones: they keep the old files."""
    remaining: tuple[str, ...] = ()
    """Names that still have the bytes of what was taken out."""
    unreferenced: int = 0
    """Bytes of a distributed checkpoint's files that nothing refers to after an edit in place."""
    fit: Fit | None = None
    """For `rename --like`, whether the model would load the result."""
    carried: tuple[Carried, ...] = ()
    """What became of the optimizers in the file; in the JSON only where something did."""
    notes: tuple[str, ...] = ()
    """Other facts that whoever edits should know, a line each; in the JSON only where there are some."""
    folded: Sequence[Folded] = ()
    """The changed names folded, where more than `MANY` have no new ones; not in the JSON, which has them all."""

    @property
    def backup(self) -> str | None:
        """The path at which the old file was kept, or the first of several; None where none was kept."""
        return self.backups[0] if self.backups else None
