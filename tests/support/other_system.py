"""A system without the calls that only POSIX systems or Linux have, as tests see it.

    PYTHONPATH=tests/support python -m pytest -p other_system tests/…    chosen tests on such a system

As a plugin of pytest it replaces `ckpt_cli/files/system.py`, the only file that makes those calls, by a copy of it that
was loaded where they are lacking; signals and timers, which `ckpt_cli/files/interrupts.py` looks for at each call, it
takes away. `make_bare` takes all from the process itself, for one that runs nothing but ckpt.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ckpt_cli.files

MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
"""Modules that such a system lacks."""

CALLS = (
    "pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "posix_fallocate", "copy_file_range", "sendfile",
    "fchmod", "fchown", "chown", "lchown", "geteuid", "getegid", "getuid", "getgid", "getgroups", "link",
    "getxattr", "setxattr", "removexattr", "listxattr", "pathconf", "fpathconf", "statvfs", "fstatvfs", "mkfifo",
    "sched_getaffinity", "fork", "fdatasync", "lockf", "SEEK_DATA", "SEEK_HOLE", "O_NOFOLLOW", "O_NONBLOCK",
    "O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_TMPFILE", "POSIX_FADV_WILLNEED", "POSIX_FADV_DONTNEED",
)  # fmt: skip
"""Names of `os` that such a system lacks."""

ELSEWHERE = ((signal, "SIGALRM"), (signal, "setitimer"), (mmap, "MADV_DONTNEED"), (time, "CLOCK_BOOTTIME"))
"""Names of other modules that such a system lacks."""


class _Bare(ModuleType):
    """A module that passes on what another one has, apart from some names.

    What is written at the position of a file goes through `pwrite`, which tests watch.
    """

    def __init__(self, real: ModuleType, lacking: tuple[str, ...]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _lacking=lacking)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_lacking"]:
            raise AttributeError(name)
        return _write if name == "write" else getattr(self.__dict__["_real"], name)


def _write(fd: int, data: memoryview) -> int:
    return os.pwrite(fd, data, os.lseek(fd, 0, os.SEEK_CUR))


def load(**modules: ModuleType | None) -> Any:
    """Load a copy of `files/system.py` on such a system, which has these `modules` instead of none of `MODULES`."""
    bare = {"os": _Bare(os, CALLS), **dict.fromkeys(MODULES), **modules}
    kept = {name: sys.modules.get(name) for name in bare}
    spec = importlib.util.spec_from_file_location(
        "ckpt_cli.files.system", Path(ckpt_cli.files.__path__[0]) / "system.py"
    )
    assert spec is not None
    assert spec.loader is not None
    system = importlib.util.module_from_spec(spec)
    try:
        sys.modules.update(bare)  # type: ignore[arg-type]
        spec.loader.exec_module(system)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    vars(system)["_module"] = lambda name: modules.get(name)
    return system


def make_bare() -> None:
    """Take from this process what such a system lacks; nothing but ckpt is to be run in it."""
    sys.modules.update(dict.fromkeys(MODULES))  # type: ignore[arg-type]
    for module, name in (*((os, name) for name in CALLS), *ELSEWHERE):
        if hasattr(module, name):
            delattr(module, name)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Replace the module before a test imports it."""
    assert "ckpt_cli.files.system" not in sys.modules
    for module, name in ELSEWHERE:
        if hasattr(module, name):
            delattr(module, name)
    system = load()
    sys.modules["ckpt_cli.files.system"] = system
    ckpt_cli.files.system = system
