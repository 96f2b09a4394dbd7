"""The description of one node of a checkpoint's tree: its class and settings, as pickled or as inferred."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.nn.extra_repr import is_torchs, settings_of, shown_name
from ckpt_cli.nn.infer import guess, settings_from
from ckpt_cli.nn.outline import AGAIN, HOLDER, NOTHING, Draft
from ckpt_cli.pickles.graph import Call, Dict, Global
from ckpt_cli.pickles.nn_module import Module, class_of, setting_text
from ckpt_cli.pickles.tensors.arguments import text_of

_LISTS = ("ModuleList", "ParametrizationList")
"""Classes of torch that show equal neighbours once (their `__repr__`)."""

_DIGITS = 9
"""Digits of a number that a layer may have."""

_WITHIN = ("lora_A", "lora_B", "_packed_params")
"""Children of a layer whose tensors identify it."""

_EMPTY = "''"
"""The text for the empty name."""

_PACKED = "_packed_params"
"""The child in which a quantized layer keeps its weight, and which it does not show."""


@dataclass(frozen=True, slots=True)
class Description:
    """The class and settings of a node, as text."""

    kind: str
    """The name of its class as it is shown."""
    qualified: str
    """The dotted name of its class where the file says it, else the kind."""
    settings: tuple[str, ...] = ()
    """The lines between its parentheses."""
    inferred: bool = False
    """True if names and shapes suggest it, because the file does not say it."""
    listed: bool = False
    """True if equal neighbours among its children are shown once."""
    hidden: str | None = None
    """The child that is not shown."""
    extra: bool = False
    """True if the settings are more than torch shows: those of a class that is not one of its own."""

    @property
    def printed(self) -> tuple[str, ...]:
        """The settings that `print(net)` shows."""
        return () if self.extra else self.settings


def description_of(draft: Draft) -> Description:
    """Return the description of a node without its children."""
    if draft.kind == NOTHING:
        return Description("None", "None")
    if draft.kind == AGAIN:
        return Description("<the same module again>", "")
    if draft.kind == HOLDER:
        return Description(draft.label, draft.label, _held(draft))
    return _module(draft, draft.module) if draft.module is not None else _inferred(draft)


def _held(draft: Draft) -> tuple[str, ...]:
    """Return lines for the tensors of a container that is not a module; for an optimizer only their number."""
    if not draft.plain:
        return _tensor_lines(draft.tensors)
    count, stack = 0, [draft]
    while stack:
        node = stack.pop()
        count += len(node.tensors)
        stack.extend(node.children.values())
    return (f"{count:,} tensor{'' if count == 1 else 's'}",)


def _tensor_lines(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A line for each tensor that belongs to no layer."""
    return tuple(f"{role or _EMPTY}: {tensor.dtype}{_shape(tensor)}" for role, tensor in tensors.items())


def _shape(tensor: Tensor) -> str:
    return "[?]" if tensor.shape is None else f"[{','.join(map(str, tensor.shape))}]"


# --- from a pickled module -------------------------------------------------------------------------------------------


def _module(draft: Draft, module: Module) -> Description:
    kind, own = shown_name(module), is_torchs(module)
    lines = _SPECIAL[module.name](draft, module) if own and module.name in _SPECIAL else None
    inferred = False
    if lines is None:
        settings = settings_of(module)
        if settings is None:
            shapes = {role: tensor.shape for role, tensor in draft.tensors.items() if tensor.shape is not None}
            settings = settings_from(module.name, shapes) or []
            inferred = bool(settings)
        lines = [", ".join(settings)] if settings else []
    return Description(
        kind,
        module.qualified,
        tuple(lines),
        inferred=inferred,
        listed=own and module.name in _LISTS,
        hidden=_PACKED if ".quantized." in module.qualified else None,
        extra=not own and not inferred,
    )


def _parameter_list(draft: Draft, module: Module) -> list[str]:
    """torch/nn/modules/container.py `ParameterList.extra_repr`."""
    size = module.settings.get("_size")
    known = {**module.settings, **module.registered}
    if isinstance(size, int):
        keys = [key for key in map(str, range(min(size, len(known)))) if key in known]
    else:
        keys = list(module.registered)
    return [f"  ({key}): {_held_value(key, draft, known, by_type=False)}" for key in keys]


def _parameter_dict(draft: Draft, module: Module) -> list[str]:
    """torch/nn/modules/container.py `ParameterDict.extra_repr`."""
    named = module.settings.get("_keys")
    known = {**module.settings, **module.registered}
    keys = [text_of(key) for key in named.pairs[::2]] if isinstance(named, Dict) else list(module.registered)
    return [f"  ({key}): {_held_value(key, draft, known, by_type=True)}" for key in keys if key in known]


