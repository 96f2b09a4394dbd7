"""The requests that commands make for checkpoints elsewhere, and the bytes that these take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ckpt
from contract import quietly
from elsewhere import HERE, Ledger, elsewhere
from safetensors.torch import save_file

HEAD = 256 << 10
PAGE = 16 << 10
COUNT = 24

LOOKS = ("ls FILE", "info FILE", "tree FILE", "ties FILE", "meta FILE", "match FILE FILE")

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Tensors of 1 MiB each."""
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{number}.weight": torch.randn(1024, 256, generator=generator) for number in range(COUNT)}


def zipped(state: State, path: Path) -> None:
    """Write a file of torch.save."""
    torch.save(state, path)


def legacy(state: State, path: Path) -> None:
    """Write a file of torch.save before 1.6."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


def safetensors(state: State, path: Path) -> None:
    """Write a safetensors file."""
    save_file(state, path)


def npz(state: State, path: Path) -> None:
    """Write an npz file."""
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})


def distributed(state: State, path: Path) -> None:
    """Write a folder of torch.distributed.checkpoint."""
    with quietly():
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)


def shards(write: Callable[[State, Path], None], suffix: str) -> Callable[[State, Path], None]:
    """Return a writer of a set of six shards with an index."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"

    def write_set(state: State, path: Path) -> None:
        path.mkdir()
        weight_map = {}
        for shard in range(6):
            part = dict(list(state.items())[shard::6])
            name = f"{stem}-{shard + 1:05}-of-00006{suffix}"
            write(part, path / name)
            weight_map.update(dict.fromkeys(part, name))
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return write_set


WRITERS: dict[str, Callable[[State, Path], None]] = {
    "zip": zipped,
    "legacy": legacy,
    "safetensors": safetensors,
    "npz": npz,
    "dcp": distributed,
    "shards": shards(safetensors, ".safetensors"),
    "zip-shards": shards(zipped, ".bin"),
}

FILES = ("zip", "legacy", "safetensors", "npz", "dcp", "shards", "zip-shards")


def nbytes_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())


def asked(ckpt: Ckpt, here: Path, command: str, *, lists: bool = True) -> Ledger:
    """Run a command on `FILE` here and elsewhere; what was asked elsewhere, where the answer is the same."""
    near = ckpt(*command.replace("FILE", "model").split(" "))
    with elsewhere(here, lists=lists) as ledger:
        far = ckpt(*command.replace("FILE", f"{HERE}model").split(" "))
    assert (far.code, far.out.replace(HERE, ""), far.err.replace(HERE, "")) == (near.code, near.out, near.err), command
    return ledger


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "no lists"])
@pytest.mark.parametrize(
    ("kind", "requests", "nbytes"),
    [("zip", 2, 600_000), ("safetensors", 1, 300_000), ("legacy", COUNT, 700_000), ("npz", COUNT + 2, 1_000_000)],
)
def test_to_look_at_a_file_takes_few_requests(
    kind: str, requests: int, nbytes: int, lists: bool, ckpt: Ckpt, here: Path, state: State
) -> None:
    WRITERS[kind](state, here / "model")
    for command in LOOKS:
        ledger = asked(ckpt, here, command, lists=lists)
        assert ledger.count <= requests
        assert ledger.alone <= 2
        assert ledger.nbytes <= nbytes


@pytest.mark.parametrize(
    ("kind", "lists", "requests"),
    [("shards", True, 6 + 3), ("zip-shards", True, 2 * 6 + 3), ("dcp", True, 3), ("dcp", False, 7)],
)
def test_to_look_at_a_folder_takes_a_request_for_each_document(
    kind: str, lists: bool, requests: int, ckpt: Ckpt, here: Path, state: State
) -> None:
    WRITERS[kind](state, here / "model")
    for command in LOOKS:
        ledger = asked(ckpt, here, command, lists=lists)
        more = command == "ties FILE" and lists and kind == "shards"
        assert ledger.count <= requests + more
        assert ledger.alone <= 3 + more


def test_an_index_without_lists_takes_a_request_for_each_shard_and_one_for_itself(
    ckpt: Ckpt, here: Path, state: State
) -> None:
    shards(safetensors, ".safetensors")(state, here / "model")
    with elsewhere(here, lists=False) as ledger:
        assert len(ckpt("ls", f"{HERE}model/model.safetensors.index.json").lines) == COUNT
        assert (ledger.count, ledger.alone) == (7, 1)
        ledger.requests.clear()
        assert ckpt("check", f"{HERE}model").out == ""
        assert ledger.count == 0 or ledger.count <= 12


@pytest.mark.parametrize(("kind", "each", "more"), [("shards", 1, 2), ("zip-shards", 2, 3)])
def test_a_folder_without_lists_takes_no_request_for_names_that_change_nothing(
    kind: str, each: int, more: int, ckpt: Ckpt, here: Path, state: State
) -> None:
    WRITERS[kind](state, here / "model")
    with elsewhere(here, lists=False) as ledger:
        assert len(ckpt("ls", f"{HERE}model/").lines) == COUNT
        assert ledger.count <= 6 * each + more


