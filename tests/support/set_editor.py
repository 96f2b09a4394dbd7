"""A checkpoint of some state in the current folder, `ckpt set` on it, and why it refuses."""

from __future__ import annotations

import zipfile
from typing import Any

import torch
from conftest import Answer, Ckpt

State = dict[str, Any]


class Editor:
    """A checkpoint of some state in the current folder, and `ckpt set` on it."""

    path = "a.pt"

    def __init__(self, ckpt: Ckpt) -> None:
        self.ckpt = ckpt

    def edited(self, state: State, *args: str) -> State:
        """The state after an edit that succeeds, as torch reads it from a sound file."""
        torch.save(state, self.path)
        answer = self.ckpt("set", self.path, *args)
        assert (answer.code, answer.out) == (0, ""), answer.err
        with zipfile.ZipFile(self.path) as archive:
            assert archive.testzip() is None
        after: State = torch.load(self.path, weights_only=False)
        assert list(after) == list(state)
        return after

    def refused(self, state: State, *args: str) -> str:
        """The problem in one line of an edit that is refused and changes nothing."""
        torch.save(state, self.path)
        return problem_of(self.ckpt("set", self.path, *args), self.path)


def problem_of(answer: Answer, path: str) -> str:
    """What a refusal says after the file's name."""
    assert (answer.code, answer.out) == (2, "")
    first, *hint = answer.err.splitlines()
    assert first.startswith(f"ckpt: {path}: ")
    assert not hint or (len(hint) == 1 and hint[0].startswith("hint: "))
    return "\n".join([first.removeprefix(f"ckpt: {path}: "), *hint])
