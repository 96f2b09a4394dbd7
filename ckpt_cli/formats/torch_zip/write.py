"""New torch zip files: a flat dict of tensors, as torch.save writes one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from ckpt_cli.dtypes import DType
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.formats.verify import verify_new
from ckpt_cli.formats.zip.write import ALIGNMENT, ZipWriter
from ckpt_cli.model.changes import Content
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.pickles.graph import Dict
from ckpt_cli.pickles.tensors.make import Maker
from ckpt_cli.pickles.write import write_pickle


def spelled(dtype: DType) -> str | None:
    """How torch says a dtype; None for one that it has not."""
    return None if dtype.category == "quantized" or dtype.elements > 1 else dtype.name


def write(new: NewCheckpoint, target: LocalFile | None, progress: Progress = no_progress) -> int:
    """Write a dict of tensors, or the OrderedDict that a state_dict is; returns its bytes.

    Without a target it only measures.
    """
    maker = Maker()
    pairs: list[object] = []
    for tensor in new.tensors:
        pairs += (tensor.name, maker.tensor(tensor))
    root: object = maker.state_dict(pairs, new.notes) if new.ordered or new.notes else Dict(pairs)
    stem = os.path.basename(new.stem) or "archive"
    return write_saved(root, maker.storages, new, target, progress, prefix=stem)


def write_saved(
    root: object,
    storages: Sequence[Storage],
    new: NewCheckpoint,
    target: LocalFile | None,
    progress: Progress = no_progress,
    *,
    prefix: str = "archive",
    data: bytes | memoryview = b"",
    base: int = 0,
) -> int:
    """Write what torch.save makes of an object: its pickle, and its storages by their numbers; returns its bytes.

    Without a target it only measures. `data` is the pickle that the object's graph was read from; the file is added to
    from byte `base` on.
    """
    writer = ZipWriter(target, base=base)
    pickle = bytearray()
    write_pickle(root, data, pickle.extend)
    writer.add(f"{prefix}/data.pkl", bytes(pickle))
    writer.add(f"{prefix}/.format_version", b"1")
    writer.add(f"{prefix}/.storage_alignment", str(ALIGNMENT).encode())
    writer.add(f"{prefix}/byteorder", b"little")
    for number, storage in enumerate(storages):
        content = new.contents[storage]
        with writer.record(f"{prefix}/data/{number}", content.nbytes):
            put_content(writer, content, new.files, progress)
    writer.add(f"{prefix}/version", b"3\n")
    writer.add(f"{prefix}/.data/serialization_id", _identity(pickle, writer.checksums))
    return writer.close()


def _identity(pickle: bytes | bytearray, checksums: Sequence[int]) -> bytes:
    """Forty digits that tell the content apart from other content, as torch's writer has them."""
    digest = hashlib.blake2b(pickle, digest_size=16)
    digest.update(b"".join(crc.to_bytes(4, "little") for crc in checksums))
    return f"{int.from_bytes(digest.digest(), 'little'):040}".encode()


def put_content(writer: ZipWriter, content: Content, files: Sequence[SourceFile], progress: Progress) -> None:
    """The bytes of a storage, into the record that is being written."""
    if writer.only_measures:
        writer.skip(content.nbytes)
        return
    if content.extents is not None:
        writer.gather(files, content.extents, progress)
        return

    def told(piece: bytes | memoryview) -> None:
        writer.put(piece)
        progress(len(piece))

    if content.make is not None:
        content.make(told)


def verify(new: NewCheckpoint, path: str) -> None:
    """Read the new file back, and compare it with what was meant."""
    verify_new(new.tensors, path)
