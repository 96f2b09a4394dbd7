"""Commands and chosen tests without what only POSIX systems or Linux have (`tests/support/other_system.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import other_system
import pytest
from conftest import SAMPLES

ROOT = Path(__file__).parent.parent.parent

COMMANDS = """
ls mlp.pt
ls train.pt --json
show mlp.pt 0.weight[0]
show tied.safetensors
stats train.pt --json
hash tied.pt
scan train.pt
check mlp.safetensors --deep
diff mlp.pt mlp.safetensors
set mlp.pt 0.bias[0]=7
set tied.pt 0.weight[0,0]=2 --backup
undo tied.pt
rename mlp.pt --add net
rename mlp.safetensors --add a.long.name.that.makes.the.header.longer
cast train.pt bfloat16 -o cast.pt
convert mlp.pt out.safetensors
convert out.safetensors out --to hf --max-shard 200B
set out net.0.bias=1 net.2.bias=2
rm out net.2.bias
convert tied.pt dcp --to dcp
convert mlp.pt out.npz
ls gone.pt
ls out.npz
"""
"""Commands of every kind, one after another in one folder."""

SCRIPT = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "bare":
    import other_system
    other_system.make_bare()
from ckpt_cli.cli.main import run
answers = []
for line in sys.stdin.read().split("\\n"):
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line.split())
        sys.stdout.flush()
        sys.stderr.flush()
    answers.append((line, code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()))
print(json.dumps(answers))
"""


def answers(folder: Path, system: str) -> tuple[list[object], dict[str, bytes]]:
    """What the commands say, and the files that they leave."""
    folder.mkdir()
    for sample in SAMPLES.glob("*.*t*s"), SAMPLES.glob("*.pt"):
        for path in sample:
            shutil.copy(path, folder)
    call = [sys.executable, "-c", SCRIPT, str(Path(other_system.__file__).parent), system]
    done = subprocess.run(
        call, cwd=folder, input=COMMANDS.strip(), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return json.loads(done.stdout), files


def test_commands_answer_and_write_the_same_without_what_only_posix_or_linux_has(tmp_path: Path) -> None:
    expected, files = answers(tmp_path / "here", "whole")
    found, left = answers(tmp_path / "there", "bare")
    assert found == expected
    assert left == files
    assert not [name for name in left if "ckpt-tmp" in name or "ckpt-journal" in name]


CHOSEN = {
    "files": "files/test_atomic.py files/test_journal.py files/test_patches.py files/test_hidden_files.py "
    "files/test_long_names.py",
    "the rest": "formats/test_npy.py formats/test_registry.py formats/test_tar.py edits/test_undo.py "
    "edits/test_meta_set.py",
}

LACKING = (
    "permissions",
    "flock",
    "another_user",
    "another_process",
    "living_process",
    "is_locked",
    "second_name",
    "holes",
)
"""Words in the names of tests about what such a system does not have."""


@pytest.mark.parametrize("chosen", CHOSEN)
def test_chosen_tests_pass_without_what_only_posix_or_linux_has(chosen: str, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "other_system"]
    call += ["-k", " and ".join(f"not {word}" for word in LACKING), f"--basetemp={tmp_path / 'own'}"]
    call += [f"tests/{name}" for name in CHOSEN[chosen].split()]
    path = os.pathsep.join([str(ROOT), str(Path(other_system.__file__).parent)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(call, cwd=ROOT, env={**kept, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
