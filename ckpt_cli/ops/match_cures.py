"""Renamings that mend a state_dict: the search for those that make the most names fit.

It goes step by step: of the substitutions that names suggest (`match_rules.py`), the one is taken that makes the most
names fit in the end. Where several do equally well and contradict each other, they are paired by resemblance or by
order if there are as many on both sides, which is a guess; else each is followed, and all are answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field

from ckpt_cli import limits
from ckpt_cli.facts import dataclass
from ckpt_cli.ops.match_rules import Proposal, Side, in_safe_order, numberings, proposals, resemblance, words
from ckpt_cli.ops.match_states import Leaf, State, shapes_fit

_TRIED = 24
"""Proposals of one step that are tried."""

_STEPS = 24
"""Steps of one answer."""

_TIMES = 40
"""Substitutions that are tried on each name of a large state_dict before a step is the last one."""

_ANSWERS = 3
"""Answers that are equally good, of which each is followed."""

_SOUND = 3
"""Different ends of names that must fit after a part was renamed, so that it is not a guess."""

_KNOWN = frozenset({
    ("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"),
    ("gamma", "weight"), ("beta", "bias"),
})  # fmt: skip
"""Spellings of one thing: weight_norm's old and new one, and TensorFlow's names of a layer norm."""


@dataclass(frozen=True, slots=True)
class Cure:
    """A renaming that makes names fit."""

    rules: tuple[tuple[str, str], ...]
    """Substitutions that carry it out, on names without the prefix of their container; empty if none do."""
    names: Mapping[str, str]
    """The names that change, in the state_dict."""
    mends: int
    """How many more names fit."""
    guess: bool
    """True if shapes and names do not settle it: parts were paired by their order or resemblance."""
    equal: bool
    """True if another renaming mends equally many names."""
    loads: bool = False
    """True if a strict load works after it."""
    left: tuple[int, int, int] = (0, 0, 0)
    """Names that are then missing, unexpected, or of another size."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Names after some substitutions."""

    names: tuple[str, ...]
    subs: tuple[tuple[str, str], ...] = ()
    guess: bool = False
    by_rules: bool = True
    """False if the names were changed by what no substitution says."""
    sound: _Step | None = None
    """The last step before the first guess."""
    depth: int = 0
    score: tuple[int, int] = field(default=(0, 0))
    """Names that fit, and names that are there with another shape too."""


@dataclass(frozen=True, slots=True)
class _Option:
    """A proposal that was tried."""

    proposal: Proposal
    names: tuple[str, ...]
    score: tuple[int, int]
    fitting: Mapping[str, str]
    """The names that it makes fit: new name by the one before."""
    changes: int


