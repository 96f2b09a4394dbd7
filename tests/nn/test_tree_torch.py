"""The text of every class in torch.nn, against `repr`: pickled by torch, read without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn

from ckpt_cli.nn.extra_repr import LAYERS

ARGUMENTS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "Linear": [((4, 8), {}), ((4, 8), {"bias": False})],
    "LazyLinear": [((8,), {}), ((8,), {"bias": False})],
    "Bilinear": [((2, 3, 4), {}), ((2, 3, 4), {"bias": False})],
    "Embedding": [
        ((5, 4), {}),
        ((5, 4), {"padding_idx": 1, "max_norm": 1.5, "norm_type": 1.0, "scale_grad_by_freq": True, "sparse": True}),
    ],
    "EmbeddingBag": [
        ((5, 4), {}),
        ((5, 4), {"max_norm": 2.0, "norm_type": 3.0, "scale_grad_by_freq": True, "mode": "sum", "padding_idx": 0}),
    ],
    "LayerNorm": [((4,), {}), (((2, 3),), {"eps": 0.1, "bias": False}), ((4,), {"elementwise_affine": False})],
    "RMSNorm": [((4,), {}), (((2, 3),), {"eps": 0.1, "elementwise_affine": False})],
    "GroupNorm": [((2, 4), {}), ((2, 4), {"eps": 1e-3, "affine": False})],
    "LocalResponseNorm": [((2,), {}), ((3, 0.1, 0.5, 2.0), {})],
    "CrossMapLRN2d": [((2,), {}), ((3, 0.1, 0.5, 2.0), {})],
    "PReLU": [((), {}), ((3,), {})],
    "GELU": [((), {}), ((), {"approximate": "tanh"})],
    "Threshold": [((0.5, 2), {}), ((0.5, 2, True), {})],
    "Softplus": [((), {}), ((2, 10), {})],
    "Flatten": [((), {}), ((0, 2), {})],
    "Unflatten": [((1, (2, 3)), {}), ((1, torch.Size([2, 3])), {})],
    "Fold": [(((4, 5), 2), {}), (((4, 5), (2, 3), 2, 1, (1, 2)), {})],
    "Unfold": [((2,), {}), (((2, 3), 2, 1, (1, 2)), {})],
    "Upsample": [
        (((3, 4),), {}),
        ((), {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
        ((), {"scale_factor": (2.0, 3.0)}),
    ],
    "UpsamplingNearest2d": [((4,), {}), ((), {"scale_factor": 2})],
    "UpsamplingBilinear2d": [(((3, 4),), {}), ((), {"scale_factor": (2, 3)})],
    "PixelShuffle": [((2,), {})],
    "PixelUnshuffle": [((2,), {})],
    "ChannelShuffle": [((2,), {})],
    "MultiheadAttention": [
        ((4, 2), {}),
        ((4, 2), {"bias": False, "kdim": 3, "vdim": 5, "add_bias_kv": True, "batch_first": True}),
    ],
    "Transformer": [((), {"d_model": 4, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 1})],
    "TransformerEncoderLayer": [
        ((4, 2, 8), {}),
        ((4, 2, 8, 0.2), {"activation": "gelu", "norm_first": True, "bias": False}),
    ],
    "TransformerDecoderLayer": [((4, 2, 8), {})],
    "TransformerEncoder": [((nn.TransformerEncoderLayer(4, 2, 8), 3), {"enable_nested_tensor": False})],
    "TransformerDecoder": [((nn.TransformerDecoderLayer(4, 2, 8), 2), {})],
    "Sequential": [((), {}), ((nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(8, 1))), {})],
    "ModuleList": [
        (([],), {}),
        (([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3), nn.ReLU(), nn.ReLU(), nn.ReLU()],), {}),
        (([nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(3)],), {}),
    ],
    "ModuleDict": [(({},), {}), (({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.ReLU()])},), {})],
    "ParameterList": [(([],), {}), (([torch.ones(2, 3), torch.zeros(()), 7, "x"],), {}), (([torch.ones(2)],), {})],
    "ParameterDict": [
        (({},), {}),
        (({"a": torch.ones(2, 3), "b": torch.ones(1).bfloat16(), "c": 1.5, "d": {}},), {}),
    ],
    "AdaptiveLogSoftmaxWithLoss": [((4, 10, [2, 5]), {}), ((4, 10, [2, 5], 2.0, True), {})],
    "FractionalMaxPool2d": [((2,), {"output_size": 3}), ((2,), {"output_ratio": 0.5})],
    "FractionalMaxPool3d": [((2,), {"output_size": 3}), ((2,), {"output_ratio": 0.5})],
    "TripletMarginWithDistanceLoss": [((), {}), ((), {"margin": 2.0, "swap": True})],
    "LinearCrossEntropyLoss": [
        ((4, 3), {}),
        ((4, 3), {"bias": True, "reduction": "sum", "ignore_index": 1}),
        ((4, 3), {"options": nn.modules.loss.LinearCrossEntropyOptions(acc_dtype=torch.float32)}),
    ],
    "GLU": [((), {}), ((1,), {})],
    "Hardtanh": [((), {}), ((-2, 3.5, True), {})],
    "RReLU": [((), {}), ((0.1, 0.2, True), {})],
    "NLLLoss2d": [((), {})],
    "SyncBatchNorm": [((3,), {}), ((3, 0.1, None, False, False), {})],
}
"""Arguments for the classes that need some, or that show more than what is given by the families below."""

_CONV = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}
_MANY = {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}
_NORM = [
    {},
    {"eps": 0.1, "momentum": None, "affine": False, "track_running_stats": True},
    {"track_running_stats": False, "affine": True},
]
_TWO_SIZES: Any = lambda d: [((3,), {}), (((3,) * d,), {})]  # noqa: E731
FAMILIES: list[tuple[str, Any]] = [
    ("ConvTranspose", lambda d: [((2, 4, 3), {}), ((2, 4, (3,) * d), {**_CONV, "output_padding": 1})]),
    ("LazyConvTranspose", lambda d: [((4, 3), {}), ((4, (3,) * d), {**_CONV, "output_padding": 1})]),
    ("LazyConv", lambda d: [((4, 3), {}), ((4, 3), {**_CONV, "padding_mode": "reflect"})]),
    ("Conv", lambda d: [((2, 4, 3), {}), ((2, 4, 3), {**_CONV, "padding_mode": "circular"}),
                        ((2, 4, 3), {"padding": "same"})]),
    ("LazyBatchNorm LazyInstanceNorm", lambda d: [((), options) for options in _NORM]),
    ("BatchNorm InstanceNorm", lambda d: [((3,), options) for options in _NORM]),
    ("AdaptiveAvgPool AdaptiveMaxPool", _TWO_SIZES),
    ("MaxPool", lambda d: [*_TWO_SIZES(d), ((3, 2, 1, 2), {"ceil_mode": True, "return_indices": True})]),
    ("AvgPool", lambda d: [((2,), {}), ((3, 2, 1), {"ceil_mode": True, "count_include_pad": False})]),
    ("MaxUnpool", lambda d: [((2,), {}), (((2,) * d, 2, 1), {})]),
    ("LPPool", lambda d: [((2, 3), {}), ((1.5, 3, 2, True), {})]),
    ("ConstantPad", lambda d: [((1, 0.5), {}), (((1,) * (2 * d), 2), {})]),
    ("ZeroPad CircularPad ReflectionPad ReplicationPad", lambda d: [((1,), {}), (((1, 2) * d,), {})]),
    ("RNNCell", lambda d: [((2, 3), {}), ((2, 3), {"bias": False, "nonlinearity": "relu"})]),
    ("LSTMCell GRUCell", lambda d: [((2, 3), {}), ((2, 3), {"bias": False})]),
    ("LSTM", lambda d: [((2, 3), {}), ((2, 3), {**_MANY, "proj_size": 1})]),
    ("RNN GRU", lambda d: [((2, 3), {}), ((2, 3), _MANY)]),
    ("Dropout AlphaDropout FeatureAlphaDropout", lambda d: [((), {}), ((0.25, True), {})]),
    ("ReLU ReLU6 SELU SiLU Mish Hardswish Hardsigmoid", lambda d: [((), {}), ((), {"inplace": True})]),
    ("CELU ELU LeakyReLU", lambda d: [((), {}), ((0.3, True), {})]),
    ("Softmax LogSoftmax Softmin", lambda d: [((), {}), ((1,), {})]),
    ("Hardshrink Softshrink", lambda d: [((), {}), ((0.25,), {})]),
]  # fmt: skip
"""Typical arguments, and all others, of the classes that come in families: by dimensions where they have any."""

NO_ARGUMENTS = [((), {})]


def arguments(name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that a class is built with."""
    if name in ARGUMENTS:
        return ARGUMENTS[name]
    dims = int(name[-2]) if name[-2:-1].isdigit() else 0
    stem = name[:-2] if dims and name != "Softmax2d" else name
    return next((make(dims) for stems, make in FAMILIES if stem in stems.split()), NO_ARGUMENTS)


