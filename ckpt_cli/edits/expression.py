"""Expressions that make a tensor of others, such as `cat(q.weight, k.weight)`: their grammar, and the tree of one.

A Pratt parser: each operator binds its operands with a power, and brackets, calls and methods bind the most. Names are
read where an operand is expected only, so that they may have the characters of operators in front of a colon: a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import exists

FUNCTIONS = (
    "cat", "stack", "split", "transpose", "permute", "reshape", "T", "copy", "cast", "zeros", "ones", "full", "normal"
)  # fmt: skip
"""The functions of the grammar."""

METHODS = ("transpose", "permute", "reshape")
"""Those that may stand behind their tensor: `q.weight.reshape(2, 3)`. `.T` takes no brackets."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number."""

    at: int
    """The character of the expression at which it begins, from 0 on, as of all others."""
    value: int | float


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a tensor, or where one is expected of a dtype."""

    at: int
    name: str
    path: str | None = None
    """The other checkpoint that it is in; None for the one that is edited."""
    is_quoted: bool = False


@dataclass(frozen=True, slots=True)
class Many:
    """Numbers or tensors in brackets: a shape, or the sizes of parts."""

    at: int
    items: Sequence[Node]


@dataclass(frozen=True, slots=True)
class Call:
    """A function and its arguments."""

    at: int
    function: str
    arguments: Sequence[Node]
    options: Mapping[str, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """An index behind its tensor."""

    at: int
    of: Node
    index: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One of `+ - * /` between two operands, or a minus before one."""

    at: int
    operator: str
    left: Node | None
    right: Node


Node = Number | Name | Many | Call | Part | Operation

_POWERS = {"+": 10, "-": 10, "*": 20, "/": 20}
_SIGN = 30
"""The power of a sign before its operand."""

_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.:])")
_NAME = re.compile(r"\w+(?:\.\w+)*")
_RUN = re.compile(r"""[^\s()\[\],"'=]+""")
"""What may be a path, a colon and a name."""

_WORDS = {"nan": float("nan"), "inf": float("inf")}


class ExpressionError(UsageError):
    """An expression is wrong; the message says at which character."""


def wrong(text: str, at: int, problem: str, hint: str | None = None) -> ExpressionError:
    """Return the error about one place of an expression."""
    begin = max(at - 30, 0)
    near = f"{'…' if begin else ''}{text[begin : at + 30]}{'…' if at + 30 < len(text) else ''}"
    return ExpressionError(f"{problem} (character {at + 1} of {near!r})", hint=hint)


def parse_expression(text: str) -> Node:
    """Return the tree of an expression; raises ExpressionError for what is not one, or is too long or too deep."""
    if len(text) > limits.EXPRESSION_CHARACTERS:
        raise UsageError(f"an expression of {len(text):,} characters is too long")
    parser = _Parser(text)
    found = parser.expression(0)
    parser.skip()
    if parser.at < len(text):
        raise wrong(text, parser.at, f"unexpected {text[parser.at]!r}")
    _require_shallow(text, found)
    return found


def _require_shallow(text: str, root: Node) -> None:
    """Raise ExpressionError for a tree that is too deep: `a + b + c + …` nests to the left."""
    level = [root]
    for _ in range(limits.EXPRESSION_DEPTH):
        level = [below for node in level for below in _below(node)]
        if not level:
            return
    raise wrong(text, level[0].at, f"the expression nests more than {limits.EXPRESSION_DEPTH} deep")


def _below(node: Node) -> Sequence[Node]:
    """Return the operands of a node."""
    if isinstance(node, Many):
        return node.items
    if isinstance(node, Call):
        return [*node.arguments, *node.options.values()]
    if isinstance(node, Part):
        return [node.of]
    if isinstance(node, Operation):
        return [node.right] if node.left is None else [node.left, node.right]
    return []


def begins_with_call(text: str) -> bool:
    """True if a text begins with a function of the grammar and a bracket."""
    found = _NAME.match(text)
    return found is not None and found.group() in FUNCTIONS and text[found.end() :].lstrip().startswith("(")


