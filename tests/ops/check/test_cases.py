"""Each code of `ckpt check` has a file with that fault and a twin without, and is documented."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_cases import CASES
from check_cases.case import CODES_PAGE, Case, codes, deep_check
from check_cases.values import is_deep

from ckpt_cli.ops.check.run import CODES, check

IDS = [f"{each.code}-{place}" for place, each in enumerate(CASES)]


@pytest.mark.parametrize("each", CASES, ids=IDS)
def test_a_fault_is_found_and_its_twin_is_clean(each: Case, tmp_path: Path) -> None:
    for fault in (False, True):
        folder = tmp_path / str(fault)
        folder.mkdir()
        path = each.make(folder, fault)
        report = deep_check(path) if is_deep(each.code) else check(str(path))
        found = codes(report) - each.also
        assert found == ({each.code} if fault else set()), report.findings


def test_every_code_has_a_case() -> None:
    assert {each.code for each in CODES} == {each.code for each in CASES}


def test_no_code_is_there_twice() -> None:
    assert len({each.code for each in CODES}) == len(CODES)


def test_every_code_is_documented() -> None:
    text = CODES_PAGE.read_text()
    assert [each.code for each in CODES if f"| `{each.code}` | {each.severity} |" not in text] == []
