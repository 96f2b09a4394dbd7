"""The engine of `tree`: the modules of a checkpoint with their settings, sizes and ties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, NameNotFoundError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.nn.describe import Description, description_of, is_number
from ckpt_cli.nn.outline import MODULE, STATE, Draft, grow


@dataclass(frozen=True, slots=True)
class Branch:
    """A module, or another container, with what lies within it."""

    name: str
    """Its name within its parent."""
    path: str
    """Its dotted name within the checkpoint."""
    description: Description
    """Its class and settings."""
    tensors: Mapping[str, Tensor]
    """Its own tensors, not those of its children, by their names within it."""
    children: tuple[Branch, ...]
    parameters: int
    """Elements of all tensors in it, those of tied ones counted once."""
    nbytes: int
    """Their bytes, counted likewise."""
    tied_to: str | None
    """The path of the module that this one is: one pickled object, or all tensors of the two are tied."""
    repeats: bool
    """True if its text is that of the module that it is tied to, so that pointing there says all."""
    text: int
    """Equal for branches whose texts are equal, their children's included."""
    printed: int
    """The same with their texts as torch would print them."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The answer: one branch with all that lies within it."""

    path: str
    format: str
    inferred: bool
    """True if any of it was inferred from names and shapes."""
    root: Branch


def tree_of(checkpoint: Checkpoint, name: str | None = None) -> Tree:
    """The module tree of a checkpoint, or what of it lies below the module called `name`.

    Reads nothing beyond what opening it has read. Raises NameNotFoundError, and LimitError where modules multiply.
    """
    root = _frozen(grow(checkpoint), in_order=checkpoint.document is not None)
    found = root if name is None else _find(checkpoint, root, name.removesuffix("."))
    return Tree(checkpoint.path, checkpoint.format, any(branch.description.inferred for branch in walk(found)), found)


def walk(root: Branch) -> Iterator[Branch]:
    """A branch and all below it, parents first."""
    stack = [root]
    while stack:
        branch = stack.pop()
        yield branch
        stack.extend(reversed(branch.children))


def _find(checkpoint: Checkpoint, root: Branch, name: str) -> Branch:
    paths = []
    for branch in walk(root):
        if branch.path == name:
            return branch
        paths.append(branch.path)
    if any(tensor.name == name for tensor in checkpoint.tensors):
        close = [name.rpartition(".")[0]]
    else:
        import difflib

        close = [path for path in paths if path and path.endswith(f".{name}")][:3]
        close = close or difflib.get_close_matches(name, paths[1:20_000], 3, 0.6)
    raise NameNotFoundError(name, list(filter(None, close)), path=checkpoint.path)


# --- from drafts to branches -----------------------------------------------------------------------------------------


def _frozen(root: Draft, *, in_order: bool) -> Branch:
    """The branch of a draft and of all below it.

    Without `in_order` the order of the modules says nothing: the names of safetensors files are sorted, and where a
    shard ends within a block, another order is left of it.
    """
    _sort(root)
    order = _parents_first(root)
    sizes = _sizes(order)
    facts = _facts(order)
    order = [draft for draft in order if id(draft) in facts]
    texts = _texts(order, facts, printed=False, in_order=in_order)
    printed = _texts(order, facts, printed=True, in_order=in_order)
    ties = _ties(order, in_order=in_order)
    branches: dict[int, Branch] = {}
    for draft in reversed(order):
        children = [branches.pop(id(child)) for child in _shown(draft, facts)]
        first = ties.get(id(draft))
        branches[id(draft)] = Branch(
            name=draft.key,
            path=draft.path,
            description=facts[id(draft)],
            tensors=draft.tensors,
            children=tuple(children),
            parameters=sizes[id(draft)][0],
            nbytes=sizes[id(draft)][1],
            tied_to=None if first is None else first.path,
            repeats=first is not None and texts[id(first)] == texts[id(draft)],
            text=texts[id(draft)],
            printed=printed[id(draft)],
        )
    return branches[id(root)]


def _facts(order: list[Draft]) -> dict[int, Description]:
    """Return the description of each draft, except for the parts of an optimizer's state; a shared module has one."""
    facts: dict[int, Description] = {}
    of_modules: dict[int, Description] = {}
    characters = limits.TREE_TEXT
    for draft in order:
        if _within_plain(draft):
            continue
        fact = of_modules.get(id(draft.module)) if draft.module is not None else None
        if fact is None:
            fact = description_of(draft)
            if draft.module is not None:
                of_modules[id(draft.module)] = fact
        facts[id(draft)] = fact
        characters -= 2 * draft.depth * (2 + len(fact.settings)) + sum(map(len, fact.settings))
        if characters < 0:
            raise LimitError(f"its tree takes more than {limits.TREE_TEXT} characters")
    return facts


