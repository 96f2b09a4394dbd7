"""New npz files: a zip file of arrays, as `numpy.savez` writes it (numpy/lib/_npyio_impl.py, numpy/lib/format.py)."""

from __future__ import annotations

import zipfile

from ckpt_cli.dtypes import DType
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.numpy.npy import header_bytes
from ckpt_cli.formats.writing import OpenCopy, not_read_back
from ckpt_cli.formats.zip.write import ZipWriter
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint

_CODES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2",
          "int8": "|i1", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1",
          "complex128": "<c16", "complex64": "<c8"}  # fmt: skip


def spelled(dtype: DType) -> str | None:
    """Return numpy's spelling of a dtype in a file; None for one that it does not have by itself."""
    return _CODES.get(dtype.name)


def _header(tensor: Tensor) -> bytes:
    return header_bytes(tensor.name, _CODES[tensor.dtype.name], tuple(tensor.shape or ()))


def write(new: NewCheckpoint, target: LocalFile | None, progress: Progress = no_progress) -> int:
    """Write one array a tensor; returns the bytes of the file. Without a target it only measures."""
    writer = ZipWriter(target)
    for tensor in new.tensors:
        head = _header(tensor)
        with writer.record(f"{tensor.name}.npy", len(head) + tensor.nbytes):
            writer.append(head)
            writer.append_contents((new.content(tensor),), progress)
    return writer.close()


def verify(new: NewCheckpoint, path: str, open_copy: OpenCopy) -> None:  # noqa: ARG001 - as all writers have it
    """Read the new file's directory and headers back with the library, and compare them with what was meant."""
    wanted = {f"{tensor.name}.npy": _header(tensor) for tensor in new.tensors}
    with zipfile.ZipFile(path) as archive:
        if archive.namelist() != list(wanted):
            raise not_read_back("other names")
        for tensor, (name, head) in zip(new.tensors, wanted.items(), strict=True):
            with archive.open(name) as record:
                if record.read(len(head)) != head or archive.getinfo(name).file_size != len(head) + tensor.nbytes:
                    raise not_read_back(repr(name))
