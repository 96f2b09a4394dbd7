"""Where files are written that nobody waits for a disk for."""

from __future__ import annotations

import os

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A folder in memory, for the `dir` of `tempfile`; None where the system has none."""
