"""A tensor of an open checkpoint: its values as an array of numpy or a tensor of torch, when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import UsageError, about
from ckpt_cli.model import checkpoint as model

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike, NDArray

    from ckpt_cli.api.checkpoint import Checkpoint
    from ckpt_cli.arrays.indexing import Index


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
        return to_torch(self)

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


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Do what `Tensor.torch` does within the request that has begun."""
    from ckpt_cli.arrays.to_torch import torch_tensor

    checkpoint = tensor._checkpoint
    with about(checkpoint.path):
        return torch_tensor(checkpoint._opened, tensor.facts, checkpoint._torch_values)
