"""Calls that torch would not take to rebuild a tensor are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pt
from builders.pickles import (
    Ops,
    built,
    call,
    named,
    ordered_dict,
    storage,
    tensor,
    tensor_v3,
    value,
)

from ckpt_cli.errors import MalformedError
from ckpt_cli.formats import open_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tensor support is in beta",
    "ignore:.*The PyTorch API of nested tensors is in prototype",
    "ignore:.*torch.quantize_per_tensor",
    "ignore:.*TypedStorage is deprecated",
)


def v2(*args: Any) -> Ops:
    """A call of `_rebuild_tensor_v2`."""
    return call("torch._utils._rebuild_tensor_v2", *args)


AT = storage("0", 12)
ENDING = (False, ordered_dict())

WRONG: dict[str, tuple[Ops, str]] = {
    "too few arguments": (v2(AT, 0, (12,)), "_rebuild_tensor_v2 has arguments that it does not take"),
    "too many arguments": (v2(AT, 0, (12,), (1,), *ENDING, None, 1), "has arguments that it does not take"),
    "too many for v1": (call("torch._utils._rebuild_tensor", AT, 0, (12,), (1,), False), "does not take"),
    "arguments in a list": (Ops(named("torch._utils._rebuild_tensor_v2") + value([]) + b"R"), "has no arguments"),
    "no storage": (v2(None, 0, (12,), (1,), *ENDING), "refers to a storage in a way that torch does not write"),
    "a storage of four": (v2(Ops(value(("storage", named("torch.FloatStorage"), "0", "cpu")) + b"Q"), 0, (1,), (1,),
                             *ENDING), "in a way that torch does not write"),
    "a storage of no class": (v2(storage("0", 4, "Floaty").replace(b"Storage", b"Stored"), 0, (1,), (1,), *ENDING), ""),
    "a storage of no dtype": (v2(storage("0", 4, "Floaty"), 0, (1,), (1,), *ENDING), "'torch.FloatyStorage' is no"),
    "a stride too short": (v2(AT, 0, (3, 4), (4,), *ENDING), r"its shape (3, 4) and its stride (4,) have different"),
    "a shape that is text": (v2(AT, 0, "12", (1,), *ENDING), "its shape or stride is not a tuple of integers"),
    "a shape of floats": (v2(AT, 0, (12.0,), (1,), *ENDING), "its shape or stride holds 12.0"),
    "an offset that is text": (v2(AT, "0", (12,), (1,), *ENDING), "its offset is '0'"),
    "a view that is too long": (v2(AT, 1, (12,), (1,), *ENDING), "needs bytes 4–52, storage '0' has 48"),
    "a dtype of no kind": (tensor_v3("0", (4,), "floaty", 48), "its dtype is not one of torch's"),
    "a v3 without dtype": (call("torch._utils._rebuild_tensor_v3", storage("0", 48, "Untyped"), 0, (1,), (1,),
                                *ENDING), "has arguments that it does not take"),
    "sparse of no layout": (call("torch._utils._rebuild_sparse_tensor", "torch.sparse_odd", (1, 2)), "is not a sparse"),
    "sparse of no tensors": (call("torch._utils._rebuild_sparse_tensor", "torch.sparse_coo", (1, 2, (3,), True)),
                             "'indices': it wraps something that is not a tensor"),
    "sparse of too little": (call("torch._utils._rebuild_sparse_tensor", "torch.sparse_coo",
                                  (tensor("0", (12,)), tensor("0", (12,)))), "has arguments that it does not take"),
    "quantized of nothing": (call("torch._utils._rebuild_qtensor", AT, 0, (1,), (1,), None, *ENDING), "does not take"),
    "nested of one": (call("torch._utils._rebuild_nested_tensor", tensor("0", (12,))), "does not take"),
    "meta of two lengths": (call("torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"), (1, 2), (1,),
                                 False), "have different lengths"),
    "a state of three": (built(call("torch.Tensor"), (1, 2, 3)), "has arguments that it does not take"),
    "a state that is a number": (built(call("torch.Tensor"), 3), "has arguments that it does not take"),
    "an array without shape": (call("torch._utils._rebuild_xla_tensor", built(call("a.b"), (1,)),
                                    named("torch.float32"), "xla", False), "it wraps something that is not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_torch_would_not_take_is_refused(name: str, tmp_path: Path) -> None:
    made, words = WRONG[name]
    path = pt.write(tmp_path / "wrong.pt", {"x": Ops(made)}, {"0": bytes(48)})
    with pytest.raises(MalformedError) as refused:
        open_checkpoint(str(path))
    assert words in str(refused.value)
    assert refused.value.path == str(path)
    with pytest.raises(Exception, match=r".+"):
        torch.load(path, weights_only=False)
