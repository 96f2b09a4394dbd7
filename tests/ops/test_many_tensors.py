"""What files of many tensors cost, in functions called and bytes of memory for each tensor rather than in time."""

from __future__ import annotations

import cProfile
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import Ckpt

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.safetensors import rewrite
from ckpt_cli.ops.ls import list_entries
from ckpt_cli.pickles.edit import rewrite as pickle_rewrite
from ckpt_cli.render.ls import listing_block
from ckpt_cli.render.several import block_text

FEW = 1000


def _safetensors(folder: Path, count: int) -> Path:
    """A file of tensors of two elements each."""
    fields = {
        f"model.layers.{at}.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8 * at, 8 * at + 8]}
        for at in range(count)
    }
    header = json.dumps(fields).encode()
    path = folder / f"{count}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 * count))
    return path


def _torch_zip(folder: Path, count: int) -> Path:
    path = folder / f"{count}.pt"
    torch.save({f"model.layers.{at}.weight": torch.zeros(2, 1) for at in range(count)}, path)
    return path


def _list(path: Path) -> None:
    """What `ckpt ls` does."""
    checkpoint = open_checkpoint(str(path))
    listing = list_entries(checkpoint)
    checkpoint.close()
    lines = "".join(
        block_text(listing_block(listing, listing.entries, "tsv", long=False, values=False, folded=False), "tsv")
    )
    assert lines.count("\n") == listing.tensors


def _calls(work: Callable[[], object]) -> int:
    """Functions that are called, those of C included."""
    with cProfile.Profile() as profile:
        work()
    return sum(entry.callcount for entry in profile.getstats())


WRITERS = {"safetensors": (_safetensors, 44), "pt": (_torch_zip, 185)}
"""For each format what writes a file of it, and how many calls a tensor may take to be listed."""


@pytest.mark.parametrize("kind", WRITERS)
def test_listing_takes_as_many_calls_for_the_second_half_of_the_tensors_as_for_the_first(
    kind: str, tmp_path: Path
) -> None:
    write, most = WRITERS[kind]
    paths = [write(tmp_path, count) for count in (FEW, 2 * FEW, 3 * FEW)]
    _list(paths[0])  # what is imported at the first use is no work for a tensor
    few, twice, thrice = (_calls(lambda path=path: _list(path)) for path in paths)
    assert thrice - twice < 1.05 * (twice - few)
    assert twice - few < most * FEW


EDITS = {"rename": ("--sub", "^model", "net"), "rm": ("model.layers.3.weight",)}


@pytest.mark.parametrize("command", EDITS)
def test_an_edit_of_a_safetensors_file_takes_few_calls_for_each_tensor_that_stays(
    command: str, tmp_path: Path, ckpt: Ckpt
) -> None:
    def edited(count: int) -> int:
        path = _safetensors(tmp_path, count)
        return _calls(lambda: ckpt(command, path, *EDITS[command], "-o", tmp_path / f"{count}.new.safetensors"))

    edited(FEW)  # for what is imported, and the expression that is compiled, at the first use
    few, twice, thrice = (edited(count) for count in (FEW, 2 * FEW, 3 * FEW))
    assert thrice - twice < 1.05 * (twice - few)
    assert twice - few < 80 * FEW


@pytest.mark.parametrize(
    ("write", "module", "function"),
    [(_safetensors, rewrite, "header_bytes"), (_torch_zip, pickle_rewrite, "write_pickle")],
    ids=["a safetensors header", "a pickle"],
)
@pytest.mark.parametrize("command", EDITS)
def test_an_edit_makes_the_document_once(
    write: Callable[[Path, int], Path],
    module: ModuleType,
    function: str,
    command: str,
    tmp_path: Path,
    ckpt: Ckpt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[object] = []
    original = getattr(module, function)

    def counting(*args: object) -> object:
        made.append(args)
        return original(*args)

    monkeypatch.setattr(module, function, counting)
    path, new = write(tmp_path, 10), tmp_path / f"new{write(tmp_path, 10).suffix}"
    assert ckpt(command, path, *EDITS[command], "-o", new).code == 0
    assert len(made) == 1


@pytest.mark.parametrize(("kind", "most"), [("safetensors", 650), ("pt", 1500)])
def test_an_open_checkpoint_takes_little_memory_for_each_tensor(kind: str, most: int, tmp_path: Path) -> None:
    path = str(WRITERS[kind][0](tmp_path, 2 * FEW))
    open_checkpoint(path).close()
    tracemalloc.start()
    checkpoint = open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    checkpoint.close()
    assert peak < most * 2 * FEW
