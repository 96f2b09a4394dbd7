"""Safetensors files of ranks are joined as torch consolidates them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from dcp_files import CUTS, QUARTERS, WHOLE, Cut, values
from safetensors.torch import save_file
from set_elements import edit

from ckpt_cli.errors import MalformedError
from ckpt_cli.formats import open_checkpoint


def hf_folder(
    path: Path, cuts: list[Cut], whole: torch.Tensor = WHOLE, more: dict[str, torch.Tensor] | None = None
) -> Path:
    """What HuggingFaceStorageWriter leaves that saves a file a rank and does not consolidate them.

    The first rank also has `more`, whole tensors.
    """
    path.mkdir()
    for number, (offsets, sizes) in enumerate(cuts, start=1):
        box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        info = {"w": {"saved_offsets": list(offsets)}}
        own = more or {} if number == 1 else {}
        info |= {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in own.items()}
        save_file(
            {"w": whole[box].contiguous(), **own},
            path / f"shard-{number:05}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"},
        )
    return path


@pytest.mark.parametrize("name", ["one", "rows", "columns", "last", "quarters"])
def test_safetensors_of_ranks_are_joined_as_torch_consolidates_them(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    path = hf_folder(tmp_path / "d", CUTS[name])
    assert open_checkpoint(str(path)).format == "dcp"
    edit(path, "w[1,2:7]=-1")
    (tmp_path / "whole").mkdir()
    consolidate_safetensors_files(str(path), str(tmp_path / "whole"), {"w": 1})
    (whole,) = (tmp_path / "whole").glob("*.safetensors")
    expected = WHOLE.clone()
    expected[1, 2:7] = -1
    assert torch.equal(load_file(whole)["w"], expected)
    assert torch.equal(values(path), expected)


def consolidated(path: Path, out: Path, *names: str) -> dict[str, torch.Tensor]:
    """What torch makes of the files of all ranks."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    out.mkdir()
    consolidate_safetensors_files(str(path), str(out), dict.fromkeys(names, 1))
    (whole,) = out.glob("*.safetensors")
    found: dict[str, torch.Tensor] = load_file(whole)
    return found


@pytest.mark.parametrize("name", ["one", "rows", "columns", "quarters"])
def test_names_of_ranks_are_edited_in_every_file(tmp_path: Path, ckpt: Ckpt, name: str) -> None:
    path = hf_folder(tmp_path / "d", CUTS[name], more={"v": WHOLE[0].clone()})
    assert ckpt("rename", path, "w", "layers.0.weight").code == 0
    assert torch.equal(values(path, "layers.0.weight"), WHOLE)
    edit(path, "layers.0.weight[0,0,0]=5")
    expected = WHOLE.clone()
    expected[0, 0, 0] = 5
    found = consolidated(path, tmp_path / "whole", "layers.0.weight", "v")
    assert torch.equal(found["layers.0.weight"], expected)
    assert ckpt("rm", path, "layers", "-o", tmp_path / "o").code == 0
    assert len(list((tmp_path / "o").iterdir())) == 1
    assert torch.equal(consolidated(tmp_path / "o", tmp_path / "p", "v")["v"], WHOLE[0])
    assert ckpt("keep", path, "v").code == 0
    assert [each.name for each in path.iterdir()] == ["shard-00001-model-00001-of-00001.safetensors"]
    assert ckpt("check", "--deep", path).code == 0
    answer = ckpt("cast", path, "float16")
    assert (answer.code, answer.err.count("\n")) == (2, 2)


def test_safetensors_of_ranks_without_one_rank_are_told(tmp_path: Path) -> None:
    path = hf_folder(tmp_path / "d", QUARTERS)
    (path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(MalformedError, match="a rank did not save its own"):
        values(path)


@pytest.mark.parametrize("info", ["[", "[]", "{}x", '{"w": 3}', '{"w": {"saved_offsets": [0, -1, 0]}}', "[" * 90_000])
def test_bad_sharding_info_is_refused_in_one_line(tmp_path: Path, info: str) -> None:
    path = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"w": WHOLE}, path, metadata={"DCP_SHARDING_INFO": info})
    with pytest.raises(MalformedError, match="DCP_SHARDING_INFO") as refused:
        open_checkpoint(str(tmp_path))
    assert refused.value.path == str(path)
