"""What the tables of opcodes are made of."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_cli.pickles.machine import Machine

Handler = Callable[[Machine, int], int]
"""Does what one opcode does. Takes the position after the opcode and returns that of the next one.

It may raise IndexError for an empty stack, struct.error for a number cut short and ValueError for a bad argument: the
reader says what each means.
"""

Table = dict[bytes, Handler]


def entering(table: Table) -> Callable[[bytes], Callable[[Handler], Handler]]:
    """A decorator that enters a function into a table: `@enter(b"R")`."""

    def enter(code: bytes) -> Callable[[Handler], Handler]:
        def into(handler: Handler) -> Handler:
            table[code] = handler
            return handler

        return into

    return enter
