"""The last look at a new file before it takes its name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.formats.open import open_checkpoint
from ckpt_cli.formats.signatures import is_safetensors
from ckpt_cli.model.changes import difference
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor


def verify_copy(original: Checkpoint, path: str, output: str) -> None:
    """Open a patched copy again before it becomes `output`, with the format's reference reader where there is one.

    Raises CkptError where it does not read back as the same entries over the same ranges.
    """
    try:
        same, why = _reads_back(original, path), ""
    except FormatError as error:
        same, why = False, f": {error.problem}"
    if not same:
        raise CkptError(f"the new file did not read back as it should, so nothing was replaced{why}", path=output)


def _reads_back(original: Checkpoint, path: str) -> bool:
    """Whether the copy opens to the original's entries, and its safetensors files in their own library."""
    copy = open_checkpoint(path)
    with closing(copy):
        for file in copy.container.files:
            if is_safetensors(file.read(0, min(9, file.size))):
                open_with_safetensors(file.path)
        return len(copy.entries) == len(original.entries) and all(
            _facts(one) == _facts(other) for one, other in zip(copy.entries, original.entries, strict=True)
        )


def _facts(entry: Entry) -> tuple[object, ...]:
    """What an edit of values leaves as it is."""
    if isinstance(entry, Tensor):
        storage = entry.storage
        own = (
            entry.name,
            entry.dtype.name,
            entry.shape,
            entry.stride,
            entry.storage_offset,
            None if storage is None else (storage.key, storage.nbytes, storage.location),
            entry.layout,
        )
        return (*own, *map(_facts, entry.parts))
    return (entry.name,)


def verify_new(wanted: Sequence[Tensor], path: str, *, in_order: bool = True) -> None:
    """Open a new checkpoint before it takes its name, and compare its tensors with those that were meant.

    Raises CkptError where their names, order, dtypes, shapes or ties are others.
    """
    try:
        with closing(open_checkpoint(path)) as copy:
            fault = difference(wanted, copy.entries)
            names = [entry.name for entry in copy.entries]
            if in_order and not fault and names != [entry.name for entry in wanted]:
                fault = "its tensors are in another order"
    except FormatError as error:
        fault = error.problem
    if fault:
        raise CkptError(f"the new checkpoint did not read back as it should, so nothing was replaced: {fault}")


def open_with_safetensors(path: str) -> None:
    """Open a file with the safetensors library; raises FormatError where it refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as reader:
            reader.keys()
    except SafetensorError as error:
        raise FormatError(f"the safetensors library refuses it: {error}") from None
