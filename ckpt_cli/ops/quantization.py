"""Scaled and packed weights: which tensors mean something only together, as libraries for quantization write them.

A scheme is a row of the table below: how the stored numbers are called and of which dtypes they are, and what else
belongs to them. Names of floats alone decide nothing (a LayerNorm may have a `scale`): the stored numbers must be of a
dtype that no ordinary weight has, or the names must be those of one library only.

With w the stored numbers, s the scale of an element's block, g that of the tensor and z the zero point, an element
stands for `w * s` (fp8, int8; `_scale_inv` is what to multiply by as well), `w * s * g` (NVFP4: w is one of the 16
values of e2m1, the first in the low four bits), `w * 2**(s - 127)` (MX: s is a byte), `(w - z) * s` (GPTQ, AWQ, HQQ),
`map[w] * absmax` (bitsandbytes), `w * s + b` (MLX).

Sources: DeepSeek-V3's inference/fp8_cast_bf16.py; transformers' quantizers and integrations/mxfp4.py;
compressed-tensors' compressors; ModelOpt's export of unified checkpoints; AutoGPTQ's and AutoAWQ's linear modules;
bitsandbytes' functional.py (QuantState) and nn/modules.py; hqq's core/quantize.py; optimum-quanto's tensors; torchao.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.ops.hf_config import config_beside

_FLOAT = frozenset(name for name, dtype in BY_NAME.items() if dtype.category == "float")
_FP8 = frozenset(["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
_E8M0 = frozenset(["uint8", "float8_e8m0fnu"])
_SCALE = _FLOAT | _E8M0
_BYTES = frozenset(["uint8", "int8"])
_FP4 = frozenset(["uint8", "int8", "float4_e2m1fn_x2", "float4_e2m1fn"])
_WORDS = frozenset(["int32", "uint32"])
_ANY = frozenset(BY_NAME)


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a group: what it is to the others, and how it is recognised."""

    role: str
    """`weight` (the stored numbers), `scale`, `global_scale`, `zero_point`, `codebook`, `order`, `state`…"""
    suffixes: tuple[str, ...]
    """The spellings of the end of its name, after the stem; after the stem's module where it begins with `/`."""
    dtypes: frozenset[str] = _SCALE


