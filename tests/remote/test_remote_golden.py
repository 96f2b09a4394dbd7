"""Every golden case that reads, of a checkpoint elsewhere: it prints what it prints of the file on the disk."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import golden_inputs
import pytest
from golden_cases import CASES, answer_to, commands_of, inside
from servers import SERVERS, Server

READ = frozenset(  # apart from edits of `meta`, and `show -o`
    ("ls", "show", "info", "tree", "ties", "stats", "hash", "diff", "check", "scan", "match", "series", "meta")
)
"""The commands that read."""

_LOCAL = ("-o", "--output", "--verify", "--baseline", "--map")
"""Options whose files lie on this machine."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input file, written once and copied for each case."""
    folder = tmp_path_factory.mktemp("golden-inputs")
    golden_inputs.build(folder)
    return folder


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind."""
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture(scope="module")
def unchanged(inputs: Path, server: Server) -> Iterator[tuple[Path, str]]:
    """The folder that cases share in which nothing edits, and where it lies on the server."""
    before = _states(inputs)
    yield inputs, server.put(inputs, "unchanged")
    assert _states(inputs) == before


@pytest.fixture(scope="module")
def said() -> dict[tuple[str, ...], str]:
    """What commands say of the files that nothing edits, which is the same beside each server."""
    return {}


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_a_command_says_the_same_of_a_checkpoint_elsewhere(
    case: Path,
    inputs: Path,
    tmp_path: Path,
    server: Server,
    unchanged: tuple[Path, str],
    said: dict[tuple[str, ...], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = [shlex.split(line)[2:] for line in commands_of(case)]
    if all(map(_only_reads, commands)):
        here, base = unchanged
        monkeypatch.chdir(here)
        monkeypatch.setenv("COLUMNS", "400")
        for args in commands:
            if tuple(args) not in said:
                said[tuple(args)] = answer_to(args)
            elsewhere = _elsewhere(args, base, server)
            if elsewhere != args:
                _require_same(answer_to(elsewhere), said[tuple(args)], base, args)
        return
    with inside(inputs, tmp_path):
        base = ""
        for args in commands:
            base = base or server.put(tmp_path, "golden")
            elsewhere = _elsewhere(args, base, server)
            if elsewhere == args or not _only_reads(args):
                answer_to(args)  # what follows sees what an edit leaves
                base = base if _only_reads(args) else ""
                continue
            monkeypatch.setenv("COLUMNS", "400")
            _require_same(answer_to(elsewhere), answer_to(args), base, args)


def _require_same(there: str, here: str, base: str, args: list[str]) -> None:
    """Require that the answer about what is below the address `base` is the one about what is here."""
    there = re.sub(r'revision +[0-9a-f]{40}\n|,\s*"revision": "[0-9a-f]{40}"', "", there)  # of the hub only
    assert _spaced(there.replace(base, "")) == _spaced(here), args


def _states(folder: Path) -> dict[str, int]:
    """The times of the last changes of all files below a folder."""
    names = (os.path.join(at, name) for at, _, files in os.walk(folder) for name in files)
    return {name: os.stat(name).st_mtime_ns for name in names}


def _only_reads(args: list[str]) -> bool:
    """True for a command that writes nothing, and for none."""
    if not args:
        return True
    edits = args[0] == "meta" and any("=" in arg or arg in ("-d", "--delete") for arg in args)
    return args[0] in READ and not edits and "-o" not in args


def _elsewhere(args: list[str], base: str, server: Server) -> list[str]:
    """A command with the address of each checkpoint in the place of its path."""
    found = list(args)
    for at, arg in enumerate(args):
        if at and not arg.startswith("-") and args[at - 1] not in _LOCAL and _is_checkpoint(arg, server):
            found[at] = base + arg
    return found


def _is_checkpoint(arg: str, server: Server) -> bool:
    """True for what can be put on a server: no empty folder.

    Over https a folder must have an index, and nothing beside it: there are no lists, and no config is looked for.
    """
    path = Path(arg)
    if not arg or not path.exists() or arg.endswith((".json", "/")):
        return False
    names = [] if path.is_file() else [each.name for each in path.iterdir()]
    return path.is_file() or bool(
        names and (server.kind != "https" or ("config.json" not in names and _indexed(names)))
    )


def _indexed(names: list[str]) -> bool:
    return any(name.endswith(".index.json") for name in names)


def _spaced(text: str) -> str:
    """A text without what the length of a path changes: the width of columns."""
    return re.sub(r" +", " ", re.sub(r"--+", "--", text)).replace(" \n", "\n")
