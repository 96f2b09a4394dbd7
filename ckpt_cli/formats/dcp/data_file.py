"""A file of items of a distributed checkpoint that is written: parts of an old one, and new items behind them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.places import open_file
from ckpt_cli.files.source import LocalFile, SourceFile, Window
from ckpt_cli.formats.dcp.write import is_saved_tensor, is_saved_value
from ckpt_cli.formats.torch_zip.write import write_pickled
from ckpt_cli.formats.writing import Appender
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


@dataclass(frozen=True, slots=True)
class Item:
    """A new item: what torch.save makes of a tensor or of a value."""

    name: str
    """The new name of its entry."""
    saved: Tensor | SavedValue
    pickle: bytes
    storages: Sequence[Storage]
    nbytes: int
    """Bytes of the whole item."""


class DataFile:
    """A file of items that is written (a `Rewriter`): parts of an old one, and new items."""

    def __init__(
        self, source: SourceFile | None, ranges: Sequence[tuple[int, int]], items: Sequence[Item], new: NewCheckpoint
    ) -> None:
        """`ranges` are the bytes of the old file that are kept, begin and end of each, in their order and apart."""
        self.source = source
        """The old file; None where all items are new."""
        self._ranges = ranges
        self._items = items
        self._new = new
        """Has the bytes of the storages of tensors."""
        self._firsts = [begin for begin, _ in ranges]
        self._begins = list(accumulate((end - begin for begin, end in ranges), initial=0))
        """The first byte of each range in the new file, and the end of the last."""

    @property
    def kept(self) -> int:
        """Bytes that are copied."""
        return self._begins[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.kept + sum(item.nbytes for item in self._items)

    def moved(self, offset: int) -> int:
        """Return where an item begins in the new file that began at `offset` of the old one."""
        number = bisect_right(self._firsts, offset) - 1
        return self._begins[number] + offset - self._firsts[number]

    def places(self) -> Iterator[tuple[Item, int]]:
        """Yield new items, with the first byte of each."""
        position = self.kept
        for item in self._items:
            yield item, position
            position += item.nbytes

    def patch(self, overlay: Overlay) -> bool:  # noqa: ARG002 - files of items are never patched
        """Return False: it is another file."""
        return False

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write all of it into an empty file."""
        appender = Appender(target)
        for begin, end in self._ranges:
            if self.source is not None:
                appender.append_range(self.source, begin, end - begin, progress)
        for item, begin in self.places():
            written = write_pickled(item.pickle, item.storages, self._new_of(item), target, progress, base=begin)
            if written != item.nbytes:
                raise CkptError(f"the item of {item.name!r} came to {written} bytes instead of {item.nbytes}")

    def _new_of(self, item: Item) -> NewCheckpoint:
        return self._new if isinstance(item.saved, Tensor) else NewCheckpoint((), item.saved.contents)

    def verify(self, path: str) -> None:
        """Read new items back, and compare them with what was meant."""
        file = open_file(path)
        try:
            for item, begin in self.places():
                window = Window(file, begin, item.nbytes)
                if isinstance(item.saved, Tensor):
                    same = is_saved_tensor(item.saved, item.pickle, window, self._new)
                else:
                    same = is_saved_value(item.saved, window)
                if not same:
                    raise CkptError(f"the new item of {item.name!r} did not read back as it should")
        except FormatError as error:
            raise CkptError(f"a new file did not read back as it should, so nothing was replaced: {error}") from None
        finally:
            file.close()