def test_what_is_shown_takes_one_request_more(ckpt: Ckpt, here: Path, state: State) -> None:
    zipped(state, here / "model")
    ledger = asked(ckpt, here, "show FILE layers.9.weight[5]")
    assert ledger.count == 3
    assert ledger.nbytes < 600_000


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "command", ["hash FILE", "stats FILE", "diff FILE near", "check --deep FILE", "ties --equal FILE", "series FILE"]
)
def test_what_reads_every_byte_reads_it_once_and_ahead(
    command: str, kind: str, ckpt: Ckpt, here: Path, state: State
) -> None:
    WRITERS[kind](state, here / "model")
    if "near" in command:
        zipped(state, here / "near")
    ledger = asked(ckpt, here, command)
    assert ledger.nbytes <= 1.07 * nbytes_of(here / "model")  # samples and headers take a page each
    assert ledger.alone <= 6


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("command", ["check FILE", "scan FILE"])
def test_what_looks_for_faults_reads_no_values(command: str, kind: str, ckpt: Ckpt, here: Path, state: State) -> None:
    WRITERS[kind](state, here / "model")
    ledger = asked(ckpt, here, command)
    documents = 2 * 7 * HEAD if "shards" in kind else 2 * HEAD
    searched = 1 << 20 if kind == "legacy" else 0  # for a zip file that it ends in
    assert ledger.nbytes <= documents + 2 * COUNT * PAGE + searched
    assert ledger.alone <= 8


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("target", ["out.pt", "out.safetensors", "out.npz", "folder"])
def test_a_conversion_from_elsewhere_reads_each_byte_once_and_ahead(
    target: str, kind: str, ckpt: Ckpt, here: Path, state: State
) -> None:
    WRITERS[kind](state, here / "model")
    more = ("--to", "dcp") if target == "folder" else ()
    (here / "near").mkdir()
    assert ckpt("convert", "model", f"near/{target}", *more).code == 0
    with elsewhere(here) as ledger:
        assert ckpt("convert", f"{HERE}model", target, *more).code == 0
    assert ledger.nbytes <= 1.05 * nbytes_of(here / "model")
    assert ledger.alone <= 6
    for each in [here / target] if target != "folder" else (here / target).iterdir():
        assert each.read_bytes() == (here / "near" / each.relative_to(here)).read_bytes()


@pytest.mark.parametrize("edit", ["cast FILE bfloat16", "rename FILE --sub layers blocks", "rm FILE layers.3"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "shards", "zip-shards"])
def test_an_edited_copy_of_a_file_elsewhere_reads_each_byte_once_and_ahead(
    kind: str, edit: str, ckpt: Ckpt, here: Path, state: State
) -> None:
    WRITERS[kind](state, here / "model")
    assert ckpt(*edit.replace("FILE", "model").split(" "), "-o", "near").code == 0
    with elsewhere(here) as ledger:
        assert ckpt(*edit.replace("FILE", f"{HERE}model").split(" "), "-o", "far").code == 0
    assert ledger.nbytes <= 1.05 * nbytes_of(here / "model")
    assert ledger.alone <= 12
    assert ckpt("diff", "near", "far").code == 0


def test_a_long_transposed_tensor_elsewhere_is_fetched_once(ckpt: Ckpt, here: Path) -> None:
    torch.save({"t": torch.arange(6_000_000.0).reshape(3000, 2000).t()}, here / "model")
    for command in ("hash FILE", "stats FILE"):
        ledger = asked(ckpt, here, command)
        assert ledger.nbytes <= 1.05 * nbytes_of(here / "model")
        assert ledger.alone <= 6


def test_a_scan_of_a_stream_elsewhere_finds_what_stands_after_its_storages(
    ckpt: Ckpt, here: Path, state: State
) -> None:
    legacy(state, here / "model")
    with (here / "model").open("ab") as file:
        file.write(b"junk" * 99 + b"cos\nsystem\n(S'true'\ntR.")
    ledger = asked(ckpt, here, "scan FILE")
    assert ledger.nbytes <= 3 * nbytes_of(here / "model")
    zipped(state, here / "model")
    with (here / "model").open("ab") as file:
        file.write(b"junk" * 99 + b"cos\nsystem\n(S'true'\ntR.")
    ledger = asked(ckpt, here, "scan FILE")
    assert ledger.nbytes < 3_000_000


def test_nothing_is_looked_for_beside_a_file_whose_folder_was_not_listed(ckpt: Ckpt, here: Path, state: State) -> None:
    (here / "folder").mkdir()
    safetensors(state, here / "folder/model.safetensors")
    (here / "folder/config.json").write_text('{"num_hidden_layers": 3}')
    with elsewhere(here) as ledger:
        assert "config-layers" not in ckpt("check", f"{HERE}folder/model.safetensors").out
        assert ledger.of("list") == 0
        assert "config-layers" in ckpt("check", f"{HERE}folder").out
