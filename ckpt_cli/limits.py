"""Every limit that untrusted input meets, in one place.

Each is far above what honest checkpoints need and low enough that a hostile file costs at most a few hundred
megabytes and a few seconds. `CKPT_LIMITS=10` in the environment multiplies them all.
"""

from __future__ import annotations

import os


def _scale() -> float:
    try:
        return max(1.0, float(os.environ.get("CKPT_LIMITS", "1")))
    except ValueError:
        return 1.0


_SCALE = _scale()

PICKLE_OPCODES = int(8_000_000 * _SCALE)
"""Opcodes in one pickle: a tensor takes about 35, so this is over 200,000 tensors."""

PICKLE_BLOCKS = int(2_600_000 * _SCALE)
"""Memory blocks (about 60 bytes each) that one pickle's graph may take."""

PICKLE_TEXT = int(96 * 2**20 * _SCALE)
"""Bytes of text and byte strings over 255 bytes that one pickle may make us hold."""

PICKLE_INFLATED = int(96 * 2**20 * _SCALE)
"""Bytes of a compressed pickle after inflation."""

INLINE_BYTES = 64 * 2**10
"""Strings of a pickle longer than this stay in the file: the graph notes only where they are."""

ENTRIES_FLOOR = int(20_000 * _SCALE)
"""Entries that any pickle may flatten to; beyond them, one for every three bytes, as shared containers multiply."""

ENTRY_BLOCKS = int(1_300_000 * _SCALE)
"""Memory blocks that the flattened entries of one pickle may take."""

NAME_BYTES = int(64 * 2**20 * _SCALE)
"""Characters of all flattened names together."""

NESTING = 1_000
"""Containers within containers, when a graph is flattened to names."""

ZIP_RECORDS = int(400_000 * _SCALE)
"""Records in one zip file."""

ZIP_DIRECTORY = int(64 * 2**20 * _SCALE)
"""Bytes of a zip file's central directory."""

ZIP_NOTE_RECORD = 64 * 2**10
"""Bytes of a small record such as `version` or `byteorder`."""

SAFETENSORS_HEADER = 100_000_000
"""Bytes of a safetensors header: the reference library's own limit."""

SAFETENSORS_PARSED = int(250 * 2**20 * _SCALE)
"""Estimated bytes of memory of a safetensors header once parsed."""

DIMENSIONS = 64
"""Dimensions of a tensor: torch and numpy stop at 64."""

CONFIG_JSON = 4 * 2**20
"""Bytes of a `config.json` beside a checkpoint; a larger one is not read."""
