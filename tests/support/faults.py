"""Run `ckpt` commands in forks of one process, with a fault at one of the calls by which ckpt writes.

    python tests/support/faults.py [FOLDER]    one JSON request a line on stdin, one JSON answer a line on stdout

Each call of `os` that changes a file or a folder is a step of an edit. A trial copies the files that the edit starts
from, forks a child that runs the edit with a fault at one step, and looks at what is left: the next command must find
the target wholly old or wholly new, and what the child printed must be true. Nothing is synced to a disk: a process
that ends leaves its writes to the system.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fault_scenes import SCENES, Scene

from ckpt_cli.cli import app as group
from ckpt_cli.cli.main import run

WRITES = ("write", "pwrite", "copy_file_range")
TAKES_SPACE = (*WRITES, "ftruncate", "open", "mkdir", "link", "symlink", "setxattr")
SEAM = (*TAKES_SPACE, "fsync", "replace", "rename", "unlink", "fchmod", "fchown", "rmdir", "removexattr")
"""The calls of `os` that change a file or a folder; `open` where it creates one."""

KINDS = ("kill", "torn", "after", "broken", "gone", "full", "filled", "interrupt")
"""A kill before a step, in the middle of a write, or right after a step; EIO of one step, or of all from there on;
ENOSPC likewise, of steps that take space; an interrupt."""

KILLED = 137

SAYS = (
    ("no checkpoint was changed", "old"),
    ("the change itself is complete", "new"),
    ("the change is incomplete until the next ckpt command", "either"),
    ("is there already", "new"),
)
"""What the words of a failed edit promise of the target."""


def steps_of(kind: str, steps: list[str]) -> list[int]:
    """The steps at which a kind of fault can come, counted from 1."""
    calls: tuple[str, ...] = {"torn": WRITES, "full": TAKES_SPACE, "filled": TAKES_SPACE}.get(kind, SEAM)
    return [number for number, step in enumerate(steps, 1) if step.split()[0] in calls]


class _Seam:
    """Counts the calls of the seam in this process, and puts a fault at one of them."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at = kind, at
        self.log: list[str] = []
        for name in SEAM:
            setattr(os, name, self._watched(name, getattr(os, name)))

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
    with tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if not child:
            code = 99
            try:
                os.chdir(folder)
                os.dup2(err.fileno(), 2)
                seam = _Seam(kind, at)
                code = run(command)
                sys.stderr.flush()
                log.write("\n".join(seam.log))
                log.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        err.seek(0)
        log.seek(0)
        return Done(os.waitstatus_to_exitcode(status), err.read(), log.read().splitlines())


Held = dict[str, bytes]


def held_by(target: Path) -> Held:
    """The content of a file, or of each file of a folder that is not hidden and no backup."""
    folder = target if target.is_dir() else target.parent
    paths = sorted(target.rglob("*")) if target.is_dir() else [target] if target.exists() else []
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.is_file() and ".bak" not in path.name and (path.name == ".metadata" or not path.name.startswith("."))
    }