def _held_value(key: str | None, draft: Draft, known: Mapping[str, object], *, by_type: bool) -> str:
    """Return the text of one value; a list names tensors by their dtype, a dict by the name of their type."""
    tensor = draft.tensors.get(key or "")
    if tensor is None:
        return f"Object of type: {_type_name(known.get(key or ''))}"
    on_gpu = tensor.device.startswith("cuda")
    if by_type:
        dtype = f"torch.{'cuda.' if on_gpu else ''}{tensor.dtype.storage or tensor.dtype.name.capitalize()}Tensor"
    else:
        dtype = f"torch.{tensor.dtype}"
    device = f" ({tensor.device})" if on_gpu else ""
    kind = "Parameter" if tensor.kind == "parameter" else "Tensor"
    return f"{kind} containing: [{dtype} of size {'x'.join(map(str, tensor.shape or ()))}{device}]"


def _type_name(node: object) -> str:
    if isinstance(node, Dict):
        return "dict"
    if isinstance(node, Call):
        kind = class_of(node)
        return "object" if kind is None else kind.name
    return "str" if text_of(node) is not None else type(node).__name__


def _cross_entropy(draft: Draft, module: Module) -> list[str] | None:
    """torch/nn/modules/loss.py `LinearCrossEntropyLoss.extra_repr`: settings of its own and of its linear layer."""
    linear = draft.children["linear"].module if "linear" in draft.children else None
    if linear is None:
        return None
    has_bias = linear.registered.get("bias") is not None
    shown = {"in_features": linear.settings.get("in_features"), "num_classes": module.settings.get("num_classes"),
             "out_features": module.settings.get("out_features"), "bias": has_bias}  # fmt: skip
    rest = {name: module.settings.get(name) for name in ("reduction", "ignore_index", "label_smoothing")}
    texts = [f"{name}={setting_text(value)}" for name, value in {**shown, **rest}.items()]
    return [", ".join([*texts, f"options={_options(module.settings.get('options'))}"])]


_OPTIONS = ("allow_retain_graph", "batch_chunk_size", "chunking_method", "acc_policy", "acc_dtype")
"""The fields of torch's `LinearCrossEntropyOptions`, in the order of its state."""


def _options(node: object) -> str:
    """The repr of a dataclass with slots, whose state is the list of its fields."""
    state = node.states[0] if isinstance(node, Call) and node.states else None
    if not isinstance(state, list) or len(state) != len(_OPTIONS):
        return setting_text(node)
    values = [value.qualified if isinstance(value, Global) else setting_text(value, quoted=True) for value in state]
    return f"LinearCrossEntropyOptions({', '.join(map('='.join, zip(_OPTIONS, values, strict=True)))})"


_SPECIAL = {
    "ParameterList": _parameter_list,
    "ParameterDict": _parameter_dict,
    "LinearCrossEntropyLoss": _cross_entropy,
}
"""Classes of torch whose text is made of more than their attributes."""


# --- from names and shapes -------------------------------------------------------------------------------------------


def _inferred(draft: Draft) -> Description:
    tensors, children = draft.tensors, draft.children
    if children and not tensors and all(map(is_number, children)):
        listed = all(child.children.keys() - set(_WITHIN) for child in children.values())
        kind = "ModuleList" if listed else "Sequential"  # of blocks, and of layers
        return Description(kind, kind, inferred=True, listed=listed)
    within = {role: tensor for role in _WITHIN if (tensor := _first_tensor(children.get(role))) is not None}
    name = draft.key
    if is_number(name) and draft.parent is not None:  # a layer of a list is called what the list is
        name = draft.parent.key
    found = guess(name, {**within, **tensors}, children.keys())
    if found.kind == "Linear" and name == "out_proj" and draft.parent and "in_proj_weight" in draft.parent.tensors:
        kind = "NonDynamicallyQuantizableLinear"
        return Description(kind, kind, (", ".join(found.settings),), inferred=True)
    others = _tensor_lines({role: tensor for role, tensor in tensors.items() if role not in found.used})
    settings = others if found.kind == "Module" else tuple(filter(None, [", ".join([*found.settings, *others])]))
    hidden = _PACKED if found.kind == "QuantizedLinear" else None
    return Description(found.kind, found.kind, settings, inferred=True, hidden=hidden)


def is_number(key: str) -> bool:
    """True if a name is a number that a layer of a list may have."""
    return len(key) <= _DIGITS and key.isdecimal()


def _first_tensor(draft: Draft | None) -> Tensor | None:
    """The first tensor of a child that holds another layer's, such as `lora_A.default.weight`."""
    for _ in range(3):
        if draft is None:
            return None
        if draft.tensors:
            return next(iter(draft.tensors.values()))
        draft = next(iter(draft.children.values()), None)
    return None
