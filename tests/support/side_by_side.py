"""Processes that edit and list one checkpoint at the same time: no command fails, and each listing is old or new."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from ckpt_cli.cli import app as group
from ckpt_cli.cli.main import run

Run = Callable[[tuple[str, ...]], tuple[int, str, str]]

SHORT, LONG = "model", "a.much.longer.name.than.it.had" + "x" * 60


def in_process(command: tuple[str, ...]) -> tuple[int, str, str]:
    """Run a command in this process; its exit code and what it said."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    try:
        code = run(command)
        sys.stdout.flush()
        sys.stderr.flush()
        out, err = (stream.buffer.getvalue().decode() for stream in (sys.stdout, sys.stderr))  # type: ignore[attr-defined]
        return code, out, err
    finally:
        sys.stdout, sys.stderr = kept


def as_process(command: tuple[str, ...]) -> tuple[int, str, str]:
    """Run a command in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "ckpt_cli", *command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def problems_of(path: Path, rounds: int, call: Run = in_process) -> list[str]:
    """What goes wrong in some rounds of `set`, `rename`, `ls` and `show` side by side, each in a process of its own.

    The checkpoint has tensors below `model`, and one, `still`, that only `set` changes, all of it to one number.
    """
    group.build = cache(group.build)
    listings = {_listing(path)}
    assert run(["rename", str(path), SHORT, LONG]) == 0
    listings.add(_listing(path))
    assert run(["rename", str(path), LONG, SHORT]) == 0
    file = str(path)

    def rename(number: int) -> str | None:
        names = (SHORT, LONG) if number % 2 == 0 else (LONG, SHORT)
        code, _, err = call(("rename", file, *names))
        return err if code else None

    def change(number: int) -> str | None:
        code, _, err = call(("set", file, f"still={number % 7}"))
        return err if code else None

    def look(_: int) -> str | None:
        code, out, err = call(("ls", file))
        return None if code == 0 and out in listings else f"ls: exit {code}: {err or out}"

    def show(_: int) -> str | None:
        code, out, err = call(("show", file, "still", "-f", "csv"))
        values = {line.rsplit(",", 1)[-1] for line in out.splitlines()[1:]}
        return None if code == 0 and len(values) == 1 else f"show: exit {code}: {err or out}"

    return _together(rounds, (rename, change, look, show))


def _listing(path: Path) -> str:
    code, out, err = in_process(("ls", str(path)))
    assert code == 0, err
    return out


def _together(rounds: int, works: tuple[Callable[[int], str | None], ...]) -> list[str]:
    """Do each work in a fork, as often as there are rounds; what they say is wrong."""
    children = []
    for work in works:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            with suppress(BaseException), open(theirs, "w", encoding="utf-8") as pipe:
                for number in range(rounds):
                    problem = work(number)
                    if problem:
                        pipe.write(problem.strip().replace("\n", " | ") + "\n")
                pipe.write("done\n")
            os._exit(0)
        os.close(theirs)
        children.append((child, open(ours, encoding="utf-8")))  # noqa: SIM115
    found = []
    for child, pipe in children:
        *problems, last = pipe.read().splitlines() or [""]
        found += problems if last == "done" else [*problems, last, "a process ended early"]
        pipe.close()
        os.waitpid(child, 0)
    return found


def main() -> int:
    """Many rounds; 1 when something failed."""
    import tempfile

    import torch

    failed = 0
    for rounds, call in ((1_000, as_process), (10_000, in_process)):
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": {"a": torch.zeros(9), "b": torch.zeros(300)}, "still": torch.zeros(5000)}
            torch.save(state, f"{folder}/m.pt")
            begin = time.monotonic()
            found = problems_of(Path(folder) / "m.pt", rounds, call)
            print(f"{rounds:,} rounds, {time.monotonic() - begin:.0f} s, {len(found)} problems", flush=True)
            for problem in found[:20]:
                print(problem, flush=True)
            failed += len(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
