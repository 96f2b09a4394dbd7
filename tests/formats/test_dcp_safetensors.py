"""Safetensors files of ranks are joined as torch consolidates them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dcp_files import CUTS, QUARTERS, WHOLE, Cut, values
from safetensors.torch import save_file
from set_elements import edit

from ckpt_cli.errors import MalformedError
from ckpt_cli.formats import open_checkpoint


def hf_folder(path: Path, cuts: list[Cut], whole: torch.Tensor = WHOLE) -> Path:
    """What HuggingFaceStorageWriter leaves that saves a file a rank and does not consolidate them."""
    path.mkdir()
    for number, (offsets, sizes) in enumerate(cuts, start=1):
        box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        info = {"w": {"saved_offsets": list(offsets)}}
        save_file(
            {"w": whole[box].contiguous()},
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
