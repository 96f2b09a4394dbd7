"""Runs of a `ckpt` command in forks of a process, with a fault at one of the calls by which ckpt writes.

    python tests/support/fault_forks.py    answer requests of an `Apart`

Nothing is synced to a disk: a process that ends leaves its writes to the system.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_cli.cli.main import run

WRITES = ("write", "pwrite", "copy_file_range")
TAKES_SPACE = (*WRITES, "ftruncate", "open", "mkdir", "link", "symlink", "setxattr")
SEAM = (*TAKES_SPACE, "fsync", "replace", "rename", "unlink", "fchmod", "fchown", "rmdir", "removexattr")
"""The calls of `os` that change a file or a folder; `open` where it creates one."""

KINDS = ("kill", "torn", "after", "broken", "gone", "full", "filled", "interrupt")
"""A kill before a step, in the middle of a write, or right after a step; EIO of one step, or of all from there on;
ENOSPC likewise, of steps that take space; an interrupt."""

KILLED = 137


def steps_of(kind: str, steps: list[str]) -> list[int]:
    """The steps at which a kind of fault can come, counted from 1.

    A kill before an fsync, which does nothing here, leaves what one before the next step leaves.
    """
    changes = tuple(name for name in SEAM if name != "fsync")
    calls = {"torn": WRITES, "full": TAKES_SPACE, "filled": TAKES_SPACE, "kill": changes}.get(kind, SEAM)
    last = len(steps) if kind == "kill" else 0
    return [number for number, step in enumerate(steps, 1) if step.split()[0] in calls or number == last]


class _Seam:
    """Counts the calls of the seam in this process, and puts a fault at one of them."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at = kind, at
        self.log: list[str] = []
        self._real = {name: getattr(os, name) for name in SEAM}
        for name, real in self._real.items():
            setattr(os, name, self._watched(name, real))

    def remove(self) -> None:
        """Make the calls what they were."""
        for name, real in self._real.items():
            setattr(os, name, real)

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if (name == "open" and not args[1] & os.O_CREAT) or (name == "write" and args[0] in (1, 2)):
                return real(*args, **options)
            self.log.append(f"{name} {_place(args)}")
            if self.at and len(self.log) >= self.at:
                self._fault(name, real, args, options)
            return None if name == "fsync" else real(*args, **options)

        return watched

    def _fault(self, name: str, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        kind, here = self.kind, len(self.log) == self.at
        if (kind == "broken" and here) or kind == "gone":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if (kind == "full" and here) or (kind == "filled" and name in TAKES_SPACE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not here:
            return
        if kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return
        if kind == "after" and name != "fsync":
            with suppress(FileNotFoundError):  # of an unlink to make sure
                real(*args, **options)
        if kind == "torn" and name == "copy_file_range":
            real(args[0], args[1], args[2] // 2, *args[3:])
        elif kind == "torn":
            real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
        if kind in ("kill", "after", "torn"):
            os._exit(KILLED)


def _place(args: tuple[Any, ...]) -> str:
    """The file that a call is about."""
    first = args[0]
    if isinstance(first, int):
        with suppress(OSError):
            return os.readlink(f"/proc/self/fd/{first}")
    return str(first)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    err: str
    steps: list[str]


def forked(folder: Path, command: tuple[str, ...], kind: str = "", at: int = 0) -> Done:
    """Run a command in a folder, in a fork with a fault at a step; 0 is none."""
    (done,) = all_forked([folder], command, kind, [at])
    return done


def all_forked(folders: Sequence[Path], command: tuple[str, ...], kind: str, ats: Sequence[int]) -> list[Done]:
    """Run a command in each of some folders, one after the other in one fork, with a fault at a step of each.

    With the fault of a folder at which the process ends, the others are not tried.
    """
    with tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if not child:
            code = 99
            try:
                os.dup2(err.fileno(), 2)
                for folder, at in zip(folders, ats, strict=True):
                    code = 99
                    os.chdir(folder)
                    seam = _Seam(kind, at)
                    code = run(command)
                    sys.stderr.flush()
                    seam.remove()
                    log.write(json.dumps([code, os.fstat(2).st_size, seam.log]) + "\n")
                    log.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        err.seek(0)
        log.seek(0)
        said, begin = err.read().encode(), 0
        found = []
        for line in log:
            code, end, steps = json.loads(line)
            found.append(Done(code, said[begin:end].decode(), steps))
            begin = end
        left = [Done(os.waitstatus_to_exitcode(status), said[begin:].decode(), [])] * (len(folders) - len(found))
        return found + left


class Spare:
    """A process that waits to run commands in forks of itself.

    What runs commands itself changes its memory, and would copy much of it after each fork.
    """

    def __init__(self) -> None:
        asked, self._requests = os.pipe()
        self._answers, answered = os.pipe()
        self._process = os.fork()
        if not self._process:
            os.close(self._requests)
            os.close(self._answers)
            try:
                _serve_forks(asked, answered)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answered)

    def run(self, folders: Sequence[Path], command: tuple[str, ...], kind: str, ats: Sequence[int]) -> list[Done]:
        """Call `all_forked` there."""
        _send(self._requests, [list(map(str, folders)), command, kind, ats])
        return [Done(*done) for done in _received(self._answers)]

    def close(self) -> None:
        """End it."""
        os.close(self._requests)
        os.close(self._answers)
        os.waitpid(self._process, 0)


class Apart:
    """A process without torch that runs commands in forks of itself: a process with torch forks slowly."""

    def __init__(self) -> None:
        call = [sys.executable, __file__]
        self._process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, folder: Path, command: tuple[str, ...], kind: str = "", at: int = 0) -> Done:
        """Call `forked` there; with the kind `import`, run the command in the process itself, before it is forked."""
        assert self._process.stdin
        assert self._process.stdout
        _send(self._process.stdin.fileno(), [[str(folder)], command, kind, [at]])
        (done,) = _received(self._process.stdout.fileno())
        return Done(*done)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _imported(folder: Path, command: tuple[str, ...]) -> Done:
    os.chdir(folder)
    code = run(command)
    gc.collect()
    gc.freeze()
    return Done(code, "", [])


def _serve_forks(requests: int, answers: int) -> None:
    while request := _received(requests):
        folders, command, kind, ats = request
        here, words = list(map(Path, folders)), tuple(command)
        found = [_imported(here[0], words)] if kind == "import" else all_forked(here, words, kind, ats)
        _send(answers, [[done.code, done.err, done.steps] for done in found])


def _send(pipe: int, message: object) -> None:
    data = json.dumps(message).encode()
    data = struct.pack("<I", len(data)) + data
    while data:
        data = data[os.write(pipe, data) :]


def _received(pipe: int) -> Any:
    """The next message; None at the end."""
    begin = _exactly(pipe, 4)
    return json.loads(_exactly(pipe, *struct.unpack("<I", begin))) if begin else None


def _exactly(pipe: int, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := os.read(pipe, length - len(data))):
        data += more
    return data


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _serve_forks(0, answers)
