"""The command `ckpt check`: exit codes, JSON, bounded and escaped text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from check_cases.case import deep_check, faulty, saved
from conftest import Ckpt

from ckpt_cli import limits


def test_notes_alone_are_exit_0_and_warnings_exit_1(ckpt: Ckpt, tmp_path: Path) -> None:
    assert ckpt("check", faulty("no-tensors", tmp_path)).code == 0
    assert ckpt("check", faulty("trailing-bytes", tmp_path)).code == 1
    assert ckpt("check", faulty("truncated", tmp_path)).code == 1


def test_json_has_the_stable_shape(ckpt: Ckpt, tmp_path: Path) -> None:
    path = faulty("nan", tmp_path)
    answer = json.loads(ckpt("check", "--json", "--deep", path).out)
    (finding,) = answer.pop("findings")
    assert answer.pop("weights_only")["loads"]
    assert answer == {"path": str(path), "ok": False, "deep": True, "allowed": 0, "known": 0}
    assert finding == {"severity": "error", "code": "nan", "where": "m.pt: x", "message": "1 of 2 elements are NaN",
                       "hint": f"ckpt show {path} x"}  # fmt: skip


def test_findings_of_one_code_are_bounded(tmp_path: Path) -> None:
    nan = {f"n{number}": torch.tensor([float("nan"), float(number)]) for number in range(3 * limits.CHECK_FINDINGS)}
    report = deep_check(saved(tmp_path, nan))
    assert len(report.findings) == limits.CHECK_FINDINGS + 1
    assert report.findings[-1].message == f"and {2 * limits.CHECK_FINDINGS} more"


def test_names_are_escaped(ckpt: Ckpt, tmp_path: Path) -> None:
    path = saved(tmp_path, {"\x1b[31mred\n": torch.tensor([float("nan")])})
    for style in ("tsv", "table"):
        assert "\x1b" not in ckpt("check", "--deep", "-f", style, path).out


def test_the_file_is_not_changed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    deep_check(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt"]
