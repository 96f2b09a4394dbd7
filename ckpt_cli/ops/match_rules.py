"""Renamings that could make the names of one state_dict those of another, proposed by comparing names that are left.

Names are compared as templates: numbers stand as `#`, so that forty layers are compared once. A proposal is made of
substitutions, which `ckpt rename --sub` carries out one after another.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cached_property

from ckpt_cli.facts import dataclass

Tokens = tuple[str, ...]
Sub = tuple[str, str]
"""A regular expression and its replacement, as `re.sub` takes them."""

_NEIGHBOURS = 4
"""Templates on each side, in the order of their beginnings and of their ends, that one is compared with."""

_PAIRS = 6
"""Templates of the other side that a template is compared with, those with the most parts in common."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A renaming that might help."""

    subs: tuple[Sub, ...]
    old: str
    """The part of names that it takes away."""
    new: str
    """The part that it puts there."""
    is_numbers: bool = False
    """True if it counts layers differently."""

    def function(self) -> Callable[[str], str]:
        """Return the renaming as a function on names."""
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in self.subs]

        def rename(name: str) -> str:
            for pattern, replacement in compiled:
                name = pattern.sub(replacement, name)
            return name

        return rename


class Side:
    """The names of one side that no name of the other fits, as templates."""

    def __init__(self, names: Iterable[str], shapes: Mapping[str, object]) -> None:
        self.templates: dict[Tokens, list[str]] = {}
        """The names of each template, in order."""
        self.shapes: dict[Tokens, set[object]] = defaultdict(set)
        for name in names:
            template = tuple("#" if token.isdigit() else token for token in name.split("."))
            self.templates.setdefault(template, []).append(name)
            self.shapes[template].add(shapes[name])

    @cached_property
    def forward(self) -> list[Tokens]:
        """The templates in the order of their beginnings."""
        return sorted(self.templates)

    @cached_property
    def backward(self) -> list[Tokens]:
        """The templates in the order of their ends, each with its last part first."""
        return sorted(template[::-1] for template in self.templates)

    def near(self, template: Tokens) -> set[Tokens]:
        """Return the templates that begin or end most like one."""
        turned = template[::-1]
        at, back = bisect_left(self.forward, template), bisect_left(self.backward, turned)
        found = set(self.forward[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS])
        found |= {other[::-1] for other in self.backward[max(0, back - _NEIGHBOURS) : back + _NEIGHBOURS]}
        return found


def proposals(a: Side, b: Side, most: int) -> list[Proposal]:
    """Return the proposals that the most pairs of similar templates agree on, the most frequent first."""
    votes: Counter[Proposal] = Counter()
    for template, names in a.templates.items():
        for other in _similar(template, a, b):
            for proposal in _of_pair(template, other, names[0], b.templates[other][0]):
                votes[proposal] += len(names)
    return [proposal for proposal, _ in votes.most_common(most)]


def _similar(template: Tokens, a: Side, b: Side) -> list[Tokens]:
    """Return the templates of the other side with a shape in common, those that are the most alike."""
    found = [other for other in b.near(template) if not a.shapes[template].isdisjoint(b.shapes[other])]
    found.sort(key=lambda other: (-sum(_common(template, other)), other))
    return found[:_PAIRS]


def _common(one: Tokens, other: Tokens) -> tuple[int, int]:
    """Return how many parts two templates have in common at their beginnings and, apart from these, at their ends."""
    most = min(len(one), len(other))
    begin = next((at for at in range(most) if one[at] != other[at]), most)
    most -= begin
    end = next((at for at in range(most) if one[-1 - at] != other[-1 - at]), most)
    return begin, end


def _of_pair(one: Tokens, other: Tokens, name: str, new_name: str) -> Iterator[Proposal]:
    """Yield the substitutions that make one template another, the widest first."""
    begin, end = _common(one, other)
    before, after = one[:begin], one[len(one) - end :]
    old, new = one[begin : len(one) - end], other[begin : len(other) - end]
    if old.count("#") != new.count("#"):
        old = tuple(name.split("."))[begin : len(one) - end]
        new = tuple(new_name.split("."))[begin : len(other) - end]
    if (not old and not new) or (old and new and all(part.isdigit() or part == "#" for part in (*old, *new))):
        return
    for pattern, replacement in _forms(before, old, new, after):
        yield Proposal(((pattern, replacement),), ".".join(old), ".".join(new))


def _forms(before: Tokens, old: Tokens, new: Tokens, after: Tokens) -> Iterator[Sub]:
    """Yield ways to say that `old` becomes `new` between two other parts."""
    stop = r"\." if after else "$"
    if old:
        tail = old if after or new else ()
        if not before:
            yield _sub("^", old, stop, new, after)
        if tail and old[0] != "#":
            yield _sub(r"\b", old, stop, new, after)
        if before and (new or after):
            yield _sub("^", (*before, *old), stop, (*before, *new), after)
        if before and not new and not after:  # the last part goes
            yield (rf"\b{_expression((before[-1], *old))}$", _replacement((before[-1],)))
        return
    if not before:
        yield ("^", _replacement(new, dot=True))
    if after and after[0] != "#":
        following = r"\." if len(after) > 1 else "$"
        yield _sub("^" if not before else r"\b", after[:1], following, (*new, after[0]), after[1:])
    if before and before[-1] != "#":
        yield _sub(r"\b", before[-1:], stop, (before[-1], *new), after)
    if before:
        yield _sub("^", before, stop, (*before, *new), after)


