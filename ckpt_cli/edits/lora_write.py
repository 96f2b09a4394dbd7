"""New adapters: a safetensors file, alone or in a folder with PEFT's config, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress, counting
from ckpt_cli.files.new_folder import new_folder, passes_over
from ckpt_cli.files.places import is_folder, is_taken, names_in, without_end
from ckpt_cli.files.system import write_all
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.safetensors.write import verify, write
from ckpt_cli.model.changes import Content, Write
from ckpt_cli.model.checkpoint import Storage, Tensor, contiguous_stride
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.ops.lora_config import ADAPTER_CONFIG
from ckpt_cli.ops.output import check_output, require_name, require_place, writing

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """Options of every command that writes an adapter."""

    dtype: DType = BY_NAME["float32"]
    """The dtype of the factors."""
    force: bool = False
    """True if a file that is there already may be replaced."""
    dry_run: bool = False
    on_progress: OnProgress | None = None
    """Called with bytes done and bytes in all, once it takes a while."""


def write_adapter(
    output: str, new: NewCheckpoint, config: Mapping[str, object] | None, options: AdapterOptions,
    check: Callable[[], None], source: str,
) -> int:  # fmt: skip
    """Write an adapter: a folder with its config, or a file where there is none; returns the bytes that were written.

    A dry run makes everything and drops it. Raises RefusedError for an output that is there already.
    """
    _check(output, options, source, is_set=config is not None)
    text = b"" if config is None else (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if options.dry_run:
        for content in new.contents.values():
            if content.make is not None:
                content.make(lambda _: None)
        check()
        return write(new, None) + len(text)
    passes = passes_over(output)
    progress = counting(options.on_progress, lambda: new.nbytes * passes)
    if config is None:
        with writing(output, mode_of=new.mode_of, replace=options.force, progress=progress) as file:
            nbytes = write(new, file, progress)
            check()
            verify(new, file.path, open_checkpoint)
            return nbytes
    with new_folder(without_end(output), progress) as folder, folder:
        file = folder.create(WEIGHTS, mode_of=new.mode_of)
        nbytes = write(new, file, progress)
        check()
        verify(new, file.path, open_checkpoint)
        write_all(folder.create(ADAPTER_CONFIG, mode_of=new.mode_of).fd, text, 0)
        return nbytes + len(text)


def _check(output: str, options: AdapterOptions, source: str, *, is_set: bool) -> None:
    """Raise before any work is done where the output must not be written."""
    require_name(output)
    if not is_set:
        check_output(output, source, "name another file: the adapter stays as it is")
        if is_taken(output) and not options.force:
            raise RefusedError("it is there already", path=output, hint="--force replaces it")
        return
    if is_taken(output) and not (is_folder(output) and not names_in(output)):
        raise RefusedError("it is there already", path=output, hint="name a folder that is new or empty")
    require_place(without_end(output))


class Made:
    """Tensors over arrays that are made when they are written, one after another."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.contents: dict[Storage, Content] = {}

    def add(self, name: str, dtype: DType, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]) -> None:
        """Add a tensor; `make` returns its values as float32 when they are written."""
        storage = Storage(name, dtype.nbytes(_numel(shape)))

        def writes(write: Write) -> None:
            for piece in _pieces(make(), dtype, name):
                write(piece)

        self.tensors.append(Tensor(name, dtype, shape, contiguous_stride(shape), storage))
        self.contents[storage] = Content(storage.nbytes, make=writes)

    def keep(self, tensors: Sequence[Tensor], contents: Mapping[Storage, Content]) -> None:
        """Add tensors with their contents."""
        self.tensors += tensors
        self.contents.update(contents)


def _numel(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


_PIECE = 1 << 20
"""Elements that are cast and written at a time."""


def _pieces(values: NDArray[Any], dtype: DType, name: str) -> Iterator[memoryview]:
    import numpy as np

    from ckpt_cli.arrays.cast import Cast, Losses

    wide = BY_NAME["float32"]
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    cast = None if dtype is wide else Cast(wide, dtype, name)
    for begin in range(0, flat.size, _PIECE):
        data = flat[begin : begin + _PIECE].view(np.uint8).data
        yield data if cast is None else cast.run(data, Losses())
