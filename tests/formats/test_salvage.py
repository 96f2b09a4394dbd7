"""Files that were cut short: what is listed of them is what torch reads from the whole file, and all else is lost."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from contract import quietly
from examples import most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from ckpt_cli.arrays.to_torch import torch_tensor
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint, open_salvaged

State = dict[str, torch.Tensor]


def training() -> tuple[dict[str, Any], State]:
    """A training checkpoint with ties, views of one storage and an empty tensor; and its tensors by their names."""
    whole = torch.arange(100.0)
    model = OrderedDict(a=torch.arange(10.0), head=whole[:20], tail=whole[50:].view(5, 10).t(), empty=torch.empty(0))
    model["tied"] = model["a"]
    moments = {0: {"exp_avg": torch.ones(3, dtype=torch.bfloat16)}}
    state = {"model": model, "epoch": 3, "opt": {"state": moments, "lr": [0.1, 0.2]}, "last": torch.tensor([7])}
    flat = {f"model.{name}": tensor for name, tensor in model.items()}
    return state, {**flat, "opt.state.0.exp_avg": moments[0]["exp_avg"], "last": state["last"]}


def zipped(state: object) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def legacy(state: object) -> bytes:
    """As torch.save wrote it before 1.6."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def repacked(data: bytes, *, method: int = zipfile.ZIP_STORED, last: str = "") -> bytes:
    """The same records as Python's zipfile writes them, one of them after all others."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as plain, zipfile.ZipFile(buffer, "w", method) as packed:
        for info in sorted(plain.infolist(), key=lambda info: bool(last) and info.filename.endswith(last)):
            packed.writestr(info.filename, plain.read(info))
    return buffer.getvalue()


def pickled(state: object) -> bytes:
    """As pickle.dump writes it, with all bytes in the pickle."""
    return pickle.dumps(state, protocol=2)


def safetensors(state: State) -> bytes:
    """As safetensors writes it."""
    from safetensors.torch import save

    return save({name: tensor.contiguous().clone() for name, tensor in state.items()})


def scripted() -> tuple[bytes, State]:
    """A TorchScript archive, whose pickle comes after the storages, and its tensors."""
    buffer = io.BytesIO()
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with quietly():
        torch.jit.save(torch.jit.script(net), buffer)
    return buffer.getvalue(), dict(net.state_dict())


def npz(save: Callable[..., None]) -> bytes:
    """As numpy writes it."""
    buffer = io.BytesIO()
    save(buffer, **{name: tensor.numpy() for name, tensor in ARRAYS.items()})
    return buffer.getvalue()


STATE, FLAT = training()
ARRAYS = {name: tensor.contiguous() for name, tensor in FLAT.items() if tensor.dtype != torch.bfloat16}
FILES: dict[str, Callable[[], tuple[bytes, State]]] = {
    "zip": lambda: (zipped(STATE), FLAT),
    "zip-repacked": lambda: (repacked(zipped(STATE)), FLAT),
    "zip-deflated": lambda: (repacked(zipped(STATE), method=zipfile.ZIP_DEFLATED), FLAT),
    "zip-pickle-last": lambda: (repacked(zipped(STATE), last="data.pkl"), FLAT),
    "legacy": lambda: (legacy(STATE), FLAT),
    "pickle": lambda: (pickled(STATE), FLAT),
    "safetensors": lambda: (safetensors(FLAT), FLAT),
    "npz": lambda: (npz(np.savez), ARRAYS),
    "npz-compressed": lambda: (npz(np.savez_compressed), ARRAYS),
    "torchscript": scripted,
}


SMALL = [FILES[kind]()[0] for kind in FILES if kind != "torchscript"]

STEPS = {"zip": 5, "legacy": 3, "safetensors": 2}
"""Bytes from one cut to the next: of these files each lost byte can only lose tensors."""


def listed_of(path: Path) -> State:
    """What is listed of a cut file, as torch tensors."""
    found = open_salvaged(str(path))
    made = {tensor.name: torch_tensor(found.checkpoint, tensor, {}) for tensor in found.checkpoint.tensors}
    found.close()
    return made


def assert_among(found: State, oracle: State) -> None:
    """Each tensor is in the oracle, with the same dtype, shape and values."""
    for name, tensor in found.items():
        assert name in oracle
        assert (tensor.dtype, tensor.shape) == (oracle[name].dtype, oracle[name].shape), name
        assert torch.equal(tensor.detach(), oracle[name].detach()), name


@pytest.mark.parametrize("kind", FILES)
def test_what_is_listed_of_a_file_cut_at_any_byte_is_what_torch_reads_from_the_whole(tmp_path: Path, kind: str) -> None:
    data, oracle = FILES[kind]()
    path = tmp_path / "cut"
    counts = []
    for cut in range(len(data) - 1, 0, -STEPS.get(kind, 23)):
        path.write_bytes(data[:cut])
        try:
            found = listed_of(path)
        except CkptError:
            continue
        assert_among(found, oracle)
        counts.append(len(found))
    assert counts[0] == max(counts)
    if kind in STEPS:
        some = [count for count in counts if count > 1]  # the one without bytes needs the pickle alone
        assert some == sorted(some, reverse=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flat_state_dict_cut_anywhere_keeps_exactly_the_tensors_before_the_cut(
    tmp_path: Path, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    state = {f"t{number}": torch.arange(float(size)) + 100 * number for number, size in enumerate(sizes)}
    write = data.draw(st.sampled_from([zipped, legacy, safetensors]))
    raw = write(state)
    cut = data.draw(st.integers(0, len(raw) - 1))
    path = tmp_path / "cut"
    path.write_bytes(raw[:cut])
    places = {name: raw.find(tensor.numpy().tobytes()) if len(tensor) > 1 else -1 for name, tensor in state.items()}
    try:
        found = listed_of(path)
    except CkptError:
        found = {}
    assert_among(found, state)
    whole = {name for name, at in places.items() if at >= 0 and at + 4 * len(state[name]) <= cut}
    assert whole <= set(found)


@settings(max_examples=most(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_file_with_other_bytes_in_it_is_salvaged_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(SMALL)))
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "cut"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with suppress(CkptError):
        listed_of(path)


def test_a_view_in_the_part_of_a_storage_that_is_there_is_whole(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    data = legacy({"head": whole[:10], "tail": whole[990:], "step": whole[::2]})
    (tmp_path / "cut").write_bytes(data[:-2000])
    assert list(listed_of(tmp_path / "cut")) == ["head"]
    lost = {item.name: item.why for item in open_salvaged(str(tmp_path / "cut")).lost}
    assert lost == {
        "tail": "its 40 bytes are not there",
        "step": "of its 3996 bytes the last 1996 are not there",
    }


def test_tensors_of_the_saves_before_a_cut_one_are_whole(tmp_path: Path) -> None:
    data = legacy({"a": torch.ones(4)}) + legacy({"b": torch.ones(4), "c": torch.zeros(4)})
    (tmp_path / "cut").write_bytes(data[:-4])
    found = open_salvaged(str(tmp_path / "cut"))
    first, second = (tensor.name for tensor in found.checkpoint.tensors)
    (lost,) = (item.name for item in found.lost)  # storages stand in the order of their addresses
    assert (first, {second, lost}) == ("a", {"[1].b", "[1].c"})


def test_a_header_of_safetensors_that_promises_more_than_the_file_has_keeps_the_rest(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [800, 808]},
        "c": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        "d": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]},
    }
    raw = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + struct.pack("<2f", 1, 2))
    found = open_salvaged(str(tmp_path / "m.safetensors"))
    assert [tensor.name for tensor in found.checkpoint.tensors] == ["a"]
    assert [item.name for item in found.lost] == ["b", "c", "d"]


def test_an_alias_of_a_lost_tensor_is_lost_with_it(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    save_model(net, str(tmp_path / "m.safetensors"))
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    found = open_salvaged(str(tmp_path / "m.safetensors"))
    assert not found.checkpoint.tensors
    assert sorted(item.name for item in found.lost) == sorted(net.state_dict())


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(here: Path) -> Path:
    """A training checkpoint whose last storages are not there."""
    data = zipped(STATE)
    (here / "cut.pt").write_bytes(data[: data.find(FLAT["last"].numpy().tobytes())])
    return here / "cut.pt"


def test_ls_salvage_lists_what_is_whole_and_says_what_is_lost(cut: Path, ckpt: Ckpt) -> None:
    answer = ckpt("ls", "--salvage", cut)
    assert answer.code == 1
    assert [line.split("\t")[0] for line in answer.lines] == [name for name in FLAT if name != "last"]
    assert answer.err.splitlines()[1:] == ["  6 tensors whole", "  lost (1):", "    last: its 8 bytes are not there"]


def test_ls_salvage_has_what_is_lost_in_its_json(cut: Path, ckpt: Ckpt) -> None:
    answer = ckpt("ls", "--salvage", cut, "--json")
    listing = json.loads(answer.out)
    assert answer.code == 1
    assert listing["lost"] == [{"name": "last", "why": "its 8 bytes are not there"}]
    assert len(listing["entries"]) == listing["tensors"] == 6


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_convert_salvage_writes_the_tensors_that_are_whole(cut: Path, ckpt: Ckpt, suffix: str) -> None:
    answer = ckpt("convert", "--salvage", cut, f"out{suffix}", "--json")
    assert answer.code == 1
    report = json.loads(answer.out)
    assert [item["name"] for item in report["lost"]] == ["last"]
    oracle = {name: tensor for name, tensor in FLAT.items() if name != "last"}
    if suffix == ".npz":  # which cannot hold bfloat16
        assert "opt.state.0.exp_avg" in [item["name"] for item in report["left_out"]]
        del oracle["opt.state.0.exp_avg"]
    assert report["tensors"] == len(oracle)
    if suffix == ".safetensors":
        assert_among(load_file(f"out{suffix}"), oracle)
    elif suffix == ".pt":
        assert torch.load(f"out{suffix}")["epoch"] == 3  # the pickle is whole, so that values and nesting are kept
        assert_among(listed_of(Path("out.pt")), oracle)
    assert sorted(tensor.name for tensor in open_checkpoint(f"out{suffix}").tensors) == sorted(oracle)


def test_a_dry_run_of_convert_salvage_writes_nothing(cut: Path, ckpt: Ckpt) -> None:
    answer = ckpt("convert", "--salvage", "-n", cut, "out.safetensors")
    assert answer.code == 1
    assert "last: its 8 bytes are not there" in answer.err
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("kind", FILES)
def test_salvage_of_a_whole_file_gives_the_same_as_without(here: Path, ckpt: Ckpt, kind: str) -> None:
    (here / "m").write_bytes(FILES[kind]()[0])
    assert ckpt("ls", "--salvage", "m", "--json") == ckpt("ls", "m", "--json")
    assert ckpt("ls", "--salvage", "m", "-la") == ckpt("ls", "m", "-la")
    options = ("--tensors-only", "--json")
    assert ckpt("convert", "--salvage", "m", "a.safetensors", *options).code == 0
    assert ckpt("convert", "m", "b.safetensors", *options).code == 0
    assert (here / "a.safetensors").read_bytes() == (here / "b.safetensors").read_bytes()


def test_the_error_of_a_cut_file_says_how_to_salvage_it(cut: Path, ckpt: Ckpt) -> None:
    for command in (("ls", cut), ("show", cut), ("convert", cut, "out.pt"), ("set", cut, "last=1")):
        answer = ckpt(*command)
        assert answer.code == 2
        listing = f"ckpt ls --salvage {cut} lists the tensors that are all there"
        assert answer.err.splitlines()[1] == f"hint: {listing}, ckpt convert --salvage {cut} OUT writes them"
    (finding,) = json.loads(ckpt("check", cut, "--json").out)["findings"]
    assert finding["code"] == "truncated"
    assert f"ckpt ls --salvage {cut} lists what is whole, ckpt convert --salvage {cut} OUT" in finding["hint"]


def test_a_file_cut_within_its_header_has_no_hint_to_salvage_it(here: Path, ckpt: Ckpt) -> None:
    save_file({"a": torch.ones(2)}, here / "m.safetensors")
    (here / "cut").write_bytes((here / "m.safetensors").read_bytes()[:20])
    assert ckpt("ls", "cut").err.splitlines()[1:] == [
        "hint: fetch or copy it again: without its header no tensor has a name"
    ]
    (finding,) = json.loads(ckpt("check", "cut", "--json").out)["findings"]
    assert finding["hint"] == "fetch or copy it again; no tool can bring back what is missing"


def test_a_file_of_which_nothing_is_left_is_refused_in_one_line(here: Path, ckpt: Ckpt) -> None:
    save_file({"a": torch.ones(2)}, here / "m.safetensors")
    for name, data in {
        "empty": b"",
        "zip": zipped(STATE)[:20],
        "header": (here / "m.safetensors").read_bytes()[:20],
        "text": b"hello\n",
    }.items():
        (here / name).write_bytes(data)
        answer = ckpt("ls", "--salvage", name)
        assert (answer.code, answer.out) == (2, "")
        assert "--salvage" not in answer.err


def test_places_that_only_look_like_the_end_of_a_record_meet_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_cli import limits

    monkeypatch.setattr(limits, "SALVAGE_TRIES", 100)
    data = zipped({"a": torch.ones(2)})
    at = data.find(b"PK\3\4", 4)
    (tmp_path / "m.pt").write_bytes(data[: at - 20] + b"PK\7\10" * 1000)
    with pytest.raises(CkptError, match="too many places"):
        open_salvaged(str(tmp_path / "m.pt"))
