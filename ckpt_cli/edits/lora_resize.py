"""The engine of `lora resize`: an adapter of a lower rank, the nearest to the old one that there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from math import sqrt
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.edits.convert_contents import Casting, pack_plain
from ckpt_cli.edits.lora_write import AdapterOptions, Made, write_adapter
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.ops.lora import Adapter, Low, adapter_of
from ckpt_cli.parallel.tensor_chunks import TensorReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckpt_cli.arrays.factors import Factored


@dataclass(frozen=True, slots=True)
class Resized:
    """A module of an adapter whose rank changed."""

    name: str
    old: int
    rank: int
    residual: float
    """The part of the norm of the old product that the new one lacks."""


@dataclass(frozen=True, slots=True)
class LoraResize:
    """The result of resizing an adapter, or of its dry run."""

    path: str
    output: str
    layout: str
    rank: int
    modules: Sequence[Resized]
    residual: float
    """That of all modules together."""
    bytes_written: int
    dry_run: bool


def resize(path: str, output: str, rank: int, options: AdapterOptions) -> LoraResize:
    """Write an adapter with factors of at most `rank` as `output`, in its layout, all or nothing.

    The product of each module becomes the nearest one of that rank, and is scaled as before. Modules of lower ranks
    stay as they are. Raises RefusedError where none is of a higher rank.
    """
    if rank < 1:
        raise UsageError("the rank is a number from 1 on")
    with about(path), closing(open_checkpoint(path)) as checkpoint:
        adapter = adapter_of(checkpoint, path, any_alpha=True)
        if "lora_adapter_metadata" in checkpoint.metadata and not adapter.config:
            raise UnsupportedError("its ranks are noted in its metadata too, which would not be true any more")
        shrinking = [low for low in adapter.modules if low.rank > rank]
        if not shrinking:
            most = max(low.rank for low in adapter.modules)
            raise RefusedError(f"no module of it has a higher rank than {rank}: {most} at most")
        work = _Work(adapter, rank, shrinking)
        made = work.made()
        new = NewCheckpoint(
            made.tensors, made.contents, metadata=checkpoint.metadata, mode_of=checkpoint.container.files[0].path
        )
        config = _config(adapter, rank) if adapter.config else None
        nbytes = write_adapter(output, new, config, options, lambda: None, path)
        total, left = work.total, work.left
    residual = sqrt(left / total) if total else 0.0
    return LoraResize(path, output, adapter.layout, rank, work.done, residual, nbytes, options.dry_run)


class _Work:
    """Makes the factors of each module when they are written."""

    def __init__(self, adapter: Adapter, rank: int, shrinking: Sequence[Low]) -> None:
        self._adapter = adapter
        self._rank = rank
        self._shrinking = shrinking
        self._last: tuple[str, Factored] | None = None
        self._noted: dict[str, None] = {}
        self.done: list[Resized] = []
        self.total = 0.0
        self.left = 0.0

    def made(self) -> Made:
        """Return the tensors of the new adapter in the order of the old ones."""
        from ckpt_cli.arrays.cast import Losses

        changed: dict[str, tuple[Low, bool]] = {}
        alphas: dict[str, Low] = {}
        for low in self._shrinking:
            changed[low.down.name], changed[low.up.name] = (low, True), (low, False)
            alphas[low.module] = low
        made = Made()
        checkpoint = self._adapter.checkpoint
        for tensor in checkpoint.tensors:
            if tensor.name in changed:
                low, is_down = changed[tensor.name]
                self._add(made, tensor, low, is_down)
            elif tensor.name.endswith(".alpha") and tensor.name.removesuffix(".alpha") in alphas:
                low = alphas[tensor.name.removesuffix(".alpha")]
                made.add(tensor.name, BY_NAME["float32"], tensor.shape or (), lambda low=low: _number(low, self._rank))  # type: ignore[misc]
            else:
                made.keep(*pack_plain(checkpoint, [tensor], Casting(None, Losses()), tied=True))
        return made

    def _add(self, made: Made, tensor: Tensor, low: Low, is_down: bool) -> None:
        shape = tensor.shape or ()
        new = (self._rank, *shape[1:]) if is_down else (shape[0], self._rank, *shape[2:])

        def make() -> NDArray[Any]:
            found = self._factors(low)
            return (found.down if is_down else found.up).reshape(new)

        made.add(tensor.name, tensor.dtype, new, make)

    def _factors(self, low: Low) -> Factored:
        from ckpt_cli.arrays.factors import refactored

        if self._last is not None and self._last[0] == low.module:
            return self._last[1]
        checkpoint = self._adapter.checkpoint
        down = values_of(checkpoint, low.down).reshape(low.rank, -1)
        up = values_of(checkpoint, low.up).reshape(-1, low.rank)
        require_finite(low.module, down, up)
        found = refactored(down, up, self._rank)
        self._last = low.module, found
        if low.module not in self._noted:
            self._noted[low.module] = None
            self.total += found.total * low.scaling**2
            self.left += found.left * low.scaling**2
            residual = sqrt(found.left / found.total) if found.total else 0.0
            self.done.append(Resized(low.module, low.rank, self._rank, residual))
        return found


def values_of(checkpoint: Checkpoint, tensor: Tensor) -> NDArray[Any]:
    """Return all elements of a tensor as float32, flat."""
    import numpy as np

    from ckpt_cli.arrays.cast import Cast, Losses

    Budget.of(checkpoint).read(tensor, Region.of(tensor))
    reader = TensorReader(checkpoint, tensor, Region.of(tensor))
    wide = BY_NAME["float32"]
    cast = None if tensor.dtype is wide else Cast(tensor.dtype, wide, tensor.name)
    found = np.empty(tensor.numel, np.float32)
    for begin in range(0, tensor.numel, _PIECE):
        end = min(begin + _PIECE, tensor.numel)
        data = reader.read_plainly(reader.chunk(begin, end))
        found[begin:end] = np.frombuffer(data if cast is None else cast.run(data, Losses()), np.float32)
    return found


_PIECE = 1 << 20
"""Elements that are read at a time."""


def require_finite(name: str, *arrays: NDArray[Any]) -> None:
    """Raise RefusedError where there are NaN or infinities."""
    import numpy as np

    if not all(np.isfinite(values).all() for values in arrays):
        raise RefusedError(f"there are NaN or infinities among the values of {name}")


def _alpha(low: Low, rank: int, *, rslora: bool) -> float:
    """Return the alpha with which a module of another rank is scaled as before."""
    return low.scaling * (sqrt(rank) if rslora else rank)


def _number(low: Low, rank: int) -> NDArray[Any]:
    import numpy as np

    return np.array(_alpha(low, rank, rslora=False), np.float32)


def _config(adapter: Adapter, rank: int) -> Mapping[str, object]:
    """Return PEFT's config for the new ranks."""
    ranks = {low.module: min(low.rank, rank) for low in adapter.modules}
    rslora = adapter.settings.rslora
    alphas = {low.module: _alpha(low, ranks[low.module], rslora=rslora) for low in adapter.modules}
    return {**adapter.config, **ranks_and_alphas(ranks, alphas)}


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, object]:
    """Return the settings of PEFT that give each module its rank and its alpha: the most frequent, and exceptions."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names = sorted(ranks, key=lambda name: (-len(name), name))  # PEFT takes the first that is an end of a name
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "rank_pattern": {name: ranks[name] for name in names if set(ranks.values()) != {rank}},
        "alpha_pattern": {name: alphas[name] for name in names if set(alphas.values()) != {alpha}},
    }
