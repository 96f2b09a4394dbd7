"""The plan of `apply`: the steps of a recipe, each planned on what the steps before it would have made.

Nothing is written between the steps. Each is planned by the planner of its own command, on a checkpoint whose entries
are those of the last step: tensors that are new are over storages that make their bytes when they are read. What comes
of all steps are the changes of one edit, carried out in one pass over the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.edits.apply_layers import taken, wanted_layers
from ckpt_cli.edits.cast import dtype_named, plan_cast
from ckpt_cli.edits.expression_tensors import Expression, new_by_expression
from ckpt_cli.edits.new_names import name_of_new, require_room
from ckpt_cli.edits.optimizer import carrying
from ckpt_cli.edits.plan import Carried, EditPlan, Planner, Verb
from ckpt_cli.edits.recipe import Recipe, RecipeStep
from ckpt_cli.edits.rename import plan_rename, renaming
from ckpt_cli.edits.resize import ResizeOptions, plan_resize, resize_of
from ckpt_cli.edits.rm import plan_keep, plan_rm, whole_containers
from ckpt_cli.edits.tie import plan_tie
from ckpt_cli.errors import CkptError, RefusedError, UsageError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor, Value
from ckpt_cli.model.names import Below
from ckpt_cli.ops.rename_patterns import is_pattern
from ckpt_cli.ops.rename_rules import Renaming, Rule, in_turn
from ckpt_cli.parallel.lazy import ExtentBytes, Home, Leaf, made_of
from ckpt_cli.parallel.lazy_made import Converted

if TYPE_CHECKING:
    from ckpt_cli.edits.expression_sources import Sources

_VERB = Verb("applied a recipe to", "apply a recipe to", "as")


def plan_apply(checkpoint: Checkpoint, recipe: Recipe, of: Sources) -> EditPlan:
    """Plan all steps of a recipe as one edit; raises what the command of a step raises, with the number of the step."""
    state = _State(checkpoint, of, recipe.optimizer)
    for step in recipe.steps:
        with _in_step(step):
            state.carry_out(step)
    return state.plan()


@contextmanager
def _in_step(step: RecipeStep) -> Iterator[None]:
    """Context manager: say in errors which step they are about."""
    try:
        yield
    except CkptError as error:
        error.problem = f"step {step.number}, {step.kind}: {error.problem}"
        raise


@dataclass(slots=True)
class _Record:
    """An entry as it is after some steps."""

    entry: Entry
    origin: str | None
    """The name that it has in the file; None for one that is not there."""
    is_changed: bool = False
    """True if it is a tensor with other facts, or a value that is another one."""


class _State:
    """A checkpoint after some steps of a recipe."""

    def __init__(self, checkpoint: Checkpoint, of: Sources, optimizer: str | None) -> None:
        self._checkpoint = checkpoint
        self._of = of
        self._optimizer = optimizer
        self._records = [_Record(entry, entry.name) for entry in checkpoint.entries]
        self._contents: dict[Storage, Content] = {}
        self._renamings: list[Renaming] = []
        self._prefixes: set[str] = set()
        self._checks: list[Callable[[], None]] = [of.require_unchanged]
        self._carried: list[Carried] = []
        self._notes: list[str] = []
        self._every: list[Checkpoint] = []
        """The checkpoints after each step, kept so that no two have one identity."""

    def _now(self) -> Checkpoint:
        """Return the checkpoint as it is now."""
        now = replace(self._checkpoint, entries=[record.entry for record in self._records])
        self._every.append(now)
        return now

    def carry_out(self, step: RecipeStep) -> None:
        """Plan one step, and take its changes over."""
        now = self._now()
        plan = self._planner(step)(now)
        changes = self._readable(now, plan.changes)
        self._take_over(changes)
        if plan.check is not None:
            self._checks.append(plan.check)
        self._carried += plan.carried
        names = list(plan.renamed) or list(plan.changed)
        self._notes.append(f"step {step.number}: {plan.verb.past} {listed(names, 5)}")
        self._notes += [f"  {note}" for note in plan.notes]

    def _planner(self, step: RecipeStep) -> Planner:
        """Return the planner of a step."""
        renames: dict[str, Callable[[], list[Rule]]] = {
            "rename": lambda: [_rule(text) for text in step.get("rename")],
            "strip": lambda: [Rule("strip", step.get("strip"))],
            "add": lambda: [Rule("add", step.get("add"))],
            "map": lambda: [Rule("map", step.get("map"))],
        }
        if step.kind in renames:
            steps = renaming(None, None, renames[step.kind]())
            return carrying(lambda now: plan_rename(now, steps), self._optimizer)
        if step.kind in ("remove", "keep"):
            plan = plan_rm if step.kind == "remove" else plan_keep
            names, exclude = step.get(step.kind), step.get("exclude", [])
            return carrying(lambda now: plan(now, names, exclude), self._optimizer)
        works: dict[str, Callable[[Checkpoint], EditPlan]] = {
            "cast": lambda now: self._cast(now, step),
            "new": lambda now: self._new(now, step),
            "resize": lambda now: self._resize(now, step),
            "tie": lambda now: plan_tie(
                now, step.get("tie"), force=step.get("force", False), new=step.get("new", False)
            ),
            "take": lambda now: self._placed(now, taken(now, self._of, step), replaces=step.get("replace", False)),
            "layers": lambda now: self._layers(now, step),
        }  # fmt: skip
        return works[step.kind]

    # --- kinds of steps ----------------------------------------------------------------------------------------------

    def _cast(self, now: Checkpoint, step: RecipeStep) -> EditPlan:
        dtype = dtype_named(step.get("cast"))
        lossy = step.get("lossy", False)
        plan = plan_cast(now, dtype, step.get("names", []), exclude=step.get("exclude", []), lossy=lossy)
        old = {tensor.name: tensor for tensor in now.tensors}
        tensors, contents, made = dict(plan.changes.tensors), {}, {}
        for name, tensor in plan.changes.tensors.items():
            before = old[name]
            if tensor.storage is None or before.storage is None or tensor.parts:
                raise RefusedError(f"{name!r} is {tensor.layout}, which a recipe does not cast", hint="ckpt cast does")
            if tensor.storage not in made:
                numel = tensor.storage.nbytes // dtype.itemsize
                home = Home(name, now, allow=lossy)
                whole = replace(before, shape=(numel,), stride=(1,), storage_offset=0, conj=False, neg=False)
                lazy = Converted(Leaf(home, now, whole), dtype)
                new, content = made_of(lazy, name, self._of.executor, before.storage.location)
                assert new.storage is not None
                made[tensor.storage] = new.storage
                contents[new.storage] = content
                self._checks.append(_kept(home, dtype.name, name))
            tensors[name] = replace(tensor, storage=made[tensor.storage])
        changes = Changes(tensors=tensors, contents=contents)
        return replace(plan, changes=changes, check=None)

    def _new(self, now: Checkpoint, step: RecipeStep) -> EditPlan:
        added: dict[str, object] = {}
        contents: dict[Storage, Content] = {}
        for name, text in step.get("new").items():
            require_room(now, name_of_new(name), added)
            if name in now.names:
                raise RefusedError(f"{name!r} is there already", hint="a step before this one may remove it")
            expression = Expression(text, name, allow=step.get("lossy", False))
            tensor, content, check = new_by_expression(now, expression, self._of)
            added[name] = tensor
            if tensor.storage is not None:
                contents[tensor.storage] = content
            self._checks.append(check)
        return EditPlan(Verb("made", "make"), tuple(added), changes=Changes(added=added, contents=contents))

    def _resize(self, now: Checkpoint, step: RecipeStep) -> EditPlan:
        asked = [resize_of(f"{name}={rows}") for name, rows in step.get("resize").items()]
        options = ResizeOptions(step.get("std", 0.02), step.get("seed", 0), self._optimizer, self._of.executor)
        return plan_resize(now, asked, options)

    def _layers(self, now: Checkpoint, step: RecipeStep) -> EditPlan:
        """Put slices of layers one behind the other in the place of all layers."""
        wanted, old = wanted_layers(now, self._of, step)
        plan = self._placed(now, wanted, replaces=True)
        gone = frozenset(name for name in old if name not in wanted)
        prefixes = frozenset(whole_containers(gone, {*now.names, *wanted} - gone)) if gone else frozenset()
        return replace(plan, changes=replace(plan.changes, dropped=gone, dropped_prefixes=prefixes))

    def _placed(self, now: Checkpoint, wanted: Mapping[str, tuple[Checkpoint, Tensor]], *, replaces: bool) -> EditPlan:
        """Copy tensors to new names, or in the place of what is there."""
        old: dict[str, Entry] = {entry.name: entry for entry in now.entries}
        tensors: dict[str, Tensor] = {}
        added: dict[str, object] = {}
        contents: dict[Storage, Content] = {}
        copies: dict[object, tuple[Tensor, Content]] = {}
        for name, (checkpoint, tensor) in wanted.items():
            before = old.get(name)
            if before is tensor:
                continue
            key = (id(checkpoint), tensor.view) if checkpoint is not now and tensor.view is not None else name
            if key not in copies:  # names that are tied in another file stay tied
                copies[key] = made_of(Leaf(Home(name, now, allow=False), checkpoint, tensor), name, self._of.executor)
            new, content = copies[key]
            assert new.storage is not None
            contents[new.storage] = content
            if before is None:
                require_room(now, name_of_new(name), {})
                added[name] = replace(new, name=name)
            elif not replaces or not isinstance(before, Tensor) or before.storage is None or before.parts:
                raise RefusedError(f"{name!r} is there already", hint="replace = true takes the other one")
            else:
                tensors[name] = replace(
                    before, dtype=new.dtype, shape=new.shape, stride=new.stride, storage=new.storage, storage_offset=0,
                    conj=False, neg=False, big_endian=False, alias_of=None,
                )  # fmt: skip
        changes = Changes(tensors=tensors, added=added, contents=contents)
        return EditPlan(Verb("took", "take"), (*tensors, *added), changes=changes)

    # --- taking over -------------------------------------------------------------------------------------------------

    def _readable(self, now: Checkpoint, changes: Changes) -> Changes:
        """Return changes whose new storages can be read by later steps."""
        del now
        made: dict[Storage, Storage] = {}
        for storage, content in changes.contents.items():
            if storage.source is not None:
                self._contents[storage] = content
                continue
            if content.extents is None:
                raise RefusedError("its new bytes cannot be read before they are written")
            source = ExtentBytes(content.extents)
            made[storage] = Storage(storage.key, storage.nbytes, storage.location, source)
            self._contents[made[storage]] = content

        def moved(tensor: Tensor) -> Tensor:
            new = made.get(tensor.storage) if tensor.storage is not None else None
            return tensor if new is None else replace(tensor, storage=new)

        tensors = {name: moved(tensor) for name, tensor in changes.tensors.items()}
        added = {name: moved(value) if isinstance(value, Tensor) else value for name, value in changes.added.items()}
        return replace(changes, tensors=tensors, added=added)

    def _take_over(self, changes: Changes) -> None:
        below = Below(changes.dropped_prefixes)
        staying = []
        for record in self._records:
            name = record.entry.name
            if name in changes.dropped or name in below:
                continue
            if name in changes.tensors:
                record.entry, record.is_changed = changes.tensors[name], True
            if name in changes.values:
                record.entry, record.is_changed = Value(name, changes.values[name]), True
            if name in changes.names:
                record.entry = replace(record.entry, name=changes.names[name])
            staying.append(record)
        self._records = staying
        if not self._renamings:
            self._prefixes |= changes.dropped_prefixes
        if changes.rename is not None:
            self._renamings.append(changes.rename)
        for name, value in changes.added.items():
            assert isinstance(value, Tensor)
            self._records.append(_Record(replace(value, name=name), None))

    # --- the result --------------------------------------------------------------------------------------------------

    def plan(self) -> EditPlan:
        """Return all steps as one edit."""
        names = {r.origin: r.entry.name for r in self._records if r.origin is not None and r.origin != r.entry.name}
        origins = {record.origin for record in self._records}
        gone = {entry.name for entry in self._checkpoint.entries if entry.name not in origins}
        tensors: dict[str, Tensor] = {}
        values: dict[str, object] = {}
        added: dict[str, object] = {}
        for record in self._records:
            entry, origin = record.entry, record.origin
            if origin is None and entry.name in gone and isinstance(entry, Tensor) and self._can_replace(entry.name):
                origin, record.is_changed = entry.name, True
                gone.discard(entry.name)
            if origin is None:
                added[entry.name] = entry
            elif record.is_changed and isinstance(entry, Tensor):
                tensors[origin] = replace(entry, name=origin)
            elif record.is_changed and isinstance(entry, Value):
                values[origin] = entry.value
        again = [name for name in added if name in self._checkpoint.names]
        if again:
            raise UsageError(
                f"{listed(again, 3)} would be new where others of that name move",
                hint="two recipes, one after the other",
            )
        used = {tensor.storage for tensor in (*tensors.values(), *added.values()) if isinstance(tensor, Tensor)}
        changes = Changes(
            names=names,
            rename=in_turn(self._renamings) if names else None,
            dropped=frozenset(gone),
            dropped_prefixes=frozenset(prefix for prefix in self._prefixes if self._is_empty(prefix)),
            tensors=tensors,
            values=values,
            added=added,
            contents={storage: content for storage, content in self._contents.items() if storage in used},
        )

        def check() -> None:
            for each in self._checks:
                each()

        changed = dict.fromkeys([*names.values(), *(names.get(name, name) for name in tensors), *added, *sorted(gone)])
        return EditPlan(
            _VERB, tuple(changed), changes=changes, check=check, carried=self._carried, notes=self._notes,
        )  # fmt: skip

    def _can_replace(self, name: str) -> bool:
        """True if a tensor of the file is such that another one can stand in its place."""
        found = next(entry for entry in self._checkpoint.entries if entry.name == name)
        return isinstance(found, Tensor) and found.storage is not None and not found.parts

    def _is_empty(self, prefix: str) -> bool:
        """True if nothing is below a prefix in the end."""
        return not any(f"{record.entry.name}.".startswith(f"{prefix}.") for record in self._records)


def _rule(text: str) -> Rule:
    """Return the rule of `OLD=NEW`, a pattern or a name or prefix."""
    if is_pattern(text):
        return Rule("pattern", text)
    old, equals, new = text.partition("=")
    if not (equals and old and new):
        raise UsageError(f"{text!r} is not OLD=NEW")
    return Rule("map", {old: new})


def _kept(home: Home, dtype: str, name: str) -> Callable[[], None]:
    """Return a check that raises where a cast lost values."""

    def check() -> None:
        if home.losses and not home.allow:
            raise RefusedError(f"{home.losses} in {dtype} (tensor {name!r})", hint="lossy = true casts all the same")

    return check
