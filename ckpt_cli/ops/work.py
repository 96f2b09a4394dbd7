"""How much one command goes through: views may repeat and share the bytes of a small file without end."""

from __future__ import annotations

from ckpt_cli import limits
from ckpt_cli.arrays.regions import Region
from ckpt_cli.errors import LimitError
from ckpt_cli.model import Checkpoint, Tensor


class Work:
    """The bytes that one command still may go through: the files a few times, as ties make it do, and some more."""

    def __init__(self, checkpoint: Checkpoint, *, as_text: bool = False) -> None:
        self._repeated = limits.REPEATED_AS_TEXT if as_text else limits.REPEATED
        nbytes = sum(file.size for file in checkpoint.container.files)
        self._left = limits.READ_TIMES * nbytes + (limits.READ_AGAIN_AS_TEXT if as_text else limits.READ_AGAIN)

    def add(self, tensor: Tensor, region: Region) -> None:
        """Count every element of a region; raises LimitError where they are too many to go through."""
        low, high = region.span()
        if region.numel > max(high - low, self._repeated):
            raise LimitError(
                f"tensor {tensor.name!r} repeats {high - low:,} elements as {region.numel:,}, too many to go through"
            )
        self._left -= tensor.dtype.nbytes(region.numel)
        if self._left < 0:
            raise LimitError("its tensors, which share bytes or are compressed, add up to far more than the file has")
