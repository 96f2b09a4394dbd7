"""Every golden case that reads, of a checkpoint elsewhere: it prints what it prints of the file on the disk."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import golden_inputs
import pytest
from fake_hub import serving
from golden_cases import CASES, answer_to, commands_of, inside

READ = frozenset(
    ("ls", "show", "info", "tree", "ties", "stats", "hash", "diff", "check", "scan", "match", "series", "meta")
)
"""The commands that only read, apart from `meta --set` and the like."""

_LOCAL = ("-o", "--output", "--verify", "--baseline", "--map")
"""Options whose files lie on this machine."""

Serve = Callable[[Path], str]


@contextmanager
def on_hub() -> Iterator[Serve]:
    """Context manager: a function that puts a folder on a hub, and returns its address."""
    with serving() as hub, pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", hub.url)
        patched.setenv("HF_HOME", "/nowhere")

        def serve(folder: Path) -> str:
            hub.commit("lab/golden", {**{name: path.read_bytes() for name, path in _files(folder)}})
            return "hf://lab/golden/"

        yield serve


SERVERS: dict[str, Callable[[], AbstractContextManager[Serve]]] = {"hub": on_hub}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input file, written once and copied for each case."""
    folder = tmp_path_factory.mktemp("golden-inputs")
    golden_inputs.build(folder)
    return folder


@pytest.fixture(scope="module", params=SERVERS)
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """A function that puts a folder on a server, and returns its address, which ends with a slash."""
    with SERVERS[request.param]() as serve:
        yield serve


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_a_command_says_the_same_of_a_checkpoint_elsewhere(
    case: Path, inputs: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [shlex.split(line)[2:] for line in commands_of(case)]
    with inside(inputs, tmp_path):
        before: dict[str, float] = {}
        base = ""
        for args in commands:
            if before != (before := {name: path.stat().st_mtime_ns for name, path in _files(tmp_path)}):
                base = serve(tmp_path)
            elsewhere = _elsewhere(args, base)
            if elsewhere == args or args[0] not in READ:
                answer_to(args)  # an edit: what follows sees it
                continue
            monkeypatch.setenv("COLUMNS", "400")
            here, there = answer_to(args), answer_to(elsewhere)
            assert _spaced(there.replace(base, "")) == _spaced(here), args


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder by their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _elsewhere(args: list[str], base: str) -> list[str]:
    """A command with the address of each checkpoint in the place of its path."""
    found = list(args)
    for at, arg in enumerate(args):
        if at and not arg.startswith("-") and args[at - 1] not in _LOCAL and _is_checkpoint(arg):
            found[at] = base + arg
    return found


def _is_checkpoint(arg: str) -> bool:
    return bool(arg) and os.path.exists(arg) and not arg.endswith((".json", "/"))


def _spaced(text: str) -> str:
    """A text without what the length of a path changes: the width of columns."""
    return re.sub(r"  +", "  ", re.sub(r"--+", "--", text)).replace(" \n", "\n")
