"""Tensors that `set --new` adds: the array of a .npy file, or numbers of the command line in a given dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from math import prod
from typing import TYPE_CHECKING

from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import CkptError, MalformedError, UsageError
from ckpt_cli.files.copy import PIECE
from ckpt_cli.files.places import open_file
from ckpt_cli.model.changes import Content, Write
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Storage, Tensor, Value, contiguous_stride

if TYPE_CHECKING:
    from ckpt_cli.arrays.codec import Array, Codec

Made = tuple[Tensor, Content]
"""A new tensor, alone in its storage, and the bytes of that."""

_COLUMNS = 64 << 20
"""Bytes of rows that are read together of an array in Fortran's order, as each column is read once for them."""

_CATEGORIES = ("int", "bool", "complex")
"""Dtypes of a new tensor, besides those that `cast` takes."""

_OTHER = {"long": "int64", "int": "int32", "short": "int16", "char": "int8", "byte": "uint8", "boolean": "bool",
          "cdouble": "complex128", "cfloat": "complex64", "chalf": "complex32"}  # fmt: skip
"""Short names of dtypes that are not floating."""


def dtype_of_new(name: str) -> DType:
    """Return the dtype of a name, in torch's spelling or a short one; raises UsageError for any other."""
    word = name.lower().removeprefix("torch.")
    dtype = BY_NAME.get(_OTHER.get(word, word))
    if dtype is not None and dtype.category in _CATEGORIES:
        return dtype
    from ckpt_cli.edits.cast import dtype_named

    try:
        return dtype_named(name)
    except UsageError as error:
        others = [known for known, its in BY_NAME.items() if its.category in _CATEGORIES]
        hint = f"{error.hint}, {', '.join(others)}" if error.hint and error.hint.startswith("one of") else error.hint
        raise UsageError(f"{name!r} is not a dtype that a new tensor can have", hint=hint) from None


def new_tensor(name: str, value: str, dtype: DType | None, *, cast: bool) -> Made:
    """Return the tensor that the right side of an assignment spells; the values of `@FILE.npy` are not read yet.

    A file keeps its dtype unless another one is given. Raises UsageError, OSError, or ValueRefusedError for values
    that the dtype cannot hold.
    """
    if value.startswith("@"):
        return _from_file(name, value[1:], dtype, cast=cast)
    if dtype is None:
        raise UsageError(f"{name!r} would be a tensor of numbers without a dtype", hint="--dtype says which")
    from ckpt_cli.edits.assignment import parse_value

    values = parse_value(value)
    data = _encoder(name, dtype, cast=cast)(values)
    return _alone(name, dtype, values.shape, lambda write: write(data))


def _alone(name: str, dtype: DType, shape: tuple[int, ...], make: Callable[[Write], object]) -> Made:
    tensor = Tensor(name, dtype, shape, contiguous_stride(shape))
    storage = Storage(f"new {name}", tensor.nbytes)
    return Tensor(name, dtype, shape, tensor.stride, storage), Content(storage.nbytes, make=make)


def _encoder(name: str, dtype: DType, *, cast: bool) -> Callable[[Array], bytes]:
    """Return a function from values to their stored bytes, in row-major order."""
    from ckpt_cli.arrays.codec import Codec

    codec = Codec(Tensor(name, dtype, (), (), Storage("", dtype.itemsize)))
    return lambda values: codec.encode(values, cast=cast).tobytes()


# --- arrays in files -------------------------------------------------------------------------------------------------


def _from_file(name: str, path: str, dtype: DType | None, *, cast: bool) -> Made:
    """Return the array of a file, which is opened again when its bytes are written."""
    with closing(_open(path)) as file:
        found = _array_in(file)
    wanted = dtype or found.dtype
    shape = found.shape or ()

    def make(write: Write) -> None:
        with closing(_open(path)) as file:
            array = _array_in(file)
            if (array.dtype, array.shape, array.stride, array.big_endian) != (
                found.dtype, found.shape, found.stride, found.big_endian
            ):  # fmt: skip
                raise CkptError("became another array while it was read", path=path)
            for piece in _pieces(file, array, name, wanted, cast=cast):
                write(piece)

    return _alone(name, wanted, shape, make)


def _open(path: str) -> Checkpoint:
    from ckpt_cli.formats.numpy import read as npy_stream

    file = open_file(path)
    try:
        return npy_stream.read(file)
    except MalformedError:
        file.close()
        raise UsageError(
            "not a numpy array of numbers", path=path, hint="write one with numpy.save (an .npz holds several)"
        ) from None
    except BaseException:
        file.close()
        raise


def _array_in(file: Checkpoint) -> Tensor:
    """Return the one array of a file; raises UsageError for objects, or where there are several arrays."""
    first = file.entries[0]
    if isinstance(first, Value):
        shown = first.value.text if isinstance(first.value, Opaque) else str(first.value)
        raise UsageError(f"its values are not numbers: {shown}", path=file.path)
    if first.storage is None or len(file.entries) > 1 or _end(first.storage) < file.container.files[0].size:
        raise UsageError("holds more than one array, and it is not clear which one is meant", path=file.path)
    return first


def _end(storage: Storage) -> int:
    """Return the offset of the byte after an array's last one."""
    return storage.extents(0, storage.nbytes)[0].offset + storage.nbytes


def _pieces(file: Checkpoint, array: Tensor, name: str, dtype: DType, *, cast: bool) -> Iterator[bytes | memoryview]:
    """Yield the elements in row-major order as they are to be stored, a bounded piece at a time."""
    from ckpt_cli.arrays.codec import Codec, little_endian
    from ckpt_cli.edits.convert_contents import elements

    by_columns = _is_by_columns(array)
    if dtype is array.dtype and not by_columns:
        yield from elements(file, array, PIECE)
        return
    codec, encode = Codec(array), _encoder(name, dtype, cast=cast)
    for stored in _rows_of_columns(array, codec) if by_columns else _rows(file, array, codec):
        yield little_endian(array, stored.tobytes()) if dtype is array.dtype else encode(codec.decode(stored))


def _rows(file: Checkpoint, array: Tensor, codec: Codec) -> Iterator[Array]:
    """Yield stored elements in row-major order, each piece valid until the next one."""
    import numpy as np

    from ckpt_cli.arrays.indexing import Region
    from ckpt_cli.parallel.tensor_chunks import TensorReader

    for data in TensorReader(file, array, Region.of(array)).read_all(PIECE):
        yield np.frombuffer(data, codec.stored)


def _is_by_columns(array: Tensor) -> bool:
    """True for an array in Fortran's order, unless its rows are too long to be held."""
    shape = array.shape or (1,)
    return not array.is_contiguous and array.nbytes // shape[0] <= _COLUMNS


def _rows_of_columns(array: Tensor, codec: Codec) -> Iterator[Array]:
    """Yield rows of an array in Fortran's order; of each column only their part is read."""
    import numpy as np

    if array.shape is None or array.storage is None:
        return
    length, *others = array.shape
    columns, size = prod(others), array.dtype.itemsize
    whole = array.storage.extents(0, array.nbytes)[0]
    most = max(_COLUMNS // (columns * size), 1)
    for first in range(0, length, most):
        nbytes = min(most, length - first) * size
        room = memoryview(bytearray(columns * nbytes))
        for column in range(columns):
            begin = whole.offset + (column * length + first) * size
            whole.file.read_into(room[column * nbytes : (column + 1) * nbytes], begin)
        yield np.frombuffer(room, codec.stored).reshape(*others[::-1], nbytes // size).T
