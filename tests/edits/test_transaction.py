"""One edit, one opening: how often an edit opens files, reads pickles and parses what it was asked for.

Counted is what comes before the first file is created. Reading back what was written, to compare it with what was
meant, opens the new file and is not counted: it is another file, or another state of it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import Ckpt
from run_edit import edited
from safetensors.torch import load_file, save_file
from shard_sets import save, state

from ckpt_cli.edits import set as set_command
from ckpt_cli.edits.plan import EditOptions, EditPlan, Verb
from ckpt_cli.edits.set import plan_set
from ckpt_cli.edits.transaction import transaction
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.zip import container
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.render.edits import edit_text

_opens: list[tuple[str, int]] | None = None


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opens is not None and isinstance(arguments[0], str):
        _opens.append((os.path.realpath(arguments[0]), arguments[2] or 0))


sys.addaudithook(_note_open)


@contextmanager
def opens() -> Iterator[list[tuple[str, int]]]:
    """Note the path and the flags of every file that is opened within the block, by whatever function."""
    global _opens
    _opens = []
    try:
        yield _opens
    finally:
        _opens = None


def opened_before_writing(noted: list[tuple[str, int]], files: list[Path]) -> Counter[str]:
    """How often each of some files was opened before any file was created."""
    before = []
    for path, flags in noted:
        if flags & os.O_CREAT:
            break
        before.append(path)
    wanted = {os.path.realpath(file) for file in files}
    return Counter(path for path in before if path in wanted)


ZIP = {
    "an element": ["w[0]=1"],
    "an element and a value": ["w[0]=1", "epoch=100000"],
    "a value": ["epoch=100000"],
    "a new value": ["--new", "note=text"],
    "a new tensor": ["--new", "n=@new.npy"],
    "an element and a new tensor": ["--new", "w[0]=1", "n=@new.npy"],
}
TENSORS = {
    "an element": ["m.a[0,0]=1"],
    "two elements": ["m.a[0,0]=1", "n.e+=1"],
    "a new tensor": ["--new", "m.n=@new.npy"],
}
CASES = [
    *(pytest.param("zip", assignments, id=f"zip, {what}") for what, assignments in ZIP.items()),
    *(
        pytest.param(kind, assignments, id=f"{kind}, {what}")
        for kind in ("safetensors", "shards")
        for what, assignments in TENSORS.items()
    ),
]
OPTIONS = [[], ["-o", "out"], ["--backup"], ["-n"]]


def made(kind: str, folder: Path) -> tuple[Path, list[Path]]:
    """A checkpoint and the files that it consists of."""
    np.save(folder / "new.npy", np.arange(3.0))
    if kind == "zip":
        torch.save({"w": torch.arange(4.0), "epoch": 3}, folder / "a.pt")
        return folder / "a.pt", [folder / "a.pt"]
    if kind == "safetensors":
        save_file(state(), folder / "a.safetensors")
        return folder / "a.safetensors", [folder / "a.safetensors"]
    whole = save(state(), folder / "set", "safetensors")
    return whole, sorted(whole.iterdir())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "in place")
@pytest.mark.parametrize(("kind", "assignments"), CASES)
def test_set_opens_each_file_once_before_it_writes(
    here: Path, ckpt: Ckpt, kind: str, assignments: list[str], options: list[str]
) -> None:
    path, files = made(kind, here)
    ckpt("ls", path)  # whatever is imported at the first use
    with opens() as noted:
        answer = ckpt("set", path, *assignments, *options)
    assert answer.code == 0, answer
    assert opened_before_writing(noted, files) == {os.path.realpath(file): 1 for file in files}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "in place")
@pytest.mark.parametrize("assignments", ZIP.values(), ids=list(ZIP))
def test_set_parses_the_pickle_and_each_assignment_once(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, assignments: list[str], options: list[str]
) -> None:
    path, _ = made("zip", here)
    with ZipFile(path) as archive:
        old = archive.read("a/data.pkl")
    pickles: list[bool] = []
    parsed: Counter[str] = Counter()
    read_pickle, parse = container.read_pickle, set_command.parse_assignment

    def count_pickle(data: bytes, *, offset: int = 0) -> Any:
        is_copy = any(flags & os.O_CREAT for _, flags in noted)
        pickles.append(bytes(data) == old and not is_copy)
        return read_pickle(data, offset=offset)

    def count_text(text: str) -> Any:
        parsed[text] += 1
        return parse(text)

    monkeypatch.setattr(container, "read_pickle", count_pickle)
    monkeypatch.setattr(set_command, "parse_assignment", count_text)
    with opens() as noted:
        assert ckpt("set", path, *assignments, *options).code == 0
    assert sum(pickles) == 1
    assert parsed == {text: 1 for text in assignments if "=" in text}


def test_values_are_parsed_once_although_a_rewritten_file_is_patched_too(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_cli.edits import set_tensors

    path, _ = made("zip", here)
    texts: list[str] = []
    parse = set_tensors.parse_value

    def count(text: str) -> Any:
        texts.append(text)
        return parse(text)

    monkeypatch.setattr(set_tensors, "parse_value", count)
    assert ckpt("set", path, "w+=[1,2,3,4]", "n=@new.npy", "epoch=4", "--new").code == 0
    assert texts == ["[1,2,3,4]"]
    found = torch.load(path)
    assert (found["w"].tolist(), found["epoch"], found["n"].tolist()) == ([1, 3, 5, 7], 4, [0, 1, 2])


def test_every_assignment_looks_in_the_same_table_of_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = made("safetensors", here)
    given: list[object] = []
    split = set_command.split_index

    def note(argument: str, names: Any = ()) -> Any:
        given.append(names)
        return split(argument, names)

    monkeypatch.setattr(set_command, "split_index", note)
    checkpoint = open_checkpoint(str(path))
    plan_set(checkpoint, ["m.a[0,0]=1", "m.b[0,0]=1", "n.e=2"])
    checkpoint.close()
    assert len(given) == 3
    assert all(names is checkpoint.names for names in given)


def test_an_edit_reports_whatever_verb_its_plan_has(here: Path) -> None:
    path, _ = made("safetensors", here)

    def plan(checkpoint: Checkpoint) -> EditPlan:
        return EditPlan(Verb("polished", "polish"), ("m.a",), changes=Changes(metadata={"shine": "yes"}))

    dry = transaction(str(path), plan, EditOptions(dry_run=True))
    assert "would polish m.a" in edit_text(dry)
    assert edit_text(transaction(str(path), plan, EditOptions())).startswith(f"{path}: polished m.a\n")
    assert load_file(path).keys() == state().keys()


@pytest.mark.parametrize(("kind", "assignments"), CASES)
def test_a_dry_run_of_set_says_what_set_then_does(here: Path, ckpt: Ckpt, kind: str, assignments: list[str]) -> None:
    path, _ = made(kind, here)
    for options in ([], ["-o", here / "out"]):
        dry = edited(ckpt, "set", path, *assignments, *options, "-n")
        done = edited(ckpt, "set", path, *assignments, *options)
        if "--new" in assignments and not options:
            path, _ = made(kind, here)
        assert dry == {**done, "dry_run": True}


def test_a_dry_run_finds_new_values_that_do_not_fit_beside_elements_that_do(here: Path, ckpt: Ckpt) -> None:
    path, _ = made("zip", here)
    np.save(here / "large.npy", np.array([1e300]))
    for dry in ([], ["-n"]):
        answer = ckpt("set", path, "w[0]=1", "n=@large.npy", "--new", "--dtype", "float16", *dry)
        assert answer.code == 2, answer
        assert "float16" in answer.err
