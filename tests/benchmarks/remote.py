"""Heavy commands over a URL against the same on the disk, side by side: seconds, CPU, memory, bytes and their ratios.

    make bench-remote               every command on a safetensors file and a zip of 537 MB, over nginx on loopback
    python remote.py [WORD…]        the commands whose labels have one of the words
    ROUNDS=9 FOLDER=/dev/shm python remote.py

The least of some rounds counts, in which both kinds take turns. "floor" is a script that does no more than receive
the file by requests of 8 MiB on two threads, with bare sockets: no command can take less CPU than what it takes on the
disk and this together. The server runs on the same processors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "support"))

from nginx import Nginx, nginx  # noqa: E402
from tabulate import tabulate  # noqa: E402

PYTHON = sys.executable
CKPT = str(Path(PYTHON).with_name("ckpt"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
COMMANDS = ("ls FILE", "stats FILE", "hash FILE", "check --deep FILE", "diff FILE SAME", "convert FILE OUT --force")
_FILES = """
import sys, torch
from safetensors.torch import save_file
generator = torch.Generator().manual_seed(0)
state = {f"layers.{i // 4}.part{i % 4}.weight": torch.randn(1024, 1024, generator=generator) for i in range(128)}
for name in ("m", "same"):
    save_file(state, f"{sys.argv[1]}/{name}.safetensors")
    torch.save(state, f"{sys.argv[1]}/{name}.pt")
"""
"""Writes a safetensors file and a zip of 128 tensors of 4 MiB, each twice."""
_FLOOR = """
import socket, sys, threading
host, port, path, size = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
parts, lock = [(at, min(at + (8 << 20), size)) for at in range(0, size, 8 << 20)], threading.Lock()
def receive():
    connection = socket.create_connection((host, port))
    room = memoryview(bytearray(8 << 20))
    while True:
        with lock:
            if not parts:
                return
            begin, end = parts.pop(0)
        ask = f"GET {path} HTTP/1.1\\r\\nHost: {host}\\r\\nRange: bytes={begin}-{end - 1}\\r\\n\\r\\n"
        connection.sendall(ask.encode())
        head = b""
        while b"\\r\\n\\r\\n" not in head:
            head += connection.recv(4096)
        done = len(head) - head.index(b"\\r\\n\\r\\n") - 4
        while done < end - begin:
            done += connection.recv_into(room[done : end - begin])
threads = [threading.Thread(target=receive) for _ in range(2)]
for each in threads:
    each.start()
for each in threads:
    each.join()
"""


class Cost:
    """What a command took at least, and the memory that it took at most."""

    def __init__(self) -> None:
        self.seconds = self.cpu = float("inf")
        self.peak = self.server = 0.0

    def run(self, command: list[str], server: int | None) -> None:
        """Run a command once; `server` is a process whose CPU seconds are counted, too."""
        before, begin = _cpu_of(server), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(command)}: {said.decode()}")
        self.seconds = min(self.seconds, time.perf_counter() - begin)
        if usage.ru_utime + usage.ru_stime < self.cpu:
            self.cpu = usage.ru_utime + usage.ru_stime
            self.server = _cpu_of(server) - before
        self.peak = max(self.peak, usage.ru_maxrss / 1024)


def _cpu_of(process: int | None) -> float:
    """Return the CPU seconds of a process so far."""
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _worker(server: Nginx) -> int:
    """Return the process of nginx that answers."""
    master = int((server.run / "nginx.pid").read_text())
    return int(Path(f"/proc/{master}/task/{master}/children").read_text().split()[0])


def compared(suffix: str, command: str, server: Nginx) -> list[str]:
    """Return a line of the table."""
    here, there = Cost(), Cost()
    files = {"SAME": str(server.root / f"same{suffix}"), "OUT": str(server.root.parent / "out.safetensors")}
    worker = _worker(server)
    for number in range(ROUNDS + 1):
        for cost, file in ((here, str(server.root / f"m{suffix}")), (there, server.url(f"m{suffix}"))):
            cost.run([CKPT, *(({**files, "FILE": file}).get(word, word) for word in command.split())], worker)
            if not number:
                cost.__init__()  # type: ignore[misc]
    (server.run / "access.log").write_bytes(b"")
    Cost().run([CKPT, *(({**files, "FILE": server.url(f"m{suffix}")}).get(w, w) for w in command.split())], None)
    log = [line for line in server.log if len(line) > 3]
    nbytes = sum(int(line[3]) for line in log) / (server.root / f"m{suffix}").stat().st_size
    return [
        f"{command} ({suffix})",
        *(f"{each:.2f}" for each in (here.seconds, there.seconds, there.seconds / here.seconds)),
        *(f"{each:.2f}" for each in (here.cpu, there.cpu, there.server)),
        f"{there.peak:.0f} MB",
        str(len(log)),
        f"{nbytes:.3f}",
    ]


def main(words: list[str]) -> None:
    """Write the files, start the server, print a line for each command as soon as it is there."""
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=os.environ.get("FOLDER")) as name:
        root, run = Path(name, "served"), Path(name, "nginx")
        root.mkdir()
        run.mkdir()
        subprocess.run([PYTHON, "-c", _FILES, str(root)], check=True)  # memory of this process would count for all
        with nginx(root, run) as server:
            floor, file = Cost(), root / "m.safetensors"
            for _ in range(ROUNDS):
                ask = [PYTHON, "-S", "-c", _FLOOR, "127.0.0.1", str(server.port), f"/{file.name}"]
                floor.run([*ask, str(file.stat().st_size)], _worker(server))
            lines = [["floor", "", f"{floor.seconds:.2f}", "", "", f"{floor.cpu:.2f}", f"{floor.server:.2f}"]]
            for suffix in (".safetensors", ".pt"):
                for command in COMMANDS:
                    if not words or any(word in f"{command} ({suffix})" for word in words):
                        lines.append(compared(suffix, command, server))
                        print(lines[-1], flush=True)
            headings = ["command", "s here", "s there", "ratio", "CPU here", "CPU there", "CPU of nginx"]
            print(tabulate(lines, [*headings, "memory", "requests", "of its bytes"], disable_numparse=True))


if __name__ == "__main__":
    main(sys.argv[1:])
