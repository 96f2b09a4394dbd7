"""The budget of one command: views may repeat and share the bytes of a small file without end."""

from __future__ import annotations

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.errors import LimitError
from ckpt_cli.model.checkpoint import Checkpoint, Tensor


class Work:
    """The bytes that one command still may go through: the files a few times, as ties make it do, and some more."""

    def __init__(self, checkpoint: Checkpoint, *, as_text: bool = False) -> None:
        self._repeated = limits.REPEATED_AS_TEXT if as_text else limits.REPEATED
        nbytes = sum(file.size for file in checkpoint.container.files)
        self._constituents = limits.CONSTITUENTS
        self._left = limits.READ_TIMES * nbytes + (limits.READ_AGAIN_AS_TEXT if as_text else limits.READ_AGAIN)

    def add(self, tensor: Tensor, region: Region) -> None:
        """Count every element of a region; raises LimitError where they are too many to go through."""
        from ckpt_cli.arrays.codec import require_bounded

        require_bounded(tensor, region, self._repeated)
        self._left -= tensor.dtype.nbytes(region.numel)
        if self._left < 0:
            raise LimitError("its tensors, which share bytes or are compressed, add up to far more than the file has")

    def add_parts(self, tensor: Tensor) -> None:
        """Count the parts that are read whole before any element is known: scales, and the indices of sparse COO."""
        for part in tensor.parts:
            if part.name in _READ_WHOLE.get(tensor.layout, ()) and part.storage is not None:
                self.add(part, Region.of(part))

    def add_constituents(self, count: int) -> None:
        """Count constituents of nested tensors, each of which is gone through on its own."""
        self._constituents -= count
        if self._constituents < 0:
            raise LimitError("its nested tensors have too many constituents to go through")


_READ_WHOLE = {"quantized": ("scales", "zero_points"), "sparse_coo": ("indices",)}
