"""What names and edits of large pickles cost, counted in function calls: linear, and few for a tensor."""

import cProfile
import io
import pstats
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.crowded import groups
from conftest import Ckpt

from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.ops.check.run import check
from ckpt_cli.pickles.edit import rewrite
from ckpt_cli.pickles.edit.rewrite import EditedPickle
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Graph, nodes_of
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.write import write_pickle


class Finder:
    """Storages that need no file."""

    big_endian = False

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        return Storage(key, nbytes, location)


def saved(tensors: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{number // 8}.block.{number % 8}.weight": torch.ones(2, 2) for number in range(tensors)}


def graph_of(tensors: int) -> Graph:
    buffer = io.BytesIO()
    torch.save(saved(tensors), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return read_pickle(archive.read("archive/data.pkl"))


def a_tensor(work: Callable[[Graph], object]) -> float:
    """Function calls for one more tensor; also checks that they are as many for the next ones."""

    def calls(tensors: int) -> int:
        graph = graph_of(tensors)
        with cProfile.Profile() as profile:
            work(graph)
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # typeshed does not list it

    few, more, most = calls(100), calls(300), calls(700)
    assert (most - more) / 400 <= 1.05 * (more - few) / 200 + 1, "the cost of a tensor grows with their number"
    return (most - more) / 400


def names(graph: Graph) -> object:
    return entries_of(graph, Finder(), place=PicklePlace(0))


def renamed(graph: Graph) -> EditedPickle:
    entries = entries_of(graph, Finder(), place=PicklePlace(0))
    changes = Changes(names={entry.name: entry.name.removeprefix("model.") for entry in entries})
    return EditedPickle(graph, Finder(), PicklePlace(0), entries, changes)


def test_naming_a_tensor_takes_few_calls() -> None:
    assert a_tensor(names) <= 38


def test_writing_a_tensor_takes_few_calls() -> None:
    assert a_tensor(lambda graph: write_pickle(graph.root, graph.data, lambda _: None)) <= 205


def test_comparing_a_tensor_with_its_copy_takes_few_calls() -> None:
    assert a_tensor(lambda graph: same_graphs(graph.root, graph.data, graph.root, graph.data)) <= 125


def test_renaming_a_tensor_takes_few_calls() -> None:
    assert a_tensor(renamed) <= 210


def test_a_rename_walks_the_graph_once_and_writes_the_pickle_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Any
) -> None:
    done: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(rewrite, "write_pickle", counting("write", write_pickle))
    monkeypatch.setattr(rewrite, "nodes_of", counting("walk", nodes_of))
    path = tmp_path / "model.pt"
    torch.save(saved(20), path)
    assert ckpt("rename", path, "--strip", "model").code == 0
    assert sorted(done) == ["walk", "write"]
    assert set(torch.load(path)) == {name.removeprefix("model.") for name in saved(20)}


def test_the_memory_is_looked_at_rarely_while_rows_of_tensors_are_read(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pt").write_bytes(groups(1_000))
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "b.pt").code == 0  # its rows come one by one
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    looks = []
    look = sys.getallocatedblocks
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: looks.append(1) or look())
    read_pickle(data)
    assert 1 <= len(looks) <= 30


def test_checking_a_tensor_that_is_pickled_without_a_memo_takes_few_calls(tmp_path: Path) -> None:
    def calls(count: int) -> int:
        (tmp_path / "a.pt").write_bytes(groups(count))
        with cProfile.Profile() as profile:
            check(str(tmp_path / "a.pt"))
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # typeshed does not list it

    calls(1)
    few, many = calls(100), calls(300)
    assert (many - few) / 600 <= 600
