"""Opens the files whose paths come on stdin, each in a forked process with limits, and says what that cost.

It is run by test_hostile_files.py: one start of Python serves them all, and none can harm the next.
"""

from __future__ import annotations

import cProfile
import gc
import json
import os
import resource
import sys
from pathlib import Path

from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"


def look(checkpoint: Checkpoint) -> None:
    """Ask every tensor for what a listing needs."""
    for entry in checkpoint.entries:
        if isinstance(entry, Tensor):
            begin, end = entry.span
            assert 0 <= begin <= end
            assert entry.nbytes >= 0
            assert entry.is_contiguous in (True, False)
            assert entry.storage is None or end <= entry.storage.nbytes


SECONDS = 120
"""CPU time after which a file that is still being opened is given up: far more than any takes on a slow machine."""


def facts_of(path: str) -> dict[str, object]:
    """Open one file; what came of it, and how many functions were called: the same on every machine, unlike time."""
    error = of = None
    profile = cProfile.Profile()
    profile.enable()
    try:
        look(open_checkpoint(path))
    except CkptError as refused:
        error, of = str(refused), refused.path
    profile.disable()
    with open("/proc/self/status") as status:
        peak = int(status.read().split("VmHWM:")[1].split()[0]) >> 10
    return {
        "error": error,
        "path": of,
        "calls": sum(entry.callcount for entry in profile.getstats()),
        "peak": peak,
        "modules": sorted(sys.modules),
    }


def warm_up() -> None:
    """Open what is sound of each kind, so that no fork has to import what reads it."""
    for sample in sorted(SAMPLES.glob("*.*t*")):
        look(open_checkpoint(str(sample)))
    gc.collect()
    gc.freeze()


def main() -> None:
    """Serve until stdin ends."""
    warm_up()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
            print(json.dumps(facts_of(line.rstrip("\n"))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"died": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
