"""Try every fault at every step of every edit, and at every step of what finishes it; 1 when something is wrong.

python tests/support/fuzz_faults.py [SCENE…]
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from fault_forks import KINDS
from fault_scenes import SCENES, fill
from fault_server import Server
from in_memory import MEMORY

REQUESTS = [{"kind": kind, "both": True} for kind in KINDS] + [{"kind": "recovery", "kinds": [kind]} for kind in KINDS]
"""What is tried of each scene: each next command after a fault, and each fault of the next command after a kill."""


def main() -> int:
    """Have a server a processor, and print what is wrong as it is found."""
    scenes = [name for name in SCENES if not sys.argv[1:] or name in sys.argv[1:]]
    failed = trials = 0
    with tempfile.TemporaryDirectory(prefix="ckpt-", dir=MEMORY) as folder:
        start = Path(folder) / "start"
        start.mkdir()
        fill(start)
        free: SimpleQueue[Server] = SimpleQueue()
        servers = [Server(start) for _ in range(os.cpu_count() or 1)]
        for server in servers:
            free.put(server)

        def ask(case: tuple[str, dict[str, object]]) -> tuple[str, list[str], int]:
            scene, request = case
            server = free.get()
            answer = server.ask(scene=scene, **request)
            free.put(server)
            return scene, answer["problems"], answer["trials"]

        with ThreadPoolExecutor(len(servers)) as pool:
            for number, (scene, problems, count) in enumerate(pool.map(ask, itertools.product(scenes, REQUESTS)), 1):
                failed, trials = failed + len(problems), trials + count
                for problem in problems:
                    print(f"{scene}: {problem}", flush=True)
                if number % len(REQUESTS) == 0:
                    print(f"{scene}: {trials:,} trials so far, {failed} problems", flush=True)
        for server in servers:
            server.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