def _parents_first(root: Draft) -> list[Draft]:
    order, stack = [], [root]
    while stack:
        draft = stack.pop()
        order.append(draft)
        stack.extend(reversed(draft.children.values()))
    return order


def _sort(root: Draft) -> None:
    """Put the numbered modules of state_dicts into the order of their numbers."""
    for draft in _parents_first(root):
        if draft.kind == STATE and all(map(is_number, draft.children)):  # safetensors has 10 before 2
            draft.children = dict(sorted(draft.children.items(), key=lambda item: int(item[0])))


def _within_plain(draft: Draft) -> bool:
    """True if it is part of an optimizer's state, which is summed up as a whole."""
    return draft.parent is not None and draft.parent.plain


def _shown(draft: Draft, facts: Mapping[int, Description]) -> list[Draft]:
    """The children that a draft's class shows."""
    hidden = facts[id(draft)].hidden
    return [] if draft.plain else [child for key, child in draft.children.items() if key != hidden]


def _texts(order: list[Draft], facts: Mapping[int, Description], *, printed: bool, in_order: bool) -> dict[int, int]:
    """For each draft a number that is that of all drafts with the same text, be it in another order or not."""
    numbers: dict[object, int] = {}
    texts: dict[int, int] = {}
    for draft in reversed(order):
        fact = facts[id(draft)]
        shown = [(child.key, texts[id(child)]) for child in _shown(draft, facts)]
        below = tuple(shown if in_order else sorted(shown))
        text = (fact.kind, fact.printed if printed else fact.settings, below)
        texts[id(draft)] = numbers.setdefault(text, len(numbers))
    return texts


def _sizes(order: list[Draft]) -> dict[int, tuple[int, int]]:
    """Elements and bytes of each draft's tensors and those below it, tied ones counted once within it.

    Of a tensor's names that follow each other, the second one counts up to where the two branches meet, not beyond.
    """
    steps = limits.WALK_STEPS + 100 * len(order)
    own = {id(draft): [0, 0] for draft in order}
    last: dict[object, Draft] = {}
    for draft in order:
        for tensor in draft.tensors.values():
            sums = [(draft, 1)]
            if tensor.view is not None:
                if tensor.view in last:
                    meeting, climbed = _meeting(last[tensor.view], draft)
                    steps -= climbed
                    sums.append((meeting, -1))
                last[tensor.view] = draft
            for where, sign in sums:
                own[id(where)][0] += sign * tensor.numel
                own[id(where)][1] += sign * tensor.nbytes
        if steps < 0:
            raise LimitError("its modules share tensors in more ways than a network does")
    for draft in reversed(order):
        if draft.parent is not None:
            parent, sums_of = own[id(draft.parent)], own[id(draft)]
            parent[0] += sums_of[0]
            parent[1] += sums_of[1]
    return {key: (parameters, nbytes) for key, (parameters, nbytes) in own.items()}


def _meeting(a: Draft, b: Draft) -> tuple[Draft, int]:
    """The innermost draft that both lie in, and how many steps it took to find it."""
    climbed = 0
    while a is not b:
        climbed += 1
        if a.depth >= b.depth and a.parent is not None:
            a = a.parent
        elif b.parent is not None:
            b = b.parent
    return a, climbed


def _ties(order: list[Draft], *, in_order: bool) -> dict[int, Draft]:
    """For each draft that is another one's module, the first of them."""
    arranged = _arrangements(order, in_order=in_order)
    first: dict[object, Draft] = {}
    ties: dict[int, Draft] = {}
    for draft in order:
        number = arranged[id(draft)]
        keys: list[object] = [("object", id(draft.identity))] if draft.kind == MODULE else []
        keys += [("tensors", number)] if number else []
        for key in keys:
            known = first.setdefault(key, draft)
            if known is not draft:
                ties.setdefault(id(draft), known)
    return ties


def _arrangements(order: list[Draft], *, in_order: bool) -> dict[int, int | None]:
    """Return a number for each draft; drafts with the very same tensors in the same places have the same number.

    0 stands for no tensor at all, None for tensors that share bytes with none.
    """
    numbers: dict[object, int] = {((), ()): 0}
    arranged: dict[int, int | None] = {}
    for draft in reversed(order):
        tensors, children = draft.tensors.items(), draft.children.items()
        views = tuple((role, tensor.view) for role, tensor in (tensors if in_order else sorted(tensors, key=_name)))
        below = [
            (key, arranged.get(id(child))) for key, child in (children if in_order else sorted(children, key=_name))
        ]
        if draft.plain or any(view is None for _, view in views) or any(number is None for _, number in below):
            arranged[id(draft)] = None
            continue
        key = (views, tuple((key, number) for key, number in below if number))
        arranged[id(draft)] = numbers.setdefault(key, len(numbers))
    return arranged


def _name(item: tuple[str, object]) -> str:
    return item[0]
