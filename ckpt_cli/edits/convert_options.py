"""What a conversion can be told, and what it tells."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.files_beside import Beside
from ckpt_cli.files.copy import OnProgress, Progress, no_progress
from ckpt_cli.files.source import LocalFile

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.model.changes import Content
    from ckpt_cli.model.checkpoint import Storage

Written = tuple[tuple[str, ...], int]
"""The names of the files of a folder, and the bytes of all that is written."""

KEEP_ONE, CLONE, ERROR = "keep-one", "clone", "error"

NOT_STATE = "not in the state_dict of the module"
"""Why what else a module has does not come along."""

_MOST = 20
"""Names that are spelled out."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a conversion can be told."""

    to: str | None = None
    """The name of the format; None for what the output's name says."""
    select: str = ""
    """The prefix that becomes the whole."""
    dtype: DType | None = None
    """What floats become."""
    max_shard: int | None = None
    """Bytes of one shard, where shards are wanted."""
    shared: str = KEEP_ONE
    """What becomes of tensors that share bytes: `keep-one`, `clone` or `error`."""
    tensors_only: bool = False
    """Whether what the format cannot hold may be left out."""
    lossy: bool = False
    """Whether values may become infinite or zero in a cast."""
    raw: bool = False
    """Whether the numbers of scaled and packed weights may be cast as they are stored."""
    weights_only: bool = False
    """Whether a new folder gets no copies of the files beside the weights."""
    force: bool = False
    """Whether what is there already may be replaced."""
    dry_run: bool = False
    progress: Progress = field(default=no_progress)
    """Told of bytes as they are written."""
    on_progress: OnProgress | None = None
    """Told of bytes done and bytes in all, once it takes a while, instead."""
    executor: Executor | None = None
    """What casts side by side."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that does not come along."""

    name: str
    why: str
    is_tensor: bool = False


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did, or would do."""

    path: str
    output: str
    format: str
    """The name of the new format."""
    what: str
    """The same in words."""
    tensors: int
    """How many were written."""
    bytes_written: int
    left_out: tuple[LeftOut, ...] = ()
    """What did not come along."""
    separated: tuple[str, ...] = ()
    """Names that shared bytes with others and have their own now."""
    not_kept: tuple[str, ...] = ()
    """What the format does not say of what came along, in words."""
    left: tuple[str, ...] = ()
    """Names of floats that stay as they are, as they cannot be cast."""
    files: tuple[str, ...] = ()
    """The names of the files, where the output is a folder."""
    dry_run: bool = False
    added: tuple[str, ...] = ()
    """What the new checkpoint says that the old one did not, in words."""
    beside: Beside | None = None
    """What became of the files beside a model's weights, where a new folder was written."""


class Job(Protocol):
    """What is left to do once all is planned."""

    nbytes: int

    def write(self, target: LocalFile, progress: Progress) -> None:
        """Write the one file."""

    def verify(self, path: str) -> None:
        """Raise where it does not read back."""


@dataclass(slots=True)
class Plan:
    """What becomes of what."""

    job: Any
    tensors: int
    losses: Losses
    measured: Callable[[], Written]
    """What would be written."""
    contents: Mapping[Storage, Content]
    """The bytes that are made, among others."""
    left_out: tuple[LeftOut, ...] = ()
    separated: tuple[str, ...] = ()
    not_kept: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    """Names of floats that stay as they are, as they cannot be cast."""
    added: tuple[str, ...] = ()


def some_of(lines: Sequence[str]) -> list[str]:
    """The first of some lines, and how many more there are."""
    more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return [*lines[:_MOST], *more]


def stem_of(output: str) -> str:
    """What the folder within a torch zip file is called: as the file without its last suffix."""
    return os.path.splitext(os.path.basename(output))[0] or "archive"
