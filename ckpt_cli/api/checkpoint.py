"""A checkpoint as a mapping of names, and its tensors as numpy arrays or torch tensors."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckpt_cli.api.request import path_of, request
from ckpt_cli.budget import Budget
from ckpt_cli.errors import NameNotFoundError, UsageError, about
from ckpt_cli.files.elsewhere import elsewhere
from ckpt_cli.files.unchanged import unchanged
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model import checkpoint as model
from ckpt_cli.render.text import bytes_text, count_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike, NDArray

    from ckpt_cli.arrays.indexing import Index
    from ckpt_cli.files.elsewhere import Elsewhere
    from ckpt_cli.ops.summaries import Stats


class Tensor:
    """One tensor of an open checkpoint: its facts at once, its values when asked for."""

    def __init__(self, checkpoint: Checkpoint, facts: model.Tensor) -> None:
        self._checkpoint = checkpoint
        self.facts = facts
        """Everything that the file says of it, as `ckpt_cli.model.checkpoint.Tensor`."""

    @property
    def name(self) -> str:
        """The dotted name."""
        return self.facts.name

    @property
    def dtype(self) -> str:
        """The dtype in torch's spelling, such as `bfloat16`."""
        return self.facts.dtype.name

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape; None for one that has none yet (a lazy module's)."""
        return self.facts.shape

    @property
    def stride(self) -> tuple[int, ...]:
        """The stride, in elements."""
        return self.facts.stride

    @property
    def numel(self) -> int:
        """Elements."""
        return self.facts.numel

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, or of the parts of a tensor that is made of others."""
        return self.facts.nbytes

    @property
    def kind(self) -> str:
        """`parameter`, `buffer`, or `tensor` where the file does not say."""
        return self.facts.kind

    @property
    def requires_grad(self) -> bool:
        """True if it was saved as requiring a gradient."""
        return self.facts.requires_grad

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is made of or has as attributes, by their roles, such as `indices` and `values`."""
        return {part.name: Tensor(self._checkpoint, part) for part in self.facts.parts}

    def numpy(self) -> NDArray[Any]:
        """The values as an array of shape `shape`.

        An array of a large tensor is a view of the file and is read as it is used. bfloat16 comes as that of ml_dtypes,
        float8 and float4 as float32, complex32 as complex64; a packed float4 adds a last dimension of 2. Quantized
        values come as what they stand for, in float32. Raises UnsupportedError for tensors that are made of others:
        `parts` are these. Raises UsageError once the checkpoint is closed.
        """
        return self._values(())

    def _values(self, index: Index) -> NDArray[Any]:
        from ckpt_cli.arrays.quantized import array_of

        opened = self._checkpoint._begin()
        with about(opened.path):
            return array_of(opened, self.facts, index)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Return the values at an index, as `numpy()` gives them, and read no others.

        Integers, slices with any step and `...` read only what they select; any other index of numpy is applied to all
        values. Raises IndexError where it does not fit the shape.
        """
        items = index if isinstance(index, tuple) else (index,)
        plain = [_plain_item(item) for item in items]
        if self.shape is None or None in plain:
            values: NDArray[Any] = self.numpy()[index]
            return values
        from ckpt_cli.arrays.indexing import Region

        try:
            Region.of(self.facts).items(tuple(plain))
        except UsageError as error:
            raise IndexError(f"tensor {self.name!r}: {error.problem}") from None
        return self._values(tuple(plain))

    def torch(self) -> torch.Tensor:
        """The values as a torch tensor of the same dtype, shape and stride.

        Tensors of one storage share it, and a tied tensor is the same object. The bytes are mapped, copy on write,
        where the file has them plainly: writing to the tensor does not change the file. Quantized, sparse, nested, meta
        and uninitialized tensors come as such; a subclass that keeps its data as torch does as a plain tensor. Raises
        UnsupportedError for other classes (`parts` are what they are made of) and for dtypes that torch has not.
        Raises UsageError once the checkpoint is closed.
        """
        self._checkpoint._begin()
        return _to_torch(self)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return what `numpy()` does, for `numpy.asarray` and all functions of numpy; of `dtype` where one is given.

        With `copy`, the array is a new one in memory. Raises ValueError where `copy` is False and another dtype needs
        new bytes.
        """
        import numpy as np

        values = self.numpy()
        wanted = values.dtype if dtype is None else np.dtype(dtype)
        if copy:
            return np.array(values, wanted)
        if copy is False and wanted != values.dtype:
            raise ValueError(f"tensor {self.name!r} is {values.dtype} and cannot become {wanted} without a copy")
        return values.astype(wanted, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        """Return the values of `torch()` as a DLPack capsule, for `torch.as_tensor` and other libraries.

        Needs torch: numpy has no such thing for bytes that are read-only.
        """
        import torch

        return torch.Tensor.__dlpack__(self.torch().detach().resolve_conj().resolve_neg(), **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's numbers for the memory of this machine, where all values come to lie."""
        return _DLPACK_CPU, 0

    def __repr__(self) -> str:
        return f"<ckpt_cli.Tensor {self.name!r} {self.dtype} {list(self.shape) if self.shape is not None else '?'}>"

    def _repr_html_(self) -> str:
        from ckpt_cli.api.notebook import tensor_html

        return tensor_html(repr(self), self.facts)


_DLPACK_CPU = 1
"""`kDLCPU` of dlpack.h."""


def _plain_item(item: Any) -> Any:
    """Return an integer, a slice or `...` of an index; None for what only numpy knows, such as masks."""
    if item is Ellipsis or isinstance(item, slice):
        return item
    if isinstance(item, bool) or not hasattr(type(item), "__index__") or getattr(item, "ndim", 0) != 0:
        return None
    return item.__index__()


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


def _to_torch(tensor: Tensor) -> torch.Tensor:
    """Do what `Tensor.torch` does within the request that has begun."""
    from ckpt_cli.arrays.to_torch import torch_tensor

    checkpoint = tensor._checkpoint
    with about(checkpoint.path):
        return torch_tensor(checkpoint._opened, tensor.facts, checkpoint._torch_values)


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their dotted names, as torch tensors.

    Ties are kept: tied names are one object, other views of a storage share it. Bytes are mapped where the format
    allows and read as they are used. Raises UnsupportedError for a tensor of a class whose data are its attributes, and
    LimitError where all tensors together inflate to more than one request may.
    """
    with open(path) as checkpoint:
        Budget.of(checkpoint._opened)  # one for all: a small file can hold any number of tensors that inflate
        return {tensor.name: _to_torch(tensor) for tensor in checkpoint.tensors}
