"""Run `ckpt` on damaged files, in processes of their own, and tell what must not happen.

    python tests/support/fuzz.py --mutations 20000 [--seed 1]
    python tests/support/fuzz.py --serve

With `--serve` it tries what it is asked for, in a fork of a process that has run all commands, and in another one where
that dies.
What must not happen: a traceback, a bug that says so, more than one line of trouble, an import of torch, a file that
nobody asked for, over 300 MB of memory, over 5 seconds. What did goes to `tests/crashes/`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from in_memory import MEMORY
from mutations import mutate

HERE = Path(__file__).parent.parent
SAMPLES = sorted(
    [
        *HERE.parent.joinpath("sample_checkpoints").glob("*.*t*"),
        *(sample for sample in HERE.joinpath("samples").glob("*.*") if sample.suffix != ".py"),
    ],
    key=lambda sample: sample.name,
)
CRASHES = HERE / "crashes"

SECONDS = 5
PEAK = 300 << 20
BATCH = 250
"""Damaged files that one process is given."""

COMMANDS = (
    ("ls", "-l", "-a", "--json", "{file}"),
    ("show", "{file}"),
    ("info", "{file}"),
    ("ties", "--equal", "{file}"),
    ("set", "{file}", "*=0", "-o", "{out}"),
    ("ls", "--fold", "--waste", "{file}"),
    ("check", "--deep", "{file}"),
    ("stats", "--total", "{file}"),
    ("hash", "{file}"),
    ("diff", "{file}", "{file}"),
    ("match", "{file}", "{file}"),
)


@dataclass(frozen=True)
class Batch:
    """Some damaged versions of one file."""

    sample: Path
    seed: int
    begin: int
    count: int
    every: bool
    """Whether each file meets every command, rather than the first and one more."""


def run_batch(batch: Batch) -> list[str]:
    """The problems of a batch, found in a forked process."""
    return in_fork(_problems, batch)


def in_fork(work: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """The problems that some work finds in a forked process, and those of the process itself."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        problems = work(*arguments) + _problems_of_process(arguments)
        with open(theirs, "w", encoding="utf-8") as pipe:
            json.dump(problems, pipe)
        os._exit(0)
    os.close(theirs)
    with open(ours, encoding="utf-8") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        return [f"{arguments}: the process died: {status}"]
    found: list[str] = json.loads(answer)
    return found


def _problems(batch: Batch) -> list[str]:
    data = batch.sample.read_bytes()
    problems = []
    with tempfile.TemporaryDirectory(prefix="ckpt-fuzz-", dir=MEMORY) as folder:
        for number in range(batch.begin, batch.begin + batch.count):
            damaged = mutate(data, f"{batch.sample.name}/{batch.seed}/{number}")
            commands = COMMANDS if batch.every else (COMMANDS[0], COMMANDS[1 + number % (len(COMMANDS) - 1)])
            for problem in try_file(damaged, Path(folder), commands):
                problems.append(f"{batch.sample.name} seed {batch.seed} number {number}: {problem}")
                CRASHES.mkdir(exist_ok=True)
                (CRASHES / f"{batch.sample.stem}-{batch.seed}-{number}").write_bytes(damaged)
    return problems


def _problems_of_process(arguments: Sequence[Any]) -> list[str]:
    problems = ["torch was imported"] if "torch" in sys.modules else []
    with open("/proc/self/status", encoding="ascii") as status:
        peak = int(status.read().split("VmHWM:")[1].split()[0]) << 10
    if peak > PEAK:
        problems.append(f"{arguments}: {peak >> 20} MB")
    return problems


def try_file(content: bytes, folder: Path, commands: tuple[tuple[str, ...], ...] = COMMANDS) -> list[str]:
    """What goes wrong with one file and some commands."""
    file, out = folder / "damaged", folder / "out"
    problems = []
    _write(file, content)
    for command in commands:
        arguments = [word.format(file=file, out=out) for word in command]
        begin = time.process_time()
        code, error = _run(arguments)
        seconds = time.process_time() - begin
        lines = error.splitlines()
        if code not in (0, 1, 2) or "bug of ckpt" in error or "Traceback" in error:
            problems.append(f"{command[0]}: exit {code}: {error[:300]}")
        elif code == 2 and (
            not lines or not lines[0].startswith((f"ckpt: {file}: ", f"ckpt: {out}: ")) or len(lines) > 2
        ):
            problems.append(f"{command[0]}: unclear: {error[:300]}")
        if seconds > SECONDS:
            problems.append(f"{command[0]}: {seconds:.1f} s")
        if not file.exists() or file.read_bytes() != content:
            problems.append(f"{command[0]}: the file was changed")
            _write(file, content)
        out.unlink(missing_ok=True)
        left = set(os.listdir(folder)) - {file.name}
        if left:
            problems.append(f"{command[0]}: left {left}")
    return problems


