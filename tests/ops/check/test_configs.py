"""What `ckpt check` says of the config.json beside tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from check_cases.case import codes
from check_cases.values import CONFIG, configured, llama
from huggingface_hub import save_torch_state_dict

from ckpt_cli.ops.check.run import check


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 12), ("hidden_size", 16), ("intermediate_size", 13), ("num_attention_heads", 2), ("head_dim", 4),
     ("num_key_value_heads", 4)],
)  # fmt: skip
def test_each_number_of_a_config_is_compared(key: str, value: int, tmp_path: Path) -> None:
    changes = {key: value}
    if key == "num_attention_heads":
        changes["head_dim"] = 2
    assert "config-shape" in codes(check(str(configured(tmp_path, **changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"bits": 4}, "hidden_size": 8, "intermediate_size": 99},
        {"vocab_size": None, "hidden_size": "wide", "num_hidden_layers": -1},
        {"torch_dtype": None, "dtype": "float32"},
        {"text_config": {"vocab_size": 11}, "vocab_size": 999},
    ],
)
def test_what_a_config_does_not_say_is_no_contradiction(changes: dict[str, Any], tmp_path: Path) -> None:
    assert check(str(configured(tmp_path, **changes))).findings == []


@pytest.mark.parametrize("text", ["[1]", "{", "", "[" * 100_000, '{"vocab_size": [1e999]}'])
def test_a_config_that_is_none_is_passed_over(text: str, tmp_path: Path) -> None:
    configured(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert check(str(tmp_path)).findings == []


def test_a_shard_alone_is_not_blamed_for_what_the_others_have(tmp_path: Path) -> None:
    save_torch_state_dict(llama(), tmp_path, max_shard_size=1000)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert check(str(tmp_path)).findings == []
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert codes(check(str(shards[0]))) == {"oddity"}


def test_a_folder_without_an_index_is_held_against_its_own_config(tmp_path: Path) -> None:
    save_torch_state_dict(llama(), tmp_path, max_shard_size=1000)
    next(tmp_path.glob("*.index.json")).unlink()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 12}))
    assert codes(check(str(tmp_path))) == {"no-index", "config-shape"}
