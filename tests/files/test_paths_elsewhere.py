"""Paths and names where the separator is a backslash, and where upper and lower case name one file."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
from pathlib import Path

import pytest
import torch
from conftest import Ckpt, refused
from contract import write_shards

from ckpt_cli.errors import RefusedError
from ckpt_cli.files import places
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
        places.refuse_cached(path)
    assert places.refuse_cached("C:\\a\\b") == "C:\\a\\b"
