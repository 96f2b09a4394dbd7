"""How the command line behaves, whatever the command: help, exit codes, errors, streams, names."""

from __future__ import annotations

import errno
import importlib
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Ckpt

import ckpt_cli
from ckpt_cli.cli.app import COMMAND_LINES, COMMANDS, SUBCOMMANDS, SUMMARIES
from ckpt_cli.cli.main import run
from ckpt_cli.errors import BusyError

ONE_LINE = re.compile(r"ckpt: [^\n]+\n(hint: [^\n]+\n)?")
READING = ("ls", "info", "tree", "show", "ties", "scan")
"""Commands that say nothing on stderr where all is well; edits tell there what they did."""

PYTHON_CKPT = f'ckpt() {{ "{sys.executable}" -m ckpt_cli "$@"; }}; '


def bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `ckpt` is this project's."""
    return subprocess.run(
        ["bash", "-c", PYTHON_CKPT + script], cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A checkpoint whose listing does not fit into a pipe."""
    torch.save({f"layers.{number}.weight": torch.zeros(2) for number in range(5000)}, tmp_path / "many.pt")
    return tmp_path


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files that the examples of the help speak of."""
    shared = torch.ones(2, 2)
    state = {"0.weight": torch.ones(2, 4), "0.bias": torch.ones(2), "2.weight": shared, "2.bias": torch.ones(1)}
    state |= {"4.weight": shared, "encoder.weight": torch.ones(3), "module.weight": torch.ones(1)}
    torch.save({**state, "embed.weight": torch.ones(4), "lm_head.weight": torch.ones(4)}, tmp_path / "model.pt")
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, tmp_path / "train.ckpt")
    torch.save({"part": torch.zeros(100)[:10]}, tmp_path / "slices.pt")
    assert run(["to", str(tmp_path / "slices.pt"), "cuda:0", "-o", str(tmp_path / "gpu.pt")]) == 0
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    assert run(["set", str(tmp_path / "model.pt"), "0.bias=2", "--backup"]) == 0
    (tmp_path / "old.pt").write_bytes((tmp_path / "model.pt").read_bytes())
    assert run(["delta", "create", str(tmp_path / "model.pt"), str(tmp_path / "old.pt"), "-o",
                str(tmp_path / "delta.safetensors")]) == 0  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    shutil.copytree(Path(__file__).parent.parent / "samples" / "lora" / "linear", tmp_path, dirs_exist_ok=True)
    (tmp_path / "recipe.toml").write_text('version = 1\n[[step]]\nremove = ["0.bias"]\n')
    quantized = Path(__file__).parent.parent / "samples" / "quantized" / "compressed-fp8-channel"
    shutil.copyfile(quantized / "model.safetensors", tmp_path / "fp8.safetensors")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model-00001-of-00001.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()
    )
    return tmp_path


