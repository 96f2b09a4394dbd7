"""Tensors of classes of their own: wrappers of torchao, DTensors, sharded tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pt
from builders.pickles import built, new, tensor
from conftest import Ckpt
from layouts import ROW, saved, wrapper
from torch import nn

import ckpt_cli
from ckpt_cli.errors import UnsupportedError

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


INT4 = "torchao.quantization.quantize_.workflows.int4.int4_tensor.Int4Tensor"


def int4(folder: Path) -> str:
    parts = {"qdata": tensor("0", (2, 2), "Char"), "scale": tensor("1", (2,)), "zero_point": tensor("2", (2,), "Char")}
    storages = {"0": bytes([1, 2, 3, 4]), "1": np.array([0.5, 2], np.float32).tobytes(), "2": bytes(2)}
    return str(pt.write(folder / "ao.pt", {"w": wrapper(INT4, parts, (2, 4)), "n": 1}, storages))


def test_a_tensor_of_torchao_is_told_by_its_parts(tmp_path: Path, ckpt: Ckpt) -> None:
    path = int4(tmp_path)
    (entry,) = json.loads(ckpt("ls", "--json", path).out)["entries"]
    assert (entry["dtype"], entry["shape"], entry["nbytes"], entry["python_type"]) == ("bfloat16", [2, 4], 14, INT4)
    assert [part["name"] for part in entry["parts"]] == ["qdata", "scale", "zero_point"]
    assert ckpt("show", path, "w").out == (
        "Int4Tensor(size=(2, 4), dtype=torch.bfloat16,\n"
        "  qdata=tensor([[1, 2],\n"
        "                [3, 4]], dtype=torch.int8),\n"
        "  scale=tensor([0.5000, 2.0000]),\n"
        "  zero_point=tensor([0, 0], dtype=torch.int8))\n"
    )
    refused = ckpt("set", path, "w[0,0]=1")
    assert refused.code == 2
    assert "tensor 'w' is wrapper, made of qdata, scale, zero_point" in refused.err
    assert ckpt("set", path, "w.scale[0]=0.25").code == 0
    assert ckpt("show", path, "w.scale").out == "tensor([0.2500, 2.0000])\n"
    with pytest.raises(UnsupportedError, match=r"cannot be made without torch\.load"):
        ckpt_cli.load(path)
    shown = json.loads(ckpt("show", "--json", path).out)[0]
    assert (shown["values"], [part["name"] for part in shown["parts"]]) == (None, ["qdata", "scale", "zero_point"])
    assert ckpt("show", "-f", "tsv", path, "w").out.splitlines()[2] == "w.scale\t0.25\t2.0"


def test_wrappers_within_wrappers_are_told_and_named(tmp_path: Path, ckpt: Ckpt) -> None:
    inner = wrapper("ao.PlainAQTTensorImpl", {"int_data": tensor("0", (2,), "Char")}, (2,), "int8")
    made = wrapper("ao.AffineQuantizedTensor", {"tensor_impl": inner}, (2,))
    path = str(pt.write(tmp_path / "ao.pt", {"w": made}, {"0": bytes([7, 8])}))
    assert ckpt("show", path, "w.tensor_impl.int_data").out == "tensor([7, 8], dtype=torch.int8)\n"
    assert "tensor_impl=PlainAQTTensorImpl(size=(2,)" in ckpt("show", path, "w").out


def test_tensors_among_the_attributes_of_a_tensor_are_listed(tmp_path: Path, ckpt: Ckpt) -> None:
    made = nn.Parameter(torch.ones(2))
    made.running = torch.arange(3)  # type: ignore[attr-defined]
    path = saved(tmp_path, x=made)
    assert ckpt("show", path, "x").out == f"{nn.Parameter(torch.ones(2))}\n"
    assert ckpt("show", path, "x.running").out == "tensor([0, 1, 2])\n"
    assert json.loads(ckpt("ls", "--json", path).out)["nbytes"] == 8 + 24
    assert ckpt("ls", "--waste", "-f", "tsv", path).out == ""


@pytest.fixture(scope="module")
def meshes() -> Any:
    """A world of two processes of which this is the first."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist
    dist.destroy_process_group()


def test_a_dtensor_is_told_as_torch_tells_it(meshes: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    data = torch.arange(6.0).reshape(2, 3)
    made = {
        "rows": DTensor.from_local(data.clone(), line, [Shard(0)]),
        "columns": nn.Parameter(DTensor.from_local(data.clone(), line, [Shard(1)])),
        "whole": DTensor.from_local(data.clone(), plane, [Replicate(), Shard(1)]),
        "summand": DTensor.from_local(data.clone(), line, [Partial()]),
    }
    path = saved(tmp_path, **made)
    with ckpt_cli.open(path) as checkpoint:
        for name, theirs in made.items():
            mine = checkpoint[name].facts
            assert (mine.shape, mine.kind) == (tuple(theirs.shape), "parameter" if name == "columns" else "tensor")
            assert ckpt("show", path, name).out == f"{theirs}\n"
    for name in ("rows", "columns", "whole"):
        assert ckpt("set", path, f"{name}[1,1]=7").code == 0
        assert ckpt("show", path, f"{name}._local_tensor[1]").out == "tensor([3., 7., 5.])\n"
    assert ckpt("show", path, "rows[0]").out == "tensor([0., 1., 2.])\n"
    assert "this file has only a part of tensor 'rows'" in ckpt("set", path, "rows[2,1]=7").err
    assert "made of _local_tensor" in ckpt("set", path, "summand[0,0]=7").err


def test_a_sharded_tensor_is_told_with_the_place_of_its_shards(meshes: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
    from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties

    mine = ShardMetadata([2, 0], [2, 3], "rank:0/cpu")
    metadata = ShardedTensorMetadata(
        [ShardMetadata([0, 0], [2, 3], "rank:1/cpu"), mine], torch.Size([4, 3]), TensorProperties(dtype=torch.float32)
    )
    made = ShardedTensor._init_from_local_shards_and_global_metadata([Shard(torch.ones(2, 3), mine)], metadata)
    path = saved(tmp_path, x=made)
    assert ckpt("ls", path).out == "x\tfloat32\t[4,3]\t24\n"
    assert ckpt("show", path, "x").out == (
        "ShardedTensor(size=(4, 3), dtype=torch.float32,\n"
        "  shard0 at (2, 0)=tensor([[1., 1., 1.],\n"
        "                           [1., 1., 1.]]))\n"
    )
    assert ckpt("set", path, "x[3,0]=7").code == 0
    assert ckpt("show", path, "x.shard0[1]").out == "tensor([7., 1., 1.])\n"
    assert "only a part" in ckpt("show", path, "x[0,0]").err


def test_an_odd_spec_of_a_dtensor_is_told_as_far_as_it_goes(tmp_path: Path, ckpt: Ckpt) -> None:
    kind = "torch.distributed.tensor.DTensor"
    spec = built(new("torch.distributed.tensor._dtensor_spec.DTensorSpec"), {"mesh": 3, "placements": (1, None)})
    path = str(
        pt.write(tmp_path / "d.pt", {"x": wrapper(kind, {"_local_tensor": ROW, "_spec": spec}, (4,))}, {"v": bytes(8)})
    )
    assert "placements=(?(), ?())" in ckpt("show", path, "x").out
    assert ckpt("set", path, "x[0]=1").code == 2
