"""The public Python API: a checkpoint as a mapping of names, and its tensors as numpy arrays or torch tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckpt_cli.budget import Budget
from ckpt_cli.errors import NameNotFoundError, about
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model import checkpoint as model

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class Tensor:
    """One tensor of an open checkpoint: its facts at once, its values when asked for."""

    def __init__(self, checkpoint: model.Checkpoint, facts: model.Tensor, torch_values: dict[object, Any]) -> None:
        self._checkpoint = checkpoint
        self._torch_values = torch_values
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
        return {part.name: Tensor(self._checkpoint, part, self._torch_values) for part in self.facts.parts}

    def numpy(self) -> NDArray[Any]:
        """The values as an array of shape `shape`.

        An array of a large tensor is a view of the file and is read as it is used. bfloat16, float8 and float4 come
        as float32, complex32 as complex64; a packed float4 adds a last dimension of 2. Quantized values come as what
        they stand for, in float32. Raises UnsupportedError for tensors that are made of others: `parts` are these.
        """
        from ckpt_cli.arrays.quantized import values_of

        Budget.of(self._checkpoint)
        with about(self._checkpoint.path):
            return values_of(self._checkpoint, self.facts)

    def torch(self) -> torch.Tensor:
        """The values as a torch tensor of the same dtype, shape and stride.

        Tensors of one storage share it, and a tied tensor is the same object. The bytes are mapped, copy on write,
        where the file has them plainly: writing to the tensor does not change the file. Quantized, sparse, nested, meta
        and uninitialized tensors come as such; a subclass that keeps its data as torch does as a plain tensor. Raises
        UnsupportedError for other classes (`parts` are what they are made of) and for dtypes that torch has not.
        """
        Budget.of(self._checkpoint)
        return _to_torch(self)

    def __repr__(self) -> str:
        return f"<ckpt_cli.Tensor {self.name!r} {self.dtype} {list(self.shape) if self.shape is not None else '?'}>"


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint: entry names to `Tensor`s and plain values, in the file's order.

    Of several entries with one name the mapping has the last; `tensors` has all.
    """

    def __init__(self, opened: model.Checkpoint) -> None:
        self._opened = opened
        self._torch_values: dict[object, Any] = {}
        self._entries = {entry.name: entry for entry in opened.entries}

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
    def tensors(self) -> list[Tensor]:
        """The entries that are tensors."""
        return [Tensor(self._opened, facts, self._torch_values) for facts in self._opened.tensors]

    def __getitem__(self, name: str) -> Any:
        try:
            entry = self._entries[name]
        except KeyError:
            raise KeyError(name) from NameNotFoundError(name, path=self.path)
        if isinstance(entry, model.Tensor):
            return Tensor(self._opened, entry, self._torch_values)
        Budget.of(self._opened)
        return _plain(entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Close the file; arrays and tensors that were handed out stay valid."""
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(entry: model.Entry) -> object:
    """Return a value as Python data; for an object that was not made, its text."""
    value = entry.value if isinstance(entry, model.Value) else None
    return value.text if isinstance(value, model.Opaque) else value


def open(path: str | os.PathLike[str]) -> Checkpoint:  # noqa: A001
    """Open a checkpoint: its names are read, its tensors are not, and nothing in it is run.

    Raises OSError, or a CkptError that says what is wrong with the file.
    """
    Budget().begun()
    return Checkpoint(open_checkpoint(os.fspath(path)))


def _to_torch(tensor: Tensor) -> torch.Tensor:
    """Do what `Tensor.torch` does within the request that has begun."""
    from ckpt_cli.arrays.to_torch import torch_tensor

    with about(tensor._checkpoint.path):
        return torch_tensor(tensor._checkpoint, tensor.facts, tensor._torch_values)


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their dotted names, as torch tensors.

    Ties are kept: tied names are one object, other views of a storage share it. Bytes are mapped where the format
    allows and read as they are used. Raises UnsupportedError for a tensor of a class whose data are its attributes, and
    LimitError where all tensors together inflate to more than one request may.
    """
    with open(path) as checkpoint:
        Budget.of(checkpoint._opened)  # one for all: a small file can hold any number of tensors that inflate
        return {tensor.name: _to_torch(tensor) for tensor in checkpoint.tensors}
