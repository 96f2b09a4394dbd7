"""Run every command on every file of the tests that was made to harm, and print what costs more than it may.

    python tests/support/every_command.py [--only GLOB] [--commands GLOB] [--every N]

No command may take over 5 s of the processor or 300 MB on a file or folder under 1 MB, print over 1 MB on stderr, end
in a traceback, or with another exit code than 0, 1 or 2. Each runs in a fork of a process that imported what commands
need. Exit 1 if one does.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS / "scanner")]

from ckpt_cli.cli.app import COMMANDS  # noqa: E402
from ckpt_cli.cli.main import run  # noqa: E402
from ckpt_cli.formats import open_checkpoint  # noqa: E402

SECONDS, MEBIBYTES, SAID = 5.0, 300, 1 << 20
"""The most that a command may cost, and the most bytes that it may print on stderr."""

SMALL = 1_000_000
"""Bytes below which a file counts as small."""

GIVEN_UP = 7
"""Seconds of the processor after which a command is stopped."""

LINES = """
ls {f} | ls -l {f} | ls -a {f} | ls -a --json {f} | ls --fold {f} | ls --sort name -f table {f} | ls --sort size {f}
ls --waste {f} | ls --salvage {f} | ls --salvage --json {f} | ls {f} *a* | ls --exclude *a* {f} | ls {f} {f}
info {f} | info --json {f} | info {f} {n} | info {f} * | info {f} {f}
tree {f} | tree --full {f} | tree --bare {f} | tree --depth 1 {f} | tree --json {f}
show {f} | show -a {f} | show --json {f} | show {f} {n} | show --full {f} {n} | show --raw {f} {n} | show {f} {n} -o {o}
ties {f} | ties --equal {f} | ties --equal --json {f}
stats {f} | stats --percentiles --total --json {f} | stats --fold --sort norm {f} | stats --nan {f}
series {f} | series --fold --by change {f} | series --json {f} {f}
check {f} | check --deep {f} | check --deep --json {f} | check -f sarif {f}
hash {f} | hash --algorithm sha256 {f} | hash --json {f}
scan {f} | scan -a {f} | scan --json {f} | scan -f sarif {f} | scan --allow * {f}
diff {f} {f} | diff --stat {f} {f} | diff {f} {e} | diff {e} {f} | diff --json {f} {e} | diff --atol 1e-3 {f} {f}
match {f} {f} | match {f} {e} | match {e} {f} | match --json {f} {e}
set -n {f} {n}=0 | set -n --new {f} new=1 | set {f} {n}=0 -o {o} | set --new {f} new=cat("{n}","{n}") -o {o}
rename -n {f} {n} other | rename -n --add p. {f} | rename --add p. {f} -o {o} | rename -n --sub (a|aa)+$ b {f}
rename -n {f} *=p.* | rename -n {f} --pattern {{x}}.*=a.{{x+1}}.*
rename -n --like {e} {f} | rename -n --json -v --add p. {f}
rm -n {f} {n} | rm -n {f} * | rm {f} {n} -o {o}
keep -n {f} {n} | keep -n {f} * | keep {f} {n} -o {o} | keep -n {f} --root {n}
resize -n {f} {n}=3 | resize {f} {n}=9:normal --optimizer leave -o {o}
cast -n {f} float16 | cast --raw --lossy {f} float16 -o {o}
set -n {f} * --replace nan=0 | tie -n --new {f} {n} second
tie -n {f} {n} {m} | tie {f} {n} {m} -o {o} | untie -n {f} * | untie {f} * -o {o} | untie -n {f} {n}
meta {f} | meta --json {f} | meta -n {f} a=b | compact -n {f} | compact {f} -o {o}
to -n {f} cuda:1 | to {f} cpu -o {o}
undo {f} | undo -n {f} | index {f} | index -n {f}
apply {f} /dev/null -o {o}
avg {f} {f} -o {o}.pt | avg {f} {f} -o {o}.safetensors --rest drop --untie
merge {f} {e} -o {o}.pt | merge {e} {f} -o {o}.safetensors | graft {f} {f} -o {o} | graft {e} {f} --add -o {o}
delta create {f} {e} -o {o} | delta create {e} {f} -o {o} | delta apply {f} {f} -o {o}
mix {f} {f} --method ties --density 0.5 -o {o}.pt
mix {f} {f} --method slerp --t 0.5 --common --untie -o {o}.safetensors
lora resize {f} --rank 1 -o {o} | lora extract {f} {f} --rank 2 -o {o} | lora extract {e} {f} --rank 1 -n -o {o}
lora info {f} | lora info {f} --base {f} | lora merge {f} {f} -o {o}.pt
lora merge {f} {f}:2 -o {o}.safetensors --alpha 1 --partial --untie
dequantize {f} -o {o}.pt | dequantize {f} -o {o}.safetensors --tensors-only --dtype float32
convert {f} {o}.pt | convert {f} {o}.safetensors | convert {f} {o}.npz | convert --tensors-only {f} {o}.safetensors
convert --to dcp {f} {o} | convert --plain {f} {o}.pt | convert --salvage {f} {o}.pt | convert --json {f} {o}.pt
convert --shared clone {f} {o}.safetensors | convert --max-shard 100KB {f} {o} | convert -n {f} {o}.pt
"""
"""Commands: {f} is the file, {n} and {m} are two of its names, {e} is a file of no tensors, {o} is for the output."""

TEMPLATES = [command.split() for line in LINES.splitlines() for command in line.split("|") if command.strip()]


@dataclass(frozen=True)
class Cost:
    """What a command cost."""

    seconds: float
    mebibytes: float
    code: int
    """The exit code; negative for a signal."""
    said: int
    """Bytes on stderr."""
    traceback: bool

    def faults(self) -> Iterator[str]:
        """What is beyond what it may cost."""
        if self.seconds > SECONDS or self.code == -24:
            yield f"{self.seconds:.1f} s"
        if self.mebibytes > MEBIBYTES:
            yield f"{self.mebibytes:.0f} MB"
        if self.said > SAID:
            yield f"{self.said} bytes on stderr"
        if self.traceback or self.code not in (0, 1, 2):
            yield f"exit {self.code}" + ", a traceback" * self.traceback


def _said() -> Path:
    """Return the file that has what a fork prints on stderr."""
    return Path(tempfile.gettempdir()) / f"ckpt-stderr-{os.getpid()}"


def in_fork(work: Callable[[], int], folder: Path, seconds: int = GIVEN_UP) -> Cost:
    """Run a function in a process of its own, in a folder."""
    said = _said()
    child = os.fork()
    if not child:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
            os.chdir(folder)
            with said.open("wb") as err, open(os.devnull, "r+b") as null:
                os.dup2(null.fileno(), 0)
                os.dup2(null.fileno(), 1)
                os.dup2(err.fileno(), 2)
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc(limit=-3)
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    text = said.read_bytes()
    return Cost(
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 1024,
        os.waitstatus_to_exitcode(status),
        len(text),
        b"Traceback (most" in text,
    )


def build_all(folder: Path, chosen: str, every: int) -> int:
    """Write the hostile files of the tests, each into a folder of its own; those that are not small are left out."""
    import test_trace
    import test_walk
    from builders.crowded import BUILDS, plain
    from builders.hostile import CASES

    builds = dict(BUILDS)
    builds |= {f"case {name}": plain(case.build) for name, case in CASES.items()}
    builds |= {f"evasion {name}": plain(lambda data=data: data) for name, data in test_trace.EVASIONS.items()}
    builds |= {f"container {name}": plain(make) for name, (make, _) in test_walk.CONTAINERS.items()}
    builds |= {f"crash {path.name}": plain(path.read_bytes) for path in sorted((TESTS / "crashes").iterdir())}
    names = [name for name in builds if any(fnmatch.fnmatch(name, glob) for glob in chosen.split("|"))][::every]
    for name in names:
        place = folder / name.replace("/", "_")
        place.mkdir()
        builds[name](place)
        if size_of(place) >= SMALL:
            print(f"{name}: {size_of(place)} bytes are no small file")
            shutil.rmtree(place)
    return 0


def size_of(path: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def names_in(path: Path) -> tuple[str, str]:
    """Two names of a file, or what may be such."""
    reader, writer = os.pipe()

    def work() -> int:
        os.close(reader)
        names = [tensor.name for tensor in open_checkpoint(str(path)).tensors]
        os.write(writer, "\n".join((*names[:1], *names[-1:]))[:4000].encode("utf-8", "surrogatepass"))
        return 0

    in_fork(work, path.parent)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        names = pipe.read().decode("utf-8", "replace").split("\n")
    return (names[0] or "w0", names[-1] or "w1") if "\0" not in "".join(names) else ("w0", "w1")


def warm_up(folder: Path) -> None:
    """Import what commands import: it is not what a file costs."""
    import importlib

    import ml_dtypes  # noqa: F401
    import safetensors.numpy  # noqa: F401

    for command in COMMANDS:
        importlib.import_module(f"ckpt_cli.cli.{command}")
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    sample = TESTS.parent / "sample_checkpoints" / "mlp.pt"
    for template in TEMPLATES:
        words = [word.format(f=sample, n="2.bias", m="0.bias", e=sample, o=folder / "out") for word in template]
        if template[0] not in ("undo", "index"):
            run(words)
        shutil.rmtree(folder / "out", ignore_errors=True)
        for made in folder.glob("out*"):
            made.unlink()
    for number, old in enumerate(kept, 1):
        os.dup2(old, number)
    gc.collect()
    gc.freeze()


def remove(base: Path) -> None:
    """Remove what a command wrote."""
    for made in base.glob("out*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def tried(base: Path, chosen: str) -> Iterator[tuple[str, str, Cost]]:
    """Run the commands on each file below a folder; yields its name, the command and the cost."""
    empty = base / "empty.safetensors"
    empty.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for place in sorted((base / "files").iterdir()):
        within = list(place.iterdir())
        path = within[0] if len(within) == 1 else place
        first, last = names_in(path)
        for template in TEMPLATES:
            label = " ".join(template)
            if not any(fnmatch.fnmatch(label, glob) for glob in chosen.split("|")):
                continue
            words = [word.format(f=path, n=first, m=last, e=empty, o=base / "out") for word in template]
            cost = in_fork(lambda words=words: run(words), place)
            remove(base)
            if any(cost.faults()):  # once more: on a busy machine each second of the processor does less
                again = in_fork(lambda words=words: run(words), place)
                remove(base)
                cost = min(cost, again, key=lambda each: each.seconds)
            yield place.name, label, cost


def main() -> int:
    """Try all, and print what costs too much, and the costliest commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="names of files, several with | between")
    parser.add_argument("--commands", default="*", help="commands with their options, several with | between")
    parser.add_argument("--every", type=int, default=1, help="try one of every N files")
    options = parser.parse_args()
    bad = count = 0
    worst: dict[str, tuple[float, float, str]] = {}
    with tempfile.TemporaryDirectory(prefix="ckpt-") as top:
        base = Path(top)
        files = base / "files"
        files.mkdir()
        if in_fork(lambda: build_all(files, options.only, options.every), files, 600).code:  # torch stays in the fork
            sys.exit(_said().read_text())
        warm_up(base)
        for name, label, cost in tried(base, options.commands):
            count += 1
            worst[label] = max(worst.get(label, (0, 0, "")), (cost.seconds, cost.mebibytes, name))
            if faults := ", ".join(cost.faults()):
                bad += 1
                print(f"{name}: ckpt {label}: {faults}", flush=True)
    for label, (seconds, mebibytes, name) in sorted(worst.items(), key=lambda item: -item[1][0])[:20]:
        print(f"costliest: ckpt {label}: {seconds:.1f} s, {mebibytes:.0f} MB, {name}")
    print(f"{count} commands, {bad} beyond what they may cost")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
