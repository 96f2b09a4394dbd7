"""The module tree as text and JSON. The text has the lines of `print(net)`, with or without notes beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_cli.facts import dataclass
from ckpt_cli.render.json import rows
from ckpt_cli.render.screen import current, padded, paint, width_of
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import bytes_text, count_text, escaped, name_text

if TYPE_CHECKING:
    from ckpt_cli.nn.tree import Branch, Tree

_WIDTH = 72
"""Columns of text after which notes follow where the text ends."""

_INFERRED = "inferred from names and shapes"

_COLUMNS = (
    Column("path"),
    Column("module"),
    Column("parameters", right=True),
    Column("bytes", right=True),
    Column("inferred"),
    Column("tied to"),
)


@dataclass(frozen=True, slots=True)
class View:
    """The part of a tree that is shown."""

    depth: int | None = None
    """Levels below the root; None for all."""
    full: bool = False
    """True if equal neighbours are each written out, and tied modules too."""
    bare: bool = False
    """True if it is the text of `print(net)` and nothing else, tied modules written out and nothing marked."""

    def cuts(self, depth: int) -> bool:
        """True if what lies below a branch of that depth is left out."""
        return self.depth is not None and depth >= self.depth


def tree_text(tree: Tree, view: View, style: str) -> Iterator[str]:
    """Yield the tree as lines: with sizes beside them for a `table`, else as torch prints it.

    `tsv`, `csv` and `markdown` have a row for each module.
    """
    if style in ("csv", "markdown", "tsv"):
        yield from table_text(_COLUMNS, _rows(tree.root, view), style)
    elif style == "table" and not view.bare:
        width = min(max(width_of(text) for text, _ in _lines(tree.root, view)), _WIDTH)
        for text, note in _lines(tree.root, view):
            yield _with_note(text, _note(note) if note is not None else "", width)
    else:
        for text, note in _lines(tree.root, view):
            marks = not view.bare and note is not None and note.begins
            yield f"{text}  # {_INFERRED}\n" if marks else f"{text}\n"


def _with_note(text: str, words: str, width: int) -> str:
    """Return a line with its notes beside it, or below it where a terminal is too narrow for both."""
    if not words:
        return f"{text}\n"
    screen, note = current(), f"  {paint(f'# {words}', 'dim')}"
    if screen is None or width_of(padded(text, width) + note) <= screen.columns:
        return f"{padded(text, width)}{note}\n"
    if width_of(text + note) <= screen.columns:
        return f"{text}{note}\n"
    return f"{text}\n{' ' * (len(text) - len(text.lstrip(' ')) + 2)}{note}\n"


@dataclass(frozen=True, slots=True)
class _Note:
    """The notes beside the first line of a branch."""

    branch: Branch
    count: int
    """The number of equal branches that the line stands for."""
    begins: bool
    """True if it is inferred while what it lies in is not."""


_CONTAINERS = frozenset(["dict", "list", "tuple", "OrderedDict", "defaultdict"])
"""Kinds of branches that are no modules: what is in them, as in an optimizer's state, need not be parameters."""


