"""Run one `ckpt` command and stop it at a step: killed, torn in the middle of a write, or met by an error.

    python crash_child.py STEP MODE LOG ARGUMENT…

A step is a call that changes a file or a folder. With STEP 0 nothing stops and LOG gets the calls, one a line.

    python crash_child.py serve

does so again and again, each time in a process that it forks, so that nothing is imported twice: it reads lines of JSON
[folder, step, mode, log, argument…] and answers each with one of [exit code or minus the signal, stderr].
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

WRITES = ("pwrite", "write")
STEPS = (
    *WRITES,
    "fsync",
    "replace",
    "rename",
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


def main() -> int:
    """Run the command, or serve."""
    return _run(*sys.argv[1:]) if sys.argv[1] != "serve" else _serve()


def _serve() -> int:
    """Fork for each line of stdin."""
    import ckpt_cli.cli.main
    import ckpt_cli.formats.safetensors_write
    import ckpt_cli.formats.shard_set_write
    import ckpt_cli.formats.torch_zip_write
    import ckpt_cli.ops.set  # noqa: F401

    for name in ("numpy", "ml_dtypes", "safetensors"):
        importlib.import_module(name)
    for line in sys.stdin:
        folder, *call = json.loads(line)
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if not child:
                os.chdir(folder)
                os.dup2(said.fileno(), 2)
                code = 70
                try:
                    code = _run(*call)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            said.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), said.read()]), flush=True)
    return 0


def _run(stop_at: str, mode: str, log_path: str, *arguments: str) -> int:
    """Run one command in this process."""
    from ckpt_cli.cli.main import run

    log: list[str] = []
    for name in STEPS:
        watch(name, int(stop_at), mode, log)
    code = run(list(arguments))
    if log_path:
        with open(log_path, "w", encoding="utf-8") as file:
            file.write("\n".join(log))
    return code


if __name__ == "__main__":
    sys.exit(main())
