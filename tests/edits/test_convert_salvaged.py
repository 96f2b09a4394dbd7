"""`convert --salvage` to .pt keeps dicts, lists and values where the pickle is whole, and takes out what is lost."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn

from ckpt_cli.edits.convert import convert
from ckpt_cli.edits.convert_options import Conversion, ConvertOptions
from ckpt_cli.errors import RefusedError

GONE = object()
"""Stands for a lost tensor while a tree is pruned."""


def training() -> dict[str, Any]:
    """A training checkpoint with ties, views, lists, tuples, an optimizer and values of many types."""
    whole = torch.arange(200.0)
    model = OrderedDict(a=torch.full((10,), 2.0), head=whole[:20], tail=whole[150:].view(5, 10).t())
    model["tied"] = model["a"]
    weights = [nn.Parameter(torch.full((3,), 3.0)), nn.Parameter(torch.full((4,), 4.0))]
    adam = torch.optim.Adam(weights)
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    adam.step()
    return {
        "model": model,
        "epoch": 3,
        "optimizer": adam.state_dict(),
        "queue": [torch.full((5,), 5.0), torch.full((6,), 6.0), {"x": True, "t": torch.full((7,), 7.0)}],
        "pair": (torch.full((8,), 8.0), "text", None),
        "hyper": {"lr": 1e-3, "names": ["b", "c"], "size": torch.Size([2, 3])},
        "last": torch.tensor([7]),
    }


def saved(state: object, *, new: bool = True) -> bytes:
    """As torch.save writes it, or as it wrote it before 1.6."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def deflated(state: object) -> bytes:
    """The records of a file of torch.save, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(state))) as plain, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for info in plain.infolist():
            out.writestr(info.filename, plain.read(info))
    return buffer.getvalue()


WRITERS: dict[str, Callable[[object], bytes]] = {
    "zip": saved,
    "legacy": functools.partial(saved, new=False),
    "deflated": deflated,
}


def pruned(node: Any, lost: set[str], name: str = "") -> Any:
    """The tree without the tensors of some names: items of dicts go, those of lists and tuples become None."""
    if isinstance(node, torch.Tensor):
        return GONE if name in lost else node
    if isinstance(node, dict):
        items = {key: pruned(item, lost, f"{name}.{key}".lstrip(".")) for key, item in node.items()}
        return type(node)((key, item) for key, item in items.items() if item is not GONE)
    if type(node) in (list, tuple):
        items = [pruned(item, lost, f"{name}.{number}".lstrip(".")) for number, item in enumerate(node)]
        return type(node)(None if item is GONE else item for item in items)
    return node


def assert_same(found: Any, wanted: Any) -> None:
    """Two trees have the same types, keys and values."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, item in wanted.items():
            assert_same(found[key], item)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


