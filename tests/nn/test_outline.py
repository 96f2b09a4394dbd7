"""`ckpt tree` of pickled modules: classes, settings, blocks that print alike, and graphs without end."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import Ops, pickled, value
from conftest import Ckpt
from safetensors.torch import save_file
from torch import nn
from trees import Block, Network, Plain, graph_tree, text_of

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.nn.tree import walk
from ckpt_cli.pickles.read import read_pickle


def test_a_pickled_network_piped_is_what_print_shows(tree: Any) -> None:
    net = Plain()
    assert tree(net) == f"{net!r}\n"


class Numbered(nn.Module):
    """A block that knows which one it is, as those of the transformers library do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.fc = number, nn.Linear(2, 2)


def test_blocks_that_print_alike_are_one_line_without_the_settings_in_which_they_differ(tree: Any) -> None:
    net = nn.ModuleList([Numbered(number) for number in range(3)])
    assert tree(net) == f"{net!r}\n"
    assert "(0-2): 3 x Numbered(" in tree(net)
    assert "(1): Numbered(\n    layer_idx=1\n" in tree(net, "--full")
    assert "(0-2): 3 x Numbered(\n    layer_idx=5\n" in tree(nn.ModuleList([Numbered(5) for _ in range(3)]))


def test_bare_is_what_print_shows_of_classes_without_a_text_of_their_own(tree: Any) -> None:
    assert tree(Network(), "--bare") == f"{Network()!r}\n"


def test_an_unknown_class_is_told_with_its_public_numbers_and_texts(tree: Any) -> None:
    out = tree(Block(8))
    assert out.splitlines()[:2] == ["Block(", "  dim=8, act='gelu'"]
    assert "_cache" not in out
    assert "training" not in out
    torch_lines = repr(Block(8)).splitlines()
    assert out.splitlines()[2:] == torch_lines[1:]


def test_modules_of_all_protocols_are_read(tree: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True))
    for protocol in (1, 2, 3, 4, 5):
        assert tree(net, pickle_protocol=protocol) == f"{net!r}\n"


def test_modules_within_a_training_checkpoint_are_found(tree: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 8))
    out = tree({"model": net, "extra": [{"ema": nn.Sequential(nn.Linear(4, 8))}], "epoch": 3})
    assert out == (
        "dict(\n"
        "  (model): Sequential(\n"
        "    (0): Linear(in_features=4, out_features=8, bias=True)\n"
        "  )\n"
        "  (extra): list(\n"
        "    (0): dict(\n"
        "      (ema): Sequential(\n"
        "        (0): Linear(in_features=4, out_features=8, bias=True)\n"
        "      )\n"
        "    )\n"
        "  )\n"
        ")\n"
    )


def test_a_module_of_an_older_torch_lacks_attributes_and_is_shown_with_their_defaults(tree: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.BatchNorm2d(4), nn.Softmax(), nn.LSTM(2, 3))
    expected = f"{net!r}\n"
    for number, name in (
        (0, "padding_mode"),
        (1, "approximate"),
        (2, "track_running_stats"),
        (3, "dim"),
        (4, "proj_size"),
    ):
        del net[number].__dict__[name]
    assert tree(net) == expected


def test_a_class_that_the_legacy_format_refers_to_by_persistent_id_is_known() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(net, buffer, _use_new_zipfile_serialization=False)
    data, offset = buffer.getvalue(), 0
    for _ in range(3):  # the magic number, the version, what is said of the machine
        offset += read_pickle(data, offset=offset).nbytes
    assert b"module" in data[offset:]
    assert text_of(graph_tree(data, offset=offset)) == f"{net!r}\n"


def test_a_module_that_python_2_pickled_is_known() -> None:
    def raw(text: str) -> Ops:
        return Ops(b"U" + bytes((len(text),)) + text.encode())

    def mapping(**pairs: object) -> Ops:
        return Ops(b"}(" + b"".join(raw(key) + value(item) for key, item in pairs.items()) + b"u")

    state = mapping(
        _parameters=mapping(weight=None), _buffers=mapping(), _modules=mapping(), inplace=True, negative_slope=0.2
    )
    leaky = Ops(b"ctorch.nn.modules.activation\nLeakyReLU\n)\x81" + state + b"b")
    assert text_of(graph_tree(pickled(leaky))) == "LeakyReLU(negative_slope=0.2, inplace=True)\n"


# --- hostile graphs ---------------------------------------------------------------------------------------------------


def module_ops(children: dict[str, Any], kind: str = "Sequential") -> Ops:
    state = {"_parameters": {}, "_buffers": {}, "_modules": children, "training": True}
    return Ops(b"ctorch.nn.modules.container\n" + kind.encode() + b"\n)\x81" + value(state) + b"b")


def test_a_module_within_itself_is_cut() -> None:
    looped = Ops(
        b"ctorch.nn.modules.container\nSequential\n)\x81q\x00"
        + value({"_parameters": {}, "_buffers": {}, "_modules": {"0": Ops(b"h\x00")}})
        + b"b"
    )
    assert text_of(graph_tree(pickled(looped))) == "Sequential(\n  (0): <the same module again>\n)\n"


def test_shared_modules_cannot_multiply_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    level = Ops(module_ops({}) + b"q\x00")
    for slot in range(1, 11):
        again = Ops(b"h" + bytes((slot - 1,)))
        level = Ops(module_ops({"0": level, "1": again}) + b"q" + bytes((slot,)))
    data = pickled(level)
    found = graph_tree(data)
    assert len(list(walk(found.root))) == 2**11 - 1
    assert len(text_of(found).splitlines()) < 40
    monkeypatch.setattr(limits, "TREE_NODES", 2000)
    with pytest.raises(LimitError, match="more than 2000 modules"):
        graph_tree(data)


def test_a_shared_module_with_many_settings_cannot_multiply_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    state = {**tables, **{f"a{number}": "x" * 99 for number in range(20)}}
    big = Ops(b"cmine\nBig\n)\x81q\x00" + value(state) + b"b")
    children = {"0": big, **{str(number): Ops(b"h\x00") for number in range(1, 800)}}
    found = graph_tree(pickled(module_ops(children)))
    assert len({id(branch.description) for branch in walk(found.root)}) == 2
    assert len(text_of(found)) < 100_000
    monkeypatch.setattr(limits, "TREE_TEXT", 1_000_000)
    with pytest.raises(LimitError, match="more than 1000000 characters"):
        graph_tree(pickled(module_ops(children)))


def test_names_of_many_parts_meet_limits(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({".".join("a" * 1500): torch.ones(1)}, tmp_path / "deep")
    answer = ckpt("tree", tmp_path / "deep")
    assert (answer.code, answer.out) == (2, "")
    assert "nest deeper than 1000" in answer.err
    save_file({".".join("a" * 900): torch.ones(1)}, tmp_path / "deep")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # of the reader here
    try:
        told = json.loads(ckpt("tree", "--json", tmp_path / "deep").out)
    finally:
        sys.setrecursionlimit(before)
    assert told["tree"]["parameters"] == 1
    assert ckpt("tree", tmp_path / "deep").code == 0


def test_odd_tables_of_a_module_are_no_trouble() -> None:
    for odd in (None, 3, "text", [1, "x"], (None,), Ops(b"ca\nb\n"), [{}]):
        state = {"_parameters": odd, "_buffers": odd, "_modules": odd, "training": odd}
        data = pickled(Ops(b"ctorch.nn.modules.linear\nLinear\n)\x81" + value(state) + b"b"))
        assert "Linear" in text_of(graph_tree(data))
