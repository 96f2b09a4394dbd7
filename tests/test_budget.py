"""One budget for each request: an open checkpoint answers any number of them, a hostile one fails within one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import FORMATS
from torch.distributed.checkpoint import save as save_distributed

import ckpt_cli
from ckpt_cli.budget import Budget, current
from ckpt_cli.errors import LimitError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.show import show

REQUESTS = 1_000

VALUES = np.arange(40_000, dtype=np.float32)


def deflated(source: Path, path: Path) -> Path:
    """A zip file with its records compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return path


def npz(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", a=VALUES)
    return folder / "a.npz"


def torch_zip(folder: Path) -> Path:
    torch.save({"a": torch.from_numpy(VALUES)}, folder / "plain.pt")
    return deflated(folder / "plain.pt", folder / "a.pt")


def torchscript(folder: Path) -> Path:
    (kind,) = (each for each in FORMATS if each.label == "torchscript")
    kind.write({"x.a": torch.from_numpy(VALUES)}, folder / "plain.pt")
    return deflated(folder / "plain.pt", folder / "a.pt")


def text_in_a_pickle(folder: Path) -> Path:
    path = folder / "a.pkl"
    path.write_bytes(pickle.dumps({"a": VALUES, "b": VALUES + 1}, protocol=2))
    return path


COMPRESSED: dict[str, Callable[[Path], Path]] = {
    "npz": npz, "torch zip": torch_zip, "torchscript": torchscript, "text in a pickle": text_in_a_pickle,
}  # fmt: skip

compressed = pytest.mark.parametrize("kind", COMPRESSED)


@compressed
def test_an_open_checkpoint_answers_a_thousand_requests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = COMPRESSED[kind](tmp_path)
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 500_000)
    with ckpt_cli.open(path) as checkpoint:
        names = [tensor.name for tensor in checkpoint.tensors]
        for number in range(REQUESTS):
            name = names[number % len(names)]
            assert np.array_equal(checkpoint[name].numpy(), VALUES + (name == "b"))


@compressed
def test_a_request_beyond_its_budget_is_refused_every_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = COMPRESSED[kind](tmp_path)
    with ckpt_cli.open(path) as checkpoint:
        monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 80_000)
        for _ in range(3):
            with pytest.raises(LimitError):
                checkpoint.tensors[0].numpy()
        monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 500_000)
        assert np.array_equal(checkpoint.tensors[0].numpy(), VALUES)


def test_what_one_request_shows_is_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", **{f"a{number}": VALUES for number in range(10)})
    checkpoint = open_checkpoint(str(tmp_path / "a.npz"))
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 500_000)
    items = show(checkpoint, [])
    with pytest.raises(LimitError, match="far more would be inflated"):
        [item.array() for item in items]  # type: ignore[union-attr]
    for name in ("a0", "a1", "a9"):
        (item,) = show(checkpoint, [name])
        assert item.array().size == VALUES.size  # type: ignore[union-attr]


def test_all_that_load_inflates_is_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", **{f"a{number}": VALUES for number in range(10)})
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 500_000)
    with pytest.raises(LimitError, match="far more would be inflated"):
        ckpt_cli.load(tmp_path / "a.npz")
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 5_000_000)
    assert len(ckpt_cli.load(tmp_path / "a.npz")) == 10


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_of_a_distributed_checkpoint_are_opened_a_thousand_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_distributed({"epoch": [3, 4], "a": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    monkeypatch.setattr("ckpt_cli.limits.ITEMS_READ", 1_000)
    with ckpt_cli.open(tmp_path / "dcp") as checkpoint:
        names = [name for name in checkpoint if name.startswith("epoch")]
        for _ in range(REQUESTS // len(names)):
            for name in names:
                assert checkpoint[name] is not None


def test_threads_that_read_one_compressed_file_get_their_own_bytes(tmp_path: Path) -> None:
    arrays = {f"a{number}": np.arange(number, 300_000 + number, dtype=np.int32) for number in range(4)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    checkpoint = open_checkpoint(str(tmp_path / "a.npz"))
    storages = {tensor.name: tensor.storage for tensor in checkpoint.tensors}

    def read(name: str) -> bool:
        storage, expected = storages[name], arrays[name].tobytes()
        assert storage is not None
        return all(storage.view(at, 50_000) == expected[at : at + 50_000] for at in range(0, 1_200_000, 50_000))

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, [name for _ in range(4) for name in arrays]))


def test_a_thread_has_the_budget_of_its_own_request() -> None:
    mine = Budget().begun()
    with ThreadPoolExecutor(1) as executor:
        other = executor.submit(lambda: Budget().begun()).result()
    assert current() is mine
    assert other is not mine


def test_a_thread_without_a_request_is_never_out_of_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 500_000)
    path = str(npz(tmp_path))

    def opened_and_read() -> None:
        with closing(open_checkpoint(path)) as checkpoint:
            for _ in range(10):
                assert checkpoint.tensors[0].storage.view(0, VALUES.nbytes) == VALUES.tobytes()  # type: ignore[union-attr]

    with ThreadPoolExecutor(1) as executor:
        for _ in range(3):
            executor.submit(opened_and_read).result()


def test_what_opening_inflates_is_counted_together_in_a_thread_without_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {f"a{number}": np.array([None] * 20_000) for number in range(4)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(open_checkpoint, str(tmp_path / "a.npz")).result().close()
        monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 50_000)
        for _ in range(2):
            with pytest.raises(LimitError, match="far more would be inflated"):
                executor.submit(open_checkpoint, str(tmp_path / "a.npz")).result()


def test_each_command_has_a_budget_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Callable[..., Any]
) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=VALUES, b=np.array([None] * 20_000))
    monkeypatch.setattr("ckpt_cli.limits.INFLATED_IN_ALL", 400_000)
    before = Budget().begun()
    for _ in range(20):
        assert ckpt("ls", tmp_path / "a.npz").code == 0
    assert current() is not before


def test_an_owner_affords_a_purpose_until_it_is_spent() -> None:
    budget, owner = Budget(), object()
    assert budget.affords((owner, "code"), 60, 100)
    assert not budget.affords((owner, "code"), 50, 100)
    assert budget.affords((owner, "code"), 40, 100)
    assert not budget.affords((owner, "code"), 1, 100)
    assert budget.affords((owner, "JSON"), 100, 100)
    assert budget.affords((object(), "code"), 100, 100)


def test_pairs_of_views_are_allowed_until_they_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.limits.VIEW_PAIRS", 10)
    budget = Budget()
    assert budget.allow_pairs(8)
    assert not budget.allow_pairs(3)
    assert budget.allow_pairs(2)


def test_text_beside_its_decoding_by_another_thread_is_right(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(text_in_a_pickle(tmp_path)))
    storages = [tensor.storage for tensor in checkpoint.tensors]
    expected = [VALUES.tobytes(), (VALUES + 1).tobytes()]

    def read(number: int) -> bool:
        storage = storages[number % 2]
        assert storage is not None
        return bytes(storage.view(0, VALUES.nbytes)) == expected[number % 2]

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(400)))
