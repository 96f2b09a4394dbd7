"""Tensors whose parts contradict each other are refused before memory or time is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pt
from builders.pickles import Ops, call, named, ordered_dict, storage, tensor
from conftest import Ckpt
from layouts import ROW, saved

import ckpt_cli
from ckpt_cli.errors import FormatError, LimitError, MalformedError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tensor support is in beta",
    "ignore:.*The PyTorch API of nested tensors is in prototype",
    "ignore:.*torch.quantize_per_tensor",
    "ignore:.*Quantized tensor creation",
    "ignore:.*quantized",
    "ignore:.*TypedStorage is deprecated",
    "ignore:.*ComplexHalf",
    "ignore:Please use DTensor instead",
    "ignore:Sparse invariant checks",
)


LAYOUT = "torch.serialization._get_layout"


def coo(indices: Ops, values: Ops, shape: tuple[int, ...]) -> Ops:
    parts = (indices, values, call("torch.Size", shape), True)
    return call("torch._utils._rebuild_sparse_tensor", call(LAYOUT, "torch.sparse_coo"), parts)


def csr(crow: Ops, columns: Ops, values: Ops, shape: tuple[int, ...], layout: str = "csr") -> Ops:
    parts = (crow, columns, values, call("torch.Size", shape))
    return call("torch._utils._rebuild_sparse_tensor", call(LAYOUT, f"torch.sparse_{layout}"), parts)


def nested(*parts: Ops) -> Ops:
    return call("torch._utils._rebuild_nested_tensor", *parts)


def longs(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


HOSTILE: dict[str, tuple[Ops, dict[str, bytes], str]] = {
    "too few values": (coo(tensor("i", (1, 3), "Long"), ROW, (4,)), {"i": longs(0, 1, 2)}, "do not fit its shape"),
    "too many indices": (coo(tensor("i", (2, 2), "Long"), ROW, (4,)), {"i": longs(0, 1, 2, 3)}, "do not fit"),
    "indices of floats": (coo(tensor("i", (1, 2)), ROW, (4,)), {"i": bytes(8)}, "are not integers"),
    "indices without end": (coo(tensor("i", (1, 1 << 40), "Long", stride=(0, 0), numel=1),
                                tensor("v", (1 << 40,), stride=(0,), numel=2), (1 << 50,)), {"i": longs(0)},
                            "repeats few bytes"),
    "csr rows of another length": (csr(tensor("i", (2,), "Long"), tensor("j", (2,), "Long"), ROW, (4, 4)),
                                   {"i": longs(0, 2), "j": longs(0, 1)}, "do not fit"),
    "bsr of no blocks": (csr(tensor("i", (3,), "Long"), tensor("j", (2,), "Long"), tensor("v", (2, 0, 0), numel=2),
                             (2, 2), "bsr"), {"i": longs(0, 1, 2), "j": longs(0, 0)}, "do not fit"),
    "a constituent beyond the buffer": (nested(ROW, tensor("s", (1, 1), "Long"), tensor("t", (1, 1), "Long"),
                                               tensor("o", (1,), "Long")),
                                        {"s": longs(3), "t": longs(1), "o": longs(0)}, "reaches beyond its buffer"),
    "a negative size": (nested(ROW, tensor("s", (1, 1), "Long"), tensor("t", (1, 1), "Long"),
                               tensor("o", (1,), "Long")), {"s": longs(-1), "t": longs(1), "o": longs(0)}, "a count"),
    "constituents without end": (nested(ROW, *(tensor(key, (1 << 40, 1), "Long", stride=(0, 0), numel=1)
                                               for key in "st"),
                                        tensor("o", (1 << 40,), "Long", stride=(0,), numel=1)),
                                 {"s": longs(1), "t": longs(1), "o": longs(0)}, "too many constituents to go through"),
    "sizes that do not fit": (nested(ROW, tensor("s", (1, 1), "Long"), tensor("t", (1,), "Long"),
                                     tensor("o", (1,), "Long")), {"s": longs(1), "t": longs(1), "o": longs(0)},
                              "do not fit each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_parts_that_contradict_each_other_are_refused(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    made, storages, words = HOSTILE[name]
    path = str(pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), **storages}))
    assert ckpt("ls", path).code == 0
    for answer in (ckpt("show", path, "x"), ckpt("show", "--json", path), ckpt("show", "-f", "tsv", path)):
        assert answer.code == 2
        assert words in answer.err
    with pytest.raises(FormatError):
        ckpt_cli.load(path)


def test_an_index_that_lies_outside_is_refused_by_torch_itself(tmp_path: Path) -> None:
    made = coo(tensor("i", (1, 2), "Long"), ROW, (4,))
    path = str(pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), "i": longs(0, 9)}))
    with pytest.raises(MalformedError, match="torch does not take the parts of tensor 'x'"):
        ckpt_cli.load(path)


def test_constituents_of_many_tensors_count_together(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_cli.limits.CONSTITUENTS", 5)
    piece = torch.nested.nested_tensor([torch.ones(1), torch.ones(2), torch.ones(3)])
    path = saved(tmp_path, a=piece, b=piece.clone())
    assert ckpt("show", path, "a").code == 0
    assert ckpt("show", path, "b[2]").out == "tensor([1., 1., 1.])\n"
    assert "too many constituents to go through" in ckpt("show", path).err
    with pytest.raises(LimitError, match="too many constituents"):
        ckpt_cli.load(path)


def test_scales_that_many_tensors_share_are_not_read_without_end(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_cli.limits.READ_AGAIN", 0)
    scales, zeros = tensor("v", (1000,), "Double"), tensor("z", (1000,), "Long", stride=(0,), numel=1)
    view = (storage("q", 1, "QInt8"), 0, (1000,), (0,))
    how = (named("torch.per_channel_affine"), scales, zeros, 0)
    made = call("torch._utils._rebuild_qtensor", *view, how, False, ordered_dict())
    storages = {"q": bytes(1), "v": bytes(8000), "z": bytes(8)}
    path = str(pt.write(tmp_path / "a.pt", {str(number): made for number in range(50)}, storages))
    assert ckpt("show", path, "7").code == 0
    answer = ckpt("show", path)
    assert answer.code == 2
    assert "add up to far more than the file has" in answer.err


def test_rows_that_lie_outside_are_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    made = csr(tensor("i", (3,), "Long"), tensor("j", (2,), "Long"), ROW, (2, 4))
    path = str(pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), "i": longs(0, 9, 2), "j": longs(0, 1)}))
    for answer in (ckpt("show", path, "x[0,0]"), ckpt("set", path, "x[0,0]=1")):
        assert answer.code == 2
        assert "says that its elements 0–9 are in one row" in answer.err


def qtensor(quantizer: tuple[Any, ...], kind: str = "QInt8") -> Ops:
    view = (storage("q", 4, kind), 0, (2, 2), (2, 1))
    return call("torch._utils._rebuild_qtensor", *view, quantizer, False, ordered_dict())


AFFINE, CHANNEL = named("torch.per_tensor_affine"), named("torch.per_channel_affine")
WRONG: dict[str, tuple[Ops, str]] = {
    "a scale that is text": (qtensor((AFFINE, "1", 0)), "its scale is '1'"),
    "a zero point that is no integer": (qtensor((AFFINE, 1.0, 0.5)), "its zero point 0.5"),
    "an unknown scheme": (qtensor((named("torch.per_row"), 1.0, 0)), "in a way that torch does not write"),
    "no quantized dtype": (qtensor((AFFINE, 1.0, 0), "Float"), "its dtype float32 is not that of a quantized"),
    "too few scales": (qtensor((CHANNEL, [1.0], [0], 0)), "1 scales and 1 zero points for 2 channels"),
    "an axis beyond": (qtensor((CHANNEL, [1.0, 1.0], [0, 0], 2)), "for 0 channels"),
    "scales that are text": (qtensor((CHANNEL, ["a", "b"], [0, 0], 0)), "are not numbers"),
    "parts too long": (qtensor((CHANNEL, tensor("v", (2,)), tensor("v", (1,), numel=2), 0)), "2 scales and 1 zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_quantizer_that_torch_would_not_take_is_refused(name: str, tmp_path: Path) -> None:
    made, words = WRONG[name]
    path = pt.write(tmp_path / "bad.pt", {"x": made}, {"q": bytes(16), "v": bytes(8)})
    with pytest.raises(MalformedError) as refused:
        ckpt_cli.open(path)
    assert words in str(refused.value)
    with pytest.raises(Exception, match=r".+"):
        torch.load(path, weights_only=False)


def test_scales_in_lists_as_torch_once_wrote_them_count(tmp_path: Path, ckpt: Ckpt) -> None:
    path = str(
        pt.write(tmp_path / "old.pt", {"x": qtensor((CHANNEL, [0.5, 2.0], [0, 1], 0))}, {"q": bytes([1, 2, 3, 4])})
    )
    assert ckpt("show", path, "x").out == f"{torch.load(path, weights_only=False)['x']}\n"
    assert torch.equal(ckpt_cli.load(path)["x"].dequantize(), torch.tensor([[0.5, 1.0], [4.0, 6.0]]))


def test_a_jagged_dimension_that_there_is_not_is_refused(tmp_path: Path) -> None:
    state = {"values": tensor("v", (2,)), "offsets": tensor("o", (2,), "Long"), "_ragged_idx": 5}
    made = call("torch.nested._internal.nested_tensor._rebuild_njt", state)
    path = pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), "o": longs(0, 2)})
    with pytest.raises(MalformedError, match="its ragged dimension is 5"):
        ckpt_cli.open(path)
