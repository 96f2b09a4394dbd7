"""LoRA adapters: their layouts, the factors of each module, and what their config says of these.

Sources: peft's tuners/lora (layer.py, dora.py, config.py) and utils/save_and_load.py; kohya-ss's networks/lora.py;
diffusers' loaders (lora_conversion_utils.py) and utils/state_dict_utils.py. A module's weight W becomes
`W + scaling * up @ down`, of rank r: `down` is r × in (A), `up` is out × r (B). An embedding's is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from math import isfinite, prod, sqrt
from typing import NamedTuple

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.errors import MalformedError, UnsupportedError, UsageError, listed, some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.lora_config import Settings, settings_of

PEFT, KOHYA, DIFFUSERS = "peft", "kohya", "diffusers"

LINEAR, EMBEDDING, CONV = "linear", "embedding", "conv"


@dataclass(frozen=True, slots=True)
class Low:
    """What an adapter has for one module: the two factors, and what belongs to them."""

    module: str
    """The module's name as the adapter has it."""
    kind: str
    """`linear`, `embedding` or `conv`."""
    down: Tensor
    up: Tensor
    alpha: float
    scaling: float
    magnitude: Tensor | None = None
    """DoRA's length for each row or column."""
    bias: Tensor | None = None
    """The bias of `up`, which is added to the module's own."""

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return (self.down.shape or (0,))[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is added to the weight, as far as the factors say it."""
        up, down = self.up.shape or (), self.down.shape or ()
        return (down[1], up[0]) if self.kind == EMBEDDING else (up[0], *down[1:])


@dataclass(frozen=True, slots=True)
class Matched:
    """The tensors of a model that an adapter means."""

    weights: Sequence[tuple[Low, str]]
    """Each module of the adapter, with the name of the model's weight."""
    whole: Mapping[str, Tensor]
    """The tensors that take the place of the model's, by the names of these."""
    copies: Mapping[str, Tensor]
    """The copies that the adapter has of the model's tensors, by the names of these."""
    unmatched: Sequence[str]
    """The names that nothing in the model has."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that was opened."""

    path: str
    checkpoint: Checkpoint
    layout: str
    """`peft`, `kohya` or `diffusers`."""
    settings: Settings
    modules: Sequence[Low]
    whole: Mapping[str, Tensor]
    """Tensors that take the place of the model's, by the names that these have in the adapter's model."""
    copies: Mapping[str, Tensor]
    """Copies of weights that it adds to, by module."""
    name: str = ""
    """The adapter's own name, where the names of its tensors have one."""
    config: Mapping[str, object] = field(default_factory=dict)


class _Role(NamedTuple):
    module: str
    role: str
    layout: str
    adapter: str = ""


_PEFT = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)((?:\.[^.]*){0,2})")
_PEFT_ROLES = {
    "lora_A": "down", "lora_B": "up", "lora_embedding_A": "embedding down", "lora_embedding_B": "embedding up",
    "lora_magnitude_vector": "magnitude",
}  # fmt: skip
_ENDS = {
    ".lora_down.weight": ("down", KOHYA), ".lora_up.weight": ("up", KOHYA), ".lora_up.bias": ("bias", KOHYA),
    ".lora.down.weight": ("down", DIFFUSERS), ".lora.up.weight": ("up", DIFFUSERS),
    ".lora_linear_layer.down.weight": ("down", DIFFUSERS), ".lora_linear_layer.up.weight": ("up", DIFFUSERS),
    ".alpha": ("alpha", ""),
}  # fmt: skip
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_OTHERS = {
    "lora_mid": "LoRA of the Tucker kind", "hada_w1_a": "LoHa", "hada_w1_b": "LoHa", "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr", "lokr_w2": "LoKr", "oft_blocks": "OFT", "oft_R": "OFT", "boft_R": "BOFT", "dora_scale":
    "LyCORIS's DoRA", "diff": "whole differences", "diff_b": "whole differences", "ia3_l": "IA3", "vera_lambda_b":
    "VeRA", "vera_lambda_d": "VeRA", "lora_edora_vector": "another kind of LoRA", "lora_router": "another kind of LoRA",
}  # fmt: skip
"""Parts of the names of adapters that are not the product of two factors."""

_BASE = "base_model.model."
"""The beginning of all names that PEFT writes."""


