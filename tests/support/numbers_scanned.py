"""Scan random blocks of numbers and of text as storages, and print those that alarm: none may.

    python tests/support/numbers_scanned.py --blocks 1000000 [--seed 1]

Most blocks of numbers begin with a byte that no pickle begins with, and end with one that none read backwards does;
they are sorted out at once by numpy, and the others scanned. The kinds are shared among processes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat

import numpy as np

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.scanner.packed import packing_of
from ckpt_cli.scanner.streams import Found, inside_string
from ckpt_cli.scanner.trace import trace_pickle
from ckpt_cli.scanner.walk import search

SIZE = 64
"""Bytes of a block."""

BATCH = 100_000


def _weights(random: np.random.Generator, count: int) -> np.ndarray:
    return random.normal(0, 0.02, (count, SIZE // 2)).astype("<f4")


_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def _text(random: np.random.Generator, count: int, alphabet: bytes) -> np.ndarray:
    return np.frombuffer(alphabet, np.uint8)[random.integers(0, len(alphabet), (count, SIZE))]


def _uuencoded(random: np.random.Generator, count: int) -> np.ndarray:
    """A first line, and one of 33 bytes."""
    begin = np.frombuffer(b"begin 6 x\nA", np.uint8)
    return np.hstack([np.tile(begin, (count, 1)), _text(random, count, bytes(range(33, 97)))[:, len(begin) :]])


def _bytes_as(dtype: str) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Integers below 256, as many as a block of bytes has."""
    return lambda random, count: random.integers(0, 256, (count, SIZE)).astype(dtype)


BLOCKS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "float32": lambda random, count: _weights(random, count)[:, : SIZE // 4],
    "bfloat16": lambda random, count: (_weights(random, count).view("<u4") >> 16).astype("<u2"),
    "float16": lambda random, count: _weights(random, count).astype("<f2"),
    "int8": lambda random, count: random.integers(-128, 128, (count, SIZE), dtype=np.int8),
    "bytes in int16": _bytes_as("<i2"),
    "bytes in int64": _bytes_as(">i8"),
    "base64": lambda random, count: _text(random, count, _LETTERS + b"+/"),
    "base32": lambda random, count: _text(random, count, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "base85": lambda random, count: _text(random, count, bytes(range(33, 118))),
    "uuencode": _uuencoded,
}
"""Kinds of numbers, and of text in which bytes are encoded."""

INSIDE = "inside a string"
"""The kind of blocks of int8 that stand one after another in a string: a pickle may begin at any byte of it."""

KINDS = (*BLOCKS, INSIDE)

_LAST = np.isin(np.arange(256), list(b"\x80x(BPP\x1f\xfd\x93"))
"""The last bytes of a block that may be a pickle, or packed, if it is read backwards."""


@cache
def _begins(byte: int) -> bool:
    """True if a block that begins with this byte may be anything but numbers: an opcode, or a sign of compression."""
    if byte == ord("."):
        return True  # the end of a pickle that stands backwards
    blocks = [bytes([byte, second]) + bytes(SIZE) for second in range(256)]
    budget = ScanBudget(opcodes=limits.SCAN_OPCODES)
    return any(trace_pickle(block, 0, budget).end > 0 or packing_of(block) is not None for block in blocks)


@cache
def _first_bytes() -> np.ndarray:
    """Whether a block may be anything but numbers, by its first byte."""
    return np.array([_begins(byte) for byte in range(256)])


def alarms(kind: str, seed: int, count: int) -> list[bytes]:
    """Return the blocks of a kind of numbers in which a scan finds anything."""
    if kind == INSIDE:
        return _alarms_inside(seed, count)
    random = np.random.default_rng(seed)
    first = _first_bytes()
    found = []
    for begin in range(0, count, BATCH):
        blocks = BLOCKS[kind](random, min(BATCH, count - begin))
        raw = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(blocks), -1)
        budget = ScanBudget(opcodes=limits.SCAN_OPCODES * 100, tries=limits.SCAN_TRIES * 100)
        may_be = first[raw[:, 0]] | _LAST[raw[:, -1]] | (raw[:, :8] == 0).any(axis=1)
        for row in raw if blocks.dtype == np.uint8 else raw[may_be]:
            block = row.tobytes()
            items = list(search(MemorySource(block), "0", 1, budget))
            if any(isinstance(item, Found) or item.severity != "note" for item in items):
                found.append(block)
    return found


def _alarms_inside(seed: int, count: int) -> list[bytes]:
    random = np.random.default_rng(seed)
    found = []
    for begin in range(0, count, BATCH):
        text = random.bytes(min(BATCH, count - begin) * SIZE)
        budget = ScanBudget(opcodes=limits.SCAN_OPCODES * 100, tries=limits.SCAN_TRIES * 100)
        traces = [item.trace for item in inside_string(memoryview(text), 0, "0", budget) if isinstance(item, Found)]
        found += [text[trace.offset : trace.end] for trace in traces]
    return found


def main() -> None:
    """Scan the blocks; exit 1 if any alarms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    bad = 0
    with ProcessPoolExecutor(os.cpu_count()) as executor:
        for kind, found in zip(
            KINDS, executor.map(alarms, KINDS, repeat(options.seed), repeat(options.blocks)), strict=True
        ):
            bad += len(found)
            said = f"{kind}: {options.blocks} blocks of {SIZE}, {len(found)} alarms"
            print(said, *(item.hex() for item in found[:5]), flush=True)
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