def _write(file: Path, content: bytes) -> None:
    """Write a file that was not there before: where one is written over, some file systems wait for the disk."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _run(arguments: list[str]) -> tuple[int, str]:
    """Run a command line in this process; its exit code and what it said on stderr."""
    from ckpt_cli.cli.main import run

    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    try:
        code = run(arguments)
        sys.stderr.flush()
        return code, sys.stderr.buffer.getvalue().decode()  # type: ignore[attr-defined]
    finally:
        sys.stdout, sys.stderr = kept


def cut_short(path: str, folder: str) -> list[str]:
    """What goes wrong with a file of any length up to its own; every other length meets the second command."""
    data = Path(path).read_bytes()
    return [
        problem
        for length in range(len(data))
        for problem in try_file(data[:length], Path(folder), COMMANDS[length % 2 :][:1])
    ]


def _batch(sample: str, seed: int, begin: int, count: int) -> list[str]:
    return _problems(Batch(Path(sample), seed, begin, count, every=False))


def _file(path: str, folder: str) -> list[str]:
    return try_file(Path(path).read_bytes(), Path(folder))


class Child:
    """A fork that finds the problems of one request after another."""

    def __init__(self) -> None:
        asked, self._requests = os.pipe()
        self._answers, answered = os.pipe()
        self._process = os.fork()
        if not self._process:
            os.close(self._requests)
            os.close(self._answers)
            code = 1
            try:
                _answer(asked, answered)
                code = 0
            finally:
                os._exit(code)
        os.close(asked)
        os.close(answered)

    def ask(self, line: str) -> str:
        """Return the answer to a request; none where the process died."""
        os.write(self._requests, line.encode())
        answer = b""
        while not answer.endswith(b"\n") and (more := os.read(self._answers, 1 << 16)):
            answer += more
        return answer.decode()

    def close(self) -> int:
        """Wait for its end, and return the status."""
        os.close(self._requests)
        os.close(self._answers)
        return os.waitpid(self._process, 0)[1]


def _answer(asked: int, answered: int) -> None:
    with open(asked, encoding="utf-8") as requests, open(answered, "w", encoding="utf-8") as answers:
        for line in requests:
            name, *arguments = json.loads(line)
            _forget_peak()
            problems = REQUESTS[name](*arguments) + _problems_of_process(arguments)
            print(json.dumps(problems), file=answers, flush=True)


def _die(status: int) -> list[str]:
    os._exit(status)


REQUESTS: dict[str, Callable[..., list[str]]] = {"batch": _batch, "file": _file, "cut short": cut_short, "die": _die}


def _forget_peak() -> None:
    """Let the peak of memory begin with what the process has now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def serve() -> None:
    """Answer requests, each a line of JSON on stdin, `[name, arguments…]`, by a line with the problems."""
    child = Child()
    for line in sys.stdin:
        answer = child.ask(line)
        if not answer:
            answer = json.dumps([f"{line.strip()}: the process died: {child.close()}"]) + "\n"
            child = Child()
        print(answer, end="", flush=True)
    child.close()


def _warm_up() -> None:
    """Run every command on every sample once, so that the forks have all modules that these need."""
    for module in ("numpy", "ml_dtypes"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="ckpt-fuzz-", dir=MEMORY) as folder:
        for sample in SAMPLES:
            try_file(sample.read_bytes(), Path(folder))
    gc.collect()
    gc.freeze()


def main() -> int:
    """Damage every sample so many times; 1 when something happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    _warm_up()
    if options.serve:
        serve()
        return 0
    batches = [
        Batch(sample, options.seed, begin, min(BATCH, options.mutations - begin), every=False)
        for sample in SAMPLES
        for begin in range(0, options.mutations, BATCH)
    ]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, problems in enumerate(pool.map(run_batch, batches), 1):
            failed += len(problems)
            for problem in problems:
                print(problem, flush=True)
            if done % 40 == 0:
                print(f"{done * BATCH:,} of {options.mutations * len(SAMPLES):,} files, {failed} problems", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
