"""Read a pickle as a graph: nothing is imported, called or hashed.

Lengths are checked against the data before a slice is taken; opcodes, memory and text meet the limits of `limits`.
"""

from __future__ import annotations

import struct
import sys
from itertools import repeat
from typing import NoReturn

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, MalformedError, TruncatedError
from ckpt_cli.pickles.graph import Graph, References
from ckpt_cli.pickles.machine import Handler, Machine
from ckpt_cli.pickles.opcodes.build import BUILDERS
from ckpt_cli.pickles.opcodes.push import VALUES, Stopped
from ckpt_cli.pickles.rows import Rows, read_rows

_CHECK_EVERY = 1 << 14
"""Opcodes between two looks at the limits."""

_BLOCKS_PER_BYTE = 8
"""Memory blocks that a byte of a pickle makes at most, with room: `}` makes two."""


def _unknown(_: Machine, __: int) -> int:
    raise MalformedError("has an opcode that does not exist")


_TABLES = {**VALUES, **BUILDERS}

OPCODES: list[Handler] = [_TABLES.get(bytes((code,)), _unknown) for code in range(256)]
"""Every opcode of protocols 0 to 5, by its byte; CPython's pickletools is the reference."""


_u32 = struct.Struct("<I").unpack_from


def _name(machine: Machine, pos: int) -> int:
    """Read a string, or the tensors in rows whose names begin with it."""
    data = machine.data
    behind = pos + 11 + _u32(data, pos)[0]  # its slot in the memo and that of a function lie between
    if data[behind : behind + 2] == b"((" and machine.rows is not None:
        begin = pos - 1
        end = read_rows(machine, begin)
        if end != begin:
            return end
    elif machine.lines > MANY and data[behind - 7 : behind - 6] == b"c" and machine.rows is not None:
        from ckpt_cli.pickles.bare_rows import read_bare_rows

        begin = pos - 1
        end = read_bare_rows(machine, begin)
        if end != begin:
            return end
    return OPCODES[_NAME](machine, pos)


MANY = 4_000
"""Lines of a pickle, of which a tensor without a memo takes six, that are read before rows without one are."""


_NAME = ord("X")
WITH_ROWS = [*OPCODES[:_NAME], _name, *OPCODES[_NAME + 1 :]]
"""The same, but for that of strings, which reads the tensors in rows that begin with one at once."""


def read_pickle(data: bytes | memoryview, *, offset: int = 0) -> Graph:
    """Read the pickle that begins at byte `offset`, running nothing.

    Raises MalformedError, TruncatedError or LimitError; their text says where in the pickle, the caller says which
    file.
    """
    machine = Machine(data)
    end = _run(machine, offset)
    if machine.below or not machine.stack:
        raise MalformedError("the pickle stops in the middle of a value")
    root = machine.stack.pop()
    if machine.stack:
        raise MalformedError(f"the pickle leaves {len(machine.stack)} values behind when it stops")
    names, references = tuple(machine.globals.values()), References(machine.persistent)
    return Graph(root, machine.protocol, end - offset, names, references, data, tuple(machine.byte_strings))


def _run(machine: Machine, pos: int) -> int:
    """Interpret opcodes up to STOP; the position after it."""
    data, table = machine.data, WITH_ROWS
    is_short = (machine.size - pos) * _BLOCKS_PER_BYTE < limits.PICKLE_BLOCKS
    rows = machine.rows = Rows(None if is_short else sys.getallocatedblocks() + limits.PICKLE_BLOCKS)
    try:
        for done in range(0, limits.PICKLE_OPCODES, _CHECK_EVERY):
            if done + rows.opcodes > limits.PICKLE_OPCODES:
                break
            for _ in repeat(None, _CHECK_EVERY):
                pos = table[data[pos]](machine, pos + 1)
            rows.check_blocks()
        raise LimitError(f"has more than {limits.PICKLE_OPCODES} opcodes")
    except Stopped:
        return pos + 1
    except (FormatError, ValueError, OverflowError, IndexError, struct.error) as error:
        _explain(error, machine, pos)


def _explain(error: Exception, machine: Machine, pos: int) -> NoReturn:
    """Raise what the failure of the opcode at `pos` means."""
    if pos >= machine.size:
        raise TruncatedError("the pickle ends before its STOP opcode") from None
    where = f"(opcode {bytes(machine.data[pos : pos + 1])!r} at byte {pos})"
    if isinstance(error, FormatError):
        raise type(error)(f"the pickle {error.problem} {where}") from None
    if isinstance(error, struct.error) or pos + 1 == machine.size:
        raise TruncatedError(f"the pickle ends within an argument {where}") from None
    if isinstance(error, IndexError):
        raise MalformedError(f"the pickle finds too little on its stack {where}") from None
    raise MalformedError(f"the pickle has a bad argument {where}: {error}") from None
