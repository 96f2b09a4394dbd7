"""Checkpoints of many small tensors elsewhere: what lies side by side is fetched together, and once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from elsewhere import HERE, elsewhere
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_cli.files import copy
from ckpt_cli.formats import open_checkpoint, writing
from ckpt_cli.ops.hash import hash_tensors
from ckpt_cli.ops.stats import stats
from ckpt_cli.remote import fetched as fetching
from ckpt_cli.remote.fetched import PAGE, PART
from ckpt_cli.remote.plan import NEAR, Plan, together

COUNT = 600

Write = Callable[[dict[str, torch.Tensor], Path], None]

WRITERS: dict[str, Write] = {
    "zip": lambda state, path: torch.save(state, path),
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, path: save_file(state, path),
}


@pytest.fixture(scope="module", params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 10 MB in small tensors, and the same beside it."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{number}": torch.randn(4000, generator=generator) for number in range(COUNT)}
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](state, folder / "model")
    save_file(state, folder / "near.safetensors")
    return folder


COMMANDS = ("stats FAR", "stats FAR --total", "stats FAR --percentiles", "hash FAR", "diff FAR NEAR",
            "check --deep FAR", "series FAR NEAR", "convert FAR OUT", "cast FAR bfloat16 -o OUT")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_small_tensors_take_a_request_for_many_of_them_and_each_byte_is_fetched_once(
    command: str, folder: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_PAGES", (4 << 20) // PAGE)  # as if the file were far longer than what memory keeps
    size = (folder / "model").stat().st_size
    out = "o.pt" if "safetensors" in folder.name else "o.safetensors"
    if command.startswith("cast"):
        out = "o.safetensors" if "safetensors" in folder.name else "o.pt"
    places = {"FAR": f"{HERE}model", "NEAR": str(folder / "near.safetensors"), "OUT": str(tmp_path / out)}
    with elsewhere(folder) as ledger:
        answer = ckpt(*[places.get(word, word) for word in command.split()])
    assert answer.code == 0, answer.err
    assert ledger.nbytes <= 1.05 * size
    assert ledger.count <= size / PART + 20


@pytest.mark.parametrize("command", ["hash", "stats", "check --deep"])
def test_records_of_a_zip_file_are_fetched_with_their_headers(command: str, tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({f"layers.{number}": torch.randn(75_000) for number in range(60)}, tmp_path / "x.pt")
    size = (tmp_path / "x.pt").stat().st_size
    with elsewhere(tmp_path) as ledger:
        answer = ckpt(*command.split(), f"{HERE}x.pt")
    assert answer.out == ckpt(*command.split(), tmp_path / "x.pt").out
    assert (ledger.count <= size / PART + 15, ledger.nbytes <= 1.05 * size) == (True, True)
    with elsewhere(tmp_path) as ledger:  # what reads no values fetches headers only
        ckpt("check", f"{HERE}x.pt")
    assert ledger.nbytes < size / 4


def test_what_other_processes_read_is_not_fetched_by_whoever_hands_out_the_jobs(folder: Path) -> None:
    size = (folder / "model").stat().st_size
    near = open_checkpoint(str(folder / "model"))
    with (
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,
        elsewhere(folder) as ledger,
    ):
        far = open_checkpoint(f"{HERE}model")
        before = ledger.nbytes
        found = hash_tensors(far, "sha256", pool)
        if "safetensors" in folder.name:  # of the others the places of all tensors are between these
            assert ledger.nbytes == before
        assert ledger.nbytes <= 1.05 * size
        hashed = ledger.nbytes
        stats(far, [], pool)
        assert ledger.nbytes <= hashed + 1.05 * size  # only samples, which decide how values are summed
        far.close()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert found == hash_tensors(near, "sha256", pool)
    near.close()


def test_a_file_that_is_copied_is_fetched_once_also_where_it_is_longer_than_what_is_held(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_EXPECTED", 3 * PART // 2)
    for module in (copy, writing):
        monkeypatch.setattr(module, "AHEAD", PART // 2)
    save_file({f"layers.{number}": torch.full((500_000,), number) for number in range(48)}, tmp_path / "x.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size
    with elsewhere(tmp_path) as ledger:
        assert ckpt("convert", f"{HERE}x.safetensors", tmp_path / "out.safetensors").code == 0
    assert (ledger.nbytes <= 1.05 * size, ledger.count <= 2 * size / PART + 5) == (True, True)


def test_pages_without_room_in_memory_are_in_a_file_without_a_name(
    folder: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(fetching, "_PAGES", 16)
    with elsewhere(folder):
        assert ckpt("stats", "--total", f"{HERE}model").code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_costs_requests_and_no_answer(
    folder: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ckpt("stats", "--total", str(folder / "model")).out
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(fetching, "_PAGES", 16)
    with elsewhere(folder):
        assert ckpt("stats", "--total", f"{HERE}model").out == right


PLACES, LENGTHS = (
    st.integers(0, 2000).map(lambda at: at * 77_777),
    st.sampled_from([1, 4096, 100_000, PART, 2 * PART + 1]),
)
RANGES = st.lists(st.tuples(PLACES, LENGTHS), max_size=10)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RANGES)
def test_pieces_have_every_range_and_are_bounded(ranges: list[tuple[int, int]]) -> None:
    plan = Plan()
    wanted = [(begin, begin + nbytes) for begin, nbytes in ranges]
    plan.add(wanted)
    for begin, end in wanted:
        at = begin
        while at < end:
            piece = plan.piece_at(at)
            assert piece is not None
            assert piece.begin <= at < piece.end <= piece.begin + PART
            at = piece.end


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RANGES)
def test_ranges_that_are_together_are_near_each_other(ranges: list[tuple[int, int]]) -> None:
    wanted = [(begin, begin + nbytes) for begin, nbytes in ranges]
    for begin, end, gaps in together(wanted):
        assert all(0 < high - low <= NEAR for low, high in gaps)
        assert not any(low < gap[1] and gap[0] < high for low, high in wanted for gap in gaps)
        within = [(low, high) for low, high in wanted if begin <= low and high <= end]
        assert (min(low for low, _ in within), max(high for _, high in within)) == (begin, end)