def function_of(command: str) -> Callable[..., None]:
    """The function of a command, or of one of a group."""
    words = command.split()
    found: Callable[..., None] = getattr(importlib.import_module(f"ckpt_cli.cli.{words[0]}"), f"{words[-1]}_command")
    return found


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_the_help_of_a_command_ends_in_an_example_that_runs(
    model: Path, ckpt: Ckpt, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = (function_of(command).__doc__ or "").strip().splitlines()[-1].strip()
    assert example.startswith(f"Example: ckpt {command} ")
    monkeypatch.setenv("COLUMNS", "80")
    shown = ckpt(*command.split(), "--help").out
    assert example in shown
    assert shown.index(example) < shown.index("Arguments:")
    done = bash(example.removeprefix("Example: "), model)
    assert (done.returncode, done.stderr if command in READING else "") == (0, "")


def test_every_example_of_the_first_help_runs(model: Path, ckpt: Ckpt) -> None:
    examples = re.findall(r"^  (ckpt .+?)  +\S.*$", ckpt().out, re.MULTILINE)
    assert len(examples) == 9
    for example in examples:
        assert bash(example, model).returncode == 0


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_every_option_and_argument_of_a_command_is_explained(ckpt: Ckpt, command: str) -> None:
    shown = ckpt(*command.split(), "-h").out
    for heading in ("Arguments:", "Options:"):
        rows = shown.split(heading)[1].split("\n\n")[0].strip("\n").splitlines()
        for row, following in zip(rows, [*rows[1:], ""], strict=True):
            is_head = re.match(r"  \S", row)
            assert not is_head or re.search(r"\S  +\S", row) or following.startswith("    ")


def test_the_version_is_the_packages(ckpt: Ckpt) -> None:
    assert ckpt("--version").out == f"ckpt {ckpt_cli.__version__}\n"


def test_every_command_is_in_the_first_help_with_one_sentence(ckpt: Ckpt) -> None:
    groups = ckpt("--help").out.split("\nLook:\n")[1]
    rows = [row for row in groups.splitlines() if row.startswith("  ")]
    assert [row.split()[0] for row in rows] == list(COMMANDS)
    assert all(row.endswith(".") for row in rows)


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_the_list_of_commands_has_the_first_sentence_of_the_help_of_each(command: str, ckpt: Ckpt) -> None:
    name, _, sub = command.partition(" ")
    summary = SUBCOMMANDS[name][sub] if sub else SUMMARIES[command]
    assert (function_of(command).__doc__ or "").splitlines()[0] == summary
    assert not sub or summary in ckpt(name, "--help").out


@pytest.mark.parametrize("group", SUBCOMMANDS)
def test_a_group_lists_its_commands_and_needs_one(ckpt: Ckpt, group: str) -> None:
    rows = ckpt("help", group).out.split("\nCommands:\n")[1].splitlines()
    assert [row.split()[0] for row in rows] == list(SUBCOMMANDS[group])
    for args in ([group], [group, "none"]):
        answer = ckpt(*args)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.endswith(f"hint: ckpt {group} --help\n")
    first = next(iter(SUBCOMMANDS[group]))
    assert ckpt("help", group, first).out == ckpt(group, first, "--help").out != ""
    assert ckpt(group, first, "--color", "never", "--help").out == ckpt(group, first, "--help").out


# --- errors ----------------------------------------------------------------------------------------------------------


ADAPTER = str(Path(__file__).parent.parent / "samples" / "lora" / "linear" / "adapter")
NEEDED = {"set": ["x=1"], "rename": ["x", "y"], "rm": ["x"], "keep": ["x"], "cast": ["bfloat16"], "tie": ["x", "y"],
          "resize": ["x=1"], "to": ["cpu"], "untie": ["x"], "convert": ["out.pt"], "avg": ["folder", "-o", "out.pt"],
          "merge": ["mlp.pt", "-o", "out.pt"], "graft": ["mlp.pt"],
          "mix": ["mlp.pt", "--method", "task", "-o", "out.pt"], "dequantize": ["-o", "out.pt"],
          "delta create": ["mlp.pt", "-o", "out.safetensors"], "delta apply": ["d.safetensors", "-o", "out.pt"],
          "apply": ["recipe.toml", "-o", "out.pt"], "lora merge": [ADAPTER, "-o", "out.pt"],
          "lora extract": ["tied.pt", "--rank", "1", "-o", "out"],
          "lora resize": ["--rank", "1", "-o", "out"]}  # fmt: skip
"""What each command takes beside a file."""

BAD_FILES = ["none.pt", "folder", "empty", "text", "zip", "fifo", "name\nbreak\x1b[31m.pt"]


@pytest.mark.parametrize(
    ("file", "command"),
    [pair for pair in product(BAD_FILES, COMMAND_LINES) if pair != ("zip", "check")],  # to find that out is its answer
)
def test_a_bad_file_is_one_line_and_exit_2(work: Path, ckpt: Ckpt, command: str, file: str) -> None:
    Path("folder").mkdir()
    Path("empty").touch()
    Path("text").write_text("hello\n")
    Path("zip").write_bytes(b"PK\3\4" + bytes(100))
    os.mkfifo("fifo")
    ckpt("delta", "create", "mlp.pt", "mlp.pt", "-o", "d.safetensors")
    Path("recipe.toml").write_text('version = 1\n[[step]]\nremove = ["x"]\n')
    needed = [file] if command in ("diff", "match") else NEEDED.get(command, ())
    answer = ckpt(*command.split(), file, *needed)
    assert (answer.code, answer.out) == (2, "")
    assert ONE_LINE.fullmatch(answer.err)
    assert answer.err.startswith(f"ckpt: {file.encode('unicode_escape').decode()}: ")


@pytest.mark.parametrize("args", [["--wrong"], ["ls", "--wrong"], ["wrong"], ["show"], ["ls", "a", "-f", "b\nc"]])
def test_bad_usage_is_one_line_with_the_help_to_read(ckpt: Ckpt, args: list[str]) -> None:
    answer = ckpt(*args)
    assert (answer.code, answer.out) == (2, "")
    assert ONE_LINE.fullmatch(answer.err)
    assert re.search(r"\nhint: ckpt ([a-z]+ )?--help\n", answer.err)


def broken(error: BaseException) -> Callable[..., None]:
    """A function that fails."""

    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


def test_an_error_of_our_own_is_one_line_that_says_so(work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", broken(ZeroDivisionError("first\nsecond")))
    answer = ckpt("ls", "mlp.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == (
        "ckpt: this is a bug of ckpt, not of the file: ZeroDivisionError: first\\nsecond\n"
        "hint: CKPT_DEBUG=1 shows where; please report it\n"
    )


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), BusyError("busy")])
def test_ckpt_debug_shows_where_an_error_came_from(
    work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", broken(error))
    assert "Traceback" not in ckpt("ls", "mlp.pt").err
    monkeypatch.setenv("CKPT_DEBUG", "1")
    answer = ckpt("ls", "mlp.pt")
    assert answer.err.startswith("Traceback (most recent call last):\n")
    assert ONE_LINE.search(answer.err)


def test_no_memory_and_no_space_are_told_without_blaming_anyone(
    work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", broken(MemoryError()))
    assert ckpt("ls", "mlp.pt").err == "ckpt: there is not enough memory\n"
    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", broken(OSError(errno.EIO, "Input/output error", b"mlp.pt")))
    assert ckpt("ls", "mlp.pt").err == "ckpt: mlp.pt: Input/output error\n"


def test_ctrl_c_is_exit_130_and_silent(work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", broken(KeyboardInterrupt()))
    answer = ckpt("ls", "mlp.pt")
    assert (answer.code, answer.out, answer.err) == (130, "", "")


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls many.pt", "show many.pt", "ls --json many.pt", "ls -f csv many.pt"])
def test_a_reader_that_goes_away_is_no_error(many: Path, command: str) -> None:
    done = bash(f'ckpt {command} | head -1; echo "${{PIPESTATUS[*]}}"', many)
    assert done.stdout.splitlines()[-1] == "141 0"
    assert done.stderr == ""


def test_help_that_nobody_reads_is_no_error(many: Path) -> None:
    done = bash('(sleep 0.1; ckpt ls --help; echo "$?" >&2) | true', many)
    assert done.stderr == "141\n"


def test_a_full_disk_behind_stdout_is_one_line(many: Path) -> None:
    done = bash("ckpt ls many.pt >/dev/full", many)
    assert done.returncode == 2
    assert done.stderr == "ckpt: standard output: No space left on device\n"


def test_closed_streams_do_not_stop_an_edit_and_nothing_is_written_into_the_checkpoint(work: Path) -> None:
    done = bash("ckpt set mlp.pt 2.bias=7 <&- >&- 2>&-; echo $?", work)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert torch.load("mlp.pt")["2.bias"] == 7
    assert bash("ckpt ls none.pt >&- 2>&-; echo $?; ckpt ls mlp.pt >&- 2>&-; echo $?", work).stdout == "2\n2\n"


def on_terminal(folder: Path, *args: str) -> str:
    """What a command prints when stdout is a terminal without colours."""
    ours, theirs = pty.openpty()
    try:
        env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}
        subprocess.run([sys.executable, "-m", "ckpt_cli", *args], cwd=folder, stdout=theirs, check=True, env=env)
        os.close(theirs)
        return b"".join(iter(lambda: _read(ours), b"")).decode().replace("\r\n", "\n")
    finally:
        os.close(ours)


def _read(terminal: int) -> bytes:
    """What a terminal has; nothing once nobody writes to it any more, which Linux tells by an error."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


@pytest.mark.parametrize("args", [["ls"], ["ls", "-l"], ["info"], ["ties"]])
def test_a_terminal_gets_a_table_and_a_pipe_gets_rows(work: Path, ckpt: Ckpt, args: list[str]) -> None:
    command, *options = args
    assert on_terminal(work, command, "tied.pt", *options) == ckpt(command, "tied.pt", *options, "-f", "table").out
    assert ckpt(command, "tied.pt", *options).out == ckpt(command, "tied.pt", *options, "-f", "tsv").out


def test_a_string_of_the_file_is_escaped_on_a_terminal_and_whole_in_a_pipe(work: Path, ckpt: Ckpt) -> None:
    torch.save({"note": "red\x1b[31m\ttext\n"}, "note.pt")
    assert on_terminal(work, "show", "note.pt", "note") == "red\\x1b[31m\ttext\n\n"
    assert ckpt("show", "note.pt", "note").out == "red\x1b[31m\ttext\n\n"


def test_a_terminal_that_knows_only_ascii_gets_ascii(work: Path, shell: Ckpt) -> None:
    torch.save({"ünï": torch.ones(2), "long": "ä" * 200}, "a.pt")
    for args in (["ls", "-a"], ["show"], ["ls", "-a", "-f", "table"], ["info"], ["ls", "--json"], ["show", "none"]):
        answer = shell(args[0], work / "a.pt", *args[1:], PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert answer.code == (2 if "none" in args else 0)
        assert answer.out.isascii()
        assert answer.err.isascii()
    assert "\\xfcn\\xef\t" in shell("ls", work / "a.pt", PYTHONIOENCODING="ascii").out


HOSTILE = [chr(code) for code in (*range(32), 127, *range(128, 160), 0x200B, 0x202E, 0x2028, 0x2066, 0xFEFF, 0xE0001)]


@pytest.mark.parametrize(
    "args",
    [
        *(["ls", "-l", "-a", "-f", style] for style in ("table", "tsv", "csv", "markdown", "json")),
        *(["show", "-f", style] for style in ("auto", "table", "tsv", "csv", "markdown", "json")),
        *(["ties", "--equal", "-f", style] for style in ("table", "tsv", "json")),
        *(["info", "-f", style] for style in ("table", "tsv", "json")),
        ["ls", "--waste", "-f", "table"],
        ["ls", "--fold"],
        ["ls", "esc"],
        ["set", "a*.*=0"],
        ["set", "--json", "-n", "a*.*=0"],
    ],
    ids=" ".join,
)
def test_no_name_of_a_file_reaches_a_terminal_raw(work: Path, ckpt: Ckpt, args: list[str]) -> None:
    wide = torch.zeros(100)
    state: dict[str, object] = {f"a{char}.{index}": wide[:2] for index, char in enumerate(HOSTILE)}
    torch.save({**state, "esc\x1b": torch.ones(2), "text": "".join(HOSTILE)}, "a.pt")
    answer = ckpt(args[0], "a.pt", *args[1:])
    assert answer.code == (2 if args[-1] == "esc" else 0)
    written = (answer.out + answer.err).replace("\n", "").replace("\t", "")
    assert written
    assert written.isprintable()


# --- names -----------------------------------------------------------------------------------------------------------

STATE = ["net.0.weight", "net.0.bias", "net.10.weight", "network.0.weight", "a[0]", "a", "it's", 'b"', "x*y", "x.y"]


@pytest.mark.parametrize(
    ("argument", "selected"),
    [
        ("net", ["net.0.weight", "net.0.bias", "net.10.weight"]),
        ("net.", ["net.0.weight", "net.0.bias", "net.10.weight"]),
        ("net.0", ["net.0.weight", "net.0.bias"]),
        ("net.0.weight", ["net.0.weight"]),
        ("*.weight", ["net.0.weight", "net.10.weight", "network.0.weight"]),
        ("net*0.weight", ["net.0.weight", "net.10.weight", "network.0.weight"]),
        ("net.?.weight", ["net.0.weight"]),
        ("net.0.*", ["net.0.weight", "net.0.bias"]),
        ("a[0]", ["a[0]"]),
        ("a", ["a"]),
        ("x*y", ["x*y"]),
        ("x?y", ["x*y", "x.y"]),
        ('"it\'s"', ["it's"]),
        ("'b\"'", ['b"']),
        ("'x*y'", ["x*y"]),
        ("*", STATE),
    ],
)
def test_a_name_is_exact_or_a_prefix_or_a_glob(tmp_path: Path, ckpt: Ckpt, argument: str, selected: list[str]) -> None:
    torch.save({name: torch.zeros(3) for name in STATE}, tmp_path / "a.pt")
    assert [line.split("\t")[0] for line in ckpt("ls", tmp_path / "a.pt", argument).lines] == selected


@pytest.mark.parametrize("argument", ["ne", "net.1", "net.0.weight.x", "'net'", "'*'", "[0]", "?", ".", ""])
def test_what_selects_nothing_is_an_error(tmp_path: Path, ckpt: Ckpt, argument: str) -> None:
    torch.save({name: torch.zeros(3) for name in STATE if name != "a"}, tmp_path / "a.pt")
    for command in ("ls", "show"):
        answer = ckpt(command, tmp_path / "a.pt", argument)
        assert (answer.code, answer.out) == (2, "")
        assert ": nothing is called '" in answer.err


@pytest.mark.parametrize(
    ("argument", "printed"),
    [
        ("a[0]", "tensor([1., 1., 1.])\n"),
        ("a[1]", "tensor(0.)\n"),
        ("a[0][1]", "tensor(1.)\n"),
        ("'a'[0]", "tensor(0.)\n"),
        ('"a[0]"[-1]', "tensor(1.)\n"),
        ("a[ 0 : 2 ]", "tensor([0., 0.])\n"),
        ("net[0]", "net.w[0] = tensor(0.)\nnet.v[0] = tensor(1.)\n"),
        ("n*[...,1]", "net.w[...,1] = tensor(0.)\nnet.v[...,1] = tensor(1.)\n"),
    ],
)
def test_an_index_goes_with_any_way_to_name(tmp_path: Path, ckpt: Ckpt, argument: str, printed: str) -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    torch.save({"a": zeros, "a[0]": ones, "net.w": zeros, "net.v": ones}, tmp_path / "a.pt")
    assert ckpt("show", tmp_path / "a.pt", argument).out == printed
