"""The engine of `dequantize`: scaled and packed weights as plain floats, in one pass over their bytes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import DType
from ckpt_cli.edits.derive import Derived, DeriveOptions, derive
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import RefusedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import folder_of, present
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, contiguous_stride
from ckpt_cli.ops.aliasing import all_strided, by_storage
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.quantization import quantized_groups
from ckpt_cli.ops.quantized_layout import Layout, config_of
from ckpt_cli.ops.quantized_schemes import layout_of
from ckpt_cli.ops.quantized_torch import QuantizedTensor, quantized_tensors
from ckpt_cli.parallel.pieces import PiecedBytes

if TYPE_CHECKING:
    from ckpt_cli.arrays.cast import Losses

DEQUANTIZE = Verb("dequantized", "dequantize")

_TARGETS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Plain:
    """A weight that became plain floats."""

    name: str
    """Its name, which is also the new one unless the scheme has another for what is packed."""
    stored: str
    """The name of the stored numbers."""
    scheme: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The result of `dequantize`, or of its dry run."""

    path: str
    plain: Sequence[Plain]
    dropped: Sequence[str]
    """Scales and other tensors that mean nothing any more."""
    edited: Sequence[str]
    """The config files that are written without what they say of the quantization, or left out."""
    derived: Derived


def dequantize(path: str, output: str, dtype: DType | None, options: DeriveOptions) -> Dequantized:
    """Write a checkpoint as `output` with its scaled and packed weights as plain floats, all or nothing.

    `dtype` is that of the plain floats: None for the one that the model had, as far as that is known, else bfloat16.
    Raises RefusedError where a layout is not certain or there are no such weights, UsageError for another dtype.
    """
    if dtype is not None and dtype.name not in _TARGETS:
        raise UsageError(f"quantized weights become {', '.join(_TARGETS)}, not {dtype}")
    plan = _Plan(dtype, options)
    derived = derive(path, output, plan.make, options)
    return Dequantized(path, plan.plain, plan.dropped, plan.edited if derived.beside is not None else (), derived)


class _Plan:
    """Plans it once the checkpoint is open."""

    def __init__(self, dtype: DType | None, options: DeriveOptions) -> None:
        from ckpt_cli.arrays.cast import Losses

        self._dtype = dtype
        self._options = options
        self._losses: Losses = Losses()
        self.plain: list[Plain] = []
        self.dropped: list[str] = []
        self.edited: list[str] = []

    def make(self, checkpoint: Checkpoint) -> EditPlan:
        """Return the plan for a checkpoint."""
        config = config_of(checkpoint)
        beside = _configs(checkpoint)
        groups = quantized_groups(checkpoint.path, checkpoint.tensors)
        layouts: list[Layout | QuantizedTensor] = [layout_of(checkpoint, group, config) for group in groups]
        layouts += quantized_tensors(checkpoint)
        if not layouts:
            raise RefusedError("nothing of it is quantized in a way that is known here", path=checkpoint.path)
        _refuse_shared(checkpoint, layouts)
        names = _new_names(checkpoint, layouts)
        budget = Budget.of(checkpoint)
        tensors: dict[str, Tensor] = {}
        contents: dict[Storage, Content] = {}
        for layout in layouts:
            target = self._dtype or layout.native
            for source in layout.stored:
                budget.read(source.tensor, Region.of(source.tensor))
            made = PiecedBytes(checkpoint, layout.of(target), target.itemsize, self._note, self._options.executor)
            location = layout.weight.storage.location if layout.weight.storage is not None else "cpu"
            storage = Storage(layout.name, target.nbytes(layout.numel), location, made)
            contents[storage] = Content(storage.nbytes, make=made.write)
            tensors[layout.weight.name] = _plain(layout, target, storage)
            self.plain.append(Plain(layout.name, layout.weight.name, layout.scheme, target.name, layout.shape))
        weights = {layout.weight.name for layout in layouts}
        self.dropped = list(dict.fromkeys(n for layout in layouts for n in layout.helpers if n not in weights))
        self.edited = list(beside)
        changes = Changes(names=names, dropped=frozenset(self.dropped), tensors=tensors, contents=contents)
        return EditPlan(DEQUANTIZE, tuple(tensors), changes=changes, check=self._check, beside=beside)

    def _note(self, facts: Any) -> None:
        self._losses.add(facts)

    def _check(self) -> None:
        if self._losses.infinite:
            raise RefusedError(
                f"{self._losses.infinite:,} finite values are too large for the new dtype", hint="--dtype float32"
            )


def _plain(layout: Layout | QuantizedTensor, target: DType, storage: Storage) -> Tensor:
    """Return the plain tensor, still under the name of the stored numbers."""
    weight = layout.weight
    return Tensor(
        weight.name, target, layout.shape, contiguous_stride(layout.shape), storage, kind=weight.kind,
        requires_grad=weight.requires_grad, holder=weight.holder,
    )  # fmt: skip


def _new_names(checkpoint: Checkpoint, layouts: Sequence[Layout | QuantizedTensor]) -> dict[str, str]:
    """Return the new names of those that get one; raises RefusedError where that is taken."""
    going = {name for layout in layouts for name in (layout.weight.name, *layout.helpers)}
    taken = {entry.name for entry in checkpoint.entries if entry.name not in going}
    for layout in layouts:
        if layout.name in taken:
            raise RefusedError(f"{layout.weight.name!r} would become {layout.name!r}, which is there already")
        taken.add(layout.name)
    return {layout.weight.name: layout.name for layout in layouts if layout.name != layout.weight.name}


def _refuse_shared(checkpoint: Checkpoint, layouts: Sequence[Layout | QuantizedTensor]) -> None:
    """Raise RefusedError for stored numbers that other tensors, which stay, share."""
    going = {name for layout in layouts for name in (layout.weight.name, *layout.helpers)}
    weights = {layout.weight.name for layout in layouts}
    for _, views in by_storage(all_strided(checkpoint.tensors)):
        named = [view.name for view in views]
        if len(named) < 2 or weights.isdisjoint(named):
            continue
        staying = [name for name in named if name not in going]
        if staying:
            raise RefusedError(
                f"{staying[0]!r} shares bytes with quantized {next(name for name in named if name in weights)!r}",
                path=checkpoint.path,
                hint="ckpt untie gives it bytes of its own",
            )


# --- the config beside ------------------------------------------------------------------------------------------------

_KEYS = ("quantization_config", "compression_config")
_DEPTH = 4
"""Levels of a config at which its parts, such as that of the text model, say how they are quantized."""

_GOING = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_log.csv")
"""Files that say nothing but how weights are quantized."""


def _configs(checkpoint: Checkpoint) -> dict[str, bytes | None]:
    """Return the new contents of config files beside a checkpoint; None for those that are not copied.

    Raises RefusedError for a config that cannot be read, and which might say that weights are quantized.
    """
    folder = folder_of(checkpoint.container.files[0].path) or "."
    found: dict[str, bytes | None] = dict.fromkeys(present(folder, _GOING))
    if present(folder, ("config.json",)):
        config = config_beside(checkpoint.container.files[0].path)
        if config is None:
            raise RefusedError(
                f"config.json beside it cannot be read, or has more than {limits.CONFIG_JSON:,} bytes",
                path=checkpoint.path,
                hint="it says how weights are quantized",
            )
        plain = _without(config, _KEYS, _DEPTH)
        if plain != config:
            found["config.json"] = (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _without(config: Mapping[str, Any], keys: Collection[str], depth: int) -> dict[str, Any]:
    """Return a config without some keys, also in its parts."""
    return {
        key: _without(value, keys, depth - 1) if depth and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }
