"""Layers guessed from the names and shapes of their tensors, where a file has no other facts about them.

Settings that shapes do not show, such as the stride of a convolution, are shown as `?` or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a layer's tensors by the roles that they play in it: `weight`, `bias`, …"""


@dataclass(frozen=True, slots=True)
class Guess:
    """A layer as its tensors suggest it."""

    kind: str
    """The name of its class, or `Module` where nothing suggests one."""
    settings: Sequence[str]
    """The settings that its shapes show, such as `in_features=4`."""
    used: Collection[str]
    """The roles of the tensors that this accounts for."""


_EMBEDDING_NAMES = ("wte", "wpe", "tok", "shared", "emb", "relative_attention_bias")
_EMBEDDING_WORDS = ("embed", "embd")
_HEAD_WORDS = ("embed_out", "lm_head", "unembed", "patch_embed", "proj")
"""Names and parts of names of tables of vectors, and parts of those of layers that only sound so."""

_GROUPED_WORDS = ("group_norm", "groupnorm", "gn")


def guess(name: str, tensors: Mapping[str, Tensor], children: Collection[str]) -> Guess:
    """The layer that these tensors make, from their roles and shapes and from the layer's own name.

    `children` are the names of the modules within it.
    """
    shapes = {role: tensor.shape for role, tensor in tensors.items() if tensor.shape is not None}
    kind = _by_roles(shapes, children)
    if kind is None and not _is_packed(tensors):
        kind = _by_weight(name.lower(), shapes)
    if kind is None:
        return Guess("Module", (), ())
    return Guess(kind, settings_from(kind, shapes) or (), _used(kind, shapes))


def settings_from(kind: str, shapes: Shapes) -> list[str] | None:
    """Return the settings that shapes show for a layer of that class; None where they do not fit one."""
    settings = _SETTINGS.get(kind)
    try:
        return None if settings is None else settings(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None


# --- which layer -----------------------------------------------------------------------------------------------------


def _by_roles(shapes: Shapes, children: Collection[str]) -> str | None:
    """The layer that only one kind of layer has such roles of."""
    roles = shapes.keys()
    for needed, kind in _ROLES:
        if needed <= roles and settings_from(kind, shapes) is not None:
            return kind
    if {"weight_ih_l0", "weight_hh_l0"} <= roles:
        return _recurrent(shapes["weight_ih_l0"], _hidden(shapes))
    if {"weight_ih", "weight_hh"} <= roles:
        cell = _recurrent(shapes["weight_ih"], (shapes["weight_hh"] or (0,))[-1])
        return cell and f"{cell}Cell"
    if {"in_proj_weight", "q_proj_weight"} & roles and "out_proj" in children:
        return "MultiheadAttention"
    return None


_ROLES: Sequence[tuple[set[str], str]] = (
    ({"running_mean", "running_var"}, "BatchNorm"),
    ({"gamma", "beta"}, "LayerNorm"),
    ({"lora_A", "lora_B"}, "LoRA"),
    ({"qweight", "qzeros", "scales"}, "QuantLinear"),
    ({"_packed_params"}, "QuantizedLinear"),
)
"""Roles that identify a kind."""

_GATES = {4: "LSTM", 3: "GRU", 1: "RNN"}
"""The rows of a recurrent layer's weights for each of its hidden units."""


def _recurrent(weight: tuple[int, ...], hidden: int) -> str | None:
    if not weight or not hidden or weight[0] % hidden:
        return None
    return _GATES.get(weight[0] // hidden)


def _hidden(shapes: Shapes) -> int:
    """Hidden units of a recurrent layer; where its outputs are projected, the projection has as many columns."""
    shape = shapes.get("weight_hr_l0") or shapes["weight_hh_l0"]
    return shape[-1] if shape else 0


def _by_weight(name: str, shapes: Shapes) -> str | None:
    """The layer of a weight, by its number of dimensions."""
    weight = shapes.get("weight", shapes.get("weight_v"))
    if not weight:
        return None
    swapped = _is_swapped(weight, shapes.get("bias"))
    if swapped is None:
        return None
    if len(weight) in (3, 4, 5):
        return f"Conv{'Transpose' if swapped else ''}{len(weight) - 2}d"
    if len(weight) == 2 and swapped:
        return "Conv1D"  # of the transformers library: a linear layer with its weight transposed
    if len(weight) == 2:
        return "Embedding" if "bias" not in shapes and _is_embedding(name) else "Linear"
    if len(weight) == 1:
        return _vector(name, weight, shapes)
    return None


def _is_swapped(weight: tuple[int, ...], bias: tuple[int, ...] | None) -> bool | None:
    """True if the outputs, of which each has a bias, are a weight's columns rather than its rows; None for neither."""
    if bias is None or bias == weight[:1]:
        return False
    return True if bias == weight[1:2] else None


def _is_packed(tensors: Mapping[str, Tensor]) -> bool:
    """True if the weight is bytes that numbers of fewer bits are packed into: then its shape shows no settings."""
    return "weight" in tensors and tensors["weight"].dtype.name == "uint8"


def _vector(name: str, weight: tuple[int, ...], shapes: Shapes) -> str:
    """The layer of a weight that is one number a channel."""
    if "bias" in shapes:
        return "GroupNorm" if any(word in name.split("_") or word == name for word in _GROUPED_WORDS) else "LayerNorm"
    return "PReLU" if weight == (1,) else "RMSNorm"


def _is_embedding(name: str) -> bool:
    if any(word in name for word in _HEAD_WORDS):
        return False
    return name in _EMBEDDING_NAMES or "emb" in name.split("_") or any(word in name for word in _EMBEDDING_WORDS)


def _used(kind: str, shapes: Shapes) -> set[str]:
    """The roles that a layer of that kind has; others are listed beside it."""
    if kind in _GATES.values() or kind.endswith("Cell"):
        return {role for role in shapes if role.startswith(("weight_", "bias_"))}
    return shapes.keys() & _KNOWN_ROLES.get(kind, {"weight", "bias", "weight_v", "weight_g"})


_KNOWN_ROLES: Mapping[str, set[str]] = {
    "BatchNorm": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    "LayerNorm": {"weight", "bias", "gamma", "beta"},
    "LoRA": {"lora_A", "lora_B"},
    "MultiheadAttention": {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight",
                           "bias_k", "bias_v"},
    "QuantizedLinear": {"_packed_params", "scale", "zero_point", "dtype"},
    "QuantLinear": set(),
}  # fmt: skip


# --- its settings ----------------------------------------------------------------------------------------------------


def _weight(shapes: Shapes) -> tuple[int, ...]:
    return shapes["weight"] if "weight" in shapes else shapes["weight_v"]


def _linear(shapes: Shapes) -> list[str]:
    out_features, in_features = _weight(shapes)
    return [f"in_features={in_features}", f"out_features={out_features}", f"bias={'bias' in shapes}"]


def _convolution(dimensions: int) -> Callable[[Shapes], list[str]]:
    """Return the settings function of a convolution; a lone input channel may be one of each group's."""

    def settings(shapes: Shapes) -> list[str]:
        out_channels, in_channels, *kernel = _weight(shapes)
        return _kernel(in_channels, out_channels, kernel, dimensions, grouped=in_channels == 1, shapes=shapes)

    return settings


def _transposed(dimensions: int) -> Callable[[Shapes], list[str]]:
    def settings(shapes: Shapes) -> list[str]:
        in_channels, out_channels, *kernel = _weight(shapes)
        return _kernel(in_channels, out_channels, kernel, dimensions, grouped=out_channels == 1, shapes=shapes)

    return settings


def _kernel(
    in_channels: int, out_channels: int, kernel: list[int], dimensions: int, *, grouped: bool, shapes: Shapes
) -> list[str]:
    if len(kernel) != dimensions:
        raise ValueError(kernel)
    arguments = [str(in_channels), str(out_channels), f"kernel_size={tuple(kernel)}", "stride=?"]
    if grouped and max(in_channels, out_channels) > 1:
        arguments.append("groups=?")
    return arguments if "bias" in shapes else [*arguments, "bias=False"]


def _features(shapes: Shapes) -> list[str]:
    return [str((shapes["running_mean"] if "running_mean" in shapes else shapes["weight"])[0])]


def _normalized(shapes: Shapes) -> list[str]:
    return [str(shapes["weight"] if "weight" in shapes else shapes["gamma"])]


def _recurrent_settings(shapes: Shapes) -> list[str]:
    layers = sum(role.startswith("weight_ih_l") and not role.endswith("_reverse") for role in shapes)
    arguments = [str(shapes["weight_ih_l0"][1]), str(_hidden(shapes))]
    if "weight_hr_l0" in shapes:
        arguments.append(f"proj_size={shapes['weight_hr_l0'][0]}")
    arguments += [f"num_layers={layers}"] * (layers != 1)
    arguments += ["bias=False"] * ("bias_ih_l0" not in shapes)
    return arguments + ["bidirectional=True"] * ("weight_ih_l0_reverse" in shapes)


def _cell_settings(shapes: Shapes) -> list[str]:
    arguments = [str(shapes["weight_ih"][1]), str(shapes["weight_hh"][-1])]
    return arguments if "bias_ih" in shapes else [*arguments, "bias=False"]


def _low_rank(shapes: Shapes) -> list[str]:
    first, second = shapes["lora_A"], shapes["lora_B"]
    if len(first) != 2 or len(second) != 2:
        return [f"r={first[0]}"]
    return [f"in_features={first[1]}", f"out_features={second[0]}", f"r={first[0]}"]


def _packed(shapes: Shapes) -> list[str]:
    out_features, in_features = shapes["_packed_params"]
    return [f"in_features={in_features}", f"out_features={out_features}"]


def _bilinear(shapes: Shapes) -> list[str]:
    out_features, first, second = shapes["weight"]
    bias = "bias" in shapes
    return [f"in1_features={first}", f"in2_features={second}", f"out_features={out_features}", f"bias={bias}"]


def _table(shapes: Shapes) -> list[str]:
    count, width = shapes["weight"]
    return [str(count), str(width)]


_SETTINGS: dict[str, Callable[[Shapes], list[str]]] = {
    **dict.fromkeys(("Linear", "NonDynamicallyQuantizableLinear"), _linear),
    "Bilinear": _bilinear,
    **{f"Conv{n}d": _convolution(n) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _transposed(n) for n in (1, 2, 3)},
    **{f"{kind}{n}": _features for kind in ("BatchNorm", "InstanceNorm") for n in ("", "1d", "2d", "3d")},
    "SyncBatchNorm": _features,
    **dict.fromkeys(("LayerNorm", "RMSNorm"), _normalized),
    "GroupNorm": lambda shapes: ["?", str(shapes["weight"][0])],
    **dict.fromkeys(("Embedding", "EmbeddingBag"), _table),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent_settings),
    **dict.fromkeys(("LSTMCell", "GRUCell", "RNNCell"), _cell_settings),
    "PReLU": lambda shapes: [f"num_parameters={shapes['weight'][0]}"],
    "LoRA": _low_rank,
    "Conv1D": lambda shapes: [f"nf={shapes['weight'][1]}", f"nx={shapes['weight'][0]}"],
    "QuantizedLinear": _packed,
    "QuantLinear": lambda _: [],
    "MultiheadAttention": lambda _: [],
}
