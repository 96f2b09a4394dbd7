"""A checkpoint as a mapping of names to its tensors and values."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckpt_cli.api.request import path_of, request
from ckpt_cli.api.tensor import Tensor, to_torch
from ckpt_cli.budget import Budget
from ckpt_cli.errors import NameNotFoundError, UsageError, about
from ckpt_cli.files.elsewhere import elsewhere
from ckpt_cli.files.unchanged import unchanged
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model import checkpoint as model
from ckpt_cli.render.text import bytes_text, count_text

if TYPE_CHECKING:
    import torch

    from ckpt_cli.files.elsewhere import Elsewhere
    from ckpt_cli.ops.optimizer_listing import OptimizerListing
    from ckpt_cli.ops.summaries import Stats


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint: entry names to `Tensor`s and plain values, in the file's order.

    A prefix of names, such as `state_dict`, gives a `View` of what lies below it, by the rest of the names. Of several
    entries with one name the mapping has the last; `tensors` has all. Names and facts stay there when it is closed;
    whatever would read the file then raises UsageError.
    """

    def __init__(self, opened: model.Checkpoint, known: Elsewhere | None = None) -> None:
        self._opened = opened
        self._elsewhere = known
        self._torch_values: dict[object, Any] = {}
        self._entries = {entry.name: entry for entry in opened.entries}
        self._is_closed = False

    @property
    def path(self) -> str:
        """The path that it was opened from."""
        return self._opened.path

    @property
    def format(self) -> str:
        """The format's name, such as `zip` or `safetensors`."""
        return self._opened.format

    @property
    def metadata(self) -> Mapping[str, str]:
        """The container's string map (safetensors' `__metadata__`)."""
        return self._opened.metadata

    @property
    def notes(self) -> list[str]:
        """What the commands say of the file on stderr, such as shards that are missing."""
        return [*self._opened.notes, *self._opened.unread]

    @property
    def tensors(self) -> list[Tensor]:
        """The entries that are tensors."""
        return [Tensor(self, facts) for facts in self._opened.tensors]

    def stats(
        self,
        *names: str,
        exclude: str | Sequence[str] = (),
        total: bool = False,
        sort: str | None = None,
        nan: bool = False,
        fold: bool = False,
        percentiles: bool = False,
        by: str | None = None,
        jobs: int = 0,
    ) -> Stats:
        """Summarize the values of each tensor, or of those that `names` select, as `ckpt stats` with these options.

        `sort` is a column. `nan` keeps only tensors with NaN or infinities. With `by`, which is `row` or `column`, each
        of these has a row. `jobs` is the number of threads, 0 for one a processor. Raises CkptError.
        """
        from ckpt_cli.ops.stats_lines import stats_of
        from ckpt_cli.parallel.map import workers

        with self._reading() as opened, workers(jobs) as executor:
            return stats_of(
                opened, names, executor, by=by,
                exclude=texts(exclude), sort=sort, bad_only=nan, total=total, folded=fold, percentiles=percentiles,
            )  # fmt: skip

    def optimizer(
        self, *names: str, exclude: str | Sequence[str] = (), model: str | os.PathLike[str] | Checkpoint | None = None
    ) -> OptimizerListing:
        """Return each parameter, or those that `names` select, with its state in the optimizer and how that is known.

        As `ckpt ls --optimizer`; `model` is the checkpoint that has the parameters, where that is another one.
        Raises CkptError where there is no optimizer, OSError.
        """
        from ckpt_cli.ops.optimizer_listing import list_states

        with ExitStack() as stack:
            opened = stack.enter_context(self._reading())
            if model is not None and not isinstance(model, Checkpoint):
                model = stack.enter_context(open(model))
            other = None if model is None else stack.enter_context(model._reading())
            return list_states(opened, names, exclude=texts(exclude), model=other)

    def __getitem__(self, name: str) -> Any:
        entry = self._entries.get(name)
        if entry is None:
            if isinstance(name, str) and self._is_prefix(name):
                return View(self, name)
            raise KeyError(name) from NameNotFoundError(str(name), path=self.path)
        if isinstance(entry, model.Tensor):
            return Tensor(self, entry)
        if isinstance(entry.content, model.Deferred) and not entry.content.is_loaded:
            self._begin()
        return _plain(entry)

    def _is_prefix(self, name: str) -> bool:
        """True if names lie below a name."""
        at = bisect_left(self._sorted, f"{name}.")
        return at < len(self._sorted) and self._sorted[at].startswith(f"{name}.")

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        tensors = self._opened.tensors
        size = bytes_text(sum(tensor.nbytes for tensor in tensors))
        what = f"{self.format}, {count_text(len(tensors), 'tensor')} of {size}, {len(self):,} names"
        return f"<ckpt_cli.Checkpoint {self.path!r}: {what}{', closed' if self._is_closed else ''}>"

    def _repr_html_(self) -> str:
        from ckpt_cli.api.notebook import entries_html

        return entries_html(repr(self), list(self._entries.values()))

    def close(self) -> None:
        """Close the file; arrays and tensors that were handed out stay valid. Closing it again does nothing."""
        self._is_closed = True
        self._opened.close()
        if self._elsewhere is not None:
            self._elsewhere.clear()

    def _begin(self) -> model.Checkpoint:
        """Begin a request that may read the file; raises UsageError once that is closed."""
        self._require_open()
        Budget.of(self._opened)
        return self._opened

    @contextmanager
    def _reading(self) -> Iterator[model.Checkpoint]:
        """Context manager: a request that reads many values; raises ChangedError if these change while it does."""
        opened = self._begin()
        with elsewhere(self._elsewhere), about(opened.path), unchanged(opened.container.files):
            yield opened

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError(
                "the checkpoint is closed, so nothing more can be read of it",
                path=self.path,
                hint="take values before close(), or within the with block",
            )

    def __enter__(self) -> Checkpoint:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class View(Mapping[str, Any]):
    """What lies below a prefix in an open checkpoint, such as its state_dict, by the rest of the names."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._checkpoint = checkpoint
        self.prefix = prefix
        """The name that all others lie below."""

    @cached_property
    def _names(self) -> list[str]:
        """The rest of each name, in the file's order."""
        dotted = f"{self.prefix}."
        return [name[len(dotted) :] for name in self._checkpoint._entries if name.startswith(dotted)]

    @property
    def tensors(self) -> list[Tensor]:
        """The entries that are tensors, with their whole names."""
        dotted = f"{self.prefix}."
        return [tensor for tensor in self._checkpoint.tensors if tensor.name.startswith(dotted)]

    def __getitem__(self, name: str) -> Any:
        try:
            return self._checkpoint[f"{self.prefix}.{name}"]
        except KeyError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<ckpt_cli.View {self.prefix!r} of {self._checkpoint.path!r}: {len(self):,} entries>"

    def _repr_html_(self) -> str:
        from ckpt_cli.api.notebook import entries_html

        dotted = f"{self.prefix}."
        entries = [self._checkpoint._entries[f"{dotted}{name}"] for name in self._names]
        return entries_html(repr(self), entries, dotted)


def texts(given: str | Sequence[str]) -> Sequence[str]:
    """Return the values of an option that may be repeated: one text is a list of one."""
    return (given,) if isinstance(given, str) else given


def _plain(entry: model.Entry) -> object:
    """Return a value as Python data; for an object that was not made, its text."""
    value = entry.value if isinstance(entry, model.Value) else None
    return value.text if isinstance(value, model.Opaque) else value


def open(path: str | os.PathLike[str]) -> Checkpoint:  # noqa: A001
    """Open a checkpoint: its names are read, its tensors are not, and nothing in it is run.

    Raises OSError, or a CkptError that says what is wrong with the file.
    """
    with request() as known:
        return Checkpoint(open_checkpoint(path_of(path)), known)


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their dotted names, as torch tensors.

    Ties are kept: tied names are one object, other views of a storage share it. Bytes are mapped where the format
    allows and read as they are used. Raises UnsupportedError for a tensor of a class whose data are its attributes, and
    LimitError where all tensors together inflate to more than one request may.
    """
    with open(path) as checkpoint:
        Budget.of(checkpoint._opened)  # one for all: a small file can hold any number of tensors that inflate
        return {tensor.name: to_torch(tensor) for tensor in checkpoint.tensors}