def adapter_of(checkpoint: Checkpoint, path: str, alpha: float | None = None, *, any_alpha: bool = False) -> Adapter:
    """Read the names and the config of an adapter.

    `alpha` is for adapters that say none; with `any_alpha`, such ones are read too, with 1 for their scaling. Raises
    UnsupportedError for adapters of other kinds, MalformedError for factors that do not belong together, UsageError for
    an alpha that is not needed.
    """
    settings, config = settings_of(checkpoint)
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    layouts, names = set(), set()
    for tensor in checkpoint.tensors:
        if tensor.holder is not None or tensor.alias_of is not None:
            continue
        role = _role_of(tensor.name)
        if role is None:
            _add_whole(tensor, whole, copies)
            continue
        layouts.add(role.layout)
        names.add(role.adapter)
        roles = found.setdefault(role.module, {})
        if role.role in roles:
            raise MalformedError(f"{roles[role.role].name!r} and {tensor.name!r} are of the same module")
        roles[role.role] = tensor
    layout = _layout(checkpoint, layouts - {""}, bool(config))
    _refuse_several(names - {""})
    budget = _Numbers(checkpoint)
    layout_of_alpha = DIFFUSERS if any_alpha else layout
    modules = [_low(module, roles, settings, layout_of_alpha, alpha, budget) for module, roles in found.items()]
    if alpha is not None and (settings.alpha is not None or any("alpha" in roles for roles in found.values())):
        raise UsageError("the adapter says its alpha itself", hint="leave --alpha out; --scale multiplies its effect")
    if settings.use_dora and not any(low.magnitude for low in modules):
        raise UnsupportedError("its config says use_dora, and it has no magnitudes")
    named = next(iter(names - {""}), "")
    return Adapter(path, checkpoint, layout, settings, modules, whole, copies, named, config)


def _role_of(name: str) -> _Role | None:
    """Return what a tensor is to its module by its name; None for one that is not a part of a low-rank product."""
    plain = name.removeprefix(_BASE)
    match = _PEFT.fullmatch(plain)
    if match:
        tail = match[3].split(".")[1:]
        end = tail.pop() if tail and tail[-1] in ("weight", "bias") else ""
        role = _PEFT_ROLES[match[2]]
        if end == "bias":
            role = "bias" if role == "up" else "down bias"
        return _Role(match[1], role, PEFT, ".".join(tail))
    match = _PROCESSOR.fullmatch(plain)
    if match:
        target = "to_out.0" if match[2] == "to_out" else match[2]
        return _Role(f"{match[1]}.{target}", match[3], DIFFUSERS)
    for end, (role, layout) in _ENDS.items():
        if plain.endswith(end) and len(plain) > len(end):
            return _Role(plain[: -len(end)], role, layout)
    for part in plain.split(".")[-2:]:
        if part in _OTHERS and plain != part:
            raise UnsupportedError(f"{name!r} is of {_OTHERS[part]}, which is not merged")
    return None


