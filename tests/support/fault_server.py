"""The process in which edits meet faults, for tests/files/test_faults.py and `make fuzz`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Server:
    """The process that runs the trials; it has no torch, so that it forks fast."""

    def __init__(self, start: Path) -> None:
        self.start = start
        call = [sys.executable, str(Path(__file__).with_name("faults.py")), str(start)]
        self._process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, and give its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it."""
        self._process.communicate()
