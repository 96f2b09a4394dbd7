"""The last look at a patched copy before it takes its name; new files are read back by their writers."""

from __future__ import annotations

from contextlib import closing

from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.formats.open import open_checkpoint
from ckpt_cli.formats.signatures import is_safetensors
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
    from ckpt_cli.formats.writing import open_with_safetensors

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
