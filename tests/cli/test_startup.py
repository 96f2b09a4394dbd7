"""What a command costs: modules imported, bytes read and written, memory; all counted, nothing timed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.files import SIZES, write_many, write_sparse_legacy, write_sparse_pt, write_sparse_safetensors
from builders.pickles import Ops, built, call, named, pickled
from safetensors.torch import save_file

from ckpt_cli.cli.app import COMMANDS

NAME = "layers.7.part1.weight"
HEAVY = {"torch", "numpy", "rich", "pydantic", "ml_dtypes", "safetensors", "tabulate", "importlib.metadata"}
MEGABYTE = 1 << 20

SPY = """
import json, mmap, os, sys
from ckpt_cli.cli.main import run

read = 0
real_pread = os.pread

def pread(fd, nbytes, offset):
    global read
    data = real_pread(fd, nbytes, offset)
    read += len(data)
    return data

def refuse(*args, **options):
    raise AssertionError("mapped")

os.pread = pread
if os.environ.get("NO_MAP"):
    mmap.mmap = refuse
written_before = int(open("/proc/self/io").read().split("wchar:")[1].split()[0])
code = run(sys.argv[1:])
sys.stdout.flush()
written = int(open("/proc/self/io").read().split("wchar:")[1].split()[0]) - written_before
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
facts = {"code": code, "read": read, "written": written, "peak": peak, "modules": sorted(sys.modules)}
open(os.environ["FACTS"], "w").write(json.dumps(facts))
"""


def spied(folder: Path, *arguments: str, may_map: bool = False) -> dict[str, Any]:
    """Run a command in a process of its own; what it imported, read, wrote and held."""
    facts = folder / "facts.json"
    environment = {**os.environ, "FACTS": str(facts), "NO_MAP": "" if may_map else "1"}
    subprocess.run([sys.executable, "-c", SPY, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(facts.read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse checkpoints of 200 tensors: 1 GB and 20 GB, and one of 10,000 tensors."""
    folder = tmp_path_factory.mktemp("large")
    for name, nbytes in SIZES.items():
        write_sparse_pt(folder / f"{name}.pt", nbytes)
        write_sparse_safetensors(folder / f"{name}.safetensors", nbytes)
        write_sparse_legacy(folder / f"{name}.legacy", nbytes)
    write_many(folder / "10k.pt", 10_000)
    return folder


