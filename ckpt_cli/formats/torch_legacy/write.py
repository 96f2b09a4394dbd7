"""New streams of torch.save from before 1.6, as torch still writes them with `_use_new_zipfile_serialization=False`.

Source: torch/serialization.py (`_legacy_save`): the magic number, the version, facts of the machine, the object, the
sorted keys of its storages, and of each the number of its elements before its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.writing import Appender, OpenCopy, announced, verify_new
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.pickles.graph import Dict, Global, PersistentId
from ckpt_cli.pickles.legacy_save import MAGIC, NUMEL, VERSION
from ckpt_cli.pickles.references import reference_of, storage_references
from ckpt_cli.pickles.tensors.make import Maker, state_of
from ckpt_cli.pickles.write import write_pickle


def spelled(dtype: DType) -> str | None:
    """Return torch's spelling of a dtype; None for one that it has no storage class for.

    torch writes such tensors to a stream, and fails to load them.
    """
    return None if dtype.category == "quantized" or dtype.storage is None else dtype.name


def write(new: NewCheckpoint, target: LocalFile | None, progress: Progress = no_progress) -> int:
    """Write a dict of tensors, or the OrderedDict that a state_dict is; returns its bytes.

    Without a target it only measures.
    """
    maker = Maker()
    root = state_of(new, maker)
    return write_object(root, maker.storages, new, target, progress, b"")


def write_object(
    root: object,
    storages: Sequence[Storage],
    new: NewCheckpoint,
    target: LocalFile | None,
    progress: Progress,
    data: bytes | memoryview,
) -> int:
    """Write an object, and its storages by their numbers; returns its bytes. Without a target it only measures.

    `data` is the pickle that the object's graph was read from. Raises UnsupportedError for a storage without a dtype.
    """
    itemsizes = _complete_references(root)
    keys = sorted(map(str, range(len(storages))))
    out = Appender(target)
    for value in (MAGIC, VERSION, _facts_of_the_machine()):
        write_pickle(value, b"", out.append)
    write_pickle(root, data, out.append)
    write_pickle(list(keys), b"", out.append)
    contents = [new.contents[storages[int(key)]] for key in keys]
    for key, content in zip(keys, contents if target is None else announced(contents), strict=True):
        out.append(NUMEL.pack(content.nbytes // itemsizes[key]))
        out.append_contents((content,), progress)
    return out.position


def _facts_of_the_machine() -> Dict:
    """Return what torch notes of the machine that wrote a stream, as it is of all that torch runs on."""
    sizes = Dict(["short", 2, "int", 4, "long", 4])
    return Dict(["protocol_version", VERSION, "little_endian", True, "type_sizes", sizes])


def _complete_references(root: object) -> dict[str, int]:
    """Give each reference the part that only streams have, a view of another storage, which is None.

    Returns the bytes of an element of each storage by its key: as in torch, the first reference says how many.
    """
    itemsizes: dict[str, int] = {}
    for node in storage_references(root):
        reference = reference_of(node)
        if reference is None or _is_untyped(reference.kind):
            raise UnsupportedError(
                "it has tensors of dtypes that torch cannot load from a file of before 1.6 (float8, unsigned integers)",
                hint="--to pt writes a file of today's format",
            )
        itemsizes.setdefault(reference.key, reference.itemsize)
        _complete(node)
    return itemsizes


def _is_untyped(kind: Global) -> bool:
    return kind.name == "UntypedStorage"


def _complete(node: PersistentId) -> None:
    if isinstance(node.pid, tuple) and len(node.pid) == 5:
        node.pid = (*node.pid, None)


def verify(new: NewCheckpoint, path: str, open_copy: OpenCopy) -> None:
    """Read the new file back, and compare it with what was meant."""
    verify_new(new.tensors, path, open_copy)
