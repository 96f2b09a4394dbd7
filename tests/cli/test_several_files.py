"""Several checkpoints on one command line, and standard input as one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_forks import forks
from conftest import Ckpt

from ckpt_cli import limits
from ckpt_cli.errors import ChangedError
from ckpt_cli.ops.ls import list_entries

COMMANDS = ("info", "ls", "check", "scan", "hash", "stats", "ties")


@pytest.fixture
def pair(here: Path) -> Path:
    """Two checkpoints of one tensor each, and a file that is none."""
    torch.save({"w": torch.ones(2)}, "a.pt")
    torch.save({"w": torch.zeros(3), "step": 7, "epoch": 2}, "b.pt")
    Path("bad.pt").write_text("hello")
    return here


def test_ls_of_two_files_lists_both_with_the_file_as_the_last_column_of_rows(pair: Path, ckpt: Ckpt) -> None:
    assert ckpt("ls", "a.pt", "b.pt").lines == ["w\tfloat32\t[2]\t8\ta.pt", "w\tfloat32\t[3]\t12\tb.pt"]
    assert ckpt("ls", "-f", "csv", "a.pt", "b.pt").lines[0] == "name,dtype,shape,bytes,file"


def test_the_file_is_the_first_column_of_a_table_and_each_has_its_totals(pair: Path, ckpt: Ckpt) -> None:
    head, _, *rows = ckpt("ls", "-f", "table", "a.pt", "b.pt").lines
    assert head.split() == ["file", "name", "dtype", "shape", "bytes"]
    assert [row.split()[0] for row in rows[:2]] == ["a.pt", "b.pt"]
    assert rows[2:] == ["a.pt: 1 tensor, 2 parameters, 8 B, zip", "b.pt: 1 tensor, 3 parameters, 12 B, zip"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("style", ["tsv", "csv", "table", "markdown", "json"])
def test_one_bad_file_has_its_line_and_does_not_stop_the_others(
    pair: Path, ckpt: Ckpt, command: str, style: str
) -> None:
    answer = ckpt(command, "-f", style, "a.pt", "bad.pt", "none.pt", "b.pt")
    assert answer.code == 2
    lines = answer.err.splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("ckpt: ")] == ["bad.pt", "none.pt"]
    if command in ("info", "ls", "hash", "stats"):
        assert answer.out.index("a.pt") < answer.out.index("b.pt")


@pytest.mark.parametrize("command", COMMANDS)
def test_json_of_several_is_a_list_of_the_single_shapes_in_order(pair: Path, ckpt: Ckpt, command: str) -> None:
    found = json.loads(ckpt(command, "--json", "a.pt", "none.pt", "b.pt").out)
    singles = [json.loads(ckpt(command, "--json", path).out) for path in ("a.pt", "b.pt")]
    assert [found[0], found[2]] == [{"path": path, **one} for path, one in zip(("a.pt", "b.pt"), singles, strict=True)]
    assert found[1] == {"path": "none.pt", "error": "No such file or directory"}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_file_is_answered_as_ever(pair: Path, ckpt: Ckpt, command: str) -> None:
    for style in ("tsv", "table", "json"):
        assert "a.pt: " not in ckpt(command, "a.pt", "-f", style).out
    assert isinstance(json.loads(ckpt(command, "a.pt", "--json").out), dict)


def test_the_exit_code_is_the_worst_of_all(pair: Path, ckpt: Ckpt) -> None:
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert ckpt("scan", "a.pt", "b.pt").code == 0
    assert ckpt("scan", "evil.pt", "b.pt").code == 1
    assert ckpt("scan", "b.pt", "none.pt", "evil.pt").code == 2


def test_an_argument_is_a_name_where_the_first_file_has_it_and_else_a_file(pair: Path, ckpt: Ckpt) -> None:
    torch.save({"b.pt": torch.ones(1), "w": torch.ones(1)}, "named.pt")
    assert ckpt("ls", "named.pt", "b.pt").lines == ["b.pt\tfloat32\t[1]\t4"]
    assert ckpt("ls", "named.pt", "a.pt", "w").lines == ["w\tfloat32\t[1]\t4\tnamed.pt", "w\tfloat32\t[2]\t8\ta.pt"]
    assert ckpt("stats", "a.pt", "w", "b.pt").lines[1].endswith("b.pt")
    Path("w").mkdir()
    assert ckpt("ls", "a.pt", "w").lines == ["w\tfloat32\t[2]\t8"]


def test_a_name_that_one_of_the_files_lacks_is_an_error_of_that_file(pair: Path, ckpt: Ckpt) -> None:
    torch.save({"v": torch.ones(1)}, "other.pt")
    answer = ckpt("ls", "a.pt", "other.pt", "w")
    assert (answer.code, answer.lines) == (2, ["w\tfloat32\t[2]\t8\ta.pt"])
    assert answer.err.startswith("ckpt: other.pt: nothing is called 'w'\n")


def test_ties_of_two_names_is_asked_of_each_file(here: Path, ckpt: Ckpt) -> None:
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared}, "tied.pt")
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, "apart.pt")
    answer = ckpt("ties", "tied.pt", "apart.pt", "a", "b")
    assert (answer.code, [line.split("\t")[1] for line in answer.lines]) == (1, ["tied.pt", "apart.pt"])


def test_info_of_several_is_a_row_each_with_step_and_epoch(pair: Path, ckpt: Ckpt) -> None:
    assert ckpt("info", "-f", "csv", "a.pt", "b.pt").lines == [
        "format,tensors,parameters,bytes,dtypes,step,epoch,file",
        "zip,1,2,8,float32,,,a.pt",
        "zip,1,3,12,float32,7,2,b.pt",
    ]


def test_sarif_of_several_is_one_run_that_tells_of_failures(pair: Path, ckpt: Ckpt) -> None:
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    Path("worse.pt").write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    log = json.loads(ckpt("scan", "-f", "sarif", "evil.pt", "none.pt", "worse.pt").out)
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    places = [one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for one in run["results"]]
    assert {"evil.pt", "worse.pt"} == set(places)
    assert all(rules[one["ruleIndex"]] == one["ruleId"] for one in run["results"])
    assert run["invocations"][0]["executionSuccessful"] is False
    assert json.loads(ckpt("scan", "-f", "sarif", "a.pt", "b.pt").out)["runs"][0]["results"] == []


def test_the_json_of_several_is_a_baseline_of_each(pair: Path, ckpt: Ckpt) -> None:
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    Path("known.json").write_text(ckpt("scan", "--json", "evil.pt", "a.pt").out)
    assert ckpt("scan", "--baseline", "known.json", "evil.pt", "b.pt").code == 0
    Path("new.pt").write_bytes(Path("evil.pt").read_bytes())
    assert ckpt("scan", "--baseline", "known.json", "new.pt").code == 1


def test_a_file_that_changes_while_it_is_read_is_read_again_beside_others(
    pair: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def changing(checkpoint: object, *args: object, **options: object) -> object:
        tries.append(checkpoint.path)  # type: ignore[attr-defined]
        if tries == ["a.pt", "b.pt"]:
            raise ChangedError("b.pt")
        return list_entries(checkpoint, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", changing)
    answer = ckpt("ls", "a.pt", "b.pt")
    assert (answer.code, len(answer.lines), tries) == (0, 2, ["a.pt", "b.pt", "b.pt"])


# --- standard input --------------------------------------------------------------------------------------------------


def piped(data: bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with bytes in a pipe as its standard input."""
    end, begin = os.pipe()
    assert os.write(begin, data) == len(data)
    os.close(begin)
    with open(end, "rb") as pipe:
        return forks().answer(*args, stdin=pipe.fileno())