def table_of_contents(path: Path) -> int:
    """Bytes of what names a file's tensors: a zip's directory and pickle, or a header."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return 8 + int.from_bytes(file.read(8), "little")
    with zipfile.ZipFile(path) as archive:
        directory = path.stat().st_size - archive.start_dir
        pickle = next(info.file_size for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    return directory + pickle


FILES = ["1GB.pt", "20GB.pt", "1GB.safetensors", "20GB.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_ls_imports_nothing_heavy_reads_only_the_contents_and_stays_small(folder: Path, name: str) -> None:
    facts = spied(folder, "ls", "-l", str(folder / name))
    assert facts["code"] == 0
    assert not HEAVY & set(facts["modules"])
    assert facts["read"] <= table_of_contents(folder / name) + 2048
    assert facts["peak"] <= 45 * MEGABYTE


@pytest.mark.parametrize("command", ["info", "ties", "tree"])
@pytest.mark.parametrize("name", ["20GB.pt", "20GB.safetensors"])
def test_info_ties_and_tree_read_only_the_contents_too(folder: Path, command: str, name: str) -> None:
    facts = spied(folder, command, str(folder / name))
    assert facts["code"] == 0
    assert not {"torch", "numpy", "rich"} & set(facts["modules"])
    assert facts["read"] <= table_of_contents(folder / name) + 2048
    assert facts["peak"] <= 45 * MEGABYTE


@pytest.mark.parametrize("name", ["1GB.legacy", "20GB.legacy"])
def test_a_legacy_stream_is_listed_as_cheaply_at_any_size(folder: Path, name: str) -> None:
    facts = spied(folder, "ls", "-l", str(folder / name))
    assert facts["code"] == 0
    assert not HEAVY & set(facts["modules"])
    assert facts["read"] <= 512 * 1024  # its pickles, read in growing pieces, and eight bytes a storage
    assert facts["peak"] <= 40 * MEGABYTE


def test_show_and_set_in_20_gb_of_a_legacy_stream_touch_a_few_bytes(folder: Path) -> None:
    path = str(folder / "20GB.legacy")
    assert spied(folder, "show", path, f"{NAME}[999,-1]")["read"] <= 512 * 1024
    facts = spied(folder, "set", path, f"{NAME}[3,-1]=100")
    assert facts["written"] <= 64 * 1024
    assert facts["peak"] <= 60 * MEGABYTE


def test_a_pickle_of_gigabytes_is_listed_without_reading_its_arrays(tmp_path: Path) -> None:
    nbytes = 3 << 30
    content = Ops(b"\x8e" + struct.pack("<Q", nbytes) + b"HOLE")
    dtype = built(call("numpy.dtype", "u1", 0, 1), (3, "|", None, None, None, -1, -1, 0))
    made = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), (0,), b"b")
    root = {"a": built(made, (1, (nbytes,), dtype, False, content)), "end": 7}
    head, tail = pickled(root, 4).split(b"HOLE")
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.write(head)
        file.seek(nbytes, 1)
        file.write(tail)
    facts = spied(tmp_path, "ls", "-a", str(path), may_map=True)
    assert facts["code"] == 0
    assert facts["read"] <= 32 * MEGABYTE
    assert facts["peak"] <= 60 * MEGABYTE


@pytest.mark.parametrize("name", ["20GB.pt", "20GB.safetensors"])
def test_check_reads_the_contents_and_the_beginnings_of_records(folder: Path, name: str) -> None:
    facts = spied(folder, "check", str(folder / name))
    assert facts["code"] == 0
    assert not (HEAVY | {"concurrent.futures.thread"}) & set(facts["modules"])
    assert facts["read"] <= 4 * table_of_contents(folder / name) + 200 * 6144
    assert facts["peak"] <= 60 * MEGABYTE


def test_check_of_every_byte_stays_small_too(folder: Path) -> None:
    facts = spied(folder, "check", "--deep", str(folder / "1GB.safetensors"))
    assert facts["code"] == 0
    assert not {"torch", "ml_dtypes"} & set(facts["modules"])
    assert facts["read"] <= 16 * MEGABYTE  # by pread, as what maps nothing; the rest goes into two buffers
    assert facts["peak"] <= 120 * MEGABYTE


def test_a_table_needs_tabulate_and_nothing_else(folder: Path) -> None:
    facts = spied(folder, "ls", "-f", "table", str(folder / "20GB.pt"))
    assert set(facts["modules"]) & HEAVY == {"tabulate", "importlib.metadata"}
    assert facts["peak"] <= 45 * MEGABYTE


def test_ten_thousand_tensors_fit_in_the_same_memory(folder: Path) -> None:
    facts = spied(folder, "ls", str(folder / "10k.pt"), may_map=True)
    assert not HEAVY & set(facts["modules"])
    assert facts["peak"] <= 60 * MEGABYTE


def test_only_the_module_of_the_command_is_imported(folder: Path) -> None:
    facts = spied(folder, "ls", str(folder / "1GB.pt"))
    assert {name for name in facts["modules"] if name.startswith("ckpt_cli.cli.")} == {
        "ckpt_cli.cli.read_again",
        "ckpt_cli.cli.boundary",
        "ckpt_cli.cli.app",
        "ckpt_cli.cli.ls",
        "ckpt_cli.cli.main",
        "ckpt_cli.cli.options",
        "ckpt_cli.cli.repeated_options",
        "ckpt_cli.cli.output",
        "ckpt_cli.cli.several",
        "ckpt_cli.cli.terminal",
        "ckpt_cli.cli.typer_parts",
    }


@pytest.mark.parametrize("words", [("--help",), ("help",), ("-h",)], ids=" ".join)
def test_the_first_help_imports_no_command_and_nothing_of_rich(tmp_path: Path, words: tuple[str, ...]) -> None:
    facts = spied(tmp_path, *words)
    assert facts["code"] == 0
    modules = set(facts["modules"])
    assert not {f"ckpt_cli.cli.{name}" for name in COMMANDS} & modules
    assert not {name for name in modules if name.startswith(("typer.rich", "typer._rich", "rich"))}
    assert not HEAVY & modules


ROOMS: dict[str, dict[str, int]] = {
    "ls small.pt": {"": 13, "cli": 11, "render": 6, "files": 12, "model": 1, "formats": 9, "ops": 3, "pickles": 26},
    "ls small.safetensors": {"": 12, "cli": 11, "render": 6, "files": 12, "model": 1, "formats": 6, "ops": 3},
    "show small.pt": {"": 14, "cli": 10, "render": 7, "files": 12, "model": 1, "formats": 9, "ops": 2, "pickles": 26,
                      "arrays": 3},
    "set -n small.pt 0.bias[0]=1": {"": 16, "cli": 11, "render": 4, "files": 23, "model": 3, "formats": 12, "ops": 4,
                                    "pickles": 26, "arrays": 4, "edits": 9, "parallel": 1},
    "info small.pt": {"": 14, "cli": 12, "render": 6, "files": 12, "model": 1, "formats": 11, "ops": 7, "pickles": 26,
                      "parallel": 1},
    "--help": {"": 10, "cli": 7, "render": 2, "files": 5, "model": 1},
}  # fmt: skip
"""Commands, and the number of modules that they import of each room at the most: a module takes 0.3 ms."""

BESIDES = {
    "ls small.pt": "array bisect contextvars dataclasses mmap struct",
    "ls small.safetensors": "contextvars dataclasses json json.decoder json.encoder json.scanner mmap",
    "--help": "contextvars dataclasses mmap typer._click._textwrap",
}
"""Commands, and the modules that they import besides ckpt's own, typer's, and those that a Typer command has anyway."""

IMPORTS = """
import __future__, gc, sys, typer, typer.main, typer.core, typer._click.decorators
before = set(sys.modules)
from ckpt_cli.cli.main import run
assert run(sys.argv[2:]) == 0
open(sys.argv[1], "w").write(" ".join(set(sys.modules) - before))
"""


def imported(folder: Path, line: str) -> set[str]:
    """Return the modules that a command line imports besides those of a Typer command that does nothing."""
    torch.save({"0.weight": torch.ones(8, 4), "0.bias": torch.ones(8)}, folder / "small.pt")
    save_file({"0.weight": torch.ones(8, 4)}, folder / "small.safetensors")
    call = [sys.executable, "-c", IMPORTS, folder / "modules", *line.split()]
    subprocess.run(call, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return set((folder / "modules").read_text().split())


@pytest.mark.parametrize("line", ROOMS)
def test_the_start_of_a_command_imports_no_more_modules_of_any_room(tmp_path: Path, line: str) -> None:
    own = [name.split(".") for name in imported(tmp_path, line) if name.split(".")[0] == "ckpt_cli"]
    counts = Counter(parts[1] if len(parts) > 2 else "" for parts in own)
    assert {room: count for room, count in counts.items() if count > ROOMS[line].get(room, 0)} == {}


@pytest.mark.parametrize("line", BESIDES)
def test_the_start_of_a_command_imports_no_more_of_other_packages(tmp_path: Path, line: str) -> None:
    others = {name for name in imported(tmp_path, line) if name.split(".")[0] != "ckpt_cli" and name[0] != "_"}
    assert others <= set(BESIDES[line].split())


@pytest.mark.parametrize("module", ["typer", "ckpt_cli.cli.boundary", "ckpt_cli.cli.ls", "ckpt_cli.formats.registry"])
def test_an_interrupt_while_modules_are_imported_is_no_error(folder: Path, module: str) -> None:
    code = (
        f"import sys\nclass Stop:\n    def find_spec(self, name, *_):\n        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\nsys.meta_path.insert(0, Stop())\nimport ckpt_cli.__main__"
    )
    call = [sys.executable, "-c", code, "ls", folder / "1GB.pt"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["20GB.pt", "20GB.safetensors"])
def test_show_of_one_element_reads_one_element(folder: Path, name: str) -> None:
    facts = spied(folder, "show", str(folder / name), f"{NAME}[999,-1]")
    assert facts["code"] == 0
    assert facts["read"] <= table_of_contents(folder / name) + 2048
    assert "torch" not in facts["modules"]
    assert facts["peak"] <= 60 * MEGABYTE


@pytest.mark.parametrize("name", ["20GB.pt", "20GB.safetensors"])
def test_show_of_a_large_tensor_touches_only_its_corners(folder: Path, name: str) -> None:
    facts = spied(folder, "show", str(folder / name), NAME, may_map=True)
    assert facts["code"] == 0
    assert facts["peak"] <= 60 * MEGABYTE


@pytest.mark.parametrize("name", ["20GB.pt", "20GB.safetensors"])
def test_set_of_one_element_in_20_gb_writes_a_few_bytes(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    facts = spied(folder, "set", str(folder / name), f"{NAME}[3,-1]=100")
    assert facts["code"] == 0
    assert facts["written"] <= 64 * 1024
    assert facts["peak"] <= 60 * MEGABYTE
    assert "torch" not in facts["modules"]
    assert (folder / name).stat().st_size == size


def test_torch_reads_what_set_wrote_into_20_gb(folder: Path) -> None:
    path = str(folder / "20GB.pt")
    assert spied(folder, "set", path, f"{NAME}[5,6]=7", "layers.0.part0.weight[-1,-1]=-2")["code"] == 0
    state = torch.load(path, mmap=True)
    assert state[NAME][5, 6] == 7
    assert state["layers.0.part0.weight"][-1, -1] == -2


def test_the_crc_of_a_large_record_is_right_after_set(tmp_path: Path) -> None:
    path = tmp_path / "one.pt"
    write_sparse_pt(path, SIZES["20GB"] // 10)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("one/data/29")
        start_dir = archive.start_dir
    zeros = _crc_of_range(path, info.file_size, b"")
    central, descriptor = _places_of_crc(path, info, start_dir)
    with path.open("r+b") as file:  # torch wrote 0 for "not computed"; write what it would compute
        for place in (central, descriptor):
            file.seek(place)
            file.write(struct.pack("<L", zeros))
    facts = spied(tmp_path, "set", str(path), f"{NAME}[0,0]=100")
    assert facts["written"] <= 64 * 1024
    expected = _crc_of_range(path, info.file_size, struct.pack("<f", 100))
    with path.open("rb") as file:
        for place in (central, descriptor):
            file.seek(place)
            assert struct.unpack("<L", file.read(4)) == (expected,)


def _crc_of_range(path: Path, nbytes: int, begin: bytes) -> int:
    """The CRC of a record that is zeros but for its first bytes."""
    crc = zlib.crc32(begin)
    left = nbytes - len(begin)
    zeros = bytes(MEGABYTE)
    while left:
        crc = zlib.crc32(zeros[: min(left, MEGABYTE)], crc)
        left -= min(left, MEGABYTE)
    return crc


def _places_of_crc(path: Path, info: zipfile.ZipInfo, start_dir: int) -> tuple[int, int]:
    """Where the directory and the descriptor after the data have a record's CRC."""
    with path.open("rb") as file:
        file.seek(start_dir)
        directory = file.read()
        name = info.filename.encode()
        central = start_dir + directory.index(name) - 46 + 16
        file.seek(info.header_offset)
        header = file.read(30)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        end = info.header_offset + 30 + name_length + extra_length + info.file_size
        file.seek(end)
        assert file.read(4) == b"PK\7\10"
    return central, end + 4