class Search:
    """The search for renamings of one state_dict that make it another."""

    def __init__(self, a: State, b: State) -> None:
        self.old = [name for name, leaf in a.leaves.items() if not leaf.is_value or leaf.is_extra]
        self.leaves = [a.leaves[name] for name in self.old]
        self.wanted: dict[str, Leaf] = {n: leaf for n, leaf in b.leaves.items() if not leaf.is_value or leaf.is_extra}
        self.most = max(limits.MATCH_STEPS, _TIMES * len(self.old))
        self.steps = 0
        """Names that substitutions were tried on: the cost of the search."""

    def cures(self) -> list[Cure]:
        """Return the best renamings, equally good ones side by side, and what of a guess is certain."""
        first = _Step(tuple(self.old), score=self._score(tuple(self.old)) or (0, 0))
        ends = self._followed(first)
        best = max((end.score for end in ends), default=first.score)
        if best <= first.score:
            return []
        chosen: dict[tuple[str, ...], _Step] = {}
        for end in sorted(ends, key=lambda end: (end.guess, len(end.subs))):
            if end.score == best:
                chosen.setdefault(self._fit(end), end)
        found = list(chosen.values())[:_ANSWERS]
        cures = [self._cure(end, first, equal=len(found) > 1) for end in found]
        sound = found[0].sound
        if sound is not None and sound.score > first.score and len(found) == 1:
            cures.append(self._cure(sound, first, equal=False))
        return cures

    def _fit(self, end: _Step) -> tuple[str, ...]:
        """Return the names that are wanted, the others left out: what two renamings have to agree in."""
        return tuple(name if name in self.wanted else "" for name in end.names)

    def _cure(self, end: _Step, first: _Step, *, equal: bool) -> Cure:
        names = {old: new for old, new in zip(self.old, end.names, strict=True) if old != new}
        mends = sum(end.score) - sum(first.score)
        mends = max(mends, end.score[0] - first.score[0])
        return Cure(end.subs if end.by_rules else (), names, mends, end.guess, equal)

    def _followed(self, first: _Step) -> list[_Step]:
        """Return the ends of all ways from one step on."""
        ends: list[_Step] = []
        waiting = [first]
        while waiting and len(ends) < _ANSWERS:
            step = waiting.pop()
            following = self._following(step) if step.depth < _STEPS and self.steps < self.most else []
            waiting += reversed(following)
            if not following:
                ends.append(self._by_order(step) or step)
        return ends

    # --- one step ---------------------------------------------------------------------------------------------------

    def _following(self, step: _Step) -> list[_Step]:
        """Return the best next step, or several that are equally good and contradict each other."""
        options = [option for option in (self._tried(step, p) for p in self._proposed(step)) if option]
        if not options:
            return []
        best = max(option.score for option in options)
        equal = [option for option in options if option.score == best]
        distinct: dict[tuple[tuple[str, str], ...], _Option] = {}
        for option in sorted(equal, key=lambda o: (o.changes, o.proposal.is_numbers, len(str(o.proposal.subs)))):
            distinct.setdefault(tuple(sorted(option.fitting.items())), option)
        group = _contradicting(list(distinct.values()))
        if len(group) == 1:
            return [self._next(step, group[0], guess=self._is_guess(step, group[0]))]
        paired = _paired(group, step.names, self.wanted)
        if paired:
            subs = tuple(sub for option in paired for sub in option.proposal.subs)
            joint = self._tried(step, Proposal(subs, "", ""))
            return [self._next(step, joint if joint is not None and joint.score > best else paired[0], guess=True)]
        return [self._next(step, option, guess=self._is_guess(step, option)) for option in group[:_ANSWERS]]

    def _proposed(self, step: _Step) -> list[Proposal]:
        fitting = self._fits(step.names)
        left = [name for name, fits in zip(step.names, fitting, strict=True) if not fits]
        there = {name for name, fits in zip(step.names, fitting, strict=True) if fits}
        open_ = [name for name in self.wanted if name not in there]
        if not open_:
            return []
        a = Side(left, dict(zip(step.names, map(_shape, self.leaves), strict=True)))
        b = Side(open_, {name: _shape(self.wanted[name]) for name in open_})
        return [
            *proposals(a, b, _TRIED),
            *words(a, b),
            *numberings(step.names, self.wanted, 4),
        ]

    def _tried(self, step: _Step, proposal: Proposal) -> _Option | None:
        """Return what a proposal does; None where it makes no more names fit, or two names the same."""
        rename = proposal.function()
        self.steps += len(step.names) * len(proposal.subs)
        names = tuple(map(rename, step.names))
        changed = [at for at, (old, new) in enumerate(zip(step.names, names, strict=True)) if old != new]
        fits, named = step.score
        fitting: dict[str, str] = {}
        for at in changed:
            old, new, leaf = step.names[at], names[at], self.leaves[at]
            if (wanted := self.wanted.get(old)) is not None:
                fits, named = (fits - 1, named) if _fit(leaf, wanted) else (fits, named - 1)
            if (wanted := self.wanted.get(new)) is not None:
                fits, named = (fits + 1, named) if _fit(leaf, wanted) else (fits, named + 1)
                if _fit(leaf, wanted):
                    fitting[old] = new
        score = (fits, named)
        if score <= step.score or not _are_names(names):
            return None
        return _Option(proposal, names, score, fitting, len(changed))

    def _next(self, step: _Step, option: _Option, *, guess: bool) -> _Step:
        sound = step.sound if step.guess else (step if guess else None)
        return _Step(
            option.names, (*step.subs, *option.proposal.subs), step.guess or guess, step.by_rules, sound,
            step.depth + 1, option.score,
        )  # fmt: skip

    def _is_guess(self, step: _Step, option: _Option) -> bool:
        """True if names were renamed for which too little speaks but a shape and a place."""
        proposal = option.proposal
        pair = (proposal.old, proposal.new)
        if pair in _KNOWN or pair[::-1] in _KNOWN:
            return False
        if proposal.is_numbers:  # layers of one shape fit under the number of any other
            known = set(step.names)
            moved = any(old in self.wanted or new in known for old, new in option.fitting.items())
            return moved or not self._has_ends(option)
        if not proposal.old or not proposal.new:
            return len(proposal.subs) > 1
        return not self._has_ends(option)

    def _has_ends(self, option: _Option) -> bool:
        """True if names of several different ends fit after a step."""
        ends = {
            (_shape(self.wanted[new]), ".".join(new.split(".")[-2:]))
            for new in option.fitting.values()
        }  # fmt: skip
        return len(ends) >= _SOUND

    # --- scores -----------------------------------------------------------------------------------------------------

    def _fits(self, names: Iterable[str]) -> list[bool]:
        return [
            (wanted := self.wanted.get(name)) is not None and _fit(leaf, wanted)
            for name, leaf in zip(names, self.leaves, strict=True)
        ]

    def _score(self, names: tuple[str, ...]) -> tuple[int, int] | None:
        """Return how many names fit, and how many are there with another shape; None where two are the same."""
        if not _are_names(names):
            return None
        fits = sum(self._fits(names))
        return fits, sum(name in self.wanted for name in names) - fits

    # --- what is left, by order and shape ---------------------------------------------------------------------------

    def _by_order(self, step: _Step) -> _Step | None:
        """Return names paired by order and shape, where as many are left of each shape on both sides."""
        fitting = self._fits(step.names)
        left: dict[object, list[int]] = defaultdict(list)
        for at, fits in enumerate(fitting):
            if not fits and step.names[at] not in self.wanted:
                left[(_shape(self.leaves[at]), _last(step.names[at]))].append(at)
        there = set(step.names)
        open_: dict[object, list[str]] = defaultdict(list)
        for name, leaf in self.wanted.items():
            if name not in there:
                open_[(_shape(leaf), _last(name))].append(name)
        total = sum(map(len, left.values()))
        pairs = [
            (at, name)
            for key, places in left.items()
            if len(places) == len(open_.get(key, ()))
            for at, name in zip(places, open_[key], strict=True)
        ]
        if not pairs or 2 * len(pairs) < max(total, sum(map(len, open_.values()))):
            return None
        names = list(step.names)
        for at, name in pairs:
            names[at] = name
        score = self._score(tuple(names))
        if score is None:
            return None
        subs = self._subs_of(step.names, tuple(names))
        sound = step.sound if step.guess else step
        return _Step(
            tuple(names), (*step.subs, *subs), True, step.by_rules and bool(subs), sound, step.depth + 1, score
        )

    def _subs_of(self, before: tuple[str, ...], after: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        """Return substitutions of modules, or of whole names, that make one list of names another."""
        modules: dict[str, str] = {}
        for old, new in zip(before, after, strict=True):
            if old != new:
                head, _, last = old.rpartition(".")
                new_head, _, new_last = new.rpartition(".")
                if not head or not new_head or last != new_last or modules.setdefault(head, new_head) != new_head:
                    modules = {}
                    break
        whole = {old: new for old, new in zip(before, after, strict=True) if old != new}
        for moves, stop in ((modules, r"\."), (whole, "$")):
            subs = in_safe_order(moves, stop)
            if subs and len(subs) <= limits.MATCH_SUBS:
                self.steps += len(before) * len(subs)
                if tuple(map(Proposal(subs, "", "").function(), before)) == after:
                    return subs
        return ()


def _are_names(names: Sequence[str]) -> bool:
    """True if names are valid, and no two are the same."""
    return len(set(names)) == len(names) and not any(not n or n[0] == "." or n[-1] == "." or ".." in n for n in names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _shape(leaf: Leaf) -> object:
    return leaf.kind if leaf.kind != "tensor" else leaf.shape


def _fit(leaf: Leaf, wanted: Leaf) -> bool:
    return leaf.is_value == wanted.is_value and (leaf.is_value or shapes_fit(leaf, wanted))


def _contradicting(options: Sequence[_Option]) -> list[_Option]:
    """Return the first option and those that cannot be carried out beside it, or beside each other."""
    group, others = [options[0]], list(options[1:])
    grown = True
    while grown:
        found = [option for option in others if any(_contradict(option, member) for member in group)]
        others = [option for option in others if option not in found]
        group += found
        grown = bool(found)
    return group


def _contradict(one: _Option, other: _Option) -> bool:
    if any(other.fitting.get(old, new) != new for old, new in one.fitting.items()):
        return True
    return not {*one.fitting.values()}.isdisjoint(other.fitting.values()) and one.fitting != other.fitting


def _paired(group: Sequence[_Option], names: Sequence[str], wanted: Iterable[str]) -> list[_Option]:
    """Return one option for each part that is renamed, paired by resemblance or else by order; empty if uneven."""
    by_parts = {(option.proposal.old, option.proposal.new): option for option in group}
    olds, news = ({parts[side]: None for parts in by_parts} for side in (0, 1))
    if "" in olds or "" in news or any(option.proposal.is_numbers for option in group):
        return []
    pairs = _by_resemblance(olds, news)
    if pairs is None:
        if len(olds) != len(news):
            return []
        in_order = [_in_order(parts, text) for parts, text in ((olds, names), (news, wanted))]
        pairs = dict(zip(*in_order, strict=True))
    chosen = [by_parts.get(pair) for pair in pairs.items()]
    return [option for option in chosen if option is not None] if all(chosen) else []


def _by_resemblance(olds: Iterable[str], news: Iterable[str]) -> dict[str, str] | None:
    """Return pairs of parts with words in common, where there is one best partner for each."""
    pairs = {}
    for old in olds:
        ranked = sorted(((resemblance(old, new), new) for new in news), reverse=True)
        if not ranked[0][0] or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        pairs[old] = ranked[0][1]
    return pairs if len(set(pairs.values())) == len(pairs) else None


def _in_order(parts: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return parts in the order in which names have them."""
    text = [f".{name}." for name in names]
    places: Mapping[str, int] = {
        part: next((at for at, name in enumerate(text) if f".{part}." in name), len(text)) for part in parts
    }
    return sorted(parts, key=lambda part: places[part])


def cures_of(a: State, b: State) -> list[Cure]:
    """Return the renamings of a state_dict that make the most of its names those of another, with their shapes."""
    return Search(a, b).cures()


def module_renaming(names: Mapping[str, str]) -> Callable[[str], str]:
    """Return new names for the modules that tensors with new names are in."""
    modules: dict[str, str] = {}
    for old, new in names.items():
        old_parts, new_parts = old.split("."), new.split(".")
        while len(old_parts) > 1 and new_parts and old_parts[-1] == new_parts[-1]:
            old_parts.pop()
            new_parts.pop()
            modules.setdefault(".".join(old_parts), ".".join(new_parts))
    return lambda module: modules.get(module, module)