@dataclass
class Trials:
    """A scene, run once to the end, and the trials of it."""

    scene: Scene
    start: Path
    scratch: Path
    steps: list[str] = field(default_factory=list)
    old: Held = field(default_factory=dict)
    new: Held = field(default_factory=dict)
    after_old: Held = field(default_factory=dict)
    """What the target holds after the next edit where the first one was not carried out."""
    after_new: Held = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (None, "next"):
            here = self._copy()
            self._quietly(self.scene.command, here)  # imports what it needs before the forks
            shutil.rmtree(here)
            here = self._copy()
            self.old = held_by(here / self.scene.target)
            if path == "next" and self.old:
                self._require(forked(here, self._next))
                self.after_old = held_by(here / self.scene.target)
                shutil.rmtree(here)
                here = self._copy()
            done = self._require(forked(here, self.scene.command))
            self.steps, self.new = done.steps, held_by(here / self.scene.target)
            if path == "next":
                self._quietly(self._next, here)
                self.after_new = held_by(here / self.scene.target)
                if self.after_new == self.after_old:
                    raise RuntimeError(f"{self.scene}: the next edit makes old and new alike")
            shutil.rmtree(here)

    @property
    def _next(self) -> tuple[str, ...]:
        return ("set", self.scene.target, self.scene.then)

    def _require(self, done: Done) -> Done:
        if done.code:
            raise RuntimeError(f"{self.scene}: {done}")
        return done

    def _copy(self) -> Path:
        """A new folder with the files that the scene is about, their backups included."""
        here = Path(tempfile.mkdtemp(dir=self.scratch))
        meant = {*self.scene.command, self.scene.target}
        kept = tuple(start for name in meant for start in (f"{name}.bak", f".{name}.bak"))  # backups and their records
        names = [name for name in os.listdir(self.start) if name in meant or name.startswith(kept)]
        for name in names:
            if (self.start / name).is_dir():
                shutil.copytree(self.start / name, here / name)
            else:
                shutil.copy(self.start / name, here / name)
        return here

    def _quietly(self, command: tuple[str, ...], folder: Path) -> tuple[int, str]:
        """Run a command in this process."""
        kept, sys.stderr = sys.stderr, io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        try:
            os.chdir(folder)
            code = run(command)
            sys.stderr.flush()
            return code, sys.stderr.buffer.getvalue().decode()  # type: ignore[attr-defined]
        finally:
            os.chdir("/")
            sys.stderr = kept

    # --- one fault

    def trial(self, kind: str, at: int, *, edit_next: bool = False) -> str | None:
        """What is wrong after a fault at a step, or None."""
        here = self._copy()
        try:
            done = forked(here, self.scene.command, kind, at)
            problem = self._judge(here, kind, done, edit_next=edit_next)
            return problem and f"{kind} at step {at} ({self.steps[at - 1]}): {problem}"
        finally:
            shutil.rmtree(here)

    def _judge(self, here: Path, kind: str, done: Done, *, edit_next: bool) -> str | None:
        promised = self._promised(kind, done)
        if promised not in ("old", "new", "either"):
            return promised
        state, problem = self._state(here, edit_next=edit_next)
        if problem is None and promised not in (state, "either"):
            problem = f"it said so of {promised}, but the target is {state}: exit {done.code}: {done.err}"
        return problem or self._after(here, state)

    def _promised(self, kind: str, done: Done) -> str:
        """What a command that met a fault says of the target; else what is wrong with how it ended."""
        if kind in ("kill", "torn", "after"):
            return "either" if done.code == KILLED else f"was not killed: {done}"
        if kind == "interrupt" and done.code == 130:
            return next((state for words, state in SAYS if words in done.err), "old")
        if done.code == 0:
            return "new"
        lines = done.err.splitlines()
        if done.code != 2 or not lines or not lines[0].startswith("ckpt: ") or "Traceback" in done.err:
            return f"exit {done.code}: {done.err}"
        return next((state for words, state in SAYS if words in done.err), "old")

    def _state(self, here: Path, *, edit_next: bool) -> tuple[str, str | None]:
        """What the next command finds: `old` or `new`, and what is wrong."""
        target = here / self.scene.target
        old, new = self.old, self.new
        if target.exists() and edit_next:
            code, err = self._quietly(self._next, here)
            old, new = self.after_old, self.after_new
        elif target.exists():
            code, err = self._quietly(("ls", self.scene.target), here)
        else:
            code, err = 0, ""
        found = held_by(target)
        if code:
            return "", f"the next command failed: {err}"
        if found not in (old, new):
            return "", f"neither old nor new: {sorted(found)}"
        return ("new" if found == new else "old"), None

    def _after(self, here: Path, state: str) -> str | None:
        """What is wrong once the same edit is done again where it was not done, and another one where it was."""
        again = state == "old" and held_by(here / self.scene.target) == self.old
        target = here / self.scene.target
        if again and "-o" in self.scene.command and target.is_dir():
            shutil.rmtree(target)
        command = self.scene.command
        repeated = again or (command[0] == "convert" and "--force" in command)  # it removes what is left of new names
        code, err = self._quietly(command if repeated else self._next, here)
        if code:
            return f"the edit after it failed: {err}"
        if again and held_by(target) != self.new:
            return "the same edit once more does not give the new state"
        left = {path.name for path in here.rglob(".*") if path.suffix != ".ckpt-undo"} - {".metadata", ".metadata.bak"}
        return f"left behind: {sorted(left)}" if left else None

    # --- faults while an interrupted edit is finished

    def recoveries(self, at: int, kinds: tuple[str, ...], most: int) -> Iterator[str | None]:
        """What is wrong after a kill at a step, and a fault at a step of the next command, which finishes it.

        Each kind of fault is tried at so many of those steps at most, once and twice.
        """
        here = self._copy()
        forked(here, self.scene.command, "kill", at)
        command = ("ls", self.scene.target)
        copied = self._like(here)
        steps = forked(copied, command).steps if (copied / self.scene.target).exists() else []
        expected = held_by(copied / self.scene.target)
        shutil.rmtree(copied)
        for kind in kinds:
            for second in _some(steps_of(kind, steps), most):
                for third in (0, second):
                    copied = self._like(here)
                    problem = self._recovered(copied, kind, second, third, expected)
                    shutil.rmtree(copied)
                    where = f"kill at step {at} ({self.steps[at - 1]}), {kind} at step {second} of the recovery"
                    yield problem and f"{where} ({steps[second - 1]}){', twice' if third else ''}: {problem}"
        shutil.rmtree(here)

    def _recovered(self, here: Path, kind: str, second: int, third: int, expected: Held) -> str | None:
        for at in filter(None, (second, third)):
            done = forked(here, ("ls", self.scene.target), kind, at)
            if kind not in ("kill", "torn", "after") and done.code not in (0, 2, 130):
                return f"exit {done.code}: {done.err}"
            if "Traceback" in done.err or "bug of ckpt" in done.err:
                return done.err
        state, problem = self._state(here, edit_next=False)
        if problem is None and held_by(here / self.scene.target) != expected:
            problem = f"it is {state}, and was not so without the second fault"
        return problem or self._after(here, state)

    def _like(self, folder: Path) -> Path:
        copied = Path(tempfile.mkdtemp(dir=self.scratch))
        shutil.copytree(folder, copied, dirs_exist_ok=True, symlinks=True)
        return copied


