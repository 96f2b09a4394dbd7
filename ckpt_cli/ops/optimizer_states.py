"""The state_dicts of optimizers in a checkpoint: their groups, the parameters that these list, and the state of each.

The layouts are those of torch.optim (numbers in `params`, perhaps `param_names` beside), of `get_state_dict` and FSDP's
`optim_state_dict` (names in `params`), of the same flattened (`param_groups.NAME.lr`), and of joined files of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

from ckpt_cli import limits
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value
from ckpt_cli.model.names import Holders
from ckpt_cli.ops.parts import optimizer_prefixes

Shape = tuple[int, ...]

LIKE_PARAMETER = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "acc_delta",
    "exp_inf", "variance", "prev", "step_size", "ax", "state1", "state2", "exp_avg_diff", "exp_avg_slow",
)  # fmt: skip
"""Keys of states that have the shape of their parameter, in torch's and other optimizers."""

_FACTORS = (("row_var", "col_var", 1), ("exp_avg_sq_row", "exp_avg_sq_col", 0))
"""Keys of the two factors of Adafactor's second moment, torch's and transformers', and how many dimensions of size 1
are at the end of the first."""

_OF_ANOTHER_SHAPE = ("projector",)
"""Keys of optimizers whose states have the shape of a projected gradient (GaLore)."""

_OF_ALL = ("prev_flat_grad", "old_dirs")
"""Keys of a state that belongs to all parameters together: that of LBFGS, which stands at the first one."""

_NEGATIVE = "has a negative number"

_DIGITS = 20
"""Digits of a number of a parameter, and one."""

_FIRST_WORDS = 8
"""Places of a long name at which the state of an optimizer is looked for."""


