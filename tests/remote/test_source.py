"""A file elsewhere as a source: what it fetches, keeps and expects, and what a command or a checkpoint remembers."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from web_server import serving

import ckpt_cli
from ckpt_cli.errors import ChangedError, TruncatedError
from ckpt_cli.files import places
from ckpt_cli.files.elsewhere import elsewhere
from ckpt_cli.remote import fetched as fetching
from ckpt_cli.remote.fetched import PAGE, Fetched
from ckpt_cli.remote.source import BEGINNING, RemoteFile
from ckpt_cli.remote.store import Version

SIZE = 3_000_001
BYTES = random.Random(0).randbytes(SIZE)


class Counted:
    """An object in memory that counts what is read of it."""

    path = "mem://x"
    revision = ""

    def __init__(self) -> None:
        self.data = BYTES
        self.version = Version(SIZE, '"tag"')
        self.asked: list[tuple[int, int]] = []
        self.fails = False
        self.open = threading.Event()
        self.open.set()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer, once the gate is open."""
        self.open.wait(20)
        if self.fails:
            raise ChangedError(self.path)
        self.asked.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all requests."""
        return sum(nbytes for _, nbytes in self.asked)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["read", "read", "read", "expect", "expect_all", "view", "begin"]),
            st.integers(0, SIZE),
            st.sampled_from([0, 1, 8, 1000, PAGE, PAGE + 1, 100_000, 300_000, 1_500_000]),
        ),
        max_size=12,
    )
)
def test_every_read_gives_the_bytes_of_the_file_whatever_was_expected(steps: list[tuple[str, int, int]]) -> None:
    file = RemoteFile("x", Counted(), Fetched())
    for kind, offset, nbytes in steps:
        nbytes = min(nbytes, SIZE - offset)
        if kind == "expect":
            file.expect(offset, nbytes)
        elif kind == "expect_all":
            file.expect_all([(offset, nbytes), (offset // 2, nbytes), (SIZE - 5, 100)])
        elif kind == "begin":
            file.begin_to_read()
        elif kind == "view":
            assert bytes(file.view(offset, nbytes)) == BYTES[offset : offset + nbytes]
        else:
            assert file.read(offset, nbytes) == BYTES[offset : offset + nbytes]
    file.close()


def test_the_beginning_and_the_end_are_one_request_each() -> None:
    found = Counted()
    file = RemoteFile("x", found, Fetched())
    file.read(0, 600)
    file.read(100_000, 1000)
    file.read(SIZE - 22, 22)
    file.read(SIZE - 200_000, 50_000)
    assert found.asked[0] == (0, BEGINNING)
    assert len(found.asked) == 2
    assert found.nbytes <= 2 * BEGINNING + PAGE


def test_small_reads_in_order_take_fewer_and_longer_requests() -> None:
    found = Counted()
    file = RemoteFile("x", found, Fetched())
    for at in range(300_000, 2_600_000, 1000):
        file.read(at, 1000)
    assert len(found.asked) < 12
    assert found.nbytes <= SIZE


def test_what_is_expected_is_fetched_once_and_dropped_when_all_of_it_was_read() -> None:
    found, fetched = Counted(), Fetched()
    file = RemoteFile("x", found, fetched)
    file.expect(300_000, 2_000_000)
    file.expect(400_000, 1_000_000)
    buffer = bytearray(1_000_000)
    file.read_into(memoryview(buffer), 1_300_000)  # the end first
    file.read_into(memoryview(buffer), 300_000)
    assert buffer == found.data[300_000:1_300_000]
    assert found.nbytes <= 2_000_000 + PAGE
    assert not any(fetched._parts.values())
    assert fetched._expected == 0


def test_expecting_never_waits_and_holds_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_EXPECTED", 1 << 20)
    found, fetched = Counted(), Fetched()
    file = RemoteFile("x", found, fetched)
    found.open.clear()
    for at in range(0, 3_000_000, 500_000):
        file.expect(at, 500_000)
    assert fetched._expected <= 1 << 20
    found.open.set()
    assert file.read(0, SIZE) == found.data
    for at in range(0, 2_000_000, 500_000):  # and what was never read does not stand in the way for ever
        for _ in range(4):
            file.expect(at + 300_000, 400_000)
    assert fetched._expected <= 1 << 20
    file.close()
    assert fetched._expected == 0


def test_many_small_ranges_are_fetched_side_by_side_and_neighbours_together() -> None:
    found = Counted()
    file = RemoteFile("x", found, Fetched())
    ranges = [(at, 30) for at in range(0, SIZE - 1000, 100_000)]
    file.expect_all([*ranges, (SIZE - 1, 10**12), (-5, 3), (SIZE + 5, 3)])
    asked = len(found.asked)
    assert asked <= len(ranges) + 1
    for offset, nbytes in ranges:
        file.read(offset, nbytes)
    assert len(found.asked) == asked
    file.expect_all([(at, 10) for at in range(0, 200_000, 500)])
    assert len(found.asked) <= asked + 13


def test_pages_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAGES", 10)
    found, fetched = Counted(), Fetched()
    file = RemoteFile("x", found, fetched)
    for at in range(0, SIZE - 1000, 50_000):
        assert file.read(at, 1000) == found.data[at : at + 1000]
    assert len(fetched._pages) <= 10


def test_the_error_of_a_part_that_was_expected_is_raised_by_the_read() -> None:
    found, fetched = Counted(), Fetched()
    file = RemoteFile("x", found, fetched)
    found.fails = True
    file.expect(0, 2_000_000)
    with pytest.raises(ChangedError):
        file.read(0, 2_000_000)
    found.fails = False
    assert file.read(0, 2_000_000) == found.data[:2_000_000]


def test_what_is_not_there_is_not_asked_for() -> None:
    found = Counted()
    file = RemoteFile("x", found, Fetched())
    for offset, nbytes in ((SIZE, 1), (-1, 1), (0, SIZE + 1)):
        with pytest.raises(TruncatedError):
            file.read(offset, nbytes)
    assert file.read(SIZE, 0) == b""
    file.expect(SIZE, 5)
    file.expect(-5, 3)
    assert found.asked == []


def test_threads_read_one_file(tmp_path: Path) -> None:
    found = Counted()
    file = RemoteFile("x", found, Fetched())
    spans = [(at, 70_000) for at in range(0, 2_900_000, 33_000)]
    with ThreadPoolExecutor(8) as pool:
        for (offset, nbytes), got in zip(spans, pool.map(lambda span: file.read(*span), spans), strict=True):
            assert got == found.data[offset : offset + nbytes]


def test_a_file_is_sent_to_another_process_without_a_request(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(200_000.0)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    with serving(tmp_path) as web, elsewhere():
        file = places.open_file(web.url("x.pt"))
        sent = pickle.dumps(file)
        assert len(sent) < 2000
        asked = len(web.seen)
        again, once_more = pickle.loads(sent), pickle.loads(sent)
        assert (again is once_more, len(web.seen)) == (True, asked)
        assert again.read(300_000, 100_000) == data[300_000:400_000]


def test_a_path_is_asked_for_once_within_a_command_and_anew_in_the_next(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pt")
    with serving(tmp_path) as web:
        path = web.url("x.pt")
        with elsewhere():
            assert places.is_file(path)
            assert places.exists(path)
            assert not places.is_folder(path)
            assert places.size_of(path) == (tmp_path / "x.pt").stat().st_size
            places.open_file(path).read(0, 600)
            assert len(web.seen) == 1
        torch.save({"w": torch.ones(2), "v": torch.ones(1)}, tmp_path / "x.pt")
        with elsewhere():
            assert places.size_of(path) == (tmp_path / "x.pt").stat().st_size


def test_python_sees_a_new_file_when_it_opens_it_anew_and_the_old_one_until_then(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pt")
    with serving(tmp_path) as web, ckpt_cli.open(web.url("x.pt")) as old:
        torch.save({"v": torch.ones(3)}, tmp_path / "x.pt")
        with ckpt_cli.open(web.url("x.pt")) as new:
            assert (list(old), list(new)) == (["w"], ["v"])
        assert old["w"].numpy().tolist() == [0, 0]  # a small file was fetched when it was opened


def test_torch_and_numpy_read_a_file_elsewhere(tmp_path: Path) -> None:
    saved = {"w": torch.arange(200_000.0), "half": torch.ones(3, 5, dtype=torch.bfloat16), "one": torch.tensor(7)}
    torch.save(saved, tmp_path / "x.pt")
    with serving(tmp_path) as web:
        loaded = ckpt_cli.load(web.url("x.pt"))
        assert {name: torch.equal(value, saved[name]) for name, value in loaded.items()} == dict.fromkeys(saved, True)
        with ckpt_cli.open(web.url("x.pt")) as checkpoint:
            assert checkpoint["w"].numpy().tolist() == saved["w"].tolist()
            assert checkpoint["w"][5:8].tolist() == [5, 6, 7]


FORKED = """
import os, sys
import ckpt_cli
checkpoint = ckpt_cli.open(sys.argv[1])
file = checkpoint._opened.container.files[0]
file.expect(300_000, 2_000_000)
children = []
for number in range(3):
    child = os.fork()
    if not child:
        right = checkpoint["w"].numpy().tolist() == list(range(700_000))
        os._exit(0 if right else 1)
    children.append(child)
right = checkpoint["w"].numpy().tolist() == list(range(700_000))
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(right, codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_process_that_was_forked_reads_by_connections_of_its_own(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(700_000)}, tmp_path / "x.pt")
    with serving(tmp_path) as web:
        call = [sys.executable, "-W", "ignore", "-c", FORKED, web.url("x.pt")]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == ("True [0, 0, 0]\n", "")
