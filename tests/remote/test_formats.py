"""Checkpoints of every format elsewhere: every reading command says of them what it says of them on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from contract import FORMATS, Format
from run_folders import run_folder
from servers import SERVERS, Server

COMMANDS = (
    "ls FILE -l -a --sort file",
    "info FILE --json",
    "show FILE",
    "stats FILE --total",
    "hash FILE --json",
    "diff FILE HERE",
    "ties FILE --equal",
    "tree FILE",
    "check FILE --deep --json",
    "scan FILE --all",
)
"""Commands in which `FILE` is the checkpoint, there or here, and `HERE` is the one on the disk."""


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind."""
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Format], Path]:
    """A function that returns a folder with the sample in a format: some take seconds to be written."""

    @cache
    def folder_of(label: str) -> Path:
        kind = next(kind for kind in FORMATS if kind.label == label)
        folder = tmp_path_factory.mktemp(label)
        kind.write(kind.sample(), folder / f"model{kind.suffix}")
        return folder

    return lambda kind: folder_of(kind.label)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.label)
def test_every_reading_command_says_the_same_of_a_checkpoint_elsewhere(
    kind: Format, server: Server, ckpt: Ckpt, here: Path, written: Callable[[Format], Path]
) -> None:
    if kind.name == "run" and server.kind == "https":
        return  # only its model can be known: see below
    name = f"model{kind.suffix}"
    shutil.copytree(written(kind), here, dirs_exist_ok=True)
    base = server.put(here, "formats")
    for command in COMMANDS:
        if command.startswith("scan") and server.kind == "https" and not kind.suffix:
            continue  # its files cannot all be known: see below
        args = command.replace("HERE", name).split()
        wanted = ckpt(*(arg.replace("FILE", name) for arg in args))
        found = ckpt(*(arg.replace("FILE", base + name) for arg in args))
        assert (found.out.replace(base, ""), found.err.replace(base, ""), found.code) == (
            wanted.out,
            wanted.err,
            wanted.code,
        ), command


def test_scan_says_that_it_cannot_know_all_files_of_a_folder_without_lists(ckpt: Ckpt, here: Path) -> None:
    (here / "set").mkdir()
    torch.save({"b": torch.ones(2)}, here / "set" / "pytorch_model-00002-of-00002.bin")
    (here / "set" / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    places = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (here / "set" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (here / "other").mkdir()
    torch.save({"b": torch.ones(2)}, here / "other" / "pytorch_model.bin")
    (here / "other" / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with SERVERS["https"]() as server:
        of_set = ckpt("scan", server.put(here / "set", "set"), "--json")
        of_other = ckpt("scan", server.put(here / "other", "other"), "--json")
    assert [answer.code for answer in (of_set, of_other)] == [1, 1]
    codes = [{finding["code"] for finding in json.loads(answer.out)["findings"]} for answer in (of_set, of_other)]
    assert codes[0] >= {"not-searched", "dangerous-global"}
    assert codes[1] == {"not-searched"}


def test_an_edit_of_a_checkpoint_elsewhere_writes_what_it_writes_of_one_here(
    server: Server, ckpt: Ckpt, here: Path
) -> None:
    torch.save({"m.w": torch.arange(6.0), "m.b": torch.ones(2)}, here / "m.pt")
    base = server.put(here, "edited")
    for edit in ("set FILE m.w[0]=5", "rename FILE --strip m", "cast FILE float16 --lossy", "rm FILE m.b"):
        command, _, *rest = edit.split()
        outputs = []
        for at, file in enumerate((f"{base}m.pt", "m.pt")):
            assert ckpt(command, file, *rest, "-o", f"{at}.pt").code == 0
            outputs.append(Path(f"{at}.pt").read_bytes())
            Path(f"{at}.pt").unlink()
        assert outputs[0] == outputs[1], edit
    for at, file in enumerate((f"{base}m.pt", "m.pt")):
        assert ckpt("convert", file, f"{at}.safetensors").code == 0
    assert Path("0.safetensors").read_bytes() == Path("1.safetensors").read_bytes()
    refused = ckpt("set", f"{base}m.pt", "m.w[0]=5")
    assert (refused.code, refused.out, "-o OUT" in refused.err) == (2, "", True)


def test_files_beside_a_set_elsewhere_go_to_the_new_folder(server: Server, ckpt: Ckpt, here: Path) -> None:
    kind = next(kind for kind in FORMATS if kind.label == "shards-safetensors")
    kind.write(kind.sample(), here / "set")
    for name in ("config.json", "tokenizer.json", "odd.txt"):
        (here / "set" / name).write_text("{}")
    address = server.put(here / "set", "beside").rstrip("/")
    answer = ckpt("convert", address, "new", "--to", "hf")
    assert answer.code == 0, answer.err
    copied = {path.name for path in Path("new").iterdir()} & {"config.json", "tokenizer.json", "odd.txt"}
    if server.kind == "https":
        assert copied == {"config.json", "tokenizer.json"}
        assert "its server has no lists" in answer.out + answer.err
    else:
        assert copied == {"config.json", "tokenizer.json", "odd.txt"}


def test_of_a_run_on_a_server_without_lists_the_model_is_known_and_a_note_says_so(ckpt: Ckpt, here: Path) -> None:
    run_folder(here / "checkpoint-7")
    with SERVERS["https"]() as server:
        base = server.put(here, "runs")
        answer = ckpt("ls", f"{base}checkpoint-7")
        assert answer.code == 0
        assert answer.out == ckpt("ls", "checkpoint-7/model.safetensors").out
        assert "its server has no lists" in answer.err
        assert ckpt("ls", f"{base}checkpoint-7/optimizer.pt").out == ckpt("ls", "checkpoint-7/optimizer.pt").out
