"""Answers on a terminal: no line is wider, names stay distinct, pagers and colours as the environment asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from builders.pickles import call, pickled
from command_forks import forks
from on_terminal import SEQUENCE, all_on_terminal, columns_of, on_terminal

WIDTHS = (80, 120, 200)
PLAIN = {"PAGER": "cat"}

LOOKS = (
    "info", "ls", "ls -l", "ls -a", "ls -al --fold", "ls --waste", "tree", "tree --full", "show", "ties",
    "ties --equal", "stats", "stats --total", "stats --by row",
    "stats --percentiles", "check --deep", "scan -a", "hash", "ls -f table", "show -f table",
)  # fmt: skip


def lightning() -> dict[str, object]:
    """The shape of a checkpoint of Lightning."""
    names = [
        f"model.encoder.layers.{layer}.self_attention.query_key_value_projection.{kind}"
        for layer in range(12)
        for kind in ("weight", "bias")
    ]
    state = {name: torch.full((8, 4), float(number)) for number, name in enumerate(names)}
    moments = {number: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(8, 4)} for number in range(len(names))}
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3, "params": list(range(len(names)))}]}],
        "hyper_parameters": {"a setting with a long text": "word " * 60, "path": "/very/long/path" * 12},
    }


def tied_with_long_names() -> dict[str, object]:
    """Names of 300 characters that differ in the middle, two of them tied; NaN for a finding."""
    names = [f"{'left.part' * 16}.{number}.{'right_part' * 14}.weight" for number in range(4)]
    state: dict[str, object] = {name: torch.arange(6.0).reshape(2, 3) / number for number, name in enumerate(names)}
    state["tied"] = state[names[1]]
    state["x" * 300] = torch.tensor([float("nan")] * 40)
    return state


def wide_names() -> dict[str, object]:
    """Names of characters that take two columns, and of ones that take none."""
    wide = {f"模型.编码器.层.{layer}.多头自注意力机制.查询投影矩阵权重": torch.ones(3, 3) for layer in range(4)}
    accents = {
        f"mode\u0301le.couche\u0301.{layer}." + "e\u0301\u0323te\u0301" * 12: torch.ones(2) for layer in range(4)
    }
    return {**wide, **accents, "备注": "一个很长的说明" * 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    for name, content in (("lightning", lightning()), ("long", tied_with_long_names()), ("wide", wide_names())):
        torch.save(content, folder / f"{name}.pt")
    many = {f"model.layers.{at}.mlp.{kind}.weight": torch.ones(2) for at in range(1500) for kind in ("up", "down")}
    torch.save(many, folder / "many.pt")
    (folder / "bad.pkl").write_bytes(pickled(call("posix", "system", ("echo a command that is long " * 9,))))
    return folder


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", ["lightning", "long", "wide"])
def test_no_line_of_a_command_is_wider_than_the_terminal(folder: Path, name: str, columns: int) -> None:
    file = f"{name}.pt"
    first, second, *_ = torch.load(folder / file)
    commands = [[look.split()[0], file, *look.split()[1:]] for look in LOOKS]
    commands += [["rm", "-n", file, first, second], ["keep", "-n", file, first, second]]
    commands += [["rename", "-n", file, "--add", "a.very.long.prefix."], ["compact", "-n", file]]
    commands += [["cast", "-n", file, "float16"], ["convert", "-n", file, "out.safetensors", "--tensors-only"]]
    commands += [["tie", "-n", "--force", file, first, second], ["diff", file, "long.pt"], ["diff", file, "wide.pt"]]
    commands += [["scan", "bad.pkl"], ["show", file, "y" * 300], ["ls", file, "--no-such-option"]]
    for command, seen in zip(commands, all_on_terminal(folder, commands, columns, PLAIN), strict=True):
        too_wide = [line for line in seen.lines if columns_of(line) > columns]
        assert not too_wide, (command, too_wide[:3])
        assert "Traceback" not in seen.text
        assert "this is a bug" not in seen.text, (command, seen.text)


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_line_of_an_error_is_wider_than_the_terminal_unless_a_path_is(folder: Path, columns: int) -> None:
    path = "z" * 240
    seen = on_terminal(folder, "ls", path, columns=columns)
    assert all(path in line for line in seen.lines if len(line) > columns)
    assert any(path in line for line in seen.lines), seen.lines


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", ["lightning", "long", "wide", "many"])
def test_shortened_names_are_told_apart(folder: Path, name: str, columns: int) -> None:
    seen = on_terminal(folder, "ls", f"{name}.pt", columns=columns, env=PLAIN)
    assert seen.widest <= columns
    rows = [line.split("  ")[0] for line in seen.lines[2:-1]]
    assert len(rows) == len(set(rows)) == len(piped(folder, "ls", f"{name}.pt").splitlines())


def test_columns_that_do_not_fit_are_named_in_a_last_line(folder: Path) -> None:
    seen = on_terminal(folder, "ls", "-l", "long.pt", columns=80)
    assert "storage" in seen.lines[0]
    said = " ".join(line.strip() for line in seen.lines[-4:])
    assert "not shown: " in said
    assert "layout" in said
    assert "--json shows them" in said
    assert "not shown" not in on_terminal(folder, "ls", "-l", "long.pt", columns=400).text


def test_what_says_most_stays_where_columns_are_left_out(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}, tmp_path / "1.pt")
    torch.save({"layer.weight": torch.ones(2, 4) * 2, "layer.bias": torch.ones(2) * 3}, tmp_path / "2.pt")
    run = on_terminal(tmp_path, "series", "1.pt", "2.pt", "--by", "change", columns=72)
    assert "layer.weight" in run.text
    assert "shape [2,3]" in run.text
    assert "▁" in run.text
    assert "not shown: " in run.text
    assert "it has no rows" in on_terminal(tmp_path, "stats", "1.pt", "--by", "row", columns=60).text
    stat = on_terminal(tmp_path, "diff", "1.pt", "2.pt", "--stat", columns=60)
    assert "  ++++++++++++\n" in stat.text.replace("\r", "")
    assert stat.widest <= 60


def test_a_terminal_too_narrow_for_a_table_shows_a_block_of_lines_for_each_row(folder: Path) -> None:
    seen = on_terminal(folder, "check", "--deep", "long.pt", columns=80)
    assert [line.split("  ")[0] for line in seen.lines[:3]] == ["severity", "code", "where"]
    seen = on_terminal(folder, "ls", "long.pt", columns=30)
    assert seen.widest <= 30


def test_the_environment_counts_more_than_the_size_of_the_terminal(folder: Path) -> None:
    seen = on_terminal(folder, "ls", "long.pt", columns=200, env={"COLUMNS": "60"})
    assert 50 < seen.widest <= 60


def test_one_long_name_does_not_widen_every_row(tmp_path: Path) -> None:
    torch.save({**{f"{at}.bias": torch.ones(2) for at in range(12)}, "long" * 40: torch.ones(2)}, tmp_path / "a.pt")
    seen = on_terminal(tmp_path, "ls", "a.pt", columns=200)
    assert seen.widest < 80


def test_what_is_piped_does_not_depend_on_the_terminal(folder: Path) -> None:
    for arguments in (("ls", "-l", "long.pt"), ("stats", "wide.pt"), ("ls", "--json", "long.pt"), ("info", "long.pt")):
        answers = {piped(folder, *arguments, COLUMNS=columns) for columns in ("40", "200")}
        assert len(answers) == 1
    seen = on_terminal(folder, "ls", "--json", "long.pt", columns=80)
    assert json.loads(seen.text)["tensors"] == 6


# --- colours ---------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_colours_unless_the_environment_or_an_option_says_no(folder: Path) -> None:
    arguments = ("check", "--deep", "long.pt")
    assert "\x1b[31merror\x1b[0m" in on_terminal(folder, *arguments).text
    assert "\x1b" not in on_terminal(folder, *arguments, env={"NO_COLOR": "1"}).text
    assert "\x1b" not in on_terminal(folder, *arguments, env={"TERM": "dumb"}).text
    assert "\x1b" not in on_terminal(folder, "--color", "never", *arguments).text
    assert "\x1b[31m" in on_terminal(folder, "--color", "always", *arguments, env={"NO_COLOR": "1"}).text


def test_colours_change_no_text(folder: Path) -> None:
    for arguments in (
        ("ls", "-l", "long.pt"),
        ("check", "--deep", "wide.pt"),
        ("tree", "long.pt"),
        ("scan", "bad.pkl"),
        ("diff", "long.pt", "wide.pt"),
        ("match", "long.pt", "wide.pt"),
        ("hash", "long.pt"),
    ):
        coloured = on_terminal(folder, *arguments)
        plain = on_terminal(folder, *arguments, env={"NO_COLOR": "1"})
        assert "\x1b" not in plain.text
        assert SEQUENCE.sub("", coloured.text) == plain.text


def test_totals_and_verdicts_have_the_colours_of_what_they_say(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "v": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.tensor([1, float("nan")]), "u": torch.ones(2)}, tmp_path / "b.pt")
    red, green, yellow, bold = ("\x1b[31m{}\x1b[0m", "\x1b[32m{}\x1b[0m", "\x1b[33m{}\x1b[0m", "\x1b[1m{}\x1b[0m")
    for arguments, texts in (
        (("check", "a.pt"), [green.format("0 errors, 0 warnings, 0 notes"), green.format("takes it")]),
        (("check", "b.pt", "--deep"), [red.format("1 error"), ", 0 warnings, 0 notes"]),
        (("diff", "a.pt", "b.pt"), [
            "0 equal, ", yellow.format("1 differ"), red.format("1 only in A"), green.format("1 only in B")]),
        (("match", "a.pt", "a.pt"), [green.format("load_state_dict would take")]),
        (("match", "a.pt", "b.pt"), [
            red.format("Error(s) in loading state_dict"), red.format("Missing key(s)"),
            green.format("Unexpected key(s)")]),
        (("ties", "a.pt", "w", "v"), [red.format("not tied: equal values, but stored apart")]),
        (("ls", "a.pt"), [bold.format("2 tensors, 4 parameters, 16 B, zip")]),
    ):  # fmt: skip
        shown = on_terminal(tmp_path, *arguments, columns=200).text
        assert [text for text in texts if text not in shown] == [], (arguments, shown)


def test_colours_and_the_pager_may_also_be_said_after_the_command(folder: Path) -> None:
    check = ("check", "--deep", "long.pt")
    assert "\x1b" not in on_terminal(folder, *check, "--color", "never").text
    assert "\x1b[31merror" in piped(folder, *check, "-f", "table", "--color=always")
    assert "\x1b[31merror" in piped(folder, "--color", "never", *check, "-f", "table", "--color=always")
    assert "\x1b[31merror" in piped(folder, "--color", "always", *check, "-f", "table")
    assert "'mauve' is not one of" in piped(folder, "ls", "long.pt", "--color", "mauve")
    assert "given 2 times" in piped(folder, "ls", "long.pt", "--color", "never", "--color", "auto")
    assert "--color" not in piped(folder, "ls", "--help")


def piped(folder: Path, *arguments: str, **env: str) -> str:
    """What a command prints where stdout and stderr are pipes."""
    ours, theirs = os.pipe()
    with open(os.devnull) as nothing, open(ours) as pipe, tempfile.TemporaryFile("w+") as errors:
        forks().start([list(arguments)], folder, {**os.environ, **env}, (nothing.fileno(), theirs, errors.fileno()))
        os.close(theirs)
        answer = pipe.read()
        forks().code()
        errors.seek(0)
        return answer + errors.read()


def test_what_is_piped_has_no_colours_unless_they_are_forced(folder: Path) -> None:
    for layout in ("auto", "table", "tsv", "csv", "json", "markdown"):
        assert "\x1b" not in piped(folder, "check", "--deep", "long.pt", "-f", layout)
    table = ("check", "--deep", "long.pt", "-f", "table")
    assert "\x1b[31merror" in piped(folder, *table, FORCE_COLOR="1")
    assert "\x1b[31merror" in piped(folder, "--color", "always", *table)
    assert "\x1b" not in piped(folder, "--color", "always", "check", "--deep", "long.pt", "--json")
    assert "\x1b" not in piped(folder, "--color", "always", "ls", "long.pt")


def test_hashes_that_are_cut_short_are_said_to_be(folder: Path) -> None:
    narrow = on_terminal(folder, "hash", "long.pt", columns=80).text
    assert "…" in narrow
    assert "hashes are cut short; a wider terminal, -f csv or --json shows them" in narrow
    assert "cut short" not in on_terminal(folder, "hash", "long.pt", columns=400).text


# --- pagers ----------------------------------------------------------------------------------------------------------


def pager(folder: Path, code: str) -> str:
    """The command of a pager that is a Python program."""
    (folder / "pager.py").write_text(f"import sys\n{code}\n")
    return f"{sys.executable} pager.py"


def test_more_than_a_screen_goes_through_the_pager(folder: Path) -> None:
    command = pager(folder, "print('PAGED', len(sys.stdin.readlines()))")
    for variable in ("PAGER", "CKPT_PAGER"):
        seen = on_terminal(folder, "ls", "many.pt", env={variable: command})
        assert (seen.code, seen.lines) == (0, ["PAGED 3003"])
    assert "PAGED" not in on_terminal(folder, "ls", "long.pt", env={"PAGER": command}).text
    assert "PAGED" not in on_terminal(folder, "--no-pager", "ls", "many.pt", env={"PAGER": command}).text
    assert "PAGED" not in on_terminal(folder, "ls", "many.pt", env={"PAGER": command, "CKPT_PAGER": ""}).text
    assert "PAGED" not in piped(folder, "ls", "many.pt", PAGER=command)
    assert on_terminal(folder, "ls", "many.pt", env={"PAGER": f"{command} | cat"}).lines == ["PAGED 3003"]


def test_without_the_pager_the_answer_is_printed_as_it_is(folder: Path) -> None:
    after = on_terminal(folder, "ls", "many.pt", "--no-pager", env={"PAGER": pager(folder, "print('PAGED')")})
    assert len(after.lines) == 3_003
    seen = on_terminal(folder, "ls", "many.pt", env={"PAGER": "no-such-pager"})
    assert (seen.code, len(seen.lines)) == (0, 3_003)


def test_a_pager_that_is_left_early_or_interrupted_is_no_trouble(folder: Path) -> None:
    left = on_terminal(
        folder, "ls", "many.pt", env={"PAGER": pager(folder, "print('LEFT', 'name' in sys.stdin.readline())")}
    )
    assert (left.code, left.lines) == (0, ["LEFT True"])
    code = "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\nprint(len(sys.stdin.readlines()) > 9)"
    seen = on_terminal(folder, "check", "--deep", "long.pt", lines=5, env={"PAGER": pager(folder, code)})
    assert "Traceback" not in seen.text
    assert "bug" not in seen.text


def test_notes_come_after_the_pager_and_the_exit_code_is_that_of_the_answer(folder: Path) -> None:
    command = pager(folder, "import time; sys.stdin.read(); time.sleep(0.3); print('END OF PAGER')")
    seen = on_terminal(folder, "check", "--deep", "long.pt", lines=3, env={"PAGER": command})
    assert seen.code == 1
    seen = on_terminal(folder, "ls", "-a", "bad.pkl", lines=2, env={"PAGER": command})
    assert "warning" not in seen.text or seen.text.index("END OF PAGER") < seen.text.index("warning")


def test_a_reader_that_ends_early_is_no_trouble(folder: Path) -> None:
    script = f"{sys.executable} -m ckpt_cli ls many.pt | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_the_reason_for_which_a_tensor_has_no_statistics_stands_below_the_table(folder: Path) -> None:
    state = {f"layers.{at}.weight": torch.empty(4, device="meta") for at in range(7)}
    torch.save({**state, "b": torch.ones(3)}, folder / "meta.pt")
    for columns in WIDTHS:
        for options in ([], ["--percentiles"]):
            seen = on_terminal(folder, "stats", "meta.pt", *options, columns=columns)
            assert seen.widest <= columns
            said = " ".join(line.strip() for line in seen.lines[-4:])
            assert "layers.0.weight, layers.1.weight" in said
            assert "and 2 more: " in said
            assert seen.text.count("is meta") == 1
    assert on_terminal(folder, "stats", "meta.pt", "-f", "markdown", columns=200).text.count("is meta") == 7