def names_of(node: Node) -> list[Name]:
    """Return all names in an expression."""
    return [node] if isinstance(node, Name) else [name for below in _below(node) for name in names_of(below)]


class _Parser:
    """Reads one expression from the left to the right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._depth = 0
        self._nodes = 0

    def skip(self) -> str:
        """Go to the next character that is not blank, and return it; empty at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def wrong(self, problem: str, at: int | None = None) -> ExpressionError:
        return wrong(self.text, self.at if at is None else at, problem)

    def take(self, char: str) -> None:
        """Go beyond a character that must be there."""
        found = self.skip()
        if found != char:
            raise self.wrong(f"{char!r} is missing" if not found else f"{char!r} is missing before {found!r}")
        self.at += 1

    def expression(self, power: int) -> Node:
        """Read an operand, and the operators behind it that bind more than a power."""
        self._depth += 1
        left = self._behind(self._operand())
        while (operator := self.skip()) and _POWERS.get(operator, 0) > power:
            at = self.at
            self.at += 1
            left = Operation(at, operator, left, self.expression(_POWERS[operator]))
        self._depth -= 1
        return left

    def _bounded(self) -> None:
        self._nodes += 1
        if self._depth > limits.EXPRESSION_DEPTH:
            raise self.wrong(f"the expression nests more than {limits.EXPRESSION_DEPTH} deep")
        if self._nodes > limits.EXPRESSION_NODES:
            raise self.wrong(f"the expression has more than {limits.EXPRESSION_NODES:,} parts")

    def _operand(self) -> Node:
        self._bounded()
        char, at = self.skip(), self.at
        if not char:
            raise self.wrong("a tensor or a number is missing")
        if char in "+-":
            self.at += 1
            right = self.expression(_SIGN)
            if isinstance(right, Number):
                return Number(at, -right.value if char == "-" else right.value)
            return Operation(at, "-", None, right) if char == "-" else right
        if char in "([":
            return self._brackets(at, {"(": ")", "[": "]"}[char])
        number = _NUMBER.match(self.text, at)
        run = _RUN.match(self.text, at)
        if run is not None and ":" in run.group():
            return self._foreign(run.group(), at)
        if number is not None:
            self.at = number.end()
            return Number(at, self._value(number.group(), at))
        return self._named(at)

    def _value(self, digits: str, at: int) -> int | float:
        if digits.isdecimal():
            if len(digits) > _DIGITS:
                raise self.wrong("a number of too many digits", at)
            return int(digits)
        value = float(digits)
        if value == float("inf"):
            raise self.wrong("a number that is larger than any float", at)
        return value

    def _brackets(self, at: int, end: str) -> Node:
        """Read what stands in brackets: one expression in round ones, else several."""
        self.at += 1
        items: list[Node] = []
        comma = end == "]"
        while self.skip() != end:
            items.append(self.expression(0))
            if self.skip() != ",":
                break
            comma = True
            self.at += 1
        self.take(end)
        if comma or not items:
            return Many(at, items)
        return items[0]

    # --- names -------------------------------------------------------------------------------------------------------

    def _named(self, at: int) -> Node:
        """Read a name, a path and a name, or a call."""
        text = self.text
        if text[at] in "\"'":
            name = self._quoted()
            if text[self.at : self.at + 1] == ":" and exists(name):
                self.at += 1
                return self._inside(name, at)
            return self._with_path(name, at) or Name(at, name, is_quoted=True)
        found = _NAME.match(text, at)
        if found is None:
            raise self.wrong(f"a tensor or a number is missing before {text[at]!r}")
        self.at = found.end()
        if self.skip() == "(":
            return self._call(found.group(), at)
        self.at = found.end()
        word = found.group()
        return Number(at, _WORDS[word]) if word in _WORDS else Name(at, word)

    def _quoted(self) -> str:
        """Read a name in quotes: in double ones a JSON string."""
        begin, quote = self.at, self.text[self.at]
        if quote == '"':
            try:
                found, self.at = json.JSONDecoder().raw_decode(self.text, begin)
            except ValueError:
                raise self.wrong("the quotes do not end") from None
            return str(found)
        end = self.text.find(quote, begin + 1)
        if end < 0:
            raise self.wrong("the quotes do not end")
        self.at = end + 1
        return self.text[begin + 1 : end]

    def _with_path(self, quoted: str, at: int) -> Name | None:
        """Return a quoted `FILE:NAME`, if there is such a file."""
        for path in _paths_in(quoted):
            return Name(at, quoted[len(path) + 1 :], path, is_quoted=True)
        return None

    def _foreign(self, run: str, at: int) -> Name:
        """Read `FILE:NAME`: the file is the longest path that is there."""
        for path in _paths_in(run):
            self.at = at + len(path) + 1
            return self._inside(path, at)
        raise self.wrong(f"there is no file {run.rpartition(':')[0]!r}", at)

    def _inside(self, path: str, at: int) -> Name:
        """Read the name behind a path and a colon."""
        if self.text[self.at : self.at + 1] in ('"', "'"):
            return Name(at, self._quoted(), path, is_quoted=True)
        found = _NAME.match(self.text, self.at)
        if found is None:
            raise self.wrong(f"the name of a tensor of {path} is missing")
        self.at = found.end()
        return Name(at, found.group(), path)

    # --- what stands behind an operand -------------------------------------------------------------------------------

    def _call(self, word: str, at: int) -> Call:
        """Read the arguments of a function, or of a method behind the name of a tensor."""
        owner, _, method = word.rpartition(".")
        if word not in FUNCTIONS and (not owner or method not in METHODS):
            close = _close(word)
            raise wrong(
                self.text, at, f"{word!r} is not a function", f"did you mean {close}?" if close else _all_functions()
            )
        if word in FUNCTIONS:
            return self._arguments(word, at, [])
        return self._arguments(method, at, [Name(at, owner)])

    def _arguments(self, function: str, at: int, given: list[Node]) -> Call:
        self.take("(")
        options: dict[str, Node] = {}
        while self.skip() != ")":
            begin = self.at
            value = self.expression(0)
            if self.skip() == "=":
                if not isinstance(value, Name) or value.is_quoted or value.path is not None or value.name in options:
                    raise self.wrong("an option is NAME=VALUE, once", begin)
                self.at += 1
                options[value.name] = self.expression(0)
            elif options:
                raise self.wrong("arguments stand before options", begin)
            else:
                given.append(value)
            if self.skip() != ",":
                break
            self.at += 1
        self.take(")")
        return Call(at, function, given, options)

    def _behind(self, found: Node) -> Node:
        """Read indices and methods behind an operand."""
        while True:
            char, at = self.skip(), self.at
            if char == "[":
                end = self.text.find("]", at)
                if end < 0:
                    raise self.wrong("']' is missing")
                found, self.at = Part(at, found, self.text[at + 1 : end]), end + 1
            elif char == ".":
                method = _NAME.match(self.text, at + 1)
                word = method.group() if method is not None else ""
                self.at = at + 1 + len(word)
                if word == "T":
                    found = Call(at, "T", [found])
                elif word in METHODS:
                    found = self._arguments(word, at, [found])
                else:
                    raise self.wrong(f"{word!r} is not one of T, {', '.join(METHODS)}", at)
            else:
                return found
            self._bounded()


def _paths_in(word: str) -> Iterator[str]:
    """Yield what is in front of a colon and is a path that is there, the longest first."""
    colons = [place for place, char in enumerate(word) if char == ":"][:_COLONS]
    return (word[:colon] for colon in reversed(colons) if colon and "\0" not in word and exists(word[:colon]))


_DIGITS = 30
_COLONS = 100
"""Colons of a word behind which a name is looked for."""


def _close(word: str) -> str | None:
    import difflib

    found = difflib.get_close_matches(word, FUNCTIONS, 1)
    return found[0] if found else None


def _all_functions() -> str:
    return f"functions are {', '.join(FUNCTIONS)}"
