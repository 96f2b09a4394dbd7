"""Every call by which torch rebuilds a tensor, as torch itself writes it: our facts are those of torch."""

from __future__ import annotations

from collections.abc import Callable
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
    parameter,
    raw_string,
    row_major,
    storage,
    tensor,
    tensor_v3,
    value,
)
from torch import nn

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, Value

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tensor support is in beta",
    "ignore:.*The PyTorch API of nested tensors is in prototype",
    "ignore:.*torch.quantize_per_tensor",
    "ignore:.*TypedStorage is deprecated",
)


class Named(torch.Tensor):
    """A subclass that keeps its data as torch keeps it."""


class Wrapping(torch.Tensor):
    """A subclass that has no data but in its attributes."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, _scale: torch.Tensor) -> Wrapping:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.bfloat16)

    def __init__(self, inner: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale, self.note = inner, scale, "not a tensor"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[arg.inner if isinstance(arg, Wrapping) else arg for arg in args], **(kwargs or {}))


def tagged(made: torch.Tensor) -> torch.Tensor:
    """A tensor with an attribute of its own."""
    made.tag = "tagged"  # type: ignore[attr-defined]
    return made


def saved(folder: Path, item: Any, **options: Any) -> tuple[Checkpoint, Any]:
    """Save something with torch; how we open it, and how torch loads it."""
    path = folder / "saved.pt"
    torch.save(item, path, **options)
    return open_checkpoint(str(path)), torch.load(path, weights_only=False)


def only(checkpoint: Checkpoint) -> Tensor:
    """The one entry, which is a tensor."""
    (entry,) = checkpoint.entries
    assert isinstance(entry, Tensor)
    return entry


def agree(mine: Tensor, theirs: torch.Tensor) -> None:
    """The facts that every layout with strides has."""
    assert f"torch.{mine.dtype}" == str(theirs.dtype)
    assert mine.shape == tuple(theirs.shape)
    assert mine.stride == theirs.stride()
    assert mine.requires_grad == theirs.requires_grad
    assert mine.conj == theirs.is_conj()
    assert mine.neg == theirs.is_neg()
    assert mine.kind == kind_of(theirs)


def kind_of(made: torch.Tensor) -> str:
    """What torch holds a tensor for."""
    if isinstance(made, nn.Parameter):
        return "parameter"
    return "buffer" if isinstance(made, nn.Buffer) else "tensor"


STRIDED: dict[str, Callable[[], torch.Tensor]] = {
    "a tensor": lambda: torch.arange(6.0).reshape(2, 3),
    "a view": lambda: torch.arange(24.0).reshape(4, 6)[1:3, ::2].t(),
    "one that requires a gradient": lambda: torch.ones(2, requires_grad=True),
    "float8": lambda: torch.ones(2, 3).to(torch.float8_e4m3fn).t(),
    "a parameter": lambda: nn.Parameter(torch.ones(2, 3).t()),
    "a frozen parameter": lambda: nn.Parameter(torch.arange(3), requires_grad=False),
    "a parameter of float8": lambda: nn.Parameter(torch.ones(2).to(torch.float8_e5m2), requires_grad=False),
    "a parameter with state": lambda: tagged(nn.Parameter(torch.ones(2))),
    "a buffer": lambda: nn.Buffer(torch.ones(2)),
    "a buffer that is not persistent": lambda: nn.Buffer(torch.ones(2), persistent=False),
    "a tensor with attributes": lambda: tagged(torch.ones(2, 3)),
    "a float8 tensor with attributes": lambda: tagged(torch.ones(2, 3).to(torch.float8_e4m3fn)),
    "a subclass": lambda: torch.ones(2, 3).as_subclass(Named),
    "a parameter of a subclass": lambda: nn.Parameter(torch.ones(2).as_subclass(Named)),
    "a conjugate": lambda: torch.tensor([[1 + 2j, 3 - 1j]]).conj().t(),
    "a negative": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "a conjugate parameter": lambda: nn.Parameter(torch.tensor([1 + 2j]).conj()),
    "a scalar": lambda: torch.tensor(7),
    "nothing": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_a_strided_tensor_is_as_torch_loads_it(name: str, tmp_path: Path) -> None:
    checkpoint, theirs = saved(tmp_path, {"x": STRIDED[name]()})
    mine = only(checkpoint)
    agree(mine, theirs["x"])
    assert mine.layout == "strided"
    assert mine.storage_offset == theirs["x"].storage_offset()
    assert mine.storage is not None
    assert mine.storage.nbytes == theirs["x"].untyped_storage().nbytes()
    assert mine.python_type == (f"{__name__}.Named" if isinstance(theirs["x"], Named) else None)
    expected = theirs["x"].detach()
    expected = expected.float() if expected.dtype.itemsize == 1 else expected.resolve_conj().resolve_neg()
    assert (values_of(checkpoint, mine) == expected.numpy()).all()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_that_torch_can_save_with_is_read(protocol: int, tmp_path: Path) -> None:
    state = {"x": nn.Parameter(torch.arange(6.0).reshape(2, 3)), "f8": torch.ones(2).to(torch.float8_e5m2), "n": 1}
    checkpoint, theirs = saved(tmp_path, state, pickle_protocol=protocol)
    assert [entry.name for entry in checkpoint.entries] == ["x", "f8", "n"]
    for mine in checkpoint.tensors:
        agree(mine, theirs[mine.name])


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32])
def test_a_tensor_quantized_as_a_whole_has_no_parts(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint, theirs = saved(tmp_path, {"x": torch.quantize_per_tensor(torch.ones(3, 2), 0.5, 2, dtype)})
    mine = only(checkpoint)
    agree(mine, theirs["x"])
    assert (mine.layout, mine.parts) == ("quantized", ())


@pytest.mark.parametrize("scheme", [torch.per_channel_affine, torch.per_channel_affine_float_qparams])
def test_a_tensor_quantized_by_channel_has_scales_and_zero_points(scheme: torch.qscheme, tmp_path: Path) -> None:
    scales, zeros = torch.rand(3) + 1, torch.zeros(3)
    if scheme == torch.per_channel_affine:
        scales, zeros = scales.double(), zeros.long()
    made = torch._empty_per_channel_affine_quantized(
        (3, 2), scales=scales, zero_points=zeros, axis=0, dtype=torch.quint8
    )
    checkpoint, theirs = saved(tmp_path, {"x": made})
    mine = only(checkpoint)
    agree(mine, theirs["x"])
    assert mine.layout == "quantized"
    assert [part.name for part in mine.parts] == ["scales", "zero_points"]
    for part, expected in zip(mine.parts, (scales, zeros), strict=True):
        agree(part, expected)
        assert (values_of(checkpoint, part) == expected.numpy()).all()


SPARSE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]]] = {
    "sparse_coo": (lambda dense: dense.to_sparse(), ("indices", "values")),
    "sparse_coo of dense rows": (lambda dense: dense.to_sparse(1), ("indices", "values")),
    "sparse_csr": (lambda dense: dense.to_sparse_csr(), ("crow_indices", "col_indices", "values")),
    "sparse_csc": (lambda dense: dense.to_sparse_csc(), ("ccol_indices", "row_indices", "values")),
    "sparse_bsr": (lambda dense: dense.to_sparse_bsr((2, 2)), ("crow_indices", "col_indices", "values")),
    "sparse_bsc": (lambda dense: dense.to_sparse_bsc((2, 2)), ("ccol_indices", "row_indices", "values")),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_tensor_lists_its_parts(name: str, tmp_path: Path) -> None:
    make, roles = SPARSE[name]
    checkpoint, theirs = saved(tmp_path, {"x": make(torch.eye(4, dtype=torch.float64))})
    mine = only(checkpoint)
    loaded = theirs["x"].coalesce() if theirs["x"].layout == torch.sparse_coo else theirs["x"]
    assert mine.layout == name.split()[0] == str(loaded.layout).removeprefix("torch.")
    assert (str(mine.dtype), mine.shape, mine.storage) == ("float64", (4, 4), None)
    assert tuple(part.name for part in mine.parts) == roles
    for part in mine.parts:
        expected = getattr(loaded, part.name)()
        assert part.shape == tuple(expected.shape)
        assert (values_of(checkpoint, part) == expected.numpy()).all()


def test_a_nested_tensor_lists_its_buffer(tmp_path: Path) -> None:
    pieces = [torch.ones(2, 3), torch.zeros(1, 3)]
    checkpoint, theirs = saved(tmp_path, {"x": torch.nested.nested_tensor(pieces)})
    mine = only(checkpoint)
    assert theirs["x"].is_nested
    assert (mine.layout, mine.shape, str(mine.dtype)) == ("nested", None, "float32")
    assert [part.name for part in mine.parts] == ["buffer", "sizes", "strides", "offsets"]
    assert values_of(checkpoint, mine.parts[0]).tolist() == [1.0] * 6 + [0.0] * 3
    assert values_of(checkpoint, mine.parts[1]).tolist() == [[2, 3], [1, 3]]


def test_a_jagged_tensor_lists_its_values_and_offsets(tmp_path: Path) -> None:
    pieces = [torch.ones(2), torch.zeros(3)]
    checkpoint, theirs = saved(tmp_path, {"x": torch.nested.nested_tensor(pieces, layout=torch.jagged)})
    mine = only(checkpoint)
    assert (mine.layout, mine.shape, str(mine.dtype)) == ("jagged", None, "float32")
    assert [part.name for part in mine.parts] == ["values", "offsets"]
    assert values_of(checkpoint, mine.parts[0]).tolist() == theirs["x"].values().tolist()
    assert values_of(checkpoint, mine.parts[1]).tolist() == theirs["x"].offsets().tolist()


@pytest.mark.parametrize("as_parameter", [False, True])
def test_a_meta_tensor_has_a_shape_and_no_bytes(as_parameter: bool, tmp_path: Path) -> None:
    made = torch.empty(3, 2, device="meta", dtype=torch.float16).t()
    checkpoint, theirs = saved(tmp_path, {"x": nn.Parameter(made) if as_parameter else made})
    mine = only(checkpoint)
    agree(mine, theirs["x"])
    assert (mine.layout, mine.storage, mine.device) == ("meta", None, "meta")


def test_a_wrapper_subclass_lists_the_tensors_among_its_attributes(tmp_path: Path) -> None:
    checkpoint, theirs = saved(tmp_path, {"x": Wrapping(torch.ones(2, 3, dtype=torch.int8), torch.rand(2))})
    mine = only(checkpoint)
    assert isinstance(theirs["x"], Wrapping)
    assert (mine.layout, mine.shape, str(mine.dtype), mine.storage) == ("wrapper", (2, 3), "bfloat16", None)
    assert mine.python_type == f"{__name__}.Wrapping"
    assert [part.name for part in mine.parts] == ["inner", "scale"]
    for part in mine.parts:
        agree(part, getattr(theirs["x"], part.name))
    assert values_of(checkpoint, mine.parts[1]).tolist() == theirs["x"].scale.tolist()


@pytest.mark.parametrize(
    ("kind", "made"),
    [("parameter", nn.UninitializedParameter), ("buffer", nn.UninitializedBuffer)],
    ids=["parameter", "buffer"],
)
def test_what_is_not_initialized_has_no_shape(kind: str, made: Callable[..., Any], tmp_path: Path) -> None:
    for requires_grad in (False, True):
        checkpoint, theirs = saved(tmp_path, {"x": made(requires_grad=requires_grad)})
        mine = only(checkpoint)
        assert (mine.kind, mine.layout, mine.shape) == (kind, "uninitialized", None)
        assert mine.requires_grad == theirs["x"].requires_grad == requires_grad


def test_ties_are_one_storage_and_views_of_it_too(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    made = {"whole": whole, "again": whole, "half": whole[:6], "parameter": nn.Parameter(whole), "apart": whole.clone()}
    checkpoint, theirs = saved(tmp_path, made)
    storages = {mine.name: mine.storage for mine in checkpoint.tensors}
    for name, loaded in theirs.items():
        shared = loaded.untyped_storage().data_ptr() == theirs["whole"].untyped_storage().data_ptr()
        assert (storages[name] is storages["whole"]) == shared
    assert len({id(found) for found in storages.values()}) == 2


# --- what torch no longer writes, or writes on other machines --------------------------------------------------------

ROW = bytes(range(48))

OLD: dict[str, Ops] = {
    "_rebuild_tensor": tensor("0", (2, 6), version=1),
    "_rebuild_tensor of a list and a Size": call(
        "torch._utils._rebuild_tensor", storage("0", 12), 2, call("torch.Size", [2, 3]), [1, 2]
    ),
    "a parameter of _rebuild_tensor": parameter(tensor("0", (2, 3), numel=12, version=1)),
    "a Tensor that is built": built(call("torch.Tensor"), (storage("0", 12), 1, (2, 3), (3, 1))),
    "a Tensor of torch._tensor": built(call("torch._tensor.Tensor"), (storage("0", 12), 0, (12,), (1,))),
    "hooks that are None": call("torch._utils._rebuild_tensor_v2", storage("0", 12), 0, (4,), (3,), True, None),
    "a flag that is false and counts": call(
        "torch._utils._rebuild_tensor_v2", storage("0", 12), 0, (4,), (3,), False, ordered_dict(), {"neg": False}
    ),
    "v3 with flags": call(
        "torch._utils._rebuild_tensor_v3", storage("0", 48, "Untyped"), 0, (3,), (1,), False, ordered_dict(),
        named("torch.complex64"), {"conj": True}
    ),
    "float8": tensor_v3("0", (6, 8), "float8_e4m3fn", 48),
    "bytes that are longer than the view": tensor("0", (4,), "Byte", numel=48),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_a_call_of_older_torch_is_as_torch_loads_it(name: str, tmp_path: Path) -> None:
    path = pt.write(tmp_path / "old.pt", {"x": OLD[name]}, {"0": ROW})
    checkpoint = open_checkpoint(str(path))
    theirs = torch.load(path, weights_only=False)["x"]
    mine = only(checkpoint)
    agree(mine, theirs)
    assert mine.storage_offset == theirs.storage_offset()
    is_float8 = theirs.dtype.itemsize == 1 and theirs.dtype.is_floating_point
    expected = theirs.detach().float() if is_float8 else theirs.detach().resolve_conj().resolve_neg()
    assert values_of(checkpoint, mine).tobytes() == expected.numpy().tobytes()


def test_a_storage_named_by_python_2_is_found(tmp_path: Path) -> None:
    at = (raw_string(b"storage"), named("torch.FloatStorage"), raw_string(b"0"), raw_string(b"cuda:1"), 12)
    view = call("torch._utils._rebuild_tensor_v2", Ops(value(at) + b"Q"), 0, (12,), (1,), False, ordered_dict())
    mine = only(open_checkpoint(str(pt.write(tmp_path / "old.pt", {"x": view}, {"0": ROW}))))
    assert (mine.shape, mine.device) == ((12,), "cuda:1")


def test_a_storage_class_counts_by_its_name_whatever_its_module(tmp_path: Path) -> None:
    data = tensor("0", (6,), "Double").replace(named("torch.DoubleStorage"), named("torch.cuda.DoubleStorage"))
    mine = only(open_checkpoint(str(pt.write(tmp_path / "old.pt", {"x": Ops(data)}, {"0": ROW}))))
    assert (str(mine.dtype), mine.shape) == ("float64", (6,))


def test_a_variable_from_before_0_4_is_the_tensor_in_it(tmp_path: Path) -> None:
    state = (tensor("0", (2, 3), numel=12, version=1), False, None, True, None)
    mine = only(
        open_checkpoint(str(pt.write(tmp_path / "old.pt", {"x": built(call("torch.Tensor"), state)}, {"0": ROW})))
    )
    assert (mine.shape, mine.requires_grad) == ((2, 3), True)


def test_a_tensor_from_another_device_has_the_facts_of_its_copy(tmp_path: Path) -> None:
    copy = call("torch._utils._rebuild_device_tensor_from_cpu_tensor", tensor("0", (2, 3), numel=12),
                named("torch.float32"), "xla:0", True)  # fmt: skip
    float32 = built(call("numpy.dtype", "f4", False, True), (3, "<", None, None, None, -1, -1, 0))
    made = call("numpy._core.multiarray._reconstruct", named("numpy.ndarray"), (0,), b"b")
    array = built(made, (1, (2, 3), float32, False, bytes(24)))
    numpy = call("torch._utils._rebuild_device_tensor_from_numpy", array, named("torch.float16"), "xla:0", False)
    checkpoint = open_checkpoint(str(pt.write(tmp_path / "old.pt", {"copy": copy, "numpy": numpy}, {"0": ROW})))
    first, second = checkpoint.tensors
    assert (first.shape, first.requires_grad, first.layout) == ((2, 3), True, "strided")
    assert (second.shape, str(second.dtype), second.layout, second.storage) == ((2, 3), "float16", "array", None)
    assert second.is_contiguous
    assert [(part.name, part.dtype.name) for part in second.parts] == [("array", "float32")]


def test_scales_in_lists_are_no_parts(tmp_path: Path) -> None:
    scheme = (named("torch.per_channel_affine"), [1.0, 1.0], [0, 0], 0)
    view = (storage("0", 4, "QInt8"), 0, (2, 2), (2, 1))
    made = call("torch._utils._rebuild_qtensor", *view, scheme, False, ordered_dict())
    path = pt.write(tmp_path / "old.pt", {"x": made}, {"0": bytes(4)})
    assert torch.load(path, weights_only=False)["x"].is_quantized
    assert only(open_checkpoint(str(path))).parts == ()


def test_a_sparse_tensor_that_does_not_say_whether_it_is_coalesced_is_read(tmp_path: Path) -> None:
    parts = (tensor("0", (1, 2), "Long"), tensor("1", (2,)), call("torch.Size", (4,)))
    layout = call("torch.serialization._get_layout", "torch.sparse_coo")
    made = call("torch._utils._rebuild_sparse_tensor", layout, parts)
    path = pt.write(tmp_path / "old.pt", {"x": made}, {"0": bytes(16), "1": bytes(8)})
    assert torch.load(path, weights_only=False)["x"].shape == (4,)
    assert only(open_checkpoint(str(path))).shape == (4,)


def test_a_subclass_that_is_rebuilt_in_a_way_of_its_own_is_a_value(tmp_path: Path) -> None:
    made = call("torch._tensor._rebuild_from_type_v2", named("lab.rebuild"), named("lab.Odd"), (1,), {})
    checkpoint = open_checkpoint(str(pt.write(tmp_path / "odd.pt", {"x": made, "y": parameter(made)})))
    assert [(type(entry), entry.name) for entry in checkpoint.entries] == [(Value, "x"), (Value, "y")]
    assert "lab.rebuild" in checkpoint.objects


def test_row_major_is_torchs_contiguous_stride() -> None:
    for shape in [(), (3,), (2, 3, 4), (2, 0, 4), (1, 1)]:
        assert tuple(row_major(shape)) == torch.empty(shape).stride()
