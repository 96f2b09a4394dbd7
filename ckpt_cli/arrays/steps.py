"""The steps by which a piece of a new tensor is made of pieces of others: what a job carries, and a worker runs.

A step gives stored elements, or values to compute with, as an array of one dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.arrays.cast import Cast, Losses
from ckpt_cli.arrays.codec import Codec
from ckpt_cli.arrays.random_normal import NormalSource
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import ValueRefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Storage, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Array = NDArray[Any]

Parts = Iterator["memoryview | bytes"]
"""The elements of each source in the order of the steps that take them; each is valid until the next one is taken."""

INT64 = "int64"
"""The kind of values of integers; that of others is float32 or float64."""


class Step(Protocol):
    """Makes some elements."""

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return the elements; adds the finite values that a dtype cannot hold to `losses`."""


class Program:
    """A step as what `parallel/made.py` runs."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Losses]:
        """Return the new elements as bytes, and what was lost."""
        import numpy as np

        losses = Losses()
        with np.errstate(all="ignore"):
            made = self._step.run(iter(parts), losses)
        return np.ascontiguousarray(made).view(np.uint8).reshape(-1).data, losses


_RAW = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
"""By their bytes, elements that are moved as they are."""


def raw_of(dtype: DType) -> str:
    """Return numpy's code of stored elements that are moved as they are."""
    return _RAW[dtype.itemsize]


@dataclass(frozen=True, slots=True)
class Take:
    """Takes stored elements of the next source."""

    raw: str

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return a copy of them, as the buffer is used again."""
        import numpy as np

        del losses
        found: Array = np.frombuffer(next(parts), self.raw).copy()
        return found


@dataclass(frozen=True, slots=True)
class Fill:
    """Repeats one stored element."""

    raw: str
    element: bytes
    count: int

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return that many of it."""
        import numpy as np

        del parts, losses
        return np.full(self.count, np.frombuffer(self.element, self.raw)[0], self.raw)


@dataclass(frozen=True, slots=True)
class Cycle:
    """Repeats a row of stored elements, from one of them on."""

    raw: str
    row: bytes
    first: int
    count: int

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return that many elements."""
        import numpy as np

        del parts, losses
        row = np.frombuffer(self.row, self.raw)
        return np.resize(np.roll(row, -self.first), self.count)


@dataclass(frozen=True, slots=True)
class Join:
    """Puts elements one behind the other; with `rows`, those of each row."""

    steps: Sequence[Step]
    rows: int = 1

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return them."""
        import numpy as np

        found = [step.run(parts, losses).reshape(self.rows, -1) for step in self.steps]
        return found[0].reshape(-1) if len(found) == 1 else np.concatenate(found, axis=1).reshape(-1)


@dataclass(frozen=True, slots=True)
class Draw:
    """Makes normal numbers, in float64."""

    source: NormalSource
    begin: int
    end: int
    mean: float
    std: float

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return them."""
        del parts, losses
        found: Array = self.source.numbers(self.begin, self.end)
        found *= self.std
        found += self.mean
        return found


@dataclass(frozen=True, slots=True)
class Decode:
    """Makes values of stored elements."""

    step: Step
    dtype: DType
    kind: str
    """The kind of the values."""
    name: str

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return them."""
        import numpy as np

        stored = self.step.run(parts, losses)
        wide = BY_NAME[self.kind]
        if self.dtype is wide:
            return stored.view(self.kind)
        if self.dtype.category == "float" and self.kind != INT64:
            return np.frombuffer(Cast(self.dtype, wide, self.name).run(stored.view(np.uint8).data, Losses()), self.kind)
        codec = codec_of(self.dtype, self.name)
        return codec.decode(stored.view(codec.stored)).astype(self.kind)


@dataclass(frozen=True, slots=True)
class Round:
    """Rounds values to stored elements of a dtype.

    Raises ValueRefusedError for integers that it cannot hold. `is_cast` counts what becomes zero as lost too, and
    `allow` lets everything be converted as a C cast does.
    """

    step: Step
    dtype: DType
    kind: str
    """The kind of the values, or the name of the dtype that they have."""
    name: str
    is_cast: bool
    allow: bool

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return the elements."""
        import numpy as np

        values, source = self.step.run(parts, losses), BY_NAME[self.kind]
        if source is self.dtype:
            return values.view(raw_of(self.dtype))
        if source.category == self.dtype.category == "float":
            lost = Losses()
            made = Cast(source, self.dtype, self.name).run(values.view(np.uint8).data, lost)
            if not self.is_cast:
                lost.zero = 0
            losses.add(lost)
            return np.frombuffer(made, raw_of(self.dtype))
        codec = codec_of(source, self.name)
        meant = values.view("i8") if self.kind == INT64 else codec.decode(values.view(codec.stored))
        return codec_of(self.dtype, self.name).encode(meant, cast=self.allow).view(raw_of(self.dtype))


@dataclass(frozen=True, slots=True)
class Convert:
    """Makes values of another kind of values: integers that are computed with as floats."""

    step: Step
    kind: str

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return them."""
        return self.step.run(parts, losses).astype(self.kind)


@dataclass(frozen=True, slots=True)
class Operate:
    """Computes with values of one kind; a number stands for that many of it."""

    operator: str
    left: Step | int | float
    right: Step | int | float
    kind: str
    name: str

    def run(self, parts: Parts, losses: Losses) -> Array:
        """Return the results; raises ValueRefusedError for integers that are too large."""
        import numpy as np

        kind = np.dtype(self.kind)
        left = kind.type(self.left) if isinstance(self.left, int | float) else self.left.run(parts, losses)
        right = kind.type(self.right) if isinstance(self.right, int | float) else self.right.run(parts, losses)
        functions = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
        function: Any = functions[self.operator]
        found: Array = function(left, right)
        if self.kind == INT64 and found.size:
            about = function(np.asarray(left, np.float64), np.asarray(right, np.float64))
            if (np.abs(about) >= _INTEGERS).any():
                raise ValueRefusedError(f"int64 cannot hold a result (tensor {self.name!r})")
        return found


_INTEGERS = 2.0**63 - 2.0**12
"""The float64 from which on a result might not be an int64."""


def codec_of(dtype: DType, name: str) -> Codec:
    """Return the codec of elements by themselves."""
    return Codec(Tensor(name, dtype, (0,), (1,), Storage("", 0)))