def salvaged(data: bytes, folder: Path, name: str = "out.pt", **options: Any) -> Conversion:
    """Convert a file of these bytes."""
    (folder / "cut").write_bytes(data)
    return convert(str(folder / "cut"), str(folder / name), ConvertOptions(salvage=True, force=True, **options))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_cut_behind_its_pickle_keeps_all_but_the_lost_tensors(tmp_path: Path, kind: str) -> None:
    state = training()
    data = WRITERS[kind](state)
    begin = len(data) - 1100 if kind == "legacy" else len(data) // 3  # of 1158 bytes of storages
    counts = set()
    for cut in range(len(data) - 3, begin, (begin - len(data)) // 25):
        done = salvaged(data[:cut], tmp_path)
        lost = {item.name for item in done.lost}
        if "" in lost:  # the pickle was cut
            continue
        assert_same(torch.load(tmp_path / "out.pt"), pruned(state, lost))
        counts.add(len(lost))
    assert len(counts) > 3


def test_items_of_lists_become_none_so_that_the_others_keep_their_places(here: Path, ckpt: Ckpt) -> None:
    state = [torch.full((5,), 5.0), torch.full((6,), 6.0), 7]
    data = saved(state)
    (here / "cut.pt").write_bytes(data[: data.find(state[1].numpy().tobytes())])  # type: ignore[union-attr]
    answer = ckpt("convert", "--salvage", "cut.pt", "out.pt", "--json")
    assert answer.code == 1
    assert json.loads(answer.out)["added"] == ["None in the place of 1"]
    assert_same(torch.load("out.pt"), [state[0], None, 7])


def test_ties_and_views_share_their_storage_and_a_cut_storage_ends_with_its_last_view(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    state = {"head": whole[:10], "next": whole[5:20], "tail": whole[900:]}
    data = saved(state, new=False)
    salvaged(data[:-1500], tmp_path)
    found = torch.load(tmp_path / "out.pt")
    assert_same(found, {"head": whole[:10], "next": whole[5:20]})
    assert found["head"].untyped_storage().data_ptr() == found["next"].untyped_storage().data_ptr()
    assert found["head"].untyped_storage().nbytes() == 80


def test_a_file_without_any_whole_tensor_still_gives_its_values(tmp_path: Path) -> None:
    data = saved({"epoch": 3, "model": {"w": torch.full((50,), 5.0)}})
    done = salvaged(data[: data.find(torch.full((50,), 5.0).numpy().tobytes())], tmp_path)
    assert (done.tensors, [item.name for item in done.lost]) == (0, ["model.w"])
    assert torch.load(tmp_path / "out.pt") == {"epoch": 3, "model": {}}


@pytest.mark.parametrize("state", [torch.full((50,), 5.0), {"w": torch.full((50,), 5.0)}, [torch.full((50,), 5.0)]])
def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path, state: object) -> None:
    data = saved(state)
    with pytest.raises(RefusedError, match="there is no tensor"):
        salvaged(data[: data.find(torch.full((50,), 5.0).numpy().tobytes())], tmp_path)


class Holder:
    """An object that a call makes of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[object, ...]:
        """Make it by its class."""
        return Holder, (self.tensor,)


LOST = torch.full((50,), 5.0)


@pytest.mark.parametrize("holder", [Holder(LOST), {LOST}, {LOST: 1}, {(LOST,): 1}], ids=["call", "set", "key", "keys"])
def test_an_object_that_is_made_of_what_is_lost_leaves_the_tensors_under_flat_names(
    tmp_path: Path, holder: object
) -> None:
    data = saved({"model": {"w": torch.ones(4)}, "epoch": 3, "object": holder})
    done = salvaged(data[: data.find(LOST.numpy().tobytes())], tmp_path)
    assert "epoch" in {item.name for item in done.left_out}
    assert list(torch.load(tmp_path / "out.pt")) == ["model.w"]


@pytest.mark.parametrize("options", [{"tensors_only": True}, {"select": "model"}, {"shared": "clone"}])
def test_options_that_choose_tensors_write_flat_names(tmp_path: Path, options: dict[str, Any]) -> None:
    data = saved({"model": {"w": torch.ones(4)}, "epoch": 3, "last": torch.full((50,), 5.0)})
    salvaged(data[: data.find(torch.full((50,), 5.0).numpy().tobytes())], tmp_path, **options)
    assert list(torch.load(tmp_path / "out.pt")) == ["w" if "select" in options else "model.w"]


def test_the_second_save_of_a_stream_leaves_flat_names(tmp_path: Path) -> None:
    data = saved({"a": {"b": torch.ones(4)}}, new=False) + saved({"c": torch.full((50,), 5.0)}, new=False)
    done = salvaged(data[:-4], tmp_path)
    assert [item.name for item in done.lost] == ["[1].c"]
    assert list(torch.load(tmp_path / "out.pt")) == ["a.b"]


def test_what_is_written_opens_without_a_note_and_is_not_cut(tmp_path: Path, ckpt: Ckpt) -> None:
    data = saved(training())
    salvaged(data[: data.find(torch.full((8,), 8.0).numpy().tobytes())], tmp_path)
    answer = ckpt("check", "--deep", tmp_path / "out.pt", "--json")
    assert not [item for item in json.loads(answer.out)["findings"] if item["severity"] != "note"]