def main() -> None:
    """Answer requests: the steps of a scene, or the problems of some trials of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    group.build = cache(group.build)  # a command line is parsed thousands of times
    start = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    known: dict[str, Trials] = {}
    with tempfile.TemporaryDirectory(prefix="ckpt-faults-", dir=start.parent) as scratch:
        for line in sys.stdin:
            request = json.loads(line)
            name = request["scene"]
            if name not in known:
                known[name] = Trials(SCENES[name], start, Path(scratch))
                gc.freeze()
            answers.write(json.dumps(answer(known[name], request)) + "\n")
            answers.flush()


def _some(steps: Sequence[int], most: int) -> list[int]:
    """At most so many steps, evenly spread, the last among them."""
    number = min(most, len(steps))
    return [steps[(place + 1) * len(steps) // number - 1] for place in range(number)]


def answer(trials: Trials, request: dict[str, Any]) -> dict[str, Any]:
    """What a request gets."""
    kind, most = request.get("kind"), request.get("most", 1_000)
    if kind == "new":
        for name, content in trials.new.items():
            (Path(request["into"]) / name).parent.mkdir(exist_ok=True)
            (Path(request["into"]) / name).write_bytes(content)
    if kind in (None, "new"):
        return {"steps": trials.steps, "old": sorted(trials.old), "new": sorted(trials.new)}
    if kind == "recovery":
        found = [
            problem
            for at in _some(range(1, len(trials.steps) + 1), most)
            for problem in trials.recoveries(at, tuple(request["kinds"]), request.get("then", 1_000))
        ]
    else:
        found = [
            trials.trial(kind, at, edit_next=edit_next)
            for number, at in enumerate(_some(steps_of(kind, trials.steps), most))
            for edit_next in ((False, True) if request.get("both") else (number % 2 == 1,))
        ]
    return {"trials": len(found), "problems": [problem for problem in found if problem]}


if __name__ == "__main__":
    main()