@dataclass(frozen=True, slots=True)
class Group:
    """One of the `param_groups`."""

    number: int | None
    """None where settings stand beside each name."""
    keys: Sequence[int | str]
    """What stands for each of its parameters in the state_dict: a number, or its name."""
    settings: Mapping[str, Entry]
    """Its entries by their keys: `lr`, `weight_decay`, `params`…"""


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter as its optimizer has it."""

    key: int | str
    """What stands for it in the state_dict."""
    group: Group | None
    """None where the file does not say it."""
    name: str | None = None
    """Its name, where the optimizer has it."""
    states: Mapping[str, Entry] = field(default_factory=dict)
    """Its state by keys: `exp_avg`, `step`…; empty for one that was frozen, or never stepped."""

    @property
    def shape(self) -> Shape | None:
        """The shape that its state shows; None where nothing shows it."""
        if not self.states or any(key in self.states for key in _OF_ANOTHER_SHAPE):
            return None
        for key in LIKE_PARAMETER:
            state = self.states.get(key)
            if isinstance(state, Tensor):
                return state.shape
        for first, second, ones in _FACTORS:
            row, col = self.states.get(first), self.states.get(second)
            if isinstance(row, Tensor) and isinstance(col, Tensor) and row.shape and col.shape:
                return (*row.shape[: len(row.shape) - ones], col.shape[-1])
        return None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """The state_dict of one optimizer."""

    prefix: str
    """The name that its entries begin with; empty where the whole checkpoint is one."""
    layout: str
    """`numbers`, `names`, `flat` (settings stand beside each name), or `joined` of files of ranks."""
    groups: Sequence[Group] = ()
    slots: Sequence[Slot] = ()
    """Its parameters in the order of the groups."""
    strays: Mapping[int, Mapping[str, Entry]] | Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    """States of parameters that no group lists."""
    fault: str = ""
    """The reason why its groups cannot be read; then it has no slots."""
    is_broken: bool = False
    """True if no optimizer of torch writes such groups."""

    @property
    def is_of_all(self) -> bool:
        """True if a state belongs to all parameters together."""
        return any(key in slot.states for slot in self.slots for key in _OF_ALL)

    @property
    def is_flattened(self) -> bool:
        """True if each group has one vector, in which its parameters stand one after another."""
        shapes = [slot.shape for slot in self.slots]
        return bool(self.groups) and len(shapes) == len(self.groups) and all(len(each or ()) == 1 for each in shapes)

    def path(self, *keys: object) -> str:
        """Return the name of what is below it."""
        return ".".join(str(key) for key in (self.prefix, *keys) if key != "")


@dataclass(slots=True)
class _Found:
    """The entries of one optimizer, by what follows its prefix."""

    settings: list[tuple[str, Entry]] = field(default_factory=list)
    states: list[tuple[str, Entry]] = field(default_factory=list)


def has_optimizer(checkpoint: Checkpoint) -> bool:
    """True if a checkpoint has `param_groups`; costs little more than a look at each name."""
    return any("param_groups." in entry.name for entry in checkpoint.entries)


def optimizers_of(checkpoint: Checkpoint) -> list[Optimizer]:
    """Return the optimizers of a checkpoint in their order; reads no tensor."""
    if not has_optimizer(checkpoint):
        return []
    found = {prefix: _Found() for prefix in optimizer_prefixes(checkpoint)}
    for entry in checkpoint.entries:
        place = _place(entry.name, found)
        if place is not None:
            prefix, kind, rest = place
            (found[prefix].states if kind == "state" else found[prefix].settings).append((rest, entry))
    return [_optimizer(prefix, each, is_joined=bool(checkpoint.fixed)) for prefix, each in found.items()]


def _place(name: str, prefixes: Mapping[str, object]) -> tuple[str, str, str] | None:
    """Return the prefix of the optimizer that a name lies in, `state` or `param_groups`, and what follows that."""
    dotted = f".{name}"
    for word in ("state", "param_groups"):
        at = -1
        for _ in range(_FIRST_WORDS):
            at = dotted.find(f".{word}.", at + 1)
            if at < 0:
                break
            if (prefix := dotted[1:at]) in prefixes:
                return prefix, word, dotted[at + len(word) + 2 :]
    return None


def _optimizer(prefix: str, found: _Found, *, is_joined: bool) -> Optimizer:
    groups: dict[int, dict[str, Entry]] = {}
    for rest, entry in found.settings:
        number, _, key = rest.partition(".")
        if _is_number(number):
            groups.setdefault(int(number), {})[key] = entry
    if not any("params" in group for group in groups.values()):
        return _flat(prefix, found)
    made = []
    for at, settings in sorted(groups.items()):
        keys, fault = _keys_of(settings.get("params"))
        if fault:
            reason = f"param_groups.{at}.params {fault}"
            return Optimizer(prefix, "numbers", fault=reason, is_broken=fault == _NEGATIVE)
        made.append(Group(at, keys, settings))
    fault, is_broken = _fault_of(made)
    if fault:
        return Optimizer(prefix, "numbers", made, fault=fault, is_broken=is_broken)
    if all(isinstance(key, str) for group in made for key in group.keys):
        return _named(prefix, "names", made, found)
    if is_joined and _are_names(found, made):
        return _named(prefix, "joined", made, found)
    return _numbered(prefix, made, found)


def _keys_of(entry: Entry | None) -> tuple[Sequence[int | str], str]:
    """Return what a group's `params` lists, and what is wrong with it."""
    items = entry.value if isinstance(entry, Value) else None
    if not isinstance(items, list | tuple):
        return (), "is not a list of parameters"
    if len(items) > limits.OPTIMIZER_PARAMETERS:
        return (), f"lists {len(items):,} parameters, and {limits.OPTIMIZER_PARAMETERS:,} are allowed"
    for item in items:
        if type(item) is int:
            if item < 0:
                return (), _NEGATIVE
        elif not isinstance(item, str):
            return (), f"has {type(item).__name__} items where numbers or names are expected"
    return [str(item) if isinstance(item, str) else item for item in items], ""


def _fault_of(groups: Sequence[Group]) -> tuple[str, bool]:
    """Return what is wrong with the parameters of all groups together, and whether torch would not write it.

    A parameter that one group lists twice is a mistake of which torch only warns.
    """
    if sum(len(group.keys) for group in groups) > limits.OPTIMIZER_PARAMETERS:
        return f"its groups list more than {limits.OPTIMIZER_PARAMETERS:,} parameters", False
    seen: dict[int | str, Group] = {}
    for group in groups:
        for key in group.keys:
            before = seen.setdefault(key, group)
            if before is not group:
                return f"groups {before.number} and {group.number} both list parameter {_short(key)}", True
    if len({type(key) for key in seen}) > 1:
        return "its groups list both numbers and names", True
    if len(seen) < sum(len(group.keys) for group in groups):
        return "a group lists a parameter twice", False
    return "", False


