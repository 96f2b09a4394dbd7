"""What the tests of structural edits share: an edit that is done, one that is refused, and what every format refuses.

The tests stand in test_safetensors_*.py, test_shard_*.py (sets) and test_structural_*.py (pickles) of tests/edits.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from contract import bits

State = dict[str, torch.Tensor]

KEYS = ["path", "output", "changed", "also_changed", "bytes_written", "in_place", "dry_run", "backup", "backups",
        "verb", "patched", "renamed", "removed", "left", "placed", "beside",
        "other_names", "remaining"]  # fmt: skip
"""What an edit with `--json` says, in its order."""

ONE_LINE = re.compile(r"ckpt: [^\n]+\n(hint: [^\n]+\n)?")


def edited(ckpt: Ckpt, command: str, path: Path, *rest: object) -> dict[str, Any]:
    """Do an edit, and give what it says of itself with `--json`."""
    answer = ckpt(command, path, *rest, "--json")
    assert (answer.code, answer.err) == (0, "")
    done: dict[str, Any] = json.loads(answer.out)
    assert list(done) == KEYS
    return done


def edited_as_told(ckpt: Ckpt, command: str, path: Path, *rest: object) -> dict[str, Any]:
    """Do an edit of which a dry run, that changes nothing, tells the same beforehand."""
    before = everything(path.parent)
    dry = edited(ckpt, command, path, *rest, "-n")
    assert everything(path.parent) == before
    done = edited(ckpt, command, path, *rest)
    assert dry == {**done, "dry_run": True}
    return done


def assert_refused(ckpt: Ckpt, path: Path, told: str, command: str, *rest: object) -> None:
    """An edit is refused in one line and perhaps a hint, as a dry run too, and changes and leaves nothing."""
    before = everything(path.parent)
    for dry in ([], ["-n"]):
        answer = ckpt(command, path, *rest, *dry)
        assert answer.code == 2, answer
        assert ONE_LINE.fullmatch(answer.err), answer.err
        assert told in answer.err, answer.err
        assert everything(path.parent) == before


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """The inode, the time of the last change and the bytes (those of a link: where to) of what is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        content = path.read_bytes() if is_file else os.fsencode(os.readlink(path)) if path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns, content)
    return found


def assert_states(found: State, wanted: State) -> None:
    """Equal names, dtypes, shapes and bits, in whatever order."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


# --- what every format refuses ---------------------------------------------------------------------------------------


def odd_requests() -> State:
    """The tensors that `SENSELESS` is about."""
    return {"a": torch.ones(2), "b": torch.zeros(2), "c": torch.ones(3), "flag": torch.tensor([True])}


SENSELESS: dict[tuple[str, ...], str] = {
    ("rename", "zz", "y"): "nothing is called 'zz'",
    ("rename", "--strip", "zz"): "no name would change by '--strip zz'",
    ("rename", "--strip", "zz", "--add", "x"): "no name would change by '--strip zz'",
    ("rename", "--sub", "zz", "y"): "no name would change",
    ("rename", "--map", "unknown.json"): "nothing is called 'zz'",
    ("rename", "--map", "list.json"): "a map of names is a JSON object",
    ("rename", "--map", "number.json"): "a map of names is a JSON object of strings",
    ("rename", "--map", "cut.json"): "not JSON",
    ("rename", "--map", "surrogate.json"): "which is not a valid name",
    ("rename", "--map", "gone.json"): "No such file",
    ("rename", "a", "b"): "'a' and 'b' would both be called 'b'",
    ("rename", "--sub", ".+", "x"): "would both be called 'x'",
    ("rename", "a", ""): "which is not a valid name",
    ("rename", "a", ".x"): "which is not a valid name",
    ("rename", "a", "\udcff"): "which is not a valid name",
    ("rename", "--sub", ".*", ""): "which is not a valid name",
    ("rename", "--sub", "(", "x"): "is not a substitution",
    ("rename", "--sub", "a", r"\9"): "is not a substitution",
    ("rename", "a"): "a name is renamed to another: OLD NEW",
    ("rename",): "say what to rename",
    ("rename", "a", "a"): "no name would change",
    ("rm", "zz"): "nothing is called 'zz'",
    ("rm", "a", "zz*"): "nothing is called 'zz*'",
    ("rm", "*"): "nothing would be left",
    ("rm", "a[0]"): "a part of a tensor",
    ("keep", "zz"): "nothing is called 'zz'",
    ("keep", "--root", "zz"): "nothing is called 'zz'",
    ("keep", "*"): "keeps all of it",
    ("keep",): "keep takes names",
    ("keep", "a", "--root", "a"): "keep takes names",
    ("cast", "half", "zz"): "nothing is called 'zz'",
    ("cast", "int8"): "not a floating dtype",
    ("cast", "complex64"): "not a floating dtype",
    ("cast", "float33"): "not a floating dtype",
    ("cast", "float32"): "no floating tensor is of another dtype",
    ("cast", "half", "flag"): "is of bool",
    ("cast", "half", "a[0]"): "a part of a tensor",
    ("tie", "a"): "two names at least",
    ("tie", "a", "zz"): "nothing is called 'zz'",
    ("tie", "a", "b"): "different values",
    ("tie", "a", "c"): "cannot be one tensor",
    ("tie", "a", "b[0]"): "whole single ones",
    ("untie", "zz*"): "nothing is called 'zz*'",
    ("untie", "a"): "shares its bytes with no other name",
    ("untie", "a[0]"): "a part of a tensor",
    ("compact",): "no storage is larger",
    ("rename", "a", "x", "-o", "FILE"): "the output is the file itself",
    ("rename", "a", "x", "-o", "out", "--backup"): "--backup is for edits in place",
}
"""What is asked of those tensors, and what is told of it; `FILE` is the file itself."""

MAPS = {
    "unknown.json": '{"a": "x", "zz": "y"}',
    "list.json": "[1]",
    "number.json": '{"a": 1}',
    "cut.json": "{",
    "surrogate.json": '{"a": "\\ud800"}',
}

senseless = pytest.mark.parametrize("arguments", SENSELESS, ids=lambda arguments: ascii(" ".join(arguments)))


def assert_senseless(ckpt: Ckpt, path: Path, arguments: tuple[str, ...]) -> None:
    """One of `SENSELESS` is refused of a file in the current folder that holds `odd_requests`."""
    for name, text in MAPS.items():
        path.with_name(name).write_text(text)
    command, *rest = [str(path) if argument == "FILE" else argument for argument in arguments]
    assert_refused(ckpt, path, SENSELESS[arguments], command, *rest)
