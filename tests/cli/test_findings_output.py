"""Findings for CI: SARIF as the standard has it, names and codes that are allowed, and what a baseline knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from builders.pickles import call, pickled
from builders.pt import write
from conftest import Ckpt
from scanning import stacked


@pytest.fixture
def evil(here: Path) -> Path:
    write(here / "evil.pt", pickled({"w": call("os.system", "echo hi"), "net": call("lab.Net")}))
    return here / "evil.pt"


def _run_of(log: dict[str, Any]) -> dict[str, Any]:
    """The one run of a SARIF log, after a look at everything that sections 3.13 to 3.52 of the standard require."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"]
    assert all(isinstance(each["executionSuccessful"], bool) for each in run["invocations"])
    rules = driver["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert all(rule["shortDescription"]["text"] for rule in rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        (location,) = result["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        parts = urlsplit(uri)
        assert parts.scheme == "file" or not (parts.scheme or parts.path.startswith("/") or "\\" in uri)
        assert uri.isascii()
        assert " " not in uri
        assert all(each["fullyQualifiedName"] for each in location["logicalLocations"])
        assert set(location["physicalLocation"]["region"]) == {"startLine", "startColumn", "endLine", "endColumn"}
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
    return dict(run)


def test_sarif_of_a_scan_has_a_result_for_each_finding(evil: Path, ckpt: Ckpt) -> None:
    said = ckpt("scan", "-f", "sarif", "evil.pt")
    results = _run_of(json.loads(said.out))["results"]
    assert said.code == 1
    assert [(each["ruleId"], each["level"]) for each in results] == [
        ("dangerous-global", "error"),
        ("unknown-global", "note"),
    ]
    place = results[0]["locations"][0]
    assert place["physicalLocation"]["artifactLocation"] == {"uri": "evil.pt"}
    assert place["logicalLocations"] == [{"fullyQualifiedName": "evil.pt/archive/data.pkl"}]
    assert "os.system" in results[0]["message"]["text"]


def test_sarif_of_a_sound_file_is_a_run_without_results(work: Path, ckpt: Ckpt) -> None:
    for command in ("scan", "check"):
        said = ckpt(command, "-f", "sarif", "mlp.pt")
        assert said.code == 0
        assert _run_of(json.loads(said.out))["results"] == []


def test_sarif_of_a_check_describes_its_codes(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.full((2,), float("nan"))}, here / "m.pt")
    said = ckpt("check", "--deep", "-f", "sarif", "m.pt")
    run = _run_of(json.loads(said.out))
    assert said.code == 1
    assert [(each["ruleId"], each["level"]) for each in run["results"]] == [("nan", "error")]
    assert run["tool"]["driver"]["rules"][0]["shortDescription"]["text"] != "nan"


def test_a_uri_is_relative_below_the_current_folder_and_absolute_elsewhere(evil: Path, ckpt: Ckpt) -> None:
    odd = evil.parent / "a b#é%.pt"
    shutil.copy(evil, odd)
    elsewhere = evil.parent / "inner"
    elsewhere.mkdir()

    def uri(path: str) -> str:
        results = _run_of(json.loads(ckpt("scan", "-f", "sarif", path).out))["results"]
        return str(results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])

    assert unquote(uri(odd.name)) == odd.name
    assert uri(f"./{evil.name}") == "evil.pt"
    assert unquote(uri(str(odd))) == f"file://{odd}"
    assert unquote(uri(f"{elsewhere}/../{odd.name}")) == f"file://{odd}"


def test_a_finding_in_a_folder_has_the_uri_of_its_file(evil: Path, ckpt: Ckpt) -> None:
    (evil.parent / "models" / "deep").mkdir(parents=True)
    evil.rename(evil.parent / "models" / "deep" / "m.pt")
    results = _run_of(json.loads(ckpt("scan", "-f", "sarif", "models").out))["results"]
    assert {each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for each in results} == {
        "models/deep/m.pt"
    }


# --- what is allowed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("globs", "left", "allowed"),
    [
        (["lab.*"], ["os.system"], 1),
        (["os.system"], ["lab.Net"], 1),
        (["os.*", "lab.Net"], [], 2),
        (["unknown-global"], ["os.system"], 1),
        (["dangerous-global"], ["lab.Net"], 1),
        (["lab"], ["os.system", "lab.Net"], 0),
        (["*"], ["os.system"], 1),
        (["*-global"], ["os.system"], 1),
        (["*.system"], ["os.system", "lab.Net"], 0),
    ],
)
def test_findings_of_names_and_codes_that_match_are_accepted(
    evil: Path, ckpt: Ckpt, globs: list[str], left: list[str], allowed: int
) -> None:
    options = [part for glob in globs for part in ("--allow", glob)]
    answer = ckpt("scan", "--json", *options, "evil.pt")
    found = json.loads(answer.out)
    assert [finding["name"] for finding in found["findings"]] == left
    assert found["allowed"] == allowed
    assert answer.code == int("os.system" in left)
    text = ckpt("scan", "-f", "table", *options, "evil.pt").out
    assert (f", {allowed} allowed" in text) == bool(allowed)