ABSTRACT = {"Module", "Container", "RNNBase", "RNNCellBase", "DataParallel"}
"""Not layers: bases, and wrappers of a network that need devices."""

CLASSES = sorted(
    name
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and name not in ABSTRACT
)
CASES = [
    pytest.param(name, args, options, id=f"{name}-{number}")
    for name in CLASSES
    for number, (args, options) in enumerate(arguments(name))
]


def built(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = getattr(nn, name)(*args, **options)
    return module


@pytest.mark.parametrize(("name", "args", "options"), CASES)
def test_every_class_of_torch_nn_is_shown_as_repr_shows_it(
    name: str, args: tuple[Any, ...], options: dict[str, Any], tmp_path: Path, ckpt: Ckpt
) -> None:
    module = built(name, args, options)
    torch.save(module, tmp_path / "net.pt")
    answer = ckpt("tree", "--bare", tmp_path / "net.pt")
    assert (answer.out, answer.err) == (f"{module!r}\n", "")


def test_every_class_in_the_table_is_compared_with_torch() -> None:
    told = {name for name in LAYERS if hasattr(nn, name)} - ABSTRACT
    assert told <= set(CLASSES)
    assert len(CLASSES) > 150


def test_every_class_of_the_table_is_built_with_arguments_of_its_own() -> None:
    shown = {name for name in told_classes() if arguments(name) is NO_ARGUMENTS}
    assert shown == set()


def told_classes() -> set[str]:
    """The classes whose table has settings."""
    return {name for name, settings in LAYERS.items() if settings and name in CLASSES}
