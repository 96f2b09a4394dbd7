"""The files of `ckpt series`: the order of a run, names beside files, and files that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

from ckpt_cli.render.text import sparkline

W = torch.ones(3)


def order_of(ckpt: Ckpt, *arguments: object) -> tuple[str, list[tuple[str, object]]]:
    """What the run is ordered by, and each file with its step."""
    done = ckpt("series", "--json", *arguments)
    assert done.code == 0, done.err
    data = json.loads(done.out)
    return data["ordered_by"], [(os.path.relpath(file["path"]), file["step"]) for file in data["files"]]


@pytest.mark.parametrize(
    "state",
    [
        lambda step: {"state_dict": {"w": W}, "global_step": step, "epoch": 0},
        lambda step: {"model": {"w": W}, "step": torch.tensor(step)},
        lambda step: {"model": {"w": W}, "iteration": np.int64(step)},
        lambda step: {"model": {"w": W}, "optimizer_history": [{"num_updates": step}]},
    ],
    ids=["lightning", "tensor", "numpy", "fairseq"],
)
def test_the_steps_in_the_files_order_a_run(here: Path, ckpt: Ckpt, state: Any) -> None:
    for name, step in (("a", 300), ("b", 20), ("c", 1000)):
        torch.save(state(step), f"{name}.pt")
    assert order_of(ckpt, "a.pt", "b.pt", "c.pt") == ("step", [("b.pt", 20), ("a.pt", 300), ("c.pt", 1000)])


def test_metadata_of_safetensors_may_say_the_step(here: Path, ckpt: Ckpt) -> None:
    for name, step in (("a", "12"), ("b", "3")):
        save_file({"w": W}, f"{name}.safetensors", metadata={"step": step})
    assert order_of(ckpt, "a.safetensors", "b.safetensors")[1] == [("b.safetensors", 3), ("a.safetensors", 12)]


def test_the_trainers_state_or_the_folders_name_orders_the_folders_of_a_run(here: Path, ckpt: Ckpt) -> None:
    for step in (500, 1000, 1500):
        folder = Path(f"checkpoint-{step}")
        folder.mkdir()
        save_file({"w": W}, folder / "model.safetensors")
    folders = [f"checkpoint-{step}" for step in (1000, 1500, 500)]
    expected = [(f"checkpoint-{step}/model.safetensors", step) for step in (500, 1000, 1500)]
    assert order_of(ckpt, *folders) == ("step", expected)
    assert order_of(ckpt, *(f"{folder}/model.safetensors" for folder in folders)) == ("step", expected)
    Path("checkpoint-500/trainer_state.json").write_text(json.dumps({"global_step": 7000, "epoch": 1.5}))
    assert order_of(ckpt, *folders)[1][-1] == ("checkpoint-500/model.safetensors", 7000)


def test_epochs_order_a_run_whose_files_do_not_say_their_steps(here: Path, ckpt: Ckpt) -> None:
    for name, epoch in (("a", 3), ("b", 1), ("c", 2)):
        torch.save({"w": W, "epoch": epoch}, f"{name}.pt")
    assert order_of(ckpt, "a.pt", "b.pt", "c.pt") == ("epoch", [("b.pt", None), ("c.pt", None), ("a.pt", None)])


def test_names_in_natural_order_decide_where_not_all_say_their_steps(here: Path, ckpt: Ckpt) -> None:
    for name in ("run-10", "run-9", "run-100"):
        torch.save({"w": W, **({"step": 1} if name == "run-100" else {})}, f"{name}.pt")
    assert order_of(ckpt, "run-10.pt", "run-100.pt", "run-9.pt") == (
        "name",
        [("run-9.pt", None), ("run-10.pt", None), ("run-100.pt", 1)],
    )


def test_steps_that_are_no_numbers_do_not_count(here: Path, ckpt: Ckpt) -> None:
    for name, step in (("a", "many"), ("b", True), ("c", [3]), ("d", float("nan")), ("e", 1 << 80)):
        torch.save({"w": W, "step": step}, f"{name}.pt")
    by, files = order_of(ckpt, *(f"{name}.pt" for name in "edcba"))
    assert by == "name"
    assert files == [(f"{name}.pt", None) for name in "abcde"]


def test_an_argument_is_a_name_of_the_first_file_else_a_file_as_in_other_commands(here: Path, ckpt: Ckpt) -> None:
    for number in range(2):
        torch.save({"w": W, "b.x": W, "b.y": W, "1.pt": W * 2}, f"{number}.pt")
    done = ckpt("series", "0.pt", "b.*", "./1.pt", "w", "0.pt")
    assert [line.split("\t")[0] for line in done.lines] == ["b.x"] * 2 + ["b.y"] * 2 + ["w"] * 2
    assert [line.split("\t")[0] for line in ckpt("series", "0.pt", "1.pt").lines] == ["1.pt"]
    Path("2.pt").symlink_to("1.pt")
    assert len(ckpt("series", "0.pt", "2.pt", "w").lines) == 2
    missing = ckpt("series", "w", "b")
    assert (missing.code, missing.err) == (2, "ckpt: w: No such file or directory\n")


def test_a_path_that_leads_nowhere_does_not_stop_the_others(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": W}, "0.pt")
    done = ckpt("series", "0.pt", "2.pt")
    assert (done.code, done.err, len(done.lines)) == (2, "ckpt: 2.pt: No such file or directory\n", 1)


def test_the_folder_of_a_run_stands_for_its_checkpoints(here: Path, ckpt: Ckpt) -> None:
    for step in (90, 500, 1000):
        Path(f"out/checkpoint-{step}").mkdir(parents=True)
        save_file({"w": W * step}, f"out/checkpoint-{step}/model.safetensors")
        Path("pl").mkdir(exist_ok=True)
        torch.save({"state_dict": {"w": W}, "global_step": step}, f"pl/epoch=0-step={step}.ckpt")
    torch.save({"optimizer": {}}, "out/optimizer.pt")
    folders = [(f"out/checkpoint-{step}/model.safetensors", step) for step in (90, 500, 1000)]
    assert order_of(ckpt, "out") == ("step", folders)
    assert order_of(ckpt, "out/", "w") == ("step", folders)
    assert order_of(ckpt, "pl")[1] == [(f"pl/epoch=0-step={step}.ckpt", step) for step in (90, 500, 1000)]
    assert order_of(ckpt, "out/checkpoint-90", "pl")[1][0] == folders[0]
    save_file({"w": W}, "pl/a-00001-of-00001.safetensors")
    assert [path for path, _ in order_of(ckpt, "pl")[1]] == ["pl"]  # a set of shards is one checkpoint


def test_a_glob_that_no_shell_expanded_stands_for_what_it_matches(here: Path, ckpt: Ckpt) -> None:
    for step in (90, 500, 1000):
        Path(f"run/checkpoint-{step}").mkdir(parents=True)
        torch.save({"w": W, "v": W}, f"run/checkpoint-{step}/model.pt")
    whole = [(f"run/checkpoint-{step}/model.pt", step) for step in (90, 500, 1000)]
    for glob in ("run/checkpoint-*", "run/checkpoint-*/model.pt", "r?n/*/*.pt", "./run/checkpoint-[!x]*", "ru*"):
        assert order_of(ckpt, glob) == ("step", whole)
    assert order_of(ckpt, "run/checkpoint-*00", "w") == ("step", whole[1:])
    assert order_of(ckpt, "run/checkpoint-90", "run/checkpoint-?00", "w") == ("step", whole[:2])
    assert {line.split("\t")[0] for line in ckpt("series", "run/*", "w*").lines} == {"w"}
    done = ckpt("series", "run/none-*")
    assert (done.code, done.err) == (2, "ckpt: run/none-*: No such file or directory\n")


def test_a_long_run_needs_few_open_files(here: Path) -> None:
    for number in range(130):
        torch.save({"w": W * (number + 1)}, f"{number}.pt")
    run = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100));"
        "from ckpt_cli.cli.main import main; main()"
    )
    files = [f"{number}.pt" for number in range(130)]
    done = subprocess.run([sys.executable, "-c", run, "series", *files], capture_output=True, text=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr, [row[2] for row in rows]) == (0, "", files)
    assert [float(row[6]) for row in rows[1:]] == pytest.approx([1 / number for number in range(1, 130)])


def test_a_name_need_not_be_in_every_file(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": W}, "0.pt")
    torch.save({"w": W, "new": W}, "1.pt")
    assert [line.split("\t")[2] for line in ckpt("series", "0.pt", "1.pt", "new").lines] == ["1.pt"]


def test_a_file_that_cannot_be_opened_does_not_stop_the_others(here: Path, ckpt: Ckpt) -> None:
    for number in range(3):
        torch.save({"w": W * number}, f"{number}.pt")
    Path("1.pt").write_text("not a checkpoint")
    done = ckpt("series", "--json", "0.pt", "1.pt", "2.pt")
    assert done.code == 2
    assert done.err == "ckpt: 1.pt: this looks like a text file\n"
    files = json.loads(done.out)["files"]
    assert [(file["path"], file["error"] is None) for file in files] == [
        ("0.pt", True),
        ("2.pt", True),
        ("1.pt", False),
    ]
    for number in (0, 2):
        Path(f"{number}.pt").write_text("nor this")
    done = ckpt("series", "0.pt", "1.pt", "2.pt")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 3)


def test_a_file_whose_values_cannot_be_read_is_left_out_and_said(here: Path, ckpt: Ckpt) -> None:
    for number in range(3):
        np.savez_compressed(f"{number}.npz", w=np.arange(300_000.0) + number, v=np.ones(3))
    data = bytearray(Path("1.npz").read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = b"\xff" * 400
    Path("1.npz").write_bytes(data)
    done = ckpt("series", "0.npz", "1.npz", "2.npz")
    assert done.code == 2
    assert done.err.startswith("ckpt: 1.npz: ")
    assert len(done.err.splitlines()) == 1
    rows = [line.split("\t") for line in done.lines]
    assert [(row[0], row[2], row[6]) for row in rows] == [
        (name, f"{number}.npz", "") for name in ("w", "v") for number in (0, 2)
    ]


def test_the_course_is_drawn_in_ascii_where_the_terminal_is_not_utf_8(here: Path, shell: Ckpt, ckpt: Ckpt) -> None:
    for number, scale in enumerate((1, 2, float("nan"), 8)):
        torch.save({"w": W * scale, **({"late": W} if number else {})}, f"{number}.pt")
    files = [f"{number}.pt" for number in range(4)]
    assert "▁▂!█" in ckpt("series", "-f", "table", *files).out
    done = shell("series", "-f", "table", *files, PYTHONIOENCODING="ascii")
    assert done.out.isascii()
    assert "_-!@" in done.out
    assert ".___" in done.out
    assert shell("stats", "-f", "table", "0.pt", PYTHONIOENCODING="ascii").out.isascii()


def test_by_chooses_what_is_drawn(here: Path, ckpt: Ckpt) -> None:
    for number, values in enumerate(([1.0, -9.0], [1.0, 2.0], [3.0, 5.0])):
        torch.save({"w": torch.tensor(values)}, f"{number}.pt")
    files = [f"{number}.pt" for number in range(3)]

    def cells(by: str) -> list[str]:
        return ckpt("series", "-f", "table", "--by", by, *files).lines[2].split()

    assert cells("max") == ["w", "[2]", "9", "5", "1.612", "2.pt", "0", "█▁▄"]
    assert cells("change") == ["w", "[2]", "1.215", "1.612", "1.612", "2.pt", "0", "·▁█"]
    assert ckpt("series", "--by", "mode", *files).code == 2


def test_a_long_course_is_drawn_in_bounded_width_and_keeps_what_stands_out() -> None:
    values: list[float | None] = [0.0] * 1000
    values[500] = 5.0
    values[900] = float("nan")
    drawn = sparkline(values)
    assert len(drawn) == 60
    assert drawn.count("█") == drawn.count("!") == 1
    assert sparkline([1e308, -1e308, None]) == "█▁·"
    assert sparkline([]) == ""
