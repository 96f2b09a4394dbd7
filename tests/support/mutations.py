"""Seeded damage to files: the same seed damages the same way for ever."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutation = Callable[[bytearray, random.Random], None]

_NUMBERS = [
    0,
    1,
    -1,
    2,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
]
_OPCODES = (
    b"(.0123FINSUVXRacbdgehijlopqrstu}])\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b"
    b"\x8c\x8d\x8e\x90\x91\x92\x93\x94\x95\x96"
)
_TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b'"F32"',
    b'"\\ud800"',
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"[[[[",
]


def mutate(data: bytes, seed: str) -> bytes:
    """One to four kinds of damage, chosen by the seed."""
    generator = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        generator.choice(_MUTATIONS)(damaged, generator)
    return bytes(damaged)


def _place(data: bytearray, generator: random.Random) -> int:
    """A place to damage: anywhere, but mostly where the structure is, at the ends."""
    if not data:
        return 0
    size = len(data)
    return generator.choice(
        [
            generator.randrange(size),
            generator.randrange(min(size, 1500)),
            size - 1 - generator.randrange(min(size, 900)),
        ]
    )


def _flip(data: bytearray, generator: random.Random) -> None:
    if data:
        data[_place(data, generator)] ^= 1 << generator.randrange(8)


def _set(data: bytearray, generator: random.Random) -> None:
    if data:
        data[_place(data, generator)] = generator.randrange(256)


def _opcode(data: bytearray, generator: random.Random) -> None:
    """An opcode of a pickle, or a byte like one."""
    if data:
        data[_place(data, generator)] = generator.choice(_OPCODES)


def _number(data: bytearray, generator: random.Random) -> None:
    """A number that limits and lengths stumble over, in a width that formats use."""
    width = generator.choice([2, 4, 8])
    value = generator.choice(_NUMBERS) & ((1 << 8 * width) - 1)
    place = _place(data, generator)
    data[place : place + width] = value.to_bytes(width, "little")


def _token(data: bytearray, generator: random.Random) -> None:
    """A piece of JSON."""
    token = generator.choice(_TOKENS)
    place = _place(data, generator)
    data[place : place + len(token)] = token


def _copy(data: bytearray, generator: random.Random) -> None:
    """A range over another one."""
    begin, to, count = _place(data, generator), _place(data, generator), generator.randint(1, 64)
    data[to : to + count] = data[begin : begin + count]


def _delete(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator)
    del data[place : place + generator.randint(1, 32)]


def _insert(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator)
    data[place:place] = generator.randbytes(generator.randint(1, 32))


def _cut(data: bytearray, generator: random.Random) -> None:
    del data[_place(data, generator) :]


_MUTATIONS: list[Mutation] = [
    _flip,
    _flip,
    _set,
    _opcode,
    _opcode,
    _number,
    _number,
    _token,
    _copy,
    _delete,
    _insert,
    _cut,
]
