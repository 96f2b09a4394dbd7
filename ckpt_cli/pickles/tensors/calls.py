"""The table of all functions that rebuild tensors, from which a `Rebuilder` is made."""

from __future__ import annotations

from ckpt_cli.pickles.tensors.layouts import LAYOUTS
from ckpt_cli.pickles.tensors.rebuild import Calls
from ckpt_cli.pickles.tensors.strided import STRIDED
from ckpt_cli.pickles.tensors.subclasses import SUBCLASSES

CALLS: Calls = {**STRIDED, **LAYOUTS, **SUBCLASSES}
"""Each function by the module and name of what a pickle calls."""
