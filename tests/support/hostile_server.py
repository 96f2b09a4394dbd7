"""Opens the files whose paths come on stdin, each in a forked process with limits, and says what that cost.

It is run by test_hostile_files.py: one start of Python serves them all, and none can harm the next.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor


def look(checkpoint: Checkpoint) -> None:
    """Ask every tensor for what a listing needs."""
    for entry in checkpoint.entries:
        if isinstance(entry, Tensor):
            begin, end = entry.span
            assert 0 <= begin <= end
            assert entry.nbytes >= 0
            assert entry.is_contiguous in (True, False)
            assert entry.storage is None or end <= entry.storage.nbytes


UNITS = 80
"""What opening a file may cost, in units of CPU time that this machine takes to make half a million small objects."""


def unit() -> float:
    """Return the CPU seconds of one unit, the least of three."""
    found = []
    for _ in range(3):
        begin = time.process_time()
        objects = [(number, str(number)) for number in range(500_000)]
        found.append(time.process_time() - begin)
        del objects
    return min(found)


def facts_of(path: str, allowed: float) -> dict[str, object]:
    """Open one file; what came of it."""
    error = of = None
    try:
        look(open_checkpoint(path))
    except CkptError as refused:
        error, of = str(refused), refused.path
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/status") as status:
        peak = int(status.read().split("VmHWM:")[1].split()[0]) >> 10
    return {
        "error": error,
        "path": of,
        "seconds": usage.ru_utime + usage.ru_stime,
        "allowed": allowed,
        "peak": peak,
        "modules": sorted(sys.modules),
    }


def main(seconds: int) -> None:
    """Serve until stdin ends; opening a file may take `seconds` of CPU time, or more where the machine is slow."""
    allowed = max(seconds, UNITS * unit())
    for line in sys.stdin:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (int(2 * allowed), int(2 * allowed)))
            resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
            print(json.dumps(facts_of(line.rstrip("\n"), allowed)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"died": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
