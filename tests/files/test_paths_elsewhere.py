"""Paths and names where the separator is a backslash, and where upper and lower case name one file."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt, refused
from contract import write_shards
from killing import killed_at

from ckpt_cli.errors import RefusedError
from ckpt_cli.files import disk, places
from ckpt_cli.files.atomic import refuse_cached
from ckpt_cli.formats.targets import target_of

EVERYWHERE = ["", ".", "..", "a/b", "/a", "../a", "a/", "a\0b"]
"""Names that are not those of a file in a folder on any system."""

ON_WINDOWS = ["a\\b", "\\a", "..\\a", "C:a", "C:\\a", "\\\\host\\share\\a", "a:stream", "nul", "NUL.bin", "con ",
              "com1.pt", "a.pt.", "a.pt ", "LPT².txt"]  # fmt: skip
"""Names that lead elsewhere on Windows, or to a device, or to a file of another name."""

PLAIN = [
    "model.pt",
    "model-00001-of-00002.safetensors",
    "a b",
    ".hidden",
    "__0_0.distcp",
    "console",
    "nullable.pt",
    "ü",
]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of Windows for paths as text."""
    monkeypatch.setattr(places, "_system", ntpath)


@pytest.mark.parametrize("system", [posixpath, ntpath])
def test_a_name_that_a_document_gives_leads_nowhere_else(system: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_system", system)
    assert [name for name in EVERYWHERE if places.is_plain_name(name)] == []
    assert [name for name in PLAIN if not places.is_plain_name(name)] == []
    assert [name for name in ON_WINDOWS if places.is_plain_name(name)] == (ON_WINDOWS if system is posixpath else [])


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("name", ON_WINDOWS)
def test_a_shard_that_would_lead_elsewhere_on_windows_is_refused_and_reported(
    here: Path, ckpt: Ckpt, name: str
) -> None:
    write_shards({"a": torch.zeros(2), "b": torch.zeros(3)}, here / "m")
    [index] = (here / "m").glob("*.json")
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = name
    index.write_text(json.dumps(content))
    assert "not a file beside it" in str(refused(str(index)))
    assert "outside-folder" in ckpt("scan", index).out


@pytest.mark.parametrize(
    ("system", "path", "stripped"),
    [
        (posixpath, "out/", "out"), (posixpath, "/", "/"), (posixpath, "a\\", None), (posixpath, "out", None),
        (ntpath, "out\\", "out"), (ntpath, "a\\out//", "a\\out"), (ntpath, "C:\\", "C:\\"), (ntpath, "C:\\out", None),
        (posixpath, "memory://out/", "memory://out"),
    ],
)  # fmt: skip
def test_a_separator_at_the_end_of_a_path_says_that_it_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, system: object, path: str, stripped: str | None
) -> None:
    monkeypatch.setattr(places, "_system", system)
    assert places.names_folder(path) == (stripped is not None)
    assert places.without_end(path) == (stripped or path)
    assert target_of(path, None, sharded=True).name == "hf"


CACHED = [
    "C:\\Users\\me\\.cache\\huggingface\\hub\\models--a\\blobs\\" + "0a" * 20,
    "D:\\data\\.git\\annex\\objects\\x\\y",
    "D:\\data\\.dvc\\cache\\x",
    "D:\\data\\.git\\lfs\\objects\\ab\\cd",
]


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("path", CACHED)
def test_a_cache_is_known_by_a_path_with_backslashes(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(os.path, "realpath", str)
    with pytest.raises(RefusedError, match="the hash of its content"):
        refuse_cached(path)
    assert refuse_cached("C:\\a\\b") == "C:\\a\\b"


@pytest.fixture
def one_case(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder in which upper and lower case name one file, which keeps its first spelling."""

    def found(path: object) -> object:
        if not isinstance(path, str) or lexists(path):
            return path
        folder, name = os.path.split(path)
        names = listdir(folder or ".") if lexists(folder or ".") else []
        return next((os.path.join(folder, each) for each in names if each.casefold() == name.casefold()), path)

    def watched(call: str) -> Callable[..., Any]:
        real = getattr(os, call)
        return lambda *args, **options: real(*map(found, args), **options)

    def lexists(path: str) -> bool:
        try:
            lstat(path)
        except OSError:
            return False
        return True

    lstat, listdir = os.lstat, os.listdir
    for call in ("open", "stat", "lstat", "access", "unlink", "replace", "rename", "link", "chmod", "mkdir"):
        monkeypatch.setattr(os, call, watched(call))
    torch.save({"a": torch.zeros(2)}, here / "model.pt")
    return here


NAMES = {"a short name": "model.pt", "a name that its journal has as a digest": "model" + "x" * 240 + ".pt"}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_an_edit_that_was_killed_is_finished_under_another_spelling(one_case: Path, ckpt: Ckpt, name: str) -> None:
    if name != "model.pt":
        (one_case / "model.pt").rename(one_case / name)
    with killed_at("unlink", 1):
        ckpt("set", name.upper(), "a=1")
    assert [found for found in os.listdir() if found.endswith("ckpt-journal")]
    answer = ckpt("show", name.title(), "a", "-f", "csv")
    assert (answer.code, answer.err, answer.out.split()[1:]) == (0, "", ["a,1.0,1.0"])
    assert os.listdir() == [name]


def test_a_backup_under_another_spelling_is_that_of_the_file(one_case: Path, ckpt: Ckpt) -> None:
    assert ckpt("set", "MODEL.PT", "a=1", "--backup").code == 0
    assert ckpt("rename", "Model.pt", "a", "b", "--backup").code == 0
    backups = {"model.pt.bak", "model.pt.bak.2"}
    assert set(os.listdir()) == {"model.pt", *backups, *(f".{name}.ckpt-undo" for name in backups)}
    for _ in range(2):
        assert ckpt("undo", "MODEL.pt").code == 0
    assert os.listdir() == ["model.pt"]
    assert torch.load("model.pt")["a"].tolist() == [0, 0]


def test_two_files_whose_names_differ_in_case_are_two(here: Path) -> None:
    for name in ("a", "A", "b"):
        (here / name).touch()
    assert [os.path.basename(disk.spelled(name)) for name in ("a", "A", "b", "B", "c")] == ["a", "A", "b", "B", "c"]
    os.link(here / "b", here / "B")
    assert [os.path.basename(disk.spelled(name)) for name in ("b", "B")] == ["b", "B"]
