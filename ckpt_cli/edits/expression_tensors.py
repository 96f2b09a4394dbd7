"""Expressions of new tensors: which values are such, and the tensor and the bytes that one makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.dtypes import DType
from ckpt_cli.edits.expression import Name, names_of, parse_expression
from ckpt_cli.edits.expression_build import Builder
from ckpt_cli.edits.expression_sources import Sources, sources, stem_of
from ckpt_cli.errors import CkptError, NameNotFoundError, RefusedError, quoted
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.select import close_names
from ckpt_cli.parallel.lazy import Home, Lazy, made_of
from ckpt_cli.parallel.lazy_made import Converted

if TYPE_CHECKING:
    from ckpt_cli.model.changes import Content

__all__ = ["Expression", "Sources", "is_expression", "new_by_expression", "require_kept", "sources"]


class Expression:
    """An expression of one new tensor."""

    def __init__(self, text: str, name: str, *, allow: bool = False) -> None:
        """Parse it; `allow` converts values that a dtype cannot hold. Raises ExpressionError."""
        self.text = text
        self.name = name
        self._allow = allow
        self._root = parse_expression(text)

    def tensor(self, checkpoint: Checkpoint, of: Sources) -> Lazy:
        """Return the tensor that it makes, of those of a checkpoint and of others.

        Raises ExpressionError for what does not fit, NameNotFoundError, RefusedError.
        """
        home = Home(self.name, checkpoint, allow=self._allow)
        found = Builder(self.text, home, of).tensor(self._root)
        if found.dtype.nbytes(found.numel) > limits.EXPRESSION_BYTES:
            raise RefusedError(f"{self.name!r} would have {found.dtype.nbytes(found.numel):,} bytes")
        return found


def is_expression(checkpoint: Checkpoint, value: str, of: Sources) -> bool:
    """True for a value that makes a tensor of others: one with an operator or an index, and a tensor's name in it.

    Raises ExpressionError for one with the name of a tensor and an operator that is not an expression all the same,
    NameNotFoundError where a name in it is nearly that of a tensor, and RefusedError for the name of a tensor alone,
    which could be a text as well.
    """
    try:
        root = parse_expression(value)
    except CkptError as error:
        words = re.findall(r"[\w.]+", value[:_LOOKED_AT])
        words += [word.rpartition(".")[0] for word in words]
        if _OPERATORS.isdisjoint(value) or not any(of.tensors(checkpoint, word) for word in words):
            return False
        error.hint = error.hint or f"a text stands in quotes: {quoted(json.dumps(value))}"
        raise
    names = names_of(root)
    known = [name for name in names if name.path is not None or of.tensors(checkpoint, stem_of(name.name))]
    if isinstance(root, Name) and root.path is None:
        if known and not root.is_quoted and not of.tensors(checkpoint, root.name):
            return True  # `q.weight.T`
        if known and not root.is_quoted:
            raise RefusedError(
                f"{root.name!r} is the name of a tensor, and could be a text",
                hint=f"copy({root.name}) copies the tensor; a text stands in quotes: '\"{root.name}\"'",
            )
        return False
    if names and not known:
        for name in names:
            close = close_names(name.name, [tensor.name for tensor in checkpoint.tensors[:_LOOKED_AT]])
            if "." in name.name and close:
                missing = NameNotFoundError(name.name, close, path=checkpoint.path)
                missing.hint = f"{missing.hint} a text stands in quotes: '\"…\"'"
                raise missing
    return bool(known)


_LOOKED_AT = 2_000
"""Characters, or tensors, among which names are looked for."""

_OPERATORS = frozenset("*/+([")
"""What a text that mentions a tensor rarely has."""


def new_by_expression(
    checkpoint: Checkpoint, expression: Expression, of: Sources, dtype: DType | None = None
) -> tuple[Tensor, Content, Callable[[], None]]:
    """Return the tensor of an expression, the bytes of its storage, and a check for when these were made.

    It is converted to a `dtype` where one is given. The check raises RefusedError for finite values that a dtype could
    not hold.
    """
    lazy = expression.tensor(checkpoint, of)
    if dtype is not None and dtype is not lazy.dtype:
        lazy = Converted(lazy, dtype)
    tensor, content = made_of(lazy, expression.name, of.executor)
    return tensor, content, lambda: require_kept(lazy)


def require_kept(tensor: Lazy) -> None:
    """Raise RefusedError where values of a tensor that was made were lost."""
    losses = tensor.home.losses
    if losses and not tensor.home.allow:
        raise RefusedError(
            f"{losses} in {tensor.dtype} (tensor {tensor.home.name!r})",
            hint="--cast converts values that the dtype cannot hold",
        )
