"""The JSON files that Hugging Face's libraries put beside a checkpoint."""

from __future__ import annotations

import json
import os
from typing import Any

from ckpt_cli import limits
from ckpt_cli.errors import CkptError
from ckpt_cli.files.source import LocalFile


def config_beside(path: str, name: str = "config.json") -> dict[str, Any] | None:
    """Return the config beside a file, or in a folder; None where no config can be read."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    try:
        with LocalFile(os.path.join(folder, name)) as config:
            parsed = json.loads(config.read(0, config.size)) if config.size <= limits.CONFIG_JSON else None
    except (OSError, CkptError, ValueError, RecursionError):  # no config, or none of Hugging Face's
        return None
    return parsed if isinstance(parsed, dict) else None