def _note(note: _Note) -> str:
    branch, words = note.branch, []
    if branch.parameters or branch.nbytes:
        each = " each" if note.count > 1 else ""
        noun = "element" if branch.description.kind in _CONTAINERS else "parameter"
        words.append(f"{count_text(branch.parameters, noun)}, {bytes_text(branch.nbytes)}{each}")
    if branch.tied_to is not None and not branch.repeats:
        words.append(f"tied to {name_text(branch.tied_to)}")
    if branch.description.inferred:
        words.append("inferred")
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A branch whose lines are still to come."""

    branch: Branch
    label: str
    """The prefix of its text, such as `(0): `."""
    depth: int
    count: int = 1
    within_inferred: bool = False
    printed: bool = False
    """True if only settings that torch prints are shown: the others differ among the branches it stands for."""


def _settings(item: _Pending, view: View) -> list[str]:
    """Return the lines of settings; a list with children has no such lines."""
    description = item.branch.description
    if description.listed and item.branch.children:
        return []
    return [escaped(line) for line in (description.printed if item.printed or view.bare else description.settings)]


def _lines(root: Branch, view: View) -> Iterator[tuple[str, _Note | None]]:
    """Yield every line, with a note where a branch begins: torch/nn/modules/module.py `Module.__repr__`."""
    stack: list[_Pending | str] = [_Pending(root, "", 0)]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item, None
            continue
        branch, indent = item.branch, "  " * item.depth
        head = f"{indent}{item.label}"
        note = _Note(branch, item.count, begins=branch.description.inferred and not item.within_inferred)
        if _points(branch, view) and item.depth:
            yield f"{head}= ({escaped(branch.tied_to or '')})", None
            continue
        shown = [] if view.cuts(item.depth) else _children(branch, item, view)
        settings = _settings(item, view)
        if branch.children and not shown:
            settings = [", ".join([*(line.strip() for line in settings), "..."])]
        kind = escaped(branch.description.kind)
        if not shown and len(settings) <= 1:
            yield head + _one_line(kind, settings), note
            continue
        yield f"{head}{kind}(", note
        for line in settings:
            yield f"{indent}  {line}", None
        stack.append(f"{indent})")
        stack.extend(reversed(shown))


def _one_line(kind: str, settings: Sequence[str]) -> str:
    return kind if kind == "None" or kind.startswith("<") else f"{kind}({''.join(settings)})"


def _points(branch: Branch, view: View) -> bool:
    """True if a tied branch is shown as the name of the branch that it is tied to."""
    return branch.repeats and not view.bare and not view.full


def _children(branch: Branch, item: _Pending, view: View) -> list[_Pending]:
    """Return what is shown below a branch; equal neighbours are one if its class shows them as one."""
    listed = branch.description.listed and not view.full
    inferred = branch.description.inferred or item.within_inferred
    groups: list[list[Branch]] = []
    for child in branch.children:
        if listed and groups and _follows(groups[-1], child):
            groups[-1].append(child)
        else:
            groups.append([child])
    pending = []
    for group in groups:
        first, last = escaped(group[0].name), escaped(group[-1].name)
        label = f"({first}): " if len(group) == 1 else f"({first}-{last}): {len(group)} x "
        printed = item.printed or any(child.text != group[0].text for child in group)
        pending.append(_Pending(group[0], label, item.depth + 1, len(group), inferred, printed))
    return pending


def _follows(group: list[Branch], child: Branch) -> bool:
    """True if a child continues a row of equal modules with consecutive numbers."""
    last = group[-1]
    numbered = last.name.isdecimal() and child.name.isdecimal() and len(child.name) < 10
    return last.printed == child.printed and numbered and int(child.name) == int(last.name) + 1


# --- rows ------------------------------------------------------------------------------------------------------------


def _visible(root: Branch, view: View) -> Iterator[tuple[Branch, int]]:
    """Yield every branch that is shown, with its depth."""
    stack = [(root, 0)]
    while stack:
        branch, depth = stack.pop()
        yield branch, depth
        stack.extend((child, depth + 1) for child in reversed(_below(branch, depth, view)))


def _below(branch: Branch, depth: int, view: View) -> Sequence[Branch]:
    """Return the children that are shown; those of a tied branch are shown below the branch that it is tied to."""
    return () if view.cuts(depth) or (_points(branch, view) and depth) else branch.children


def _rows(root: Branch, view: View) -> Iterator[list[str]]:
    for branch, _ in _visible(root, view):
        yield [
            name_text(branch.path),
            escaped(line_of(branch)),
            str(branch.parameters),
            str(branch.nbytes),
            "yes" if branch.description.inferred else "no",
            "" if branch.tied_to is None else name_text(branch.tied_to),
        ]


def line_of(branch: Branch) -> str:
    """Return a branch on one line, without its children."""
    settings = ", ".join(line.strip() for line in branch.description.settings)
    return _one_line(branch.description.kind, [settings])


# --- JSON ------------------------------------------------------------------------------------------------------------


def to_json(tree: Tree, view: View) -> dict[str, object]:
    """Return the tree as docs/json.md describes it, each module made when its turn comes."""
    return {
        "path": tree.path,
        "format": tree.format,
        "inferred": tree.inferred,
        "tree": _branch_json(tree.root, 0, view),
    }


def _branch_json(branch: Branch, depth: int, view: View) -> dict[str, object]:
    below = _below(branch, depth, view)
    return {**_facts(branch), "children": rows(lambda: (_branch_json(child, depth + 1, view) for child in below))}


def _facts(branch: Branch) -> dict[str, object]:
    return {
        "name": branch.name,
        "path": branch.path,
        "class": None if branch.description.kind == "None" else branch.description.qualified or branch.description.kind,
        "text": line_of(branch),
        "inferred": branch.description.inferred,
        "parameters": branch.parameters,
        "nbytes": branch.nbytes,
        "tied_to": branch.tied_to,
        "tensors": [
            {
                "name": tensor.name,
                "kind": tensor.kind,
                "dtype": tensor.dtype.name,
                "shape": None if tensor.shape is None else list(tensor.shape),
                "numel": tensor.numel,
                "nbytes": tensor.nbytes,
            }
            for tensor in branch.tensors.values()
        ],
    }