def test_a_wildcard_does_not_reach_a_dangerous_name_through_a_module_that_is_trusted(here: Path, ckpt: Ckpt) -> None:
    write(here / "m.pt", stacked("lab", "helpers.os.system", "echo hi"))
    answer = ckpt("scan", "--allow", "lab.*", "m.pt")
    assert answer.code == 1
    assert "os" in answer.out
    assert ckpt("scan", "--allow", "lab.helpers.os.system", "--allow", "*", "m.pt").code == 0


def test_check_accepts_codes(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.full((2,), float("nan"))}, here / "m.pt")
    answer = ckpt("check", "--deep", "--allow", "nan", "-f", "table", "m.pt")
    assert answer.code == 0
    assert "0 warnings, 0 notes, 1 allowed" in answer.out


# --- what is known ----------------------------------------------------------------------------------------------------


def test_only_findings_that_are_not_in_the_baseline_count(evil: Path, ckpt: Ckpt) -> None:
    (evil.parent / "known.json").write_text(ckpt("scan", "--json", "evil.pt").out)
    answer = ckpt("scan", "--baseline", "known.json", "evil.pt")
    assert (answer.code, answer.out) == (0, "")
    assert "2 known" in answer.err
    write(evil, pickled({"w": call("os.system", "echo hi"), "v": call("os.system", "reboot"), "x": call("lab.Net")}))
    assert ckpt("scan", "--baseline", "known.json", "evil.pt").code == 0  # a name is said once, with its first call
    write(evil, pickled({"w": call("os.system", "echo hi"), "v": call("posix.system", "x"), "x": call("lab.Net")}))
    answer = ckpt("scan", "--baseline", "known.json", "--json", "evil.pt")
    found = json.loads(answer.out)
    assert answer.code == 1
    assert [finding["name"] for finding in found["findings"]] == ["posix.system"]
    assert found["known"] == 2


def test_the_name_of_the_file_is_not_part_of_a_finding(here: Path, ckpt: Ckpt) -> None:
    for name in ("epoch1", "epoch2"):
        write(here / f"{name}.pt", pickled(call("lab.Net")), prefix=f"{name}/")
    (here / "known.json").write_text(ckpt("scan", "--json", "epoch1.pt").out)
    (here / "runs").mkdir()
    (here / "epoch2.pt").rename(here / "runs" / "epoch2.pt")
    found = json.loads(ckpt("scan", "--baseline", "known.json", "--json", "runs/epoch2.pt").out)
    assert found["findings"] == []
    assert found["known"]


def test_a_finding_at_another_place_is_new(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.full((2,), float("nan")), "v": torch.zeros(2)}, here / "m.pt")
    (here / "known.json").write_text(ckpt("check", "--deep", "--json", "m.pt").out)
    assert ckpt("check", "--deep", "--baseline", "known.json", "m.pt").code == 0
    torch.save({"v": torch.full((2,), float("nan")), "w": torch.zeros(2)}, here / "m.pt")
    found = json.loads(ckpt("check", "--deep", "--json", "--baseline", "known.json", "m.pt").out)
    assert [finding["where"] for finding in found["findings"] if finding["code"] == "nan"] == ["m.pt: v"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"pickles": 1}',
        b'{"pickles": 1, "path": "m", "findings": 5}',
        b'{"pickles": 1, "path": "m", "findings": [1]}',
        b'{"pickles": 1, "path": "m", "findings": [{"code": 1, "where": "", "message": ""}]}',
        b'{"deep": false, "path": "m", "findings": []}',
        None,
    ],
)
def test_a_bad_baseline_is_one_line(evil: Path, ckpt: Ckpt, content: bytes | None) -> None:
    if content is not None:
        (evil.parent / "bad.json").write_bytes(content)
    answer = ckpt("scan", "--baseline", "bad.json", "evil.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("ckpt: bad.json: ")
    assert answer.err.count("\n") == 1


def test_a_folder_is_no_baseline(evil: Path, ckpt: Ckpt) -> None:
    (evil.parent / "bad.json").mkdir()
    answer = ckpt("scan", "--baseline", "bad.json", "evil.pt")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
