"""Checks that read every byte: the CRCs of records, and values that no sound tensor has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.arrays.lines import EXAMPLES, LEAST, WIDEST, Lines, lines_of, merged_lines
from ckpt_cli.arrays.tally import Tally, can_tally, merged, tally
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, LimitError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import Place, announce, fetch
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.places import name_of
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, contiguous_stride
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.check.zip import ZipFile
from ckpt_cli.parallel.announced import places_in
from ckpt_cli.parallel.byte_ranges import BLOCK, Answers, FileRange, Job, jobs_of, read_all, total
from ckpt_cli.parallel.map import grouped, run
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader
from ckpt_cli.scanner.tolerant_zip import Member, inflated_crc

if TYPE_CHECKING:
    from concurrent.futures import Executor

_TAIL = 1 << 20
"""Zero bytes at the end of a file from which on they are reported."""


@dataclass(slots=True)
class Deep:
    """The facts from reading every byte of a checkpoint."""

    records: list[tuple[str, Member, int | None]] = field(default_factory=list)
    """The place of each record with content, the record, and the CRC of its content; None where it does not inflate."""
    tensors: list[tuple[str, Tensor, Tally]] = field(default_factory=list)
    """Each distinct view, with where it is."""
    lines: list[tuple[str, Tensor, Lines]] = field(default_factory=list)
    """The matrices that were looked into for rows and columns of equal elements."""
    tails: list[tuple[str, int, int]] = field(default_factory=list)
    """Files that end in tensors of zeros: where, how many tensors, how many bytes."""
    unchecked: list[tuple[str, str]] = field(default_factory=list)
    """The things that could not be checked, and why."""


class Reading:
    """The bytes of some checkpoints, to be read in one go."""

    def __init__(self) -> None:
        self.answer = Deep()
        self._jobs: list[Job] = []
        self._records: list[tuple[str, Member]] = []
        self._tensors: list[tuple[str, Tensor]] = []
        self._packed: list[tuple[SourceFile, str, Member]] = []
        self._apart: list[tuple[Checkpoint, str, Tensor]] = []
        """Views with gaps, and of compressed storages: read on their own."""
        self._ends: dict[str, list[tuple[int, int, int]]] = {}
        """By file: the number, begin and end of the tensors in it."""

    def add(self, checkpoint: Checkpoint, zips: Sequence[ZipFile]) -> None:
        """Ask for the records and the tensors of a checkpoint."""
        parts: dict[SourceFile, list[FileRange]] = {file: [] for file in checkpoint.container.files}
        for subject in zips:
            for part in self._record_parts(subject):
                parts[subject.file].append(part)
        budget = Budget.of(checkpoint)
        seen: set[object] = set()
        for tensor in all_strided(checkpoint.tensors):
            if tensor.view is None or tensor.view in seen:
                continue
            seen.add(tensor.view)
            if not can_tally(tensor.dtype):
                what = f"{tensor.dtype.described} of dtype {tensor.dtype}, whose values cannot be read"
                self.answer.unchecked.append((f"{_where(checkpoint)}: {tensor.name}", what))
                continue
            try:
                budget.read(tensor, _once(Region.of(tensor)))
            except LimitError as error:
                self.answer.unchecked.append((f"{_where(checkpoint)}: {tensor.name}", error.problem))
            else:
                self._add_tensor(checkpoint, tensor, parts)
        for file, wanted in parts.items():
            self._jobs.extend(jobs_of(file, wanted))

    def _record_parts(self, subject: ZipFile) -> Iterator[FileRange]:
        """The plain records of a file; those that only overlapping ones could be are not read over and over."""
        left = subject.file.size
        for found in subject.zips:
            for member in found.members:
                where = f"{subject.where}/{member.name}"
                if not member.nbytes or member.begin < 0 or member.end > subject.file.size:
                    continue
                left -= member.stored
                if left < 0:
                    self.answer.unchecked.append((where, "its records have more bytes than the file"))
                    return
                if member.method == 0:
                    yield FileRange(len(self._records), member.begin, member.end)
                    self._records.append((where, member))
                elif member.method == 8:
                    self._packed.append((subject.file, where, member))

    def _add_tensor(self, checkpoint: Checkpoint, tensor: Tensor, parts: dict[SourceFile, list[FileRange]]) -> None:
        low, high = tensor.span
        extents: Sequence[Extent] | None = None
        if tensor.storage is not None and _is_dense(tensor):
            try:
                extents = tensor.storage.extents(low, high - low)
            except UnsupportedError:  # compressed
                extents = None
            except CkptError:  # not where the metadata say, as another check reports
                return
        size = tensor.dtype.itemsize
        if extents is None or any(extent.nbytes % size for extent in extents):
            self._apart.append((checkpoint, _where(checkpoint), tensor))
            return
        number = len(self._tensors)
        width = _width(tensor) if len(extents) == 1 else 0
        for extent in extents:
            begin, end = extent.offset, extent.offset + extent.nbytes
            parts[extent.file].append(
                FileRange(number, begin, end, tensor.dtype, tensor.big_endian, width, begin if width else 0)
            )
            self._ends.setdefault(extent.file.path, []).append((number, begin, end))
        self._tensors.append((_where(checkpoint), tensor))

    def read(self, executor: Executor, on_progress: OnProgress = lambda _, __: None) -> Deep:
        """Read it all; raises OSError or a FormatError where a file changes meanwhile."""
        nbytes, done = total(self._jobs), 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            on_progress(done, nbytes)

        answers = read_all(self._jobs, executor, count)
        answer = self.answer
        for number, (where, member) in enumerate(self._records):
            answer.records.append((where, member, answers.crcs.get(number, 0)))
        fetch(self._cut_rows(answers))
        for number, (where, tensor) in enumerate(self._tensors):
            found = answers.tallies[number]
            answer.tensors.append((where, tensor, found))
            if found.lines is not None and not found.same and not found.zero:
                answer.lines.append((where, tensor, _completed(tensor, found.lines)))
        self._read_packed()
        for checkpoint, where, tensor in self._apart:
            self._read_apart(checkpoint, where, tensor, executor)
        answer.tails = list(self._tails(answers))
        return answer

    def _cut_rows(self, answers: Answers) -> dict[SourceFile, list[tuple[int, int]]]:
        """Return where the rows lie that jobs cut, and that are read again."""
        found: dict[SourceFile, list[tuple[int, int]]] = {}
        for number, (_, tensor) in enumerate(self._tensors):
            lines, storage = answers.tallies[number].lines, tensor.storage
            if lines is None or storage is None:
                continue
            nbytes = _width(tensor) * tensor.dtype.itemsize
            for row in lines.cut:
                for extent in storage.extents(tensor.span[0] + row * nbytes, nbytes):
                    found.setdefault(extent.file, []).append((extent.offset, extent.nbytes))
        return found

    def _read_apart(self, checkpoint: Checkpoint, where: str, tensor: Tensor, executor: Executor) -> None:
        try:
            self.answer.tensors.append((where, tensor, _tally_apart(checkpoint, tensor, executor)))
        except CkptError as error:
            if not all(file.is_whole() for file in checkpoint.container.files):
                raise
            self.answer.unchecked.append((f"{where}: {tensor.name}", error.problem))

    def _read_packed(self) -> None:
        budget = Budget()
        for file, where, member in self._packed:
            try:
                budget.inflate(member.nbytes)
            except LimitError:
                self.answer.unchecked.append((where, "it is compressed, and would inflate to far too much"))
                return
            self.answer.records.append((where, member, inflated_crc(file, member)))

    def _tails(self, answers: Answers) -> Iterator[tuple[str, int, int]]:
        """The files whose last tensors are zeros, but not all of them."""
        for path, ends in self._ends.items():
            nbytes = 0
            for count, (number, begin, end) in enumerate(sorted(ends, key=lambda item: item[1], reverse=True)):
                if not answers.tallies[number].zero:
                    if nbytes >= _TAIL and count > 1:
                        yield name_of(path), count, nbytes
                    break
                nbytes += end - begin


def _where(checkpoint: Checkpoint) -> str:
    return name_of(checkpoint.path)


def _once(region: Region) -> Region:
    """A region without the dimensions that repeat its elements."""
    kept = [(size, step) for size, step in zip(region.shape, region.stride, strict=True) if step]
    return Region(tuple(size for size, _ in kept), tuple(step for _, step in kept), region.offset)


def _width(tensor: Tensor) -> int:
    """Elements of a row of a matrix as it lies in memory; 0 for what is not looked into."""
    sizes = tensor.shape or ()
    is_plain = tensor.dtype.category in ("float", "complex") and tensor.layout != "quantized"
    if not is_plain or len(sizes) < 2 or tensor.dtype.itemsize not in (1, 2, 4, 8):
        return 0
    if tuple(tensor.stride) == contiguous_stride(sizes):
        width = prod(sizes[1:])
    elif _is_turned(tensor):
        width = sizes[0]
    else:
        return 0
    is_fit = width >= LEAST and tensor.numel >= 2 * width and width * tensor.dtype.itemsize <= WIDEST
    return width if is_fit else 0


def _is_turned(tensor: Tensor) -> bool:
    """True if a matrix lies in memory column by column."""
    return len(tensor.shape or ()) == 2 and tuple(tensor.stride) == (1, (tensor.shape or (0,))[0])


def _completed(tensor: Tensor, found: Lines) -> Lines:
    """What pieces of a matrix show, with the rows that they cut, and with columns only where all rows agree."""
    width, size = _width(tensor), tensor.dtype.itemsize
    nbytes, base, count = width * size, tensor.span[0], tensor.numel // width
    storage = tensor.storage
    if storage is None:  # not reached: it has bytes
        return found
    for number in sorted(set(found.cut)):
        row = storage.view(base + number * nbytes, nbytes)
        merged_lines(found, lines_of(row, number * width, width, size, rows_alone=True))
    columns = found.columns if count >= LEAST and len(tensor.shape or ()) == 2 else None
    step = max(1, BLOCK // nbytes)
    for first in range(0, count if columns else 0, step):
        rows = min(step, count - first)
        here = lines_of(storage.view(base + first * nbytes, rows * nbytes), first * width, width, size)
        columns = {number: bits for number, bits in (columns or {}).items() if (here.columns or {}).get(number) == bits}
        if not columns:
            break
    return replace(found, columns=columns)


def _is_dense(tensor: Tensor) -> bool:
    """True if a view touches each element of its span once, in whatever order."""
    expected = 1
    for step, size in sorted(zip(tensor.stride, tensor.shape or (), strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _tally_apart(checkpoint: Checkpoint, tensor: Tensor, executor: Executor) -> Tally:
    """The tally of a view with gaps or of a compressed storage, each element once; of a quantized one its integers."""
    if tensor.layout == "quantized":
        from ckpt_cli.arrays.quantized import integers

        tensor = integers(tensor)
    source = TensorReader(checkpoint, tensor, _once(Region.of(tensor)), any_order=True)
    found = tally(memoryview(b""), tensor.dtype)
    announce(source.all_places())
    chunks = ((chunk, source.cost(chunk)) for chunk in source.chunks(source.cuts()))
    work = partial(_tally_chunks, source, tensor.big_endian)
    for answer in run(grouped(chunks), work, executor, places=_places):
        found = merged(found, answer)
    return found


def _places(chunks: Sequence[Chunk]) -> list[Place]:
    """Return what is read for some chunks."""
    return places_in([chunks])


def _tally_chunks(source: TensorReader, big_endian: bool, chunks: Sequence[Chunk]) -> Tally:
    """The tally of some chunks that follow each other."""
    found: Tally | None = None
    for chunk in chunks:
        found = merged(found, tally(source.read(chunk), source.dtype, big_endian=big_endian))
    return found or tally(memoryview(b""), source.dtype)


# --- the checks -------------------------------------------------------------------------------------------------------


def _crc(deep: Deep) -> Iterator[Occurrence]:
    for where, member, crc in deep.records:
        if crc is None:
            yield Occurrence(where, f"the record does not inflate to the {member.nbytes} bytes that it should have")
        elif member.crc not in (0, crc):
            yield Occurrence(where, f"the CRC of the record should be {member.crc:08x}, it is {crc:08x}")


def _no_crc(deep: Deep) -> Iterator[Occurrence]:
    bare = [(where, member.nbytes) for where, member, crc in deep.records if not member.crc and crc]
    if bare:
        nbytes = sum(nbytes for _, nbytes in bare)
        yield Occurrence(bare[0][0], f"{len(bare)} records have no CRC, so their {nbytes} bytes cannot be checked")


def _nan(deep: Deep) -> Iterator[Occurrence]:
    for where, tensor, found in deep.tensors:
        if found.nan:
            message = f"{found.nan} of {found.numel} elements are NaN"
            yield Occurrence(f"{where}: {tensor.name}", message, name=tensor.name)


def _inf(deep: Deep) -> Iterator[Occurrence]:
    for where, tensor, found in deep.tensors:
        if found.inf:
            message = f"{found.inf} of {found.numel} elements are infinite"
            severity = "note" if "mask" in tensor.name.lower() else ""
            yield Occurrence(f"{where}: {tensor.name}", message, severity, name=tensor.name)


def _is_matrix(tensor: Tensor) -> bool:
    """True if it could be a weight: a vector of zeros or ones is a bias or a scale that was never trained."""
    return tensor.dtype.category in ("float", "complex") and sum(size > 1 for size in tensor.shape or ()) > 1


def _zeros(deep: Deep) -> Iterator[Occurrence]:
    for where, tensor, found in deep.tensors:
        if found.zero and found.numel and _is_matrix(tensor):
            yield Occurrence(f"{where}: {tensor.name}", f"all {found.numel} elements are zero")


def _constant(deep: Deep) -> Iterator[Occurrence]:
    for where, tensor, found in deep.tensors:
        if found.same and not found.zero and not found.nan and _is_matrix(tensor):
            yield Occurrence(f"{where}: {tensor.name}", f"all {found.numel} elements are the same")


def _dead(deep: Deep) -> Iterator[Occurrence]:
    """Rows and columns of equal elements in matrices that have others."""
    for where, tensor, found in deep.lines:
        rows, columns = ("columns", "rows") if _is_turned(tensor) else ("rows", "columns")
        numbers = sorted(found.columns or {})
        zeros = sum(not bits.strip(b"\0") for bits in (found.columns or {}).values())
        both = ((rows, found.rows, found.zeros, sorted(found.first)), (columns, len(numbers), zeros, numbers))
        for kind, count, zero, first in both:
            if count:
                yield Occurrence(f"{where}: {tensor.name}", _dead_text(tensor, kind, count, zero, first))


def _dead_text(tensor: Tensor, kind: str, count: int, zeros: int, first: Sequence[int]) -> str:
    """Say how many rows or columns are of equal elements, and which are the first of them."""
    what = "zeros" if zeros == count else "one value each"
    more = f", {zeros} of them zeros" if 0 < zeros < count else ""
    named = ", ".join(map(str, first[:EXAMPLES])) + (", …" if count > EXAMPLES else "")
    lines = f"{kind.removesuffix('s')} is" if count == 1 else f"{kind} are"
    return f"{count} {lines} {what}{more}, of a shape of {list(tensor.shape or ())}: {named}"


def _tail(deep: Deep) -> Iterator[Occurrence]:
    for where, count, nbytes in deep.tails:
        yield Occurrence(where, f"its last {count} tensors, {nbytes} bytes, are zeros, as a copy cut short leaves them")


def _unchecked(deep: Deep) -> Iterator[Occurrence]:
    for where, reason in deep.unchecked:
        yield Occurrence(where, reason)


CHECKS: tuple[Check[Deep], ...] = (
    Check("crc", "error", "the bytes of a record have another CRC than the file says", _crc,
          "the file is damaged: fetch or copy it again"),
    Check("nan", "error", "a tensor has NaN", _nan, "ckpt show FILE NAME"),
    Check("inf", "warning", "a tensor has infinities; a note where its name says that it is a mask", _inf,
          "ckpt show FILE NAME"),
    Check("zero-tail", "warning", "the last tensors of a file, 1 MiB or more, are zeros", _tail,
          "compare its hash with the original's, or fetch it again"),
    Check("zeros", "note", "a tensor of two dimensions or more is all zeros", _zeros),
    Check("constant", "note", "a tensor of two dimensions or more is one value throughout", _constant),
    Check("dead-lines", "note", "rows or columns of a matrix are zeros, or one value throughout", _dead),
    Check("no-crc", "note", "records have no CRC, as torch writes them under `set_crc32_options(False)`", _no_crc),
    Check("unchecked", "note", "values that could not be looked at, or too many of them", _unchecked),
)  # fmt: skip
"""With `--deep` only."""