def _sub(start: str, old: Tokens, stop: str, new: Tokens, after: Tokens) -> Sub:
    return f"{start}{_expression(old)}{stop}", _replacement(new, dot=bool(after))


def _expression(parts: Tokens) -> str:
    return r"\.".join(r"(\d+)" if part == "#" else re.escape(part) for part in parts)


def _replacement(parts: Tokens, *, dot: bool = False) -> str:
    """Return the replacement with references to the numbers that an expression found."""
    written, number = [], 0
    for part in parts:
        number += part == "#"
        written.append(f"\\{number}" if part == "#" else part.replace("\\", r"\\"))
    return ".".join(written) + ("." if dot and parts else "")


# --- parts renamed wherever they stand -----------------------------------------------------------------------------


def words(a: Side, b: Side) -> list[Proposal]:
    """Propose one renaming of several parts at once, by pairing templates of one shape in their order."""
    groups: tuple[dict[object, list[Tokens]], ...] = (defaultdict(list), defaultdict(list))
    for side, group in zip((a, b), groups, strict=True):
        for template, names in side.templates.items():
            shape = min(map(repr, side.shapes[template]))
            group[(shape, len(names), len(template), template[-1])].append(template)
    votes: dict[Tokens, Counter[Tokens]] = defaultdict(Counter)
    for key, mine in groups[0].items():
        others = groups[1].get(key, ())
        if len(mine) == len(others):
            for one, other in zip(mine, others, strict=True):
                for old, new in _changes(one, other):
                    votes[old][new] += 1
    if not votes:
        return []
    chosen = {old: counts.most_common(1)[0][0] for old, counts in votes.items()}
    subs = tuple(
        _sub(r"\b", old, r"\.", new, ("x",)) for old, new in sorted(chosen.items(), key=lambda item: -len(item[0]))
    )
    return [Proposal(subs, ", ".join(map(".".join, chosen)), ", ".join(map(".".join, chosen.values())))]


def _changes(one: Tokens, other: Tokens) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield the parts that were replaced, one at a time where as many take their place."""
    for what, begin, end, new_begin, new_end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if what == "replace":
            old, new = one[begin:end], other[new_begin:new_end]
            pairs = zip(old, new, strict=True) if len(old) == len(new) else ()
            for part, new_part in pairs:
                if part != "#" and new_part != "#":
                    yield (part,), (new_part,)


# --- numbers of layers ---------------------------------------------------------------------------------------------


def numberings(names: Iterable[str], wanted: Iterable[str], most: int) -> list[Proposal]:
    """Propose to count layers below a prefix as the other side does: each in its turn, or all by the same distance."""
    ours, theirs = _numbers(names), _numbers(wanted)
    found = []
    for prefix, numbers in ours.items():
        others = theirs.get(prefix)
        if others is None or others == numbers:
            continue
        mine, new = sorted(numbers), sorted(others)
        maps = [dict(zip(mine, new, strict=False))] if len(mine) == len(new) else []
        maps += [{n: n + by for n in mine} for by in {new[0] - mine[0], new[-1] - mine[-1]} if by and mine[0] + by >= 0]
        for mapping in maps:
            moves = {f"{prefix}{n}": f"{prefix}{to}" for n, to in mapping.items() if n != to}
            proposal = Proposal(in_safe_order(moves), prefix, prefix, is_numbers=True)
            if moves and proposal.subs and proposal not in found:
                found.append(proposal)
    return found[:most]


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """Return the numbers that stand right after each prefix, which ends in a dot or is empty."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        at = 0
        for token in name.split(".")[:-1]:
            if token.isdecimal() and token.isascii() and len(token) < 6 and str(int(token)) == token:
                found[name[:at]].add(int(token))
            at += len(token) + 1
    return found


def in_safe_order(moves: Mapping[str, str], stop: str = r"\.") -> tuple[Sub, ...]:
    """Return substitutions of prefixes in an order in which none takes the name of one still to be moved.

    Empty where there is no such order.
    """
    left = dict(moves)
    taken = Counter(left)
    dot = "." if stop != "$" else ""
    ready = [old for old, new in left.items() if new not in taken]
    by_new: dict[str, list[str]] = defaultdict(list)
    for old, new in left.items():
        by_new[new].append(old)
    subs: list[Sub] = []
    while ready:
        old = ready.pop()
        new = left.pop(old)
        new_text = new.replace("\\", r"\\")
        subs.append((f"^{re.escape(old)}{stop}", f"{new_text}{dot}"))
        ready += [other for other in by_new.get(old, ()) if other in left]
    return () if left else tuple(subs)


# --- resemblance of parts -------------------------------------------------------------------------------------------

_SAME = {"query": "q", "key": "k", "value": "v", "out": "o", "output": "o", "gamma": "weight", "beta": "bias",
         "norm": "ln", "layernorm": "ln", "attention": "attn", "linear": "fc", "dense": "fc"}  # fmt: skip
"""Words that mean the same in names of modules."""


def resemblance(old: str, new: str) -> float:
    """Return the share of words that two parts of names have in common."""
    one, other = _words(old), _words(new)
    return len(one & other) / max(len(one | other), 1)


def _words(text: str) -> set[str]:
    found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)
    split: Sequence[str] = [
        word for part in map(str.lower, found) for word in ((part[0], part[1]) if part in _SHORT else (part,))
    ]
    return {_SAME.get(word, word) for word in split}


_SHORT = ("wq", "wk", "wv", "wo")
"""Words that are written as one."""
