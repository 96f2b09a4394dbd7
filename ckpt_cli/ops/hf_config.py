"""The JSON files that Hugging Face's libraries put beside a checkpoint."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

from ckpt_cli import limits
from ckpt_cli.errors import CkptError
from ckpt_cli.files.places import folder_of, is_folder, is_listed, join, open_file


def config_beside(path: str, name: str = "config.json") -> dict[str, Any] | None:
    """Return the config beside a file, or in a folder; None where no config can be read.

    Nothing is looked for beside a file elsewhere whose folder was not listed: that would be a request more.
    """
    folder = path if is_folder(path) else folder_of(path)
    if not is_listed(folder):
        return None
    try:
        with closing(open_file(join(folder, name))) as config:
            parsed = json.loads(config.read(0, config.size)) if config.size <= limits.CONFIG_JSON else None
    except (OSError, CkptError, ValueError, RecursionError):  # no config, or none of Hugging Face's
        return None
    return parsed if isinstance(parsed, dict) else None
