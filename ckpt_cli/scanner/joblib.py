"""Arrays that joblib writes between the opcodes of a pickle, as joblib.load reads them.

After the BUILD of a `NumpyArrayWrapper` the array's bytes follow: a byte with the length of the padding, the padding,
and the elements; of an array of objects, a pickle (joblib/numpy_pickle.py `write_array`, `read_array`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, MalformedError, TruncatedError
from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.graph import Call, Dict, Global
from ckpt_cli.pickles.machine import Handler, Machine
from ckpt_cli.pickles.opcodes.push import Stopped
from ckpt_cli.pickles.tensors.arguments import COUNT_END, text_of
from ckpt_cli.pickles.tensors.numpy import NumpyDType, numpy_dtype

_WRAPPER = ("joblib.numpy_pickle", "NumpyArrayWrapper")
_RECONSTRUCTOR = ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")

_PADDING = 16
"""Bytes that elements are aligned to."""

_HAS_OBJECTS = 1
"""The flag of a dtype whose elements refer to objects (numpy's NPY_ITEM_REFCOUNT)."""


@dataclass(frozen=True, slots=True)
class ArrayBytes:
    """What follows a wrapper."""

    end: int
    """The byte after the elements; that after the padding, where they are a pickle."""
    pickled: bool
    """True if the elements are a pickle."""
    aligned: bool
    """True if there is a padding, at whose first byte any other unpickler than joblib's stops."""


def is_wrapper(node: object) -> bool:
    """True for a call that makes a `NumpyArrayWrapper`."""
    if not isinstance(node, Call):
        return False
    func = node.func
    if isinstance(func, Global) and (func.module, func.name) in _RECONSTRUCTOR and isinstance(node.args, tuple):
        func = node.args[0] if node.args else None
    return isinstance(func, Global) and (func.module, func.name) == _WRAPPER


def array_after(wrapper: Call, data: bytes | memoryview, position: int) -> ArrayBytes:
    """Return what follows a wrapper's BUILD; raises MalformedError where its state does not say, or says too much."""
    state = _state(wrapper)
    dtype = state.get("dtype")
    known = numpy_dtype(dtype)
    if known is None or not isinstance(dtype, Call):
        raise MalformedError("has an array of joblib whose dtype is not known")
    if _has_objects(known, dtype):
        return ArrayBytes(position, pickled=True, aligned=False)
    shape, size = state.get("shape"), _itemsize(known)
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < COUNT_END for n in shape) or not size:
        raise MalformedError("has an array of joblib whose size is not known")
    aligned = state.get("numpy_array_alignment_bytes") is not None
    if aligned:
        padding = data[position] if position < len(data) else 0
        if padding > _PADDING or bytes(data[position + 1 : position + 1 + padding]).strip(b"\xff"):
            raise MalformedError("has an array of joblib after a padding that joblib does not write")
        position += 1 + padding
    nbytes = prod(shape[:64]) * size
    if position + nbytes > len(data):
        raise TruncatedError(f"ends within an array of {nbytes} bytes")
    return ArrayBytes(position + nbytes, pickled=False, aligned=aligned)


def _state(wrapper: Call) -> dict[str, object]:
    found: dict[str, object] = {}
    for state in wrapper.states:
        pairs = state.pairs if isinstance(state, Dict) else []
        for key, value in zip(pairs[::2], pairs[1::2], strict=False):
            name = text_of(key)
            if name is not None:
                found[name] = value
    return found


def _has_objects(known: NumpyDType, dtype: Call) -> bool:
    """True if the elements refer to objects; raises MalformedError where only numpy could say."""
    if known.code[:1] == "O":
        return True
    if not dtype.states:
        return False
    state = dtype.states[-1]
    flags = state[7] if isinstance(state, tuple) and len(state) > 7 else None
    if type(flags) is not int:
        raise MalformedError("has an array of joblib whose dtype does not say whether it holds objects")
    return bool(flags & _HAS_OBJECTS)


def _itemsize(known: NumpyDType) -> int:
    """Bytes of an element; 0 where they are not known."""
    if known.dtype is not None:
        return known.dtype.bits // 8
    kind, digits = known.code[:1], known.code[1:]
    if kind not in "biufcSaVUMm" or not digits.isdigit() or len(digits) > 12:
        return 0
    return int(digits) * (4 if kind == "U" else 1)


class Enclosing:
    """The pickles that the present one stands in: joblib's arrays of objects are pickles within a pickle."""

    def __init__(self) -> None:
        self._saved: list[tuple[list[object], list[list[object]], list[object], dict[str, object]]] = []
        self._followed = 0
        self.frame_end = 0
        """The byte after the last frame: no pickler ends a pickle, or writes an array, before it."""

    def frame(self, begin: int, nbytes: int) -> None:
        """Note a frame, which a file that cannot look ahead reads as a whole."""
        self.frame_end = max(self.frame_end, begin + nbytes)

    def enter(self, m: Machine) -> None:
        """Begin a pickle within that of a machine, with a stack and a memo of its own."""
        if len(self._saved) >= limits.NESTING:
            raise LimitError("has pickles within pickles far deeper than any other", fixed=True)
        self._saved.append((m.stack, m.below, m.memo, m.sparse))
        m.stack, m.below, m.memo, m.sparse = [], [], [], {}

    def leave(self, m: Machine) -> bool:
        """Go on with the pickle that the present one stands in, its value on the stack; False where there is none."""
        if not self._saved:
            return False
        value = m.stack[-1] if m.stack else None
        m.stack, m.below, m.memo, m.sparse = self._saved.pop()
        m.stack.append(value)
        return True

    def follow(self, m: Machine, other: Machine, table: Sequence[Handler], position: int) -> None:
        """Let another machine go on from the state of a machine, as far as what follows are opcodes."""
        other.stack, other.below = list(m.stack), [list(stack) for stack in m.below]
        other.memo, other.sparse = list(m.memo), dict(m.sparse)
        self._followed += (len(other.stack) + len(other.memo) + len(other.sparse)) // 16
        try:
            while self._followed < _FOLLOWED:
                self._followed += 1
                position = table[other.data[position]](other, position + 1)
        except (Stopped, FormatError, ValueError, OverflowError, IndexError, struct.error):
            return
        raise LimitError("has arrays of joblib that are opcodes as well")


_FOLLOWED = 1_000_000
"""Opcodes in the arrays of one pickle that are followed."""


def without_changes(table: Sequence[Handler]) -> list[Handler]:
    """Return a table of opcodes in which those that change a value only take their arguments from the stack."""
    found = list(table)
    for code in b"ab":
        found[code] = _drop_one
    for code in b"eu\x90":
        found[code] = _drop_marked
    found[ord("s")] = lambda m, pos: _drop_one(m, _drop_one(m, pos))
    return found


def _drop_one(m: Machine, pos: int) -> int:
    m.stack.pop()
    return pos


def _drop_marked(m: Machine, pos: int) -> int:
    m.since_mark()
    return pos