def _add_whole(tensor: Tensor, whole: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    """Note a tensor that is not low-rank: a whole one of the model, or a copy of what the adapter adds to."""
    name = tensor.name.removeprefix(_BASE)
    module, inner, rest = name.partition(".modules_to_save.")
    if inner:
        name = f"{module}.{rest.rpartition('.')[2]}"
    if ".original_module." in name:
        return
    module, inner, rest = name.rpartition(".base_layer.")
    if inner:
        copies[f"{module}.{rest}"] = tensor
    else:
        whole[name] = tensor


def _layout(checkpoint: Checkpoint, layouts: set[str], has_config: bool) -> str:
    if not layouts:
        names = [tensor.name for tensor in checkpoint.tensors]
        raise UnsupportedError("it is not a LoRA adapter: no tensor is a factor of one", details=some_of(names, 3))
    if len(layouts) > 1:
        raise UnsupportedError(f"names of {' and '.join(sorted(layouts))} stand side by side in it")
    layout = next(iter(layouts))
    is_wrapped = any(tensor.name.startswith(_BASE) for tensor in checkpoint.tensors)
    return layout if layout != PEFT or has_config or is_wrapped else DIFFUSERS


def _refuse_several(names: set[str]) -> None:
    if len(names) > 1:
        raise UnsupportedError(
            f"there are several adapters in it: {listed(sorted(names), 5)}",
            hint="ckpt keep FILE '*.NAME.*' -o OUT writes one of them",
        )


class _Numbers:
    """Reads single numbers of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def number(self, tensor: Tensor) -> float:
        """Return the value of a tensor of one element."""
        from ckpt_cli.arrays.codec import Codec
        from ckpt_cli.parallel.tensor_chunks import TensorReader

        if tensor.numel != 1 or tensor.storage is None or tensor.dtype.category not in ("float", "int"):
            raise MalformedError(f"{tensor.name!r} is not a number")
        import numpy as np

        codec = Codec(tensor)
        reader = TensorReader(self._checkpoint, tensor, Region.of(tensor))
        stored = np.frombuffer(bytes(reader.read(reader.chunk(0, 1))), codec.stored)
        return float(codec.decode(stored).reshape(-1)[0])


def _low(
    module: str, roles: Mapping[str, Tensor], settings: Settings, layout: str, alpha: float | None, reader: _Numbers
) -> Low:
    """Return what there is for a module; raises MalformedError where factors are missing or do not fit each other."""
    if "down bias" in roles:
        raise UnsupportedError(f"{roles['down bias'].name!r} is a bias of the first factor, which is not merged")
    kind = EMBEDDING if "embedding down" in roles or "embedding up" in roles else LINEAR
    keys = ("embedding down", "embedding up") if kind == EMBEDDING else ("down", "up")
    present = [roles.get(key) for key in keys]
    is_mixed = kind == EMBEDDING and ("down" in roles or "up" in roles)
    if is_mixed or None in present:
        some = next(iter(roles.values()))
        raise MalformedError(f"module {module!r} does not have both factors, but {some.name!r}")
    down, up = present
    assert down is not None
    assert up is not None
    _require_factors(module, down, up)
    if len(down.shape or ()) > 2:
        kind = CONV
    rank = (down.shape or (0,))[0]
    said = reader.number(roles["alpha"]) if "alpha" in roles else settings.alpha_of(module)
    if said is None:
        said = alpha if alpha is not None else float(rank) if layout != PEFT else None
    if said is None:
        raise UnsupportedError(
            "its alpha is not known: there is no adapter_config.json beside it, nor one in it",
            hint="--alpha N says it; with the rank as alpha the product is added as it is",
        )
    if not isfinite(said):
        raise MalformedError(f"the alpha of module {module!r} is not a finite number")
    scaling = said / (sqrt(rank) if settings.rslora else rank)
    return Low(module, kind, down, up, said, scaling, roles.get("magnitude"), roles.get("bias"))


def _require_factors(module: str, down: Tensor, up: Tensor) -> None:
    """Raise where two tensors are not the factors of a product."""
    for tensor in (down, up):
        shape = tensor.shape or ()
        if len(shape) < 2 or 0 in shape:
            raise UnsupportedError(
                f"tensor {tensor.name!r} is {list(shape)}: it was saved without its values, as ZeRO-3 does before they "
                "are gathered"
            )
        if tensor.layout != "strided" or tensor.dtype.name not in FLOATS:
            raise UnsupportedError(f"tensor {tensor.name!r} of {tensor.dtype} is not a factor that can be multiplied")
    first, second = down.shape or (), up.shape or ()
    if second[1] != first[0] or prod(second[2:]) != 1:
        raise MalformedError(
            f"the factors of module {module!r} do not fit each other: {list(first)} and {list(second)}"
        )


FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The dtypes of weights and factors that are multiplied."""


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What an adapter has for one module, and which tensor of a model that is for."""

    low: Low
    target: str | None
    """The name of the model's tensor; None where no model was given, or where it does not have it."""


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """The facts of an adapter."""

    adapter: Adapter
    modules: Sequence[ModuleFacts]
    parameters: int
    """Elements of all factors and of what belongs to them."""
    unmatched: Sequence[str]
    """The names that the model does not have."""
    base: str | None
    """The path of the model."""


def describe(adapter: Adapter, base: str | None = None, matched: Matched | None = None) -> LoraInfo:
    """Return the facts of an adapter, with what it was matched with of the model at a path."""
    targets = {id(low): name for low, name in matched.weights} if matched is not None else {}
    modules = [ModuleFacts(low, targets.get(id(low))) for low in adapter.modules]
    parameters = sum(
        tensor.numel
        for low in adapter.modules
        for tensor in (low.down, low.up, low.magnitude, low.bias)
        if tensor is not None
    )
    return LoraInfo(adapter, modules, parameters, matched.unmatched if matched is not None else (), base)
