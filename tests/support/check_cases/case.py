"""What the cases of `ckpt check` share: the list that they join, and small files to break."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

import ckpt_cli
from ckpt_cli.ops.check.run import Report, check

CODES_PAGE = Path(ckpt_cli.__file__).parent.parent / "docs" / "check.md"
PT = {"format": "pt"}


def deep_check(path: Path, workers: int = 2) -> Report:
    with ThreadPoolExecutor(workers) as pool:
        return check(str(path), pool)


def codes(report: Report, *severities: str) -> set[str]:
    return {each.code for each in report.findings if not severities or each.severity in severities}


@dataclass(frozen=True)
class Case:
    """How to make a file or folder with one fault, and the same without it."""

    code: str
    make: Callable[[Path, bool], Path]
    """Writes into a folder, with the fault or without, and returns what to check."""
    also: frozenset[str] = frozenset()
    """Codes that the way in which it is written brings along."""


CASES: list[Case] = []


def case(code: str, *also: str) -> Callable[[Callable[[Path, bool], Path]], Callable[[Path, bool], Path]]:
    """Add a maker to the cases."""

    def keep(make: Callable[[Path, bool], Path]) -> Callable[[Path, bool], Path]:
        CASES.append(Case(code, make, frozenset(also)))
        return make

    return keep


def two() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(40.0)}


def saved(folder: Path, state: Any = None, name: str = "m.pt") -> Path:
    torch.save(two() if state is None else state, folder / name)
    return folder / name


def padded(header: dict[str, Any] | str, extra: int = 0) -> bytes:
    """A safetensors header that ends at a multiple of 8 bytes, and so many more."""
    raw = header if isinstance(header, str) else json.dumps(header)
    return raw.encode() + b" " * (-len(raw) % 8 + extra)


def patched(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def rezipped(path: Path, keep: Callable[[str], bool] = lambda _: True, method: int = zipfile.ZIP_STORED) -> Path:
    """The records of a file in a zip as Python writes it."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w", method) as new:
        for each in old.infolist():
            if keep(each.filename):
                new.writestr(each.filename, old.read(each.filename))
    os.replace(path.with_suffix(".new"), path)
    return path


def faulty(code: str, folder: Path) -> Path:
    return next(each for each in CASES if each.code == code).make(folder, True)


def hub(folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """What huggingface_hub writes: two shards and an index."""
    save_torch_state_dict(state or {f"l{n}.weight": torch.randn(8, 8) for n in range(4)}, folder, max_shard_size=512)
    return folder