Shapes = Callable[[tuple[int, ...], tuple[int, ...]], bool]
"""True if the shapes of the stored numbers and of their scales belong together."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way in which weights are stored as other numbers."""

    name: str
    """In words, for messages."""
    weight: Part
    """The stored numbers."""
    scale: Part
    """The roles that every group of this scheme has."""
    more: tuple[Part, ...] = ()
    """The roles that a group may have."""
    needs: tuple[str, ...] = ()
    """The roles among these that must be there too."""
    block: tuple[int, ...] = ()
    """Elements that share one scale, along the last dimensions; empty where shapes or a config say it."""
    packed: int = 1
    """Values in each stored number; 0 where shapes or a config say it."""
    fits: Shapes | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One weight, with what belongs to it."""

    scheme: str
    """The name of the scheme."""
    weight: Tensor
    """The stored numbers; scales whose numbers are in another file stand for themselves."""
    parts: Mapping[str, Tensor]
    """The tensors that belong to them, by role."""
    layout: Scheme | None = None
    """The scheme, where it is known."""

    @property
    def is_alone(self) -> bool:
        """True for stored numbers or scales whose partners are not there, as far as a config or their names say it."""
        return self.layout is None and self.weight.layout == "strided" and not self.parts

    @property
    def is_scale(self) -> bool:
        """True if the `weight` is itself a scale, which stands alone."""
        return self.is_alone and self.weight.dtype.name in _FLOAT and _SCALES.search(self.weight.name) is not None

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.weight, *self.parts.values()]


def _is_mxfp4(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return weight[-1:] == (16,) and weight[:-1] == scale


def _same_columns(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    return bool(weight) and weight[-1:] == scale[-1:]


_ACTIVATION = Part(
    "activation", ("/input_scale", "/input_global_scale", "/activation_scale", "/output_scale", "/input_scale_ub")
)
_ZERO = Part("zero_point", ("_zero_point",), _ANY)
_SHAPE = Part("shape", ("_shape",), _ANY)
_ORDER = Part("order", ("_g_idx",), _ANY)

_SCHEMES = (
    Scheme("MXFP4", Part("weight", ("_blocks", ".blocks"), frozenset(["uint8"])),
           Part("scale", ("_scales", ".scales"), frozenset(["uint8"])), block=(32,), packed=2, fits=_is_mxfp4),
    Scheme("NVFP4", Part("weight", ("",), _FP4), Part("global_scale", ("_scale_2", "_weight_scale_2")),
           (Part("scale", ("_scale", "_weight_scale"), frozenset(["float8_e4m3fn", "uint8"])), _ACTIVATION),
           ("scale",), block=(16,), packed=2),
    Scheme("NVFP4", Part("weight", ("_packed",), _FP4), Part("scale", ("_scale",), frozenset(["float8_e4m3fn"])),
           (Part("global_scale", ("_global_scale",)), _SHAPE, _ACTIVATION), ("global_scale",), block=(16,), packed=2),
    Scheme("packed integers of compressed-tensors", Part("weight", ("_packed",), _WORDS | _BYTES),
           Part("scale", ("_scale",)), (_ZERO, _SHAPE, _ORDER, Part("global_scale", ("_global_scale",)), _ACTIVATION),
           packed=0),
    Scheme("fp8 with block scales", Part("weight", ("",), _FP8), Part("scale", ("_scale_inv",)), (_ACTIVATION,),
           block=(128, 128)),
    Scheme("MXFP8", Part("weight", ("",), _FP8), Part("scale", ("_scale",), _E8M0), (_ACTIVATION,), block=(32,)),
    Scheme("fp8 with scales", Part("weight", ("",), _FP8), Part("scale", ("_scale",)), (_ACTIVATION,)),
    Scheme("fp8 with scales", Part("weight", ("weight",), _FP8),
           Part("scale", ("scale", "scales", "scale_weight", "qscale_weight")),
           (Part("activation", ("scale_input", "qscale_act", "input_scale")),)),
    Scheme("integers with scales", Part("weight", ("",), _BYTES), Part("scale", ("_scale",)),
           (_ZERO, Part("global_scale", ("_scale_2",)), Part("order", ("/pre_quant_scale",)), _ACTIVATION), packed=0),
    Scheme("MLX's packed integers", Part("weight", ("weight",), frozenset(["uint32"])), Part("scale", ("scales",)),
           (Part("zero_point", ("biases",)),), packed=0),
    Scheme("integers with scales", Part("weight", ("weight",), _BYTES | _WORDS),
           Part("scale", ("scale", "scales", "scales_and_zeros")),
           (Part("zero_point", ("zeros", "zero_point", "zero_points"), _ANY),), packed=0),
    Scheme("GPTQ", Part("weight", ("qweight",), _WORDS), Part("scale", ("scales",)),
           (Part("zero_point", ("qzeros",), _ANY), Part("order", ("g_idx",), _ANY)), packed=0, fits=_same_columns),
    Scheme("AWQ", Part("weight", ("qweight",), _WORDS), Part("scale", ("scales",)),
           (Part("zero_point", ("qzeros",), _ANY), Part("order", ("g_idx",), _ANY)), packed=8),
    Scheme("EXL2", Part("weight", ("q_weight",), _WORDS), Part("scale", ("q_scale",), _ANY),
           (Part("global_scale", ("q_scale_max",)), Part("order", ("q_invperm", "q_perm"), _ANY),
            Part("groups", ("q_groups",), _ANY)), packed=0),
    Scheme("EXL3", Part("weight", ("trellis",), frozenset(["int16", "uint16"])), Part("scale", ("svh", "sv"), _ANY),
           (Part("input_scale", ("suh", "su"), _ANY),), packed=0),
    Scheme("AQLM", Part("weight", ("codes",), frozenset(["int8", "uint8", "int16"])), Part("codebook", ("codebooks",)),
           (Part("scale", ("scales",)),), packed=0),
    Scheme("HQQ", Part("weight", ("W_q",), _ANY), Part("scale", ("scale", "meta.scale")),
           (Part("zero_point", ("zero", "meta.zero"), _ANY),), packed=0),
    Scheme("bitsandbytes 4-bit", Part("weight", ("",), _ANY), Part("scale", (".absmax",)),
           (Part("codebook", (".quant_map",)), Part("global_scale", (".nested_absmax",)),
            Part("scale_codebook", (".nested_quant_map",)),
            Part("state", (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"), _ANY)),
           ("codebook",), block=(64,), packed=2),
    Scheme("bitsandbytes int8", Part("weight", ("weight",), frozenset(["int8"])), Part("scale", ("SCB", "weight.SCB")),
           (Part("state", ("weight_format",), _ANY),)),
    *(Scheme("bitsandbytes 8-bit optimizer state", Part("weight", (f"state{n}",), frozenset(["uint8"])),
             Part("scale", (f"absmax{n}",)), (Part("codebook", (f"qmap{n}",)),), block=(256,)) for n in (1, 2)),
    Scheme("quanto", Part("weight", ("._data",), _FP8 | _BYTES | _WORDS), Part("scale", ("._scale",)),
           (Part("zero_point", ("._shift",), _ANY), _ACTIVATION), packed=0),
    Scheme("torchao", Part("weight", ("_qdata",), _FP8 | _FP4 | _WORDS), Part("scale", ("_scale",)),
           (_ZERO, Part("global_scale", ("_per_tensor_scale",))), packed=0),
)  # fmt: skip
"""Every scheme; of several that a weight fits, the first is taken."""


def _by_suffix() -> dict[str, list[Scheme]]:
    found: dict[str, list[Scheme]] = {}
    for scheme in _SCHEMES:
        for suffix in scheme.scale.suffixes:
            found.setdefault(suffix, []).append(scheme)
    return found


_BY_SUFFIX = _by_suffix()
_RANK = {id(scheme): rank for rank, scheme in enumerate(_SCHEMES)}

_LIBRARIES = ("torchao.", "optimum.quanto.", "bitsandbytes.", "hqq.", "transformer_engine.")
"""The modules of tensor classes that hold packed numbers and scales themselves."""

_INNER = frozenset(["qdata", "int_data", "tensor_impl", "original_weight_tensor", "packed_weight", "quantized_data"])
"""Parts that only such tensors have."""


def quantized_groups(path: str, tensors: Iterable[Tensor]) -> list[Group]:
    """Find the scaled and packed weights among tensors, in their order, with what belongs to each.

    The config beside `path` names the scheme of weights whose scales are in other files.
    """
    tensors = list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    found = {group.weight.name: group for group in _of_names(by_name)}
    for tensor in tensors:
        group = _of_one(tensor, by_name)
        if group is not None:
            found.setdefault(tensor.name, group)
    taken = {tensor.name for group in found.values() for tensor in group.tensors}
    for group in _of_config(path, [tensor for tensor in tensors if tensor.name not in taken]):
        found.setdefault(group.weight.name, group)
    return [found[name] for name in by_name if name in found]


def _of_names(by_name: Mapping[str, Tensor]) -> Iterable[Group]:
    """Yield the groups of the table: those of earlier schemes first."""
    ends = tuple(_BY_SUFFIX)
    matches = [
        (scheme, name.removesuffix(suffix))
        for name in by_name
        if name.endswith(ends)
        for suffix, schemes in _BY_SUFFIX.items()
        if name.endswith(suffix)
        for scheme in schemes
    ]
    taken: set[str] = set()
    for scheme, stem in sorted(matches, key=lambda match: _RANK[id(match[0])]):
        group = _group(by_name, scheme, stem)
        if group is not None and group.weight.name not in taken:
            taken.add(group.weight.name)
            yield group


def _group(by_name: Mapping[str, Tensor], scheme: Scheme, stem: str) -> Group | None:
    """Return the group of a scheme whose names begin with a stem, if it is all there."""
    weight, scale = _find(by_name, scheme.weight, stem), _find(by_name, scheme.scale, stem)
    if weight is None or scale is None or weight is scale or not _is_held(weight):
        return None
    if scheme.fits is not None and not scheme.fits(weight.shape or (), scale.shape or ()):
        return None
    parts = {scheme.scale.role: scale}
    for part in scheme.more:
        other = _find(by_name, part, stem)
        if other is not None:
            parts.setdefault(part.role, other)
    missing = [role for role in scheme.needs if role not in parts]
    return None if missing else Group(scheme.name, weight, parts, scheme)


def _find(by_name: Mapping[str, Tensor], part: Part, stem: str) -> Tensor | None:
    module = stem[: stem.rfind(".") + 1]
    for suffix in part.suffixes:
        found = by_name.get(module + suffix[1:] if suffix.startswith("/") else stem + suffix)
        if found is not None and found.dtype.name in part.dtypes:
            return found
    return None


def _is_held(weight: Tensor) -> bool:
    """True if it has numbers of its own: what torch quantizes itself has its scales with it."""
    return weight.layout != "quantized"


# --- tensors that say it themselves ----------------------------------------------------------------------------------


def _of_one(tensor: Tensor, by_name: Mapping[str, Tensor]) -> Group | None:
    """A tensor of a class that holds packed numbers, or that of a quantized module whose scale stands beside it."""
    python_type = tensor.python_type or ""
    if python_type.startswith(_LIBRARIES) or any(part.name in _INNER for part in tensor.parts):
        name = python_type.rpartition(".")[2]
        return Group(f"{python_type.partition('.')[0]}'s {name}" if name else "packed parts", tensor, {})
    if tensor.layout == "quantized" and "._packed_params" in tensor.name:
        scale = by_name.get(f"{tensor.name.partition('._packed_params')[0]}.scale")
        if scale is not None:
            return Group("torch's quantized modules", tensor, {"activation": scale})
    return None


# --- what a config says ----------------------------------------------------------------------------------------------

_STORED = re.compile(r"(?:weight|qweight|W_q|_packed|_blocks|_proj)$")
_SCALES = re.compile(r"(?:weight_scale(?:_inv|_2)?|_global_scale|_scale_inv|\.scales|\.SCB|\.absmax|input_scale)$")
_ONLY_SCALES = re.compile(r"weight_scale_inv$")
"""Names of floats that only scales have, whatever a config says."""


def _of_config(path: str, tensors: Sequence[Tensor]) -> Iterable[Group]:
    """Stored numbers and scales whose partners are in other files, where the config says that weights are quantized."""
    stored = _FP8 | _FP4 | _WORDS
    method: str | None = None
    for tensor in tensors:
        is_scale = tensor.dtype.name in _FLOAT and _SCALES.search(tensor.name) is not None
        is_stored = tensor.dtype.name in stored and len(tensor.shape or ()) > 1 and _STORED.search(tensor.name)
        if is_scale or is_stored:
            if method is None:
                method = quantization_said(path)
            if method or _ONLY_SCALES.search(tensor.name):
                yield Group(f"{method} (as its config says)" if method else "scales of fp8", tensor, {})


def quantization_said(path: str) -> str:
    """Return the method of quantization that the config beside a checkpoint names; empty where it names none."""
    for name, keys in (
        ("config.json", ("quantization_config", "compression_config")),
        ("hf_quant_config.json", ("quantization",)),
    ):
        config: dict[str, Any] = config_beside(path, name) or {}
        for said in (config.get(key) for key in keys):
            if isinstance(said, dict):
                method = said.get("quant_method") or said.get("quant_algo") or said.get("format")
                return method if isinstance(method, str) and method else "quantized"
    return ""


# --- what it means ---------------------------------------------------------------------------------------------------

_MOST = 3
"""Schemes that are spelled out."""


def groups_text(groups: Sequence[Group]) -> str:
    """Say how many weights are of which scheme, with an example of each."""
    by_scheme: dict[str, list[Group]] = {}
    for group in groups:
        by_scheme.setdefault(group.scheme, []).append(group)
    said = []
    for name, some in by_scheme.items():
        example = some[0]
        beside = next(iter(example.parts.values()), None)
        with_it = f" with {beside.name!r}" if beside is not None else ""
        said.append(f"{name}: {len(some):,}, such as {example.weight.name!r}{with_it}")
    more = f"; and {len(said) - _MOST} more kinds" if len(said) > _MOST else ""
    return "; ".join(said[:_MOST]) + more
