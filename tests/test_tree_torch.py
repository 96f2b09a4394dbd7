"""The text of every class in torch.nn, against `repr`: pickled by torch, read without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn

from ckpt_cli.ops.layers import LAYERS

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

_WINDOW = [((2,), {}), (((2, 3), (1, 2), 1), {})]
_CONV = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}


def _family(name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Typical and all-other arguments of the classes that come in several dimensions."""
    lazy = name.startswith("Lazy")
    base, dims = name.removeprefix("Lazy"), int(name[-2]) if name[-2:-1].isdigit() else 0
    out = (4,) if lazy else (2, 4)
    if base.startswith("ConvTranspose"):
        return [((*out, 3), {}), ((*out, (3,) * dims), {**_CONV, "output_padding": 1})]
    if base.startswith("Conv"):
        return [
            ((*out, 3), {}),
            ((*out, 3), {**_CONV, "padding_mode": "reflect"}),
            ((*out, 3), {"padding": "same"}),
        ]
    if base.startswith(("BatchNorm", "InstanceNorm")):
        return [
            (() if lazy else (3,), {}),
            (() if lazy else (3,), {"eps": 0.1, "momentum": None, "affine": False, "track_running_stats": True}),
            (() if lazy else (3,), {"track_running_stats": False, "affine": True}),
        ]
    if base.startswith(("AdaptiveAvgPool", "AdaptiveMaxPool")):
        return [((3,), {}), (((3,) * dims,), {})]
    if base.startswith("MaxPool"):
        return [((2,), {}), ((3, 2, 1, 2), {"ceil_mode": True, "return_indices": True}), (((3,) * dims,), {})]
    if base.startswith("AvgPool"):
        return [((2,), {}), ((3, 2, 1), {"ceil_mode": True, "count_include_pad": False})]
    if base.startswith("MaxUnpool"):
        return [((2,), {}), (((2,) * dims, 2, 1), {})]
    if base.startswith("LPPool"):
        return [((2, 3), {}), ((1.5, 3, 2, True), {})]
    if base.startswith("ConstantPad"):
        return [((1, 0.5), {}), (((1,) * (2 * dims), 2), {})]
    if "Pad" in base:
        return [((1,), {}), (((1, 2) * dims,), {})]
    if base.startswith(("RNNCell", "LSTMCell", "GRUCell")):
        other = {"nonlinearity": "relu"} if base == "RNNCell" else {}
        return [((2, 3), {}), ((2, 3), {"bias": False, **other})]
    if base in ("RNN", "LSTM", "GRU"):
        many = {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}
        return [((2, 3), {}), ((2, 3), {**many, **({"proj_size": 1} if base == "LSTM" else {})})]
    if "Dropout" in base:
        return [((), {}), ((0.25, True), {})]
    if base in ("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"):
        return [((), {}), ((), {"inplace": True})]
    if base in ("CELU", "ELU", "LeakyReLU"):
        return [((), {}), ((0.3, True), {})]
    if base in ("Softmax", "LogSoftmax", "Softmin"):
        return [((), {}), ((1,), {})]
    if base in ("Hardshrink", "Softshrink"):
        return [((), {}), ((0.25,), {})]
    return [((), {})]


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
    for number, (args, options) in enumerate(ARGUMENTS.get(name) or _family(name))
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
