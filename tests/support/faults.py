"""Run `ckpt` commands in forks of one process, with a fault at one of the calls by which ckpt writes.

    python tests/support/faults.py [FOLDER]    one JSON request a line on stdin, one JSON answer a line on stdout

Each call of `os` that changes a file or a folder is a step of an edit. A trial copies the files that the edit starts
from, forks a child that runs the edit with a fault at one step, and looks at what is left: the next command must find
the target wholly old or wholly new, and what the child printed must be true. Nothing is synced to a disk: a process
that ends leaves its writes to the system.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fault_forks import KILLED, Done, Spare, all_forked, forked, steps_of
from fault_scenes import SCENES, Scene

from ckpt_cli.cli import app as group
from ckpt_cli.cli.main import run

SAYS = (
    ("no checkpoint was changed", "old"),
    ("the change itself is complete", "new"),
    ("the change is incomplete until the next ckpt command", "either"),
    ("is there already", "new"),
)
"""What the words of a failed edit promise of the target."""


Held = dict[str, bytes]

Look = tuple[object, ...]


def look_of(folder: Path) -> Look:
    """All that a folder holds: names, contents, modes, extended attributes, and which names are one file.

    Journals and records have inodes and times within, so that folders with such files are alike in no two trials.
    """
    found: list[object] = []
    numbers: dict[int, int] = {}
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in (*folders, *sorted(files)):
            path = os.path.join(place, name)
            info = os.lstat(path)
            attributes = [(key, os.getxattr(path, key)) for key in os.listxattr(path, follow_symlinks=False)]
            content: object = None
            if stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(info.st_mode):
                content = Path(path).read_bytes()
                attributes.append(("number", bytes([numbers.setdefault(info.st_ino, len(numbers))])))
            found.append((os.path.relpath(path, folder), info.st_mode, content, tuple(attributes)))
    return tuple(found)


def held_by(target: Path) -> Held:
    """The content of a file, or of each file of a folder that is not hidden, nor in a hidden one, and no backup."""
    folder = target if target.is_dir() else target.parent
    paths = sorted(target.rglob("*")) if target.is_dir() else [target] if target.exists() else []
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.is_file() and ".bak" not in path.name and not _is_hidden(path.relative_to(folder))
    }


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") and part != ".metadata" for part in path.parts)


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
    spare: Spare | None = None
    """Where the trials are run; None for this process."""
    _known: dict[tuple[Look, bool], tuple[str, str | None]] = field(default_factory=dict)
    """What was found in each look of a folder: it is the same each time, so that the commands on it are run once."""

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

    def _forked(self, folder: Path, command: tuple[str, ...], kind: str = "", at: int = 0) -> Done:
        (done,) = self._all_forked([folder], command, kind, [at])
        return done

    def _all_forked(
        self, folders: Sequence[Path], command: tuple[str, ...], kind: str, ats: Sequence[int]
    ) -> list[Done]:
        return (self.spare.run if self.spare else all_forked)(folders, command, kind, ats)

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

    def trials(self, kind: str, cases: Sequence[tuple[int, bool]]) -> list[str | None]:
        """What is wrong, or None, after a fault at each of some steps, and an edit or a look as the next command.

        Those of which none ends the process are tried in one.
        """
        if kind in ("kill", "torn", "after") and len(cases) > 1:
            return [problem for case in cases for problem in self.trials(kind, [case])]
        folders = [self._copy() for _ in cases]
        try:
            found = []
            dones = self._all_forked(folders, self.scene.command, kind, [at for at, _ in cases])
            for (at, edit_next), here, done in zip(cases, folders, dones, strict=True):
                problem = self._judge(here, kind, done, edit_next=edit_next)
                found.append(problem and f"{kind} at step {at} ({self.steps[at - 1]}): {problem}")
            return found
        finally:
            for here in folders:
                shutil.rmtree(here)

    def _judge(self, here: Path, kind: str, done: Done, *, edit_next: bool) -> str | None:
        promised = self._promised(kind, done)
        if promised not in ("old", "new", "either"):
            return promised
        look = look_of(here), edit_next
        if look not in self._known:
            state, problem = self._state(here, edit_next=edit_next)
            self._known[look] = state, problem or self._after(here, state)
        state, problem = self._known[look]
        if problem is None and promised not in (state, "either"):
            problem = f"it said so of {promised}, but the target is {state}: exit {done.code}: {done.err}"
        return problem

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
        self._forked(here, self.scene.command, "kill", at)
        command = ("ls", self.scene.target)
        copied = self._like(here)
        steps = self._forked(copied, command).steps if (copied / self.scene.target).exists() else []
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
            done = self._forked(here, ("ls", self.scene.target), kind, at)
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
    spare, spare_of = None, ""
    with tempfile.TemporaryDirectory(prefix="ckpt-faults-", dir=start.parent) as scratch:
        for line in sys.stdin:
            request = json.loads(line)
            name = request["scene"]
            if name not in known:
                known[name] = Trials(SCENES[name], start, Path(scratch))
                gc.freeze()
            if spare is None or spare_of != name:  # it has what this one has imported by now
                if spare:
                    spare.close()
                spare, spare_of = Spare(), name
            known[name].spare = spare
            answers.write(json.dumps(answer(known[name], request)) + "\n")
            answers.flush()
        if spare:
            spare.close()


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
        cases = [
            (at, edit_next)
            for number, at in enumerate(_some(steps_of(kind, trials.steps), most))
            for edit_next in ((False, True) if request.get("both") else (number % 2 == 1,))
        ]
        found = trials.trials(kind, cases) if cases else []
    return {"trials": len(found), "problems": [problem for problem in found if problem]}


if __name__ == "__main__":
    main()