def _short(key: object) -> str:
    text = repr(key) if isinstance(key, str) or (isinstance(key, int) and key < 1 << 63) else "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}…"


def _are_names(found: _Found, groups: Sequence[Group]) -> bool:
    """True if states stand beside names rather than numbers: more of them than the numbers that groups list."""
    keys = {rest.partition(".")[0] for rest, _ in found.states}
    numbers = {_digits(key) for group in groups for key in group.keys}
    return bool(keys) and not (keys <= numbers and all(rest.count(".") == 1 for rest, _ in found.states))


def _numbered(prefix: str, groups: Sequence[Group], found: _Found) -> Optimizer:
    """The optimizer whose groups list numbers."""
    states: dict[str, dict[str, Entry]] = {}
    for rest, entry in found.states:
        number, _, key = rest.partition(".")
        states.setdefault(number, {})[key] = entry
    slots = []
    for group in groups:
        for number_or_name, name in zip(group.keys, _names_of(group), strict=True):
            slots.append(Slot(number_or_name, group, name, states.pop(_digits(number_or_name), {})))
    strays = {int(number): own for number, own in states.items() if _is_number(number)}
    return Optimizer(prefix, "numbers", groups, slots, strays)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < _DIGITS


def _digits(key: int | str) -> str:
    """Return a number as its entries' names have it; empty for one that no parameter has."""
    return str(key) if isinstance(key, str) or key < 1 << 63 else ""


def _names_of(group: Group) -> Sequence[str | None]:
    """Return the names that a group has beside its parameters; None for each where it has none that fit."""
    entry = group.settings.get("param_names")
    names = entry.value if isinstance(entry, Value) else None
    if isinstance(names, list | tuple) and len(names) == len(group.keys):
        return [str(name) if isinstance(name, str) else None for name in names]
    return [None] * len(group.keys)


def _named(prefix: str, layout: str, groups: Sequence[Group], found: _Found) -> Optimizer:
    """The optimizer whose states stand beside names."""
    listed = {key: group for group in groups for key in group.keys if isinstance(key, str)}
    states = _by_name(found.states, listed)
    if layout == "joined":
        group = groups[0] if len(groups) == 1 else None
        return Optimizer(prefix, layout, groups, [Slot(name, group, name, own) for name, own in states.items()])
    slots = [Slot(key, group, key, states.pop(key, {})) for key, group in listed.items()]
    return Optimizer(prefix, layout, groups, slots, states)


def _flat(prefix: str, found: _Found) -> Optimizer:
    """The optimizer in which the settings of a group stand beside the name of each parameter."""
    settings: dict[str, dict[str, Entry]] = {}
    for rest, entry in found.settings:
        name, _, key = rest.rpartition(".")
        settings.setdefault(name, {})[key] = entry
    states = _by_name(found.states, settings)
    if not found.states or not set(states) <= set(settings) or "" in settings:
        return Optimizer(prefix, "numbers", fault="its param_groups list no parameters")
    slots = [Slot(name, Group(None, [name], own), name, states.get(name, {})) for name, own in settings.items()]
    return Optimizer(prefix, "flat", (), slots)


def _by_name(states: Iterable[tuple[str, Entry]], names: Mapping[str, object]) -> dict[str, dict[str, Entry]]:
    """Return the states of each parameter by their keys; a name that is not listed is all but the last part."""
    found: dict[str, dict[str, Entry]] = {}
    holders = Holders(rest for rest, _ in states)
    known = {name for name in names if name in holders}
    for rest, entry in states:
        name, _, key = rest.rpartition(".")
        at = len(name)
        for _ in range(_FIRST_WORDS):  # a key of a state may have dots too
            if rest[:at] in known:
                name, key = rest[:at], rest[at + 1 :]
                break
            at = rest.rfind(".", 0, at)
            if at <= 0:
                break
        found.setdefault(name, {})[key] = entry
    return found
