"""`ckpt stats` in pieces: any number of workers, small memory at any size, files cut short, progress, Control-C."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dcp_formats
import numpy as np
import pytest
import torch
from conftest import Ckpt

from ckpt_cli.arrays import indexing as chunks
from ckpt_cli.arrays.compare import Tolerance
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.check.run import check
from ckpt_cli.ops.diff import Asked, diff
from ckpt_cli.ops.hash import hash_tensors
from ckpt_cli.ops.stats import stats
from ckpt_cli.parallel import map as jobs

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*ComplexHalf", "ignore:.*Quantized")


def test_the_answer_is_the_same_for_any_number_of_workers(tmp_path: Path, ckpt: Ckpt) -> None:
    generator = torch.Generator().manual_seed(3)
    state = {f"w{i}": torch.randn(700, 3001, generator=generator) * 10**i for i in range(3)}
    state |= {"b": state["w0"].bfloat16(), "t": state["w1"].t()[::2], "i": (state["w2"] * 1e6).long()}
    torch.save(state, tmp_path / "m.pt")
    answers = {ckpt("stats", tmp_path / "m.pt", "--json", "--total", "-j", jobs).out for jobs in (1, 2, 7)}
    assert len(answers) == 1


def test_workers_may_be_processes_that_share_nothing(tmp_path: Path) -> None:
    state = {
        "f": torch.randn(900, 3001), "h": torch.randn(400_000).half(), "b": torch.randn(400_000).bfloat16(),
        "i": torch.arange(5), "bytes": torch.arange(256, dtype=torch.uint8), "c": torch.ones(3, 2, 9).permute(2, 0, 1),
        "q": torch.quantize_per_tensor(torch.randn(9), 0.1, 3, torch.qint8),
        "gaps": torch.full((300, 5), math.inf)[:, 1:3],
    }  # fmt: skip
    torch.save(state, tmp_path / "m.pt")
    other = {name: values + 1 if name in "fhbi" else values for name, values in state.items()}
    torch.save(other, tmp_path / "other.pt")

    def answers(executor: Executor) -> tuple[object, ...]:
        paths = (tmp_path / name for name in ("m.pt", "other.pt"))
        with closing(open_checkpoint(str(next(paths)))) as a, closing(open_checkpoint(str(next(paths)))) as b:
            reported = list(stats(a, (), executor).tensors)
            hashes = hash_tensors(a, "blake3", executor)
            checked = check(str(tmp_path / "m.pt"), executor)
            return reported, hashes, diff(a, b, Asked(), Tolerance(), executor), checked

    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, get_context("spawn")) as processes:
        assert repr(answers(threads)) == repr(answers(processes))


def test_cuts_are_indices_that_cover_every_shape() -> None:
    for shape in ((), (7,), (3, 1, 5), (2, 3, 4, 5), (1, 1), (5, 0)):
        for most in (1, 2, 3, 7, 30, 1000):
            cuts = list(chunks.row_cuts(shape, most))
            numbers = np.arange(math.prod(shape)).reshape(shape)
            found = [numbers[chunks.part_at(shape, *cut)].reshape(-1) for cut in cuts]
            assert all(end - begin <= most for begin, end in cuts)
            assert np.array_equal(np.concatenate([*found, np.arange(0)]), numbers.reshape(-1))


def test_no_more_jobs_are_made_than_are_under_way() -> None:
    made = 0

    def numbers() -> Any:
        nonlocal made
        for number in range(100):
            made += 1
            yield number

    with ThreadPoolExecutor(2) as executor:
        answers = jobs.run(numbers(), lambda number: number * 2, executor, ahead=4)
        assert [next(answers) for _ in range(3)] == [0, 2, 4]
        assert made <= 8
        assert list(answers) == [number * 2 for number in range(3, 100)]


def _write_hole(path: Path, nbytes: int) -> None:
    head = json.dumps({"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + nbytes)


def _measured(*arguments: object) -> tuple[str, int]:
    """What a command prints, and the kilobytes that its process takes at most."""
    code = (
        "import sys\nfrom ckpt_cli.cli.main import run\ncode = run(sys.argv[1:])\n"
        "sys.stderr.write(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout, int(done.stderr)


@pytest.mark.parametrize("command", [["stats"], ["hash"], ["check", "--deep"]], ids=" ".join)
def test_memory_stays_small_at_any_size(tmp_path: Path, command: list[str]) -> None:
    _write_hole(tmp_path / "m.safetensors", 3 << 28)
    answer, kilobytes = _measured(*command, tmp_path / "m.safetensors")
    assert command != ["stats"] or answer.split("\t")[8] == str(3 << 26)
    assert kilobytes < 120_000


def test_memory_stays_small_where_views_are_strided(tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        state = {"w": torch.empty(4096, 4 * 4096).t()[::2]}
        state |= {str(number): torch.empty(1024, 4 * 1024).t()[::2] for number in range(16)}
        torch.save(state, tmp_path / "m.pt")
    for command in (["stats"], ["stats", "--total"], ["hash"]):
        _, kilobytes = _measured(*command, tmp_path / "m.pt")
        assert kilobytes < 180_000


def test_the_samples_for_a_total_of_many_tensors_stay_small(tmp_path: Path) -> None:
    header = {
        str(at): {"dtype": "F32", "shape": [4096], "data_offsets": [at << 14, at + 1 << 14]} for at in range(4000)
    }
    head = json.dumps(header).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + (4000 << 14))
    answer, kilobytes = _measured("stats", "--total", tmp_path / "m.safetensors")
    assert answer.splitlines()[-1].split("\t")[-1] == str(4000 << 12)
    assert kilobytes < 180_000


def _cut_short(command: str, path: Path, *more: object) -> None:
    """Run a command, and cut the files short after it gathered a piece: were they mapped, the process would end."""
    code = (
        "import os, sys\nfrom ckpt_cli.cli.main import run\nfrom ckpt_cli.files.source import LocalFile\n"
        "read = LocalFile.read_into\ncut = lambda file: os.truncate(file.path, 3000)\nLocalFile.forget = cut\n"
        "LocalFile.read_into = lambda file, *where: (read(file, *where), cut(file))[0]\nsys.exit(run(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", code, command, path, *more]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if command == "check":  # the file is read again, and is a short one then
        assert (done.returncode, done.stderr) == (1, "")
        assert "cut short" in done.stdout
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"ckpt: .*: .*(cut short|file has 3000|changed while it was read; try again)\n(hint: ckpt ls --salvage .*\n)?",
        done.stderr,
    )


@pytest.mark.parametrize("command", ["stats", "diff", "hash", "check"])
def test_a_file_that_becomes_shorter_while_a_view_is_gathered_is_told_in_one_line(command: str, tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save({"w": torch.empty(4000, 6000).t()[::2]}, tmp_path / "m.pt")
    shutil.copy(tmp_path / "m.pt", tmp_path / "other.pt")
    _cut_short(command, tmp_path / "m.pt", *{"diff": [tmp_path / "other.pt"], "check": ["--deep"]}.get(command, []))


def test_so_are_the_files_of_several_ranks(tmp_path: Path) -> None:
    dcp_formats.save_ranks({"2.weight": torch.zeros(2048, 2048)}, tmp_path / "d")
    _cut_short("hash", tmp_path / "d")


def test_what_will_be_read_is_announced_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a disk reads what several threads ask for as if they asked at random."""
    torch.save({f"w{number}": torch.zeros(3_000_000) for number in range(3)}, tmp_path / "m.pt")
    expected: list[tuple[int, int]] = []
    monkeypatch.setattr(LocalFile, "expect", lambda _, offset, nbytes: expected.append((offset, nbytes)))
    for ask in (lambda c, e: stats(c, (), e), lambda c, e: hash_tensors(c, "sha256", e)):
        expected.clear()
        with ThreadPoolExecutor(2) as executor, closing(open_checkpoint(str(tmp_path / "m.pt"))) as checkpoint:
            ask(checkpoint, executor)
        assert expected == sorted(expected)
        assert sum(nbytes for _, nbytes in expected) == 36_000_000


def test_a_terminal_sees_how_far_it_is_and_control_c_stops_at_once(tmp_path: Path) -> None:
    _write_hole(tmp_path / "m.safetensors", 1 << 40)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_cli", "stats", tmp_path / "m.safetensors"],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    guard = threading.Timer(60, process.kill)
    guard.start()
    said = b""
    while b" left" not in said:
        said += os.read(ours, 1000)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130  # and not killed by the guard: the rest of the file would take many minutes
    guard.cancel()
    os.close(ours)
