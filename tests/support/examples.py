"""How many examples a property is tried with."""

from __future__ import annotations

import os

_DEFAULT = 100


def most(count: int) -> int:
    """Return `count` where each run draws others (`make fuzz`), else those that Hypothesis tries by default.

    The examples of `make test` are the same in every run, so that more of them find little that is new.
    """
    return count if os.environ.get("HYPOTHESIS_PROFILE") == "random" else min(count, _DEFAULT)
