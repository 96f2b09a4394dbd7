"""The checkpoints that the tensors of expressions are from: the one that is edited, and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import require_bounded
from ckpt_cli.errors import RefusedError, about
from ckpt_cli.files.unchanged import require_unchanged
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

if TYPE_CHECKING:
    from concurrent.futures import Executor


def stem_of(name: str) -> str:
    """Return a name without the `.T` that turns its tensor."""
    return name.removesuffix(".T")


class Sources:
    """The checkpoints that expressions take tensors of: the one that is edited, and others, which are opened once."""

    def __init__(self, stack: ExitStack, executor: Executor | None) -> None:
        self._stack = stack
        self._others: dict[str, Checkpoint] = {}
        self._tables: dict[int, Mapping[str, list[Tensor]]] = {}
        self.executor = executor

    def other(self, path: str) -> Checkpoint:
        """Return another checkpoint, which stays open."""
        if path not in self._others:
            with about(path):
                self._others[path] = self._stack.enter_context(closing(open_checkpoint(path)))
        return self._others[path]

    def tensors(self, checkpoint: Checkpoint, name: str) -> list[Tensor]:
        """Return the tensors of a name."""
        table = self._tables.get(id(checkpoint))
        if table is None:
            found: dict[str, list[Tensor]] = {}
            for tensor in checkpoint.tensors:
                found.setdefault(tensor.name, []).append(tensor)
            table = self._tables[id(checkpoint)] = found
        return table.get(name, [])

    def tensor(self, checkpoint: Checkpoint, name: str) -> Tensor | None:
        """Return the one tensor of a name, which has elements of its own; None where there is none.

        Raises RefusedError where several have it, UnsupportedError where its elements cannot be read, LimitError where
        few of them are repeated without end.
        """
        found = self.tensors(checkpoint, name)
        if len(found) > 1:
            raise RefusedError(f"several entries are called {name!r}", path=checkpoint.path)
        if not found:
            return None
        from ckpt_cli.arrays.codec import require_plain

        with about(checkpoint.path):
            require_plain(found[0])
            found[0].dtype.itemsize  # noqa: B018 - raises for packed elements
            require_bounded(found[0], Region.of(found[0]))
        return found[0]

    def require_unchanged(self) -> None:
        """Raise ChangedError where one of the others changed since it was opened."""
        for checkpoint in self._others.values():
            require_unchanged(checkpoint.container.files)


@contextmanager
def sources(executor: Executor | None = None) -> Iterator[Sources]:
    """Context manager: sources of expressions; other checkpoints are closed at its end."""
    with ExitStack() as stack:
        yield Sources(stack, executor)
