"""Runs of `ckpt` in forks of one process that has imported it: they start at once, and have streams of their own.

    python tests/support/command_forks.py DESCRIPTOR    answer requests that come through a socket

Nothing but modules is shared by the commands: each has the arguments, folder, environment and descriptors that it
would have as a program. What is read of the environment when a module is imported, such as CKPT_LIMITS, is not seen:
a test of that starts Python.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

Streams = tuple[int, int, int]

_HELPERS = ("numpy", "ml_dtypes", "tabulate", "typer")
_MOST = 1 << 20


class Forks:
    """The process that is forked."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        call = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(call, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(
        self, commands: list[list[str]], folder: Path, env: dict[str, str], streams: tuple[int, int, int]
    ) -> None:
        """Begin to run commands one after the other; of several, each is followed by its code, between "\\x1e"."""
        request = json.dumps([commands, str(folder), env]).encode()
        socket.send_fds(self._socket, [len(request).to_bytes(4, "little")], streams)
        self._socket.sendall(request)

    def code(self) -> int:
        """Wait for the end of what was started, and return the exit code."""
        return int.from_bytes(self._socket.recv(4), "little", signed=True)

    def answer(
        self, *arguments: str, stdin: int = 0, stdout: int | None = None, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the current folder, with a changed environment, and return what it wrote into files."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            streams = (stdin, out.fileno() if stdout is None else stdout, err.fileno())
            self.start([list(arguments)], Path.cwd(), {**os.environ, **env}, streams)
            code = self.code()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait()


@cache
def forks() -> Forks:
    """The process of this process, started when it is first needed."""
    started = Forks()
    atexit.register(started.close)
    return started


def _import_all() -> None:
    import ckpt_cli

    for module in pkgutil.walk_packages(ckpt_cli.__path__, "ckpt_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in _HELPERS:
        importlib.import_module(name)


def _become(commands: list[list[str]], folder: str, env: dict[str, str], streams: list[int]) -> NoReturn:
    """Run commands in this process as if it had been started for them."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    errors = open(2, "wb", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(errors, line_buffering=True, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    from ckpt_cli.cli.main import main, run

    if len(commands) == 1:
        sys.argv = ["ckpt", *commands[0]]
        main()
    for command in commands:
        code = run(command)
        sys.stdout.flush()
        print(f"\x1e{code}\x1e", flush=True)
    os._exit(0)


def _serve(asked: socket.socket) -> None:
    while True:
        head, streams, _, _ = socket.recv_fds(asked, 4, 3)
        if not head:
            return
        length, data = int.from_bytes(head, "little"), b""
        while len(data) < length:
            data += asked.recv(min(_MOST, length - len(data)))
        request: list[Any] = json.loads(data)
        child = os.fork()
        if not child:
            asked.close()
            try:
                _become(*request, streams)
            finally:
                os._exit(99)
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        asked.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _import_all()
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
