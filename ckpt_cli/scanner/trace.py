"""A pickle read for what it would do: every name, call and change, also where it breaks, and what it throws away.

The reader of `reader` refuses what no checkpoint needs; this one follows CPython's C unpickler through whatever that
would go on from, so that a pickle cannot hide behind an oddity. Nothing is imported, called or hashed here either.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError, LimitError, TruncatedError
from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.graph import Call, Global, PersistentId
from ckpt_cli.pickles.opcodes.push import Stopped
from ckpt_cli.scanner.tracer import TRACED, Tracer

_CHECK_EVERY = 1 << 12
"""Opcodes between two looks at the limits."""

_LINE = 256
"""Bytes that nearly every line is shorter than."""

_BEGINNING_COSTS = 128
"""Opcodes in whose time another pickle is begun."""

_TOO_MANY = "all pickles together have more opcodes than a scan of files of their size reads"


@dataclass(frozen=True, slots=True)
class Trace:
    """The trace of one pickle: what it would do, as far as it could be read."""

    offset: int
    """Its first byte within the data."""
    end: int
    """The byte after its STOP, or that of the opcode it breaks at."""
    protocol: int
    globals: Sequence[Global]
    """Every distinct name, in order of first use."""
    calls: Sequence[Call]
    """Every call, in order, those whose result is thrown away too."""
    changes: Sequence[tuple[str, object, object]]
    """Changes to a value that is not a container or new object: the opcode's action, the target, the argument."""
    loose: Sequence[Global]
    """Names that are not only called but stand as values, arguments or items too."""
    computed: Sequence[Global]
    """Names that the pickle computes, so that only running it would show them; their text describes the arguments."""
    extensions: Sequence[int]
    """Codes of copyreg's registry, each of which stands for a name."""
    texts: Sequence[object]
    """Strings that are long enough to hide a pickle: str, bytes, RawString or Inline."""
    storages: Sequence[PersistentId]
    """References to what is outside the pickle, in order."""
    unsearched: int
    """Strings beyond those, because they were too many."""
    root: object
    """The top of its stack at the end."""
    problem: str | None
    """The reason that it could not be read to its end; None where it could."""
    limited: bool
    """True if the problem is one of our limits."""
    cut: bool
    """True if the problem is that the data end too early."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """The end of a pickle."""

    at: int
    """The byte after STOP, or that of the opcode it breaks at."""
    problem: str | None = None
    limited: bool = False
    cut: bool = False


def trace_pickle(data: bytes | memoryview, offset: int, budget: ScanBudget) -> Trace:
    """Follow the pickle that begins at byte `offset` as far as it goes; never raises for what the data holds."""
    tracer = Tracer(data)
    spent = budget.opcodes < 0
    ending = _Ending(offset, _TOO_MANY, limited=True) if spent else _run(tracer, offset, budget)
    return Trace(
        offset=offset,
        end=ending.at,
        protocol=tracer.protocol,
        globals=tuple(tracer.globals.values()),
        calls=tracer.calls,
        changes=tracer.changes,
        loose=[node for node, count in tracer.pushed.items() if count > tracer.used.get(node, 0)],
        computed=tracer.computed,
        extensions=tracer.extensions,
        texts=tracer.texts,
        storages=tracer.storages,
        unsearched=tracer.unsearched,
        root=tracer.stack[-1] if tracer.stack else None,
        problem=ending.problem,
        limited=ending.limited,
        cut=ending.cut,
    )


def _run(tracer: Tracer, pos: int, budget: ScanBudget) -> _Ending:
    """Interpret opcodes up to STOP or trouble."""
    data = tracer.data
    while True:
        begin = pos
        pos, stopped, error = _stretch(tracer, begin, data)
        budget.opcodes -= min(pos - begin + _BEGINNING_COSTS, _CHECK_EVERY) + tracer.weighed
        tracer.weighed = 0
        if stopped:
            if tracer.outer.frame_end > pos + 1:
                return _Ending(pos + 1, f"it stops within a frame, the rest of which some readers skip (byte {pos})")
            if not tracer.outer.leave(tracer):
                return _Ending(pos + 1)
            pos += 1
        if error is not None:
            after = _past(tracer, pos, error)
            if after is None:
                return _broken(error, pos, tracer.size)
            pos = after
        if budget.opcodes < 0:
            return _Ending(pos, _TOO_MANY, limited=True)
        if sys.getallocatedblocks() > budget.blocks:
            return _Ending(pos, "it builds far more objects than a checkpoint needs", limited=True)


def _stretch(tracer: Tracer, pos: int, data: bytes | memoryview) -> tuple[int, bool, Exception | None]:
    """Some opcodes: where they led to, whether to STOP, and what went wrong at that place."""
    try:
        for _ in range(_CHECK_EVERY):
            pos = TRACED[data[pos]](tracer, pos + 1)
    except Stopped:
        return pos, True, None
    except (FormatError, ValueError, OverflowError, IndexError, struct.error) as error:
        return pos, False, error.with_traceback(None)  # or it would hold itself, by the frames that hold it
    return pos, False, None


def _past(tracer: Tracer, pos: int, error: Exception) -> int | None:
    """Return the place after an opcode with a bad value, which is pushed as None; None where none is known."""
    if isinstance(error, LimitError) or pos >= tracer.size or tracer.data[pos] not in b"ILFVS":
        return None
    for reach in (_LINE, limits.INLINE_BYTES):
        newline = bytes(tracer.data[pos : pos + reach]).find(b"\n")
        if newline >= 0:
            tracer.stack.append(None)
            return pos + newline + 1
    return None


def _broken(error: Exception, pos: int, size: int) -> _Ending:
    """Return the end of a pickle whose opcode at `pos` failed."""
    if pos >= size:
        return _Ending(size, "it ends before its STOP opcode", cut=True)
    cut = isinstance(error, TruncatedError | struct.error) or pos + 1 == size
    if isinstance(error, FormatError):
        return _Ending(pos, f"it {error.problem} (byte {pos})", isinstance(error, LimitError), cut)
    what = "finds too little on its stack" if isinstance(error, IndexError) and not cut else "has a bad argument"
    return _Ending(pos, f"it {what} (byte {pos})", cut=cut)
