"""Run one `ckpt` command and stop it at a step: killed, torn in the middle of a write, or met by an error.

    python crash_child.py ARGUMENT…

It runs the command once in the current folder, so that everything is imported. Then it takes a JSON object a line from
stdin, `{"folder", "step", "mode"}`, and runs the command in that folder in a process of its own; the answer on stdout
is `{"code", "err", "steps"}`. A step is a call that changes a file or a folder; with step 0 nothing stops.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

WRITES = ("pwrite", "write")
STEPS = (
    *WRITES,
    "fsync",
    "replace",
    "rename",
    "link",
    "unlink",
    "ftruncate",
    "copy_file_range",
    "open",
    "fchmod",
    "mkdir",
    "rmdir",
)

step = 0


def watch(name: str, stop_at: int, mode: str, log: list[str]) -> None:
    """Count the calls of one function of `os`, and stop at one of them."""
    real: Callable[..., Any] = getattr(os, name)

    def watched(*args: Any, **options: Any) -> Any:
        global step
        if name == "open" and not args[1] & os.O_CREAT:
            return real(*args, **options)
        if name == "write" and args[0] in (1, 2):
            return real(*args, **options)
        step += 1
        log.append(f"{name} {place(args)}")
        if step == stop_at:
            stop(name, real, mode, args)
        return real(*args, **options)

    setattr(os, name, watched)


def place(args: tuple[Any, ...]) -> str:
    """The file that a call is about."""
    first = args[0]
    return str(first) if isinstance(first, str) else os.readlink(f"/proc/self/fd/{first}")


def stop(name: str, real: Callable[..., Any], mode: str, args: tuple[Any, ...]) -> None:
    """Do to the process, at this call, what the mode says."""
    if mode == "torn" and name in WRITES:
        half = bytes(args[1])[: len(args[1]) // 2]
        real(args[0], half, *args[2:])
    if mode == "after":
        with suppress(FileNotFoundError):  # of an unlink to make sure
            real(*args)
    if mode in ("kill", "torn", "after"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        return
    raise OSError({"full": errno.ENOSPC, "broken": errno.EIO}[mode], os.strerror(errno.ENOSPC))


def run_stopped(folder: str, stop_at: int, mode: str, arguments: list[str]) -> dict[str, object]:
    """Run the command in a child of this process; returns its exit code, what it said, and its steps."""
    with tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as steps:
        child = os.fork()
        if not child:
            code = 99
            try:
                os.chdir(folder)
                os.dup2(err.fileno(), 2)
                code = run_watched(stop_at, mode, arguments, steps)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        err.seek(0)
        steps.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "err": err.read(), "steps": steps.read().splitlines()}


def run_watched(stop_at: int, mode: str, arguments: list[str], steps: IO[str]) -> int:
    """Run the command with all steps watched."""
    from ckpt_cli.cli.main import run

    log: list[str] = []
    for name in STEPS:
        watch(name, stop_at, mode, log)
    code = run(arguments)
    sys.stderr.flush()
    steps.write("\n".join(log))
    steps.flush()
    return code


def main() -> None:
    """Run once, then as often as is asked for."""
    from ckpt_cli.cli.main import run

    arguments = sys.argv[1:]
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if run(arguments):
        sys.exit(1)
    for line in sys.stdin:
        case = json.loads(line)
        answers.write(json.dumps(run_stopped(case["folder"], case["step"], case["mode"], arguments)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
