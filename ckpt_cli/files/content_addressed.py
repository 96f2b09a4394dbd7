"""Files that must not change in place, because their name is the hash of their content."""

from __future__ import annotations

import os
import re

from ckpt_cli.errors import RefusedError

_CACHES = (
    ("the Hugging Face hub's cache", re.compile(r"/blobs/[0-9a-f]{40,64}$")),
    ("git-annex", re.compile(r"/\.git/annex/objects/")),
    ("DVC's cache", re.compile(r"/\.dvc/cache/|/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")),
    ("git LFS's store", re.compile(r"/\.git/lfs/objects/")),
)


def refuse_cached(path: str) -> str:
    """The real path to write to; raises RefusedError where it lies in a content-addressed cache."""
    real = os.path.realpath(path)
    for owner, pattern in _CACHES:
        if pattern.search(real):
            raise RefusedError(
                f"lies in {owner}, where a file's name is the hash of its content: an edit there would corrupt it",
                path=path,
                hint="write the result elsewhere with -o OUT",
            )
    return real
