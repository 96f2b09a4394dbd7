"""The layout of a scaled or packed weight: the tensor that it stands for, and how that is made of what is stored.

Whatever names, shapes, dtypes and the config do not say without doubt is refused, with the tensor and the reason.
Sources of the layouts: ops/quantization.py. Of the formulas: DeepSeek-V3's inference/kernel.py (`weight_dequant`);
transformers' integrations/finegrained_fp8.py (`Fp8Dequantize`) and integrations/mxfp4.py
(`convert_moe_packed_tensors`); compressed-tensors' quantization/lifecycle/forward_helpers.py (`_dequantize`) and
compressors; ModelOpt's torch/quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ckpt_cli.arrays.dequantize import Dequantizing
from ckpt_cli.arrays.formula import Formula
from ckpt_cli.arrays.indexing import Index
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import RefusedError, UnfittingError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.quantization import Group

PIECE = 512 << 10
"""Elements that are made at a time, about."""

LONGEST_ROW = 4 << 20
"""The most elements of a row, which is made at once."""

FLOAT32, BFLOAT16 = BY_NAME["float32"], BY_NAME["bfloat16"]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of which each piece needs a part."""

    tensor: Tensor
    kind: str = "rows"
    """`rows` (times `times`, divided by `per`), `grid` for the rows of scales, `all`, or `turned` for some columns of
    one of several matrices."""
    times: int = 1
    per: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """A weight as it is stored, and as it will be; a recipe of `parallel/pieces.py`."""

    scheme: str
    """In words."""
    weight: Tensor
    """The stored numbers."""
    name: str
    """The name of the plain tensor."""
    shape: tuple[int, ...]
    native: DType
    """The dtype that the scheme's own dequantizer gives, as far as is known."""
    formula: Formula
    stored: Sequence[Source]
    """What is read for it, in the order in which the formula takes it."""
    helpers: tuple[str, ...] = ()
    """The names of the tensors beside it that mean nothing without it."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def piece(self) -> int:
        """Elements of a piece: some whole rows of what is made."""
        formula = self.formula
        if formula.turned:
            return formula.rows * formula.scales.block[1] * _divisor(formula)
        rows = max(PIECE // max(formula.columns, 1), 1)
        step = 8 if formula.codes.kind == "awq" else formula.scales.block[0]
        return max(formula.columns, 1) * (rows // step * step if 1 < step <= rows else rows)

    def of(self, target: DType) -> Layout:
        """Return the layout that makes another dtype."""
        return replace(self, formula=replace(self.formula, target=target))

    def making(self, begin: int, end: int) -> Dequantizing:
        """Return what makes a range of elements."""
        return Dequantizing(self.formula, begin, end)

    def sources(self, begin: int, end: int) -> list[tuple[Tensor, Index]]:
        """Return the parts of what is stored that a range of elements is made of."""
        formula = self.formula
        if formula.turned:
            return [(source.tensor, self._turned(begin, end)) for source in self.stored]
        columns = max(formula.columns, 1)
        first, last = begin // columns, -(-end // columns)
        found: list[tuple[Tensor, Index]] = []
        for source in self.stored:
            part = slice(first * source.times // source.per, -(-last * source.times // source.per))
            if source.kind == "grid":
                part = slice(formula.grid_row(first), formula.grid_row(last - 1) + 1)
            found.append((source.tensor, () if source.kind == "all" else (part,)))
        return found

    def _turned(self, begin: int, end: int) -> Index:
        """Return the index of some blocks of columns of one matrix."""
        rows, width = self.formula.rows, self.formula.scales.block[1]
        matrix, at = divmod(begin // rows, self.formula.columns)
        return matrix, slice(None), slice(at // width, at // width + (end - begin) // rows // width)


def _divisor(formula: Formula) -> int:
    """Return how many blocks of columns are turned at a time: a divisor of all, so that a piece is of one matrix."""
    blocks = formula.columns // formula.scales.block[1]
    most = max(4 * PIECE // max(formula.rows * formula.scales.block[1], 1), 1)
    return next((count for count in range(min(most, blocks), 0, -1) if blocks % count == 0), 1)


@dataclass(frozen=True, slots=True)
class Config:
    """What is said beside the weights."""

    quantization: Mapping[str, Any]
    """The `quantization_config`; empty where there is none."""
    dtype: str = ""
    """The dtype of the model; empty where it is not said."""

    def get(self, key: str) -> Any:
        """Return a value of the quantization; None where it is not said."""
        return self.quantization.get(key)


def config_of(checkpoint: Checkpoint) -> Config:
    """Return what the config files beside a checkpoint say."""
    path = checkpoint.container.files[0].path
    config = config_beside(path) or {}
    said = next((value for key in ("quantization_config", "compression_config")
                 if isinstance(value := config.get(key), dict)), None)  # fmt: skip
    if said is None:
        said = config_beside(path, "quantize_config.json") or config_beside(path, "quant_config.json") or {}
    text = config.get("text_config")
    dtype = next((value for part in (config, text if isinstance(text, dict) else {}) for key in ("dtype", "torch_dtype")
                  if isinstance(value := part.get(key), str)), "")  # fmt: skip
    return Config(said, dtype.removeprefix("torch."))


def refused(group: Group, why: str) -> RefusedError:
    """Return the error for a weight whose layout is not certain."""
    return RefusedError(f"tensor {group.weight.name!r} {why}", hint="ckpt info says what it is taken for")


def unfitting(group: Group, *roles: str) -> UnfittingError:
    """Return the error for shapes that do not fit each other."""
    shapes = [f"{role} {list(group.parts[role].shape or ())}" for role in roles if role in group.parts]
    shape = list(group.weight.shape or ())
    return UnfittingError(f"tensor {group.weight.name!r} {shape} does not fit its {' and '.join(shapes)}")


# --- tensors as they are read -----------------------------------------------------------------------------------------


def matrix(group: Group, tensor: Tensor, columns: int, dtype: DType | None = None) -> Tensor:
    """Return a tensor as a matrix of rows; of more dimensions than two, all matrices one after the other."""
    shape = tensor.shape or ()
    if dtype is not None or tensor.dtype.elements > 1:
        from ckpt_cli.arrays.codec import as_bytes

        tensor = as_bytes(tensor) if tensor.dtype.elements > 1 else replace(tensor, dtype=dtype or tensor.dtype)
        if len(tensor.shape or ()) == len(shape) > 1:
            shape = tensor.shape or ()
        elif not tensor.is_contiguous:
            raise refused(group, "is not contiguous")
        else:
            return replace(tensor, shape=(tensor.numel // max(columns, 1), columns), stride=(columns, 1))
    if len(shape) == 2 and shape[1] == columns:
        return tensor
    if not tensor.is_contiguous:
        raise refused(group, f"has {tensor.name!r}, which is not contiguous")
    return replace(tensor, shape=(tensor.numel // max(columns, 1), columns), stride=(columns, 1))


def transposed(tensor: Tensor) -> Tensor:
    """Return a view of a matrix whose rows are its columns."""
    shape, stride = tensor.shape or (), tensor.stride
    return replace(tensor, shape=shape[::-1], stride=stride[::-1])


def number_of(checkpoint: Checkpoint, group: Group, role: str) -> float:
    """Return the one value of a tensor beside the weight."""
    from ckpt_cli.arrays.quantized import values_of

    tensor = group.parts[role]
    if tensor.numel != 1:
        raise refused(group, f"has a {role} {list(tensor.shape or ())}, not one number")
    return float(values_of(checkpoint, tensor).reshape(-1)[0])


def native_dtype(config: Config, scale: Tensor | None = None) -> DType:
    """Return the dtype of the model before it was quantized: that of 16-bit scales, else what the config says."""
    if scale is not None and scale.dtype.name in ("float16", "bfloat16"):
        return scale.dtype
    return BY_NAME[config.dtype] if config.dtype in ("float16", "bfloat16", "float32") else BFLOAT16


def made_layout(
    group: Group,
    name: str,
    shape: Sequence[int],
    native: DType,
    formula: Formula,
    stored: Sequence[Source],
) -> Layout:
    """Return the layout of a weight, without which the rest of its group means nothing."""
    helpers = tuple(part.name for part in group.parts.values())
    return Layout(group.scheme, group.weight, name, tuple(shape), native, formula, stored, helpers)
