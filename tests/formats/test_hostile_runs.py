"""Folders of runs whose files were made to deceive: one line, and neither memory nor time."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt, refused
from run_folders import run_folder

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.formats import open_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run."""
    return run_folder(tmp_path / "checkpoint-7")


HOSTILE_JSON = {
    "deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"a": ' * 5_000 + "1" + "}" * 5_000,
    "many lists": '{"a": [' + ",".join(["[]"] * 3_000_000) + "]}",
    "many objects": '{"a": [' + ",".join(['{"b":{}}'] * 1_000_000) + "]}",
    "no JSON": '{"a": ',
    "no object": "[1, 2]",
    "a number of many digits": '{"a": ' + "1" * 100_000 + "}",
    "no text": "\udc80",
    "nothing": "",
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_is_refused_in_one_line(run: Path, name: str) -> None:
    path = run / "trainer_state.json"
    path.write_bytes(HOSTILE_JSON[name].encode("utf-8", "surrogateescape"))
    with pytest.raises((LimitError, MalformedError)) as error:
        open_checkpoint(str(run))
    assert error.value.path == str(path)
    assert "\n" not in str(error.value)


def test_json_of_a_gigabyte_is_not_read(run: Path, ckpt: Ckpt) -> None:
    os.truncate(run / "trainer_state.json", 2**30)
    answer = ckpt("ls", run)
    assert answer.code == 2
    assert "far larger than the state of a trainer" in answer.err
    assert ckpt("ls", run / "model.safetensors").code == 0


def test_json_that_nests_a_little_is_read_and_edited(run: Path, ckpt: Ckpt) -> None:
    (run / "trainer_state.json").write_text('{"b": 1, "a": ' + '{"x": [1, ' * 200 + "2" + "]}" * 200 + "}")
    assert ckpt("ls", "-a", run).code == 0
    assert ckpt("set", run, "trainer_state.b=2").code == 0
    assert json.loads((run / "trainer_state.json").read_text())["b"] == 2


def test_values_beyond_the_limit_are_not_listed_and_not_lost(
    run: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RUN_VALUES", 5)
    lines = [line for line in ckpt("ls", "-a", run).lines if line.startswith("trainer_state")]
    assert len(lines) == 6
    assert "the others are not listed" in lines[-1]
    assert ckpt("rm", run, "trainer_state").code == 2
    assert (run / "trainer_state.json").exists()


class Payload:
    """An object that would run something where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/nowhere/ran",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "other.pkl"])
def test_no_pickle_of_a_run_is_run_and_scan_finds_it(run: Path, ckpt: Ckpt, name: str) -> None:
    if name.endswith("pkl"):
        (run / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps({"x": Payload()}))
    else:
        torch.save({"x": Payload()}, run / name)
    assert ckpt("ls", "-a", run).code == 0
    assert ckpt("scan", run).code == 1


BROKEN = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "no bytes": lambda _: b"",
    "noise": lambda _: bytes(range(256)) * 4,
    "an endless pickle": lambda _: b"\x80\x02" + b"(" * 300_000 + b".",
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_broken_part_is_named_in_one_line(run: Path, how: str, name: str, ckpt: Ckpt) -> None:
    path = run / name
    path.write_bytes(BROKEN[how](path.read_bytes()))
    error = None
    try:
        open_checkpoint(str(run))
    except Exception as caught:
        error = caught
    assert getattr(error, "path", None) == str(path), error
    assert "\n" not in str(error)
    assert ckpt("check", run).code in (1, 2)


def test_a_folder_of_very_many_files_is_refused_or_read_fast(run: Path) -> None:
    for number in range(limits.SHARDS + 1):
        (run / f"rng_state_{number}.pth").touch()
    assert "files" in str(refused(str(run)))


def test_hostile_files_take_little_memory(run: Path) -> None:
    """One process for the worst of them; what was measured of others stands in test_hostile_files.py."""
    (run / "trainer_state.json").write_text('{"a": [' + ",".join(['{"b":1}'] * 400_000) + "]}")
    code = (
        "import sys\nfrom ckpt_cli.cli.main import run\ncode = run(['ls', sys.argv[1]])\n"
        "print(code, open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    code_of, peak = done.stderr.splitlines()[-1].split()
    assert code_of in ("0", "2")
    assert int(peak) < 300 * 1024
