"""Checks that read every byte: the CRCs of records, and values that no sound tensor has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.arrays.tally import Tally, can_tally, merged, tally
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, LimitError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.places import name_of
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.check.zip import ZipFile
from ckpt_cli.parallel.byte_ranges import Answers, FileRange, Job, jobs_of, read_all, total
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
        parts: list[list[FileRange]] = [[] for _ in checkpoint.container.files]
        numbers = {id(file): number for number, file in enumerate(checkpoint.container.files)}
        for subject in zips:
            for part in self._record_parts(subject):
                parts[numbers[id(subject.file)]].append(part)
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
        for file, wanted in zip(checkpoint.container.files, parts, strict=True):
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

    def _add_tensor(self, checkpoint: Checkpoint, tensor: Tensor, parts: list[list[FileRange]]) -> None:
        low, high = tensor.span
        extents: Sequence[Extent] | None = None
        if tensor.storage is not None and _is_dense(tensor):
            try:
                extents = checkpoint.container.extents(tensor.storage, low, high - low)
            except UnsupportedError:  # compressed
                extents = None
            except CkptError:  # not where the metadata say, as another check reports
                return
        size = tensor.dtype.itemsize
        if extents is None or any(extent.nbytes % size for extent in extents):
            self._apart.append((checkpoint, _where(checkpoint), tensor))
            return
        number = len(self._tensors)
        for extent in extents:
            end = extent.offset + extent.nbytes
            parts[extent.file].append(FileRange(number, extent.offset, end, tensor.dtype, tensor.big_endian))
            path = checkpoint.container.files[extent.file].path
            self._ends.setdefault(path, []).append((number, extent.offset, end))
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
        for number, (where, tensor) in enumerate(self._tensors):
            answer.tensors.append((where, tensor, answers.tallies[number]))
        self._read_packed()
        for checkpoint, where, tensor in self._apart:
            self._read_apart(checkpoint, where, tensor, executor)
        answer.tails = list(self._tails(answers))
        return answer

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
    chunks = ((chunk, source.cost(chunk)) for chunk in source.chunks(source.cuts()))
    for answer in run(grouped(chunks), partial(_tally_chunks, source, tensor.big_endian), executor):
        found = merged(found, answer)
    return found


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
    Check("no-crc", "note", "records have no CRC, as torch writes them under `set_crc32_options(False)`", _no_crc),
    Check("unchecked", "note", "values that could not be looked at, or too many of them", _unchecked),
)  # fmt: skip
"""With `--deep` only."""
