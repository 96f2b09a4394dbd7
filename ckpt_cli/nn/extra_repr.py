"""The settings that torch.nn's layers show: for each class the content of its `extra_repr`, as a table.

Source: the `extra_repr` methods of torch 2.13's torch/nn/modules/*.py. A default stands in for an attribute that older
versions of torch did not have; their `__setstate__` methods say which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.nn_module import Module, is_scalar, setting_text
from ckpt_cli.pickles.tensors.arguments import text_of

_MISSING = object()
"""An attribute that is not there and has no default."""


def _always(_: object) -> bool:
    return True


def _unless(value: object) -> Callable[[object], bool]:
    """Shown unless it is this very value: a number, text, or None."""

    def shown(node: object) -> bool:
        text = text_of(node)
        return bool(type(node) not in (int, float, bool) or node != value) if text is None else text != value

    return shown


def _unless_none(node: object) -> bool:
    return node is not None


def _unless_all(value: int) -> Callable[[object], bool]:
    """Shown unless it is a tuple of nothing but this number."""
    return lambda node: type(node) is not tuple or any(type(item) is not int or item != value for item in node)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in the text of a layer."""

    attribute: str
    label: str = ""
    """The text before the value, `=` included; empty for a positional value."""
    shown: Callable[[object], bool] = _always
    """True if a value is shown."""
    quoted: bool = False
    """True if text stands in quotes."""
    default: object = _MISSING
    """The value where the attribute is missing."""
    presence: bool = False
    """A setting that shows if an attribute is there and not None."""


def _bare(*attributes: str) -> tuple[Setting, ...]:
    """Positional values."""
    return tuple(Setting(attribute) for attribute in attributes)


def _named(*attributes: str, **options: object) -> tuple[Setting, ...]:
    """Values by name."""
    return tuple(Setting(attribute, f"{attribute}=", **options) for attribute in attributes)  # type: ignore[arg-type]  # options are Setting's


def _flag(attribute: str, *, default: object = _MISSING) -> tuple[Setting, ...]:
    """A flag that is shown when it is set."""
    return _named(attribute, shown=lambda node: node is True, default=default)


