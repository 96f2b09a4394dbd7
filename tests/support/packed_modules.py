"""Modules whose weights are packed or kept in odd attributes, and how they are scripted and saved for the tests."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from torch import nn

QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nnq.Linear(8, 4)),
    "linear without bias": lambda: nn.Sequential(nnq.Linear(8, 4, bias_=False)),
    "conv1d": lambda: nn.Sequential(nnq.Conv1d(2, 4, 3)),
    "conv2d": lambda: nn.Sequential(nnq.Conv2d(2, 4, 3)),
    "conv3d": lambda: nn.Sequential(nnq.Conv3d(2, 4, 3)),
    "transposed conv2d": lambda: nn.Sequential(nnq.ConvTranspose2d(2, 4, 3)),
    "conv and relu": lambda: nn.Sequential(torch.ao.nn.intrinsic.quantized.ConvReLU2d(2, 4, 3)),
    "embedding": lambda: nn.Sequential(nnq.Embedding(10, 12)),
    "embedding bag": lambda: nn.Sequential(nnq.EmbeddingBag(10, 12, include_last_offset=True)),
    "dynamic linear": lambda: nn.Sequential(nnqd.Linear(8, 4)),
    "dynamic linear of halves": lambda: nn.Sequential(nnqd.Linear(8, 4, dtype=torch.float16)),
    "dynamic lstm": lambda: nnqd.LSTM(4, 3, bidirectional=True),
    "dynamic gru": lambda: nnqd.GRU(4, 3),
    "dynamic lstm of halves": lambda: nnqd.LSTM(4, 3, dtype=torch.float16),
    "dynamic lstm cell": lambda: nnqd.LSTMCell(4, 3),
    "dynamic gru cell": lambda: nnqd.GRUCell(4, 3),
    "two after a float one": lambda: nn.Sequential(nn.Linear(8, 8), nnq.Linear(8, 8), nnq.Linear(8, 2)),
}
"""Each makes a quantized module of torch's."""


@contextmanager
def engine() -> Iterator[None]:
    """With an engine that packs all of them, without torch's word that this way of quantizing is deprecated."""
    backend = torch.backends.quantized
    before = backend.engine
    known = [name for name in ("x86", "fbgemm", "onednn", "qnnpack") if name in backend.supported_engines]
    backend.engine = known[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        backend.engine = before


class Pair(NamedTuple):
    """A named tuple that TorchScript knows."""

    first: torch.Tensor
    second: int


class Attributes(nn.Module):
    """Tensors in every kind of attribute that TorchScript has."""

    listed: list[torch.Tensor]
    mapped: dict[str, torch.Tensor]
    numbered: dict[int, list[torch.Tensor]]
    maybe: torch.Tensor | None
    nothing: torch.Tensor | None
    pair: tuple[torch.Tensor, int]
    named: Pair

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("gone", torch.full((3,), 2.0), persistent=False)
        self.plain = torch.full((4,), 3.0)
        self.listed = [torch.full((5,), 4.0), torch.full((6,), 5.0)]
        self.mapped = {"a.b": torch.full((7,), 6.0)}
        self.numbered = {3: [torch.full((8,), 7.0)]}
        self.maybe = torch.full((9,), 8.0)
        self.nothing = None
        self.pair = (torch.full((10,), 9.0), 1)
        self.named = Pair(torch.full((11,), 10.0), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.listed[0].sum() + self.weight.sum() + self.pair[0].sum() + self.named.first.sum()


class Stateful(nn.Module):
    """A module that pickles itself by a tuple of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.arange(4.0)
        self.factor = 2.0

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, list[torch.Tensor], float, bool]:
        return self.kept, [self.kept * 2], self.factor, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, list[torch.Tensor], float, bool]) -> None:
        self.kept = state[0]
        self.factor = state[2]
        self.training = state[3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.kept.sum()


KEPT = torch.arange(6.0)


def constant(x: torch.Tensor) -> torch.Tensor:
    """A function whose trace has a tensor in its code."""
    return x + KEPT


SCRIPTED: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: torch.jit.script(make()) for name, make in QUANTIZED.items()},
    "attributes": lambda: torch.jit.script(Attributes()),
    "a state of its own": lambda: torch.jit.script(nn.Sequential(Stateful(), Stateful())),
    "a constant": lambda: torch.jit.trace(constant, torch.ones(6)),
    "a constant in a module": lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 2))).eval()),
    "frozen packed weights": lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(nnq.Linear(8, 4))).eval()),
}
"""Each makes something that torch.jit.save takes."""