@pytest.mark.parametrize("command", [*COMMANDS, "show", "tree"])
def test_a_dash_is_standard_input_from_a_pipe_and_from_a_file(pair: Path, ckpt: Ckpt, command: str) -> None:
    expected = ckpt(command, "b.pt").out.replace("b.pt", "-").encode()
    done = piped(Path("b.pt").read_bytes(), command, "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")
    with Path("b.pt").open("rb") as file:
        done = forks().answer(command, "-", stdin=file.fileno())
    assert (done.returncode, done.stdout) == (0, expected)


def test_a_dash_may_be_any_of_the_files(pair: Path) -> None:
    data = Path("b.pt").read_bytes()
    assert piped(data, "ls", "a.pt", "-").stdout == b"w\tfloat32\t[2]\t8\ta.pt\nw\tfloat32\t[3]\t12\t-\n"
    assert piped(data, "check", "a.pt", "-").returncode == 0
    assert piped(data, "diff", "b.pt", "-").returncode == 0
    assert piped(data, "diff", "-", "a.pt").returncode == 1
    assert piped(data, "convert", "-", "c.pt").returncode == 0
    assert torch.load("c.pt")["step"] == 7


def test_standard_input_has_no_neighbours(pair: Path) -> None:
    Path("config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    torch.save({"embed_tokens.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}, "c.pt")
    assert b"config.json" in piped(b"", "ties", "c.pt").stderr
    assert piped(Path("c.pt").read_bytes(), "ties", "-").stderr == b""


def test_an_edit_does_not_read_standard_input(pair: Path) -> None:
    done = piped(Path("b.pt").read_bytes(), "set", "-", "step=8")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"ckpt: -: No such file or directory\n"


@pytest.mark.parametrize("data", [b"", b"hello"])
def test_what_is_no_checkpoint_in_standard_input_is_one_line(here: Path, data: bytes) -> None:
    done = piped(data, "ls", "-")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"ckpt: -: ")


def test_standard_input_meets_a_limit(pair: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STANDARD_INPUT", 100)
    with subprocess.Popen(["cat", "b.pt"], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        monkeypatch.setattr("os.read", lambda _, nbytes: cat.stdout.read(nbytes))  # type: ignore[union-attr]
        monkeypatch.setattr("ckpt_cli.files.standard_input.stat.S_ISREG", lambda _: False)
        answer = ckpt("ls", "-")
    assert (answer.code, answer.err.splitlines()[0]) == (2, "ckpt: -: standard input is longer than 100 bytes")


def _folders_of_open_files(process: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            found.append(str(link.readlink().parent))
    return found


def test_an_interrupt_leaves_no_copy_of_standard_input(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pair / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    command = [sys.executable, "-m", "ckpt_cli", "ls", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(Path("b.pt").read_bytes())
        process.stdin.flush()
        while str(folder) not in _folders_of_open_files(process.pid):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait()
    assert process.returncode == 130
    assert list(folder.iterdir()) == []