_INPLACE = _flag("inplace", default=False)
_BIAS = _named("bias", presence=True)
_WITHOUT_BIAS = _named("bias", presence=True, shown=lambda present: present is False)
_CONVOLUTION = (
    *_bare("in_channels", "out_channels"),
    *_named("kernel_size", "stride"),
    *_named("padding", shown=_unless_all(0)),
    *_named("dilation", shown=_unless_all(1)),
    *_named("output_padding", shown=_unless_all(0)),
    *_named("groups", shown=_unless(1)),
    *_WITHOUT_BIAS,
    *_named("padding_mode", shown=_unless("zeros"), default="zeros"),
)
_NORM = (
    *_bare("num_features"),
    *_named("eps", "momentum", "affine"),
    *_BIAS,
    *_named("track_running_stats", default=True),
)
_RECURRENT = (
    *_bare("input_size", "hidden_size"),
    *_named("proj_size", shown=_unless(0), default=0),
    *_named("num_layers", shown=_unless(1)),
    *_named("bias", shown=lambda node: node is not True),
    *_named("batch_first", shown=lambda node: node is not False),
    *_named("dropout", shown=_unless(0)),
    *_named("bidirectional", shown=lambda node: node is not False),
)
_CELL = (
    *_bare("input_size", "hidden_size"),
    *_named("bias", shown=lambda node: node is not True, default=True),
    *_named("nonlinearity", shown=_unless("tanh"), default="tanh"),
)
_EMBEDDING = (
    *_bare("num_embeddings", "embedding_dim"),
    *_named("padding_idx", "max_norm", shown=_unless_none, default=None),
    *_named("norm_type", shown=_unless(2)),
    *_named("scale_grad_by_freq", shown=lambda node: node is not False),
    *_named("sparse", shown=lambda node: node is not False),
)
_EMBEDDING_BAG = (
    *_bare("num_embeddings", "embedding_dim"),
    *_named("max_norm", shown=_unless_none),
    *_named("norm_type", shown=_unless(2)),
    *_named("scale_grad_by_freq", shown=lambda node: node is not False),
    *_named("mode", quoted=True),
    *_named("padding_idx", shown=_unless_none, default=None),
)
_UPSAMPLE = (
    *_named("scale_factor", shown=_unless_none, quoted=True),
    *_named("size", shown=_unless_none, quoted=True),
    *_named("mode", quoted=True),
)
_DROPOUT = _named("p", "inplace")
_POOL = _named("kernel_size", "stride", "padding")
_MAX_POOL = _named("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_SIZED_POOL = _named("output_size")
_RESPONSE = (*_bare("size"), *_named("alpha", "beta", "k"))
_LINEAR = (*_named("in_features", "out_features"), *_BIAS)

_FAMILIES: Sequence[tuple[str, tuple[Setting, ...]]] = (
    ("Linear LazyLinear NonDynamicallyQuantizableLinear _LinearWithBias", _LINEAR),
    ("Bilinear", (*_named("in1_features", "in2_features", "out_features"), *_BIAS)),
    ("Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d LazyConv1d LazyConv2d LazyConv3d "
     "LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d", _CONVOLUTION),
    ("BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d LazyBatchNorm1d "
     "LazyBatchNorm2d LazyBatchNorm3d LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d", _NORM),
    ("LayerNorm", (*_bare("normalized_shape"), *_named("eps", "elementwise_affine"), *_BIAS)),
    ("GroupNorm", (*_bare("num_groups", "num_channels"), *_named("eps", "affine"), *_BIAS)),
    ("RMSNorm", (*_bare("normalized_shape"), *_named("eps", "elementwise_affine"))),
    ("LocalResponseNorm CrossMapLRN2d", _RESPONSE),
    ("Embedding", _EMBEDDING),
    ("EmbeddingBag", _EMBEDDING_BAG),
    ("LSTM GRU RNN RNNBase", _RECURRENT),
    ("LSTMCell GRUCell RNNCell RNNCellBase", _CELL),
    ("Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout", _DROPOUT),
    ("ReLU ReLU6 SELU SiLU Mish", _INPLACE),
    ("CELU ELU", (*_named("alpha"), *_INPLACE)),
    ("LeakyReLU", (*_named("negative_slope"), *_INPLACE)),
    ("Hardtanh", (*_named("min_val", "max_val"), *_INPLACE)),
    ("RReLU", (*_named("lower", "upper"), *_INPLACE)),
    ("Threshold", (*_named("threshold", "value"), *_INPLACE)),
    ("GELU", _named("approximate", quoted=True, default="none")),
    ("GLU Softmax LogSoftmax Softmin", _named("dim", default=None)),
    ("Hardshrink Softshrink", _bare("lambd")),
    ("PReLU", _named("num_parameters")),
    ("Softplus", _named("beta", "threshold")),
    ("MaxPool1d MaxPool2d MaxPool3d", _MAX_POOL),
    ("AvgPool1d AvgPool2d AvgPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d", _POOL),
    ("LPPool1d LPPool2d LPPool3d", _named("norm_type", "kernel_size", "stride", "ceil_mode")),
    ("AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d",
     _SIZED_POOL),
    ("ConstantPad1d ConstantPad2d ConstantPad3d", _named("padding", "value")),
    ("ZeroPad1d ZeroPad2d ZeroPad3d CircularPad1d CircularPad2d CircularPad3d ReflectionPad1d ReflectionPad2d "
     "ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d", _bare("padding")),
    ("Upsample UpsamplingNearest2d UpsamplingBilinear2d", _UPSAMPLE),
    ("PixelShuffle", _named("upscale_factor")),
    ("PixelUnshuffle", _named("downscale_factor")),
    ("ChannelShuffle", _named("groups")),
    ("Flatten", _named("start_dim", "end_dim")),
    ("Unflatten", _named("dim", "unflattened_size")),
    ("Fold", _named("output_size", "kernel_size", "dilation", "padding", "stride")),
    ("Unfold", _named("kernel_size", "dilation", "padding", "stride")),
)  # fmt: skip

LAYERS: dict[str, tuple[Setting, ...]] = {name: settings for names, settings in _FAMILIES for name in names.split()}
"""The settings of each class; classes of torch.nn that are not here show none."""

_SCALARS = 64
"""The number of settings that are shown for a class that is not one of torch's."""

_NAME = 200
"""Characters of such a setting's name."""

_QUANTIZED = ("torch.nn.quantized.", "torch.ao.nn.quantized.")
_TORCH = ("torch.nn.", "torch.ao.", "torch.quantization.")


def is_torchs(module: Module) -> bool:
    """True if a module's class is one of torch's own, whose text torch decides."""
    return module.qualified.startswith(_TORCH)


def shown_name(module: Module) -> str:
    """The name of a class as its modules show it; the quantized ones put a word before it (their `_get_name`)."""
    if module.qualified.startswith(_QUANTIZED) and module.name in LAYERS:
        return f"{'Dynamic' if '.dynamic.' in module.qualified else ''}Quantized{module.name}"
    return module.name or "Module"


def settings_of(module: Module) -> list[str] | None:
    """The settings as `extra_repr` shows them, each a text; None where the file does not have them all.

    For a class that is not one of torch's they are its public attributes that are numbers or text.
    """
    if not is_torchs(module):
        return _scalars(module)
    if module.qualified.startswith(_QUANTIZED):
        return _quantized(module)
    texts = []
    for setting in LAYERS.get(module.name, ()):
        value = _value(module, setting)
        if value is _MISSING:
            return None
        if setting.shown(value):
            texts.append(f"{setting.label}{setting_text(value, quoted=setting.quoted)}")
    if module.name.startswith("Upsampl") and len(texts) == 3:
        del texts[1]  # of both, `extra_repr` shows the scale
    return texts


def _value(module: Module, setting: Setting) -> object:
    if setting.presence:
        found = module.settings.get(setting.attribute)
        return (module.registered.get(setting.attribute) if found is None else found) is not None
    default = _MISSING if module.scripted else setting.default
    return module.settings.get(setting.attribute, default)


def _scalars(module: Module) -> list[str]:
    scalars = [
        (name, value)
        for name, value in module.settings.items()
        if name != "training" and not name.startswith("_") and is_scalar(value) and name not in module.registered
    ]
    texts = [f"{name[:_NAME]}={setting_text(value, quoted=True)}" for name, value in scalars[:_SCALARS]]
    return [*texts, "…"] if len(scalars) > _SCALARS else texts


def _quantized(module: Module) -> list[str]:
    """The settings of a quantized layer; what `extra_repr` reads from its packed weights is left out."""
    settings = LAYERS.get(module.name, ())
    values = [(setting, _value(module, setting)) for setting in settings if not setting.presence]
    texts = [
        f"{setting.label}{setting_text(value, quoted=setting.quoted)}"
        for setting, value in values
        if value is not _MISSING and setting.shown(value)
    ]
    if ".dynamic." in module.qualified:
        return texts
    scale = [
        f"{name}={setting_text(module.settings[name])}" for name in ("scale", "zero_point") if name in module.settings
    ]
    return [*texts, *scale]
