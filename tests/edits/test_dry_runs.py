"""Dry runs: what the real run would refuse is refused with the same words, and nothing is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

from ckpt_cli.edits import in_place, transaction

EDITS: dict[str, tuple[str, ...]] = {
    "set": ("set", "{file}", "w[0]=5"),
    "set-new": ("set", "{file}", "x=[1,2]", "--new", "--dtype", "float32"),
    "rename": ("rename", "{file}", "w", "renamed"),
    "rename-long": ("rename", "{file}", "w", "r" * 300),
    "rm": ("rm", "{file}", "w"),
    "keep": ("keep", "{file}", "w"),
    "cast": ("cast", "{file}", "float64"),
    "tie": ("tie", "{file}", "w", "v"),
    "compact": ("compact", "{file}"),
    "meta": ("meta", "{file}", "key=value"),
}
FILES = ("m.pt", "m.safetensors", "packed.npz", "cut.pt", "none.pt", "", ".", "dir")
OUTPUTS = (None, "none/out", "m.pt/out", "taken", "-", "", "link", "n" * 300, "m.pt", "m.safetensors")


@pytest.fixture
def files(here: Path) -> Path:
    """Checkpoints, and places that cannot be written."""
    torch.save({"w": torch.ones(4), "v": torch.ones(4)}, here / "m.pt")
    save_file({"w": torch.ones(4), "v": torch.ones(4)}, here / "m.safetensors")
    np.savez_compressed(here / "packed.npz", w=np.ones(4), v=np.ones(4))
    (here / "cut.pt").write_bytes((here / "m.pt").read_bytes()[:-100])
    (here / "taken").mkdir()
    (here / "taken" / "file").write_bytes(b"x")
    (here / "dir").mkdir()
    (here / "link").symlink_to("none/out")
    return here


def state_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: str(output)[:20])
@pytest.mark.parametrize("edit", EDITS)
def test_a_dry_run_refuses_what_the_real_run_refuses(files: Path, ckpt: Ckpt, edit: str, output: str | None) -> None:
    for file in FILES if output is None else FILES[:3]:
        arguments = [part.format(file=file) for part in EDITS[edit]] + ([] if output is None else ["-o", output])
        before = state_of(files)
        dry = ckpt(*arguments, "-n")
        assert state_of(files) == before
        real = ckpt(*arguments)
        assert dry.code == real.code, (arguments, dry.err, real.err)
        if real.code:
            assert dry.err == real.err, arguments
            assert state_of(files) == before
        else:
            for path, content in before.items():
                Path(path).write_bytes(content)
            for path in state_of(files).keys() - before.keys():
                Path(path).unlink()


@pytest.mark.parametrize("output", OUTPUTS[1:], ids=lambda output: str(output)[:20])
@pytest.mark.parametrize("to", ["pt", "safetensors", "npz", "hf", "dcp"])
def test_a_dry_run_of_convert_refuses_what_the_real_run_refuses(files: Path, ckpt: Ckpt, to: str, output: str) -> None:
    before = state_of(files)
    dry = ckpt("convert", "m.pt", output, "--to", to, "-n")
    assert state_of(files) == before
    real = ckpt("convert", "m.pt", output, "--to", to)
    assert (dry.code, dry.err) == (real.code, real.err) if real.code else dry.code == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_place_that_may_not_be_written_has_the_hint_to_write_elsewhere(
    files: Path, ckpt: Ckpt, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = transaction.open_checkpoint

    def refusing(path: str, *, write: bool = False) -> object:
        if write:
            raise OSError(number, os.strerror(number), path)
        return whole(path)

    monkeypatch.setattr(transaction, "open_checkpoint", refusing)
    answer = ckpt("set", "m.pt", "w[0]=5")
    assert answer.code == 2
    assert answer.err.splitlines() == [
        f"ckpt: m.pt: {os.strerror(number)}",
        "hint: -o OUT writes the result to another place, and leaves the file as it is",
    ]
    assert ckpt("set", "m.pt", "w[0]=5", "-o", "out.pt").code == 0


@pytest.mark.parametrize("command", [("set", "m.pt", "w[0]=5"), ("rename", "m.pt", "w", "x"), ("rm", "m.pt", "w")])
def test_a_dry_run_refuses_a_file_that_may_not_be_written(
    files: Path, ckpt: Ckpt, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "can_write", lambda path: not path.endswith("m.pt"))
    answer = ckpt(*command, "-n")
    assert answer.code == 2
    assert answer.err.startswith("ckpt: m.pt: Permission denied\nhint: -o OUT")
