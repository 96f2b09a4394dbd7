"""What a small file could make a conversion or a print take: items of a distributed checkpoint, long names, text."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from builders.pickles import Ops, get, put, tensor
from builders.pt import write
from builders.st import info
from builders.st import write as write_safetensors
from conftest import Ckpt
from contract import quietly
from safetensors.torch import save_file

from ckpt_cli import limits
from ckpt_cli.pickles.write import write_pickle

REFUSED = "entries to be written one by one, far more than a file of its size has"


def test_far_more_entries_than_a_file_of_that_size_has_are_not_written_one_by_one(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DCP_ITEMS_FLOOR", 10)
    torch.save({"w": torch.ones(2), **{f"k{number}": number for number in range(100)}}, here / "values.pt")
    torch.save(dict.fromkeys(map(str, range(200)), torch.ones(1)), here / "tied.pt")
    for name, *options in (("values.pt",), ("values.pt", "-n"), ("tied.pt",), ("tied.pt", "--tensors-only")):
        answer = ckpt("convert", name, "out", "--to", "dcp", *options)
        assert (answer.code, REFUSED in answer.err) == (2, True), answer.err
        assert not (here / "out").exists()
    assert ckpt("convert", "tied.pt", "out.pt").code == 0


def test_tensors_of_one_shape_are_pickled_once_for_a_distributed_checkpoint(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed.checkpoint as dcp

    from ckpt_cli.formats.dcp import write as writer

    state = {f"{number}": torch.full((2,), float(number)) for number in range(50)}
    state |= {"other": torch.ones(2, 1), "half": torch.ones(2).half(), "trained": torch.ones(2, requires_grad=True)}
    torch.save(state, here / "m.pt")
    calls: list[object] = []

    def counted(root: object, *rest: object) -> None:
        calls.append(root)
        write_pickle(root, *rest)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(writer, "write_pickle", counted)
    assert ckpt("convert", "m.pt", "out", "--to", "dcp").code == 0
    assert len(calls) == 9  # four kinds, written and compared, and what says where all are
    found = {name: torch.zeros_like(value) for name, value in state.items()}
    with quietly():
        dcp.load(found, checkpoint_id=here / "out", no_dist=True)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_name_too_long_for_a_zip_file_is_refused_in_one_line(here: Path, ckpt: Ckpt) -> None:
    write(here / "m.pt", {"k" * 40_000: {"l" * 40_000: tensor("0", (4,))}}, {"0": bytes(16)})
    for options in ((), ("-n",)):
        answer = ckpt("convert", "m.pt", "out.npz", *options)
        assert answer.code == 2
        assert answer.err.endswith("a zip file has no room for a name of 80005 bytes: 65535 is the most\n")
        assert not (here / "out.npz").exists()


def test_a_header_of_long_names_is_refused_before_it_is_made(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Ops(b"}(" + b"".join(Ops(f"X{chr(4)}\0\0\0{number:04}".encode()) + get(1) for number in range(2000)) + b"u")
    write(here / "m.pt", {"first": put(1, tensor("0", (4,))), "k" * 20_000: inner}, {"0": bytes(16)})
    monkeypatch.setattr(limits, "SAFETENSORS_WRITTEN", 10_000_000)
    tracemalloc.start()
    answer = ckpt("convert", "m.pt", "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.code == 2
    assert "bytes or more; 10000000 is the most" in answer.err
    assert peak < 250_000_000


def test_views_of_few_bytes_are_not_printed_over_and_over(here: Path, ckpt: Ckpt) -> None:
    views = {f"{number}": tensor("0", (2,) * 12, stride=(1,) * 12, numel=16) for number in range(300)}
    write(here / "m.pt", views, {"0": bytes(64)})
    answer = ckpt("show", "m.pt")
    assert (answer.code, answer.out) == (2, "")
    assert "come to far more text than the file has bytes" in answer.err
    assert ckpt("show", "m.pt", "7").code == 0
    write_safetensors(here / "u.safetensors", {"u": info("U8", [300_000], 0, 300_000)}, bytes(300_000))
    assert ckpt("show", "--full", "u.safetensors").code == 0


@pytest.mark.parametrize(
    "command", [("convert", "m.safetensors", "out.pt"), ("rename", "m.safetensors", "--add", "p.")]
)
def test_a_report_does_not_spell_out_names_of_60_000_characters(
    here: Path, ckpt: Ckpt, command: tuple[str, ...]
) -> None:
    names = [f"w{number}" + "x" * 60_000 + "end" for number in range(8)]
    save_file({name: torch.ones(2) for name in names}, here / "m.safetensors")
    answer = ckpt(*command)
    assert answer.code == 0
    assert len(answer.out + answer.err) < 5000
    if command[0] == "rename":
        assert "xend (60,0" in answer.out + answer.err
        whole = ckpt("rename", "m.safetensors", "-n", "-v", "--add", "q.")
        assert len(whole.out + whole.err) > 400_000
