"""Tensors elsewhere announced before they are read, so that whoever makes jobs of them does not wait for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from ckpt_cli.errors import CkptError
from ckpt_cli.files.at_once import Place, announce, fetch, is_elsewhere, is_left_to_workers
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader


def places_in(job: Iterable[Iterable[object]]) -> list[Place]:
    """Return the places of all chunks in the items of a job: what is read for it."""
    return [place for item in job for each in item if isinstance(each, Chunk) for place in each.places]


class Sampled(Protocol):
    """A tensor of which a few places are read before jobs are made of it."""

    source: TensorReader

    def places(self) -> list[Place]:
        """Return these places."""


_Subject = TypeVar("_Subject", bound=Sampled)


def announce_tensors(pairs: Iterable[tuple[Checkpoint, Tensor]]) -> None:
    """Say that all bytes of tensors will be read, in this order, as far as they lie elsewhere."""
    announce(place for checkpoint, tensor in pairs for place in _stored(checkpoint, tensor))


def _stored(checkpoint: Checkpoint, tensor: Tensor) -> list[Place]:
    """Return where a tensor's bytes lie elsewhere, as far as that is known."""
    if tensor.storage is None or not any(map(is_elsewhere, checkpoint.container.files)):
        return []
    begin, end = tensor.span
    with suppress(CkptError):  # compressed, or not where the metadata say, as whoever reads it reports
        extents = tensor.storage.extents(begin, end - begin)
        if len(extents) <= _EXTENTS:
            return [(extent.file, extent.offset, extent.nbytes) for extent in extents]
    return []


def announced(subjects: Sequence[_Subject], *, stream: bool) -> Iterator[_Subject]:
    """Yield the subjects; the samples of some that lie elsewhere are fetched before the first of these.

    To `stream` them, those of which all will be read next are asked for whole instead.
    """
    if not are_elsewhere(subjects):
        yield from subjects
        return
    ahead = reached = 0
    stream = stream and not is_left_to_workers()
    if stream:
        samples = (place for subject in subjects for place in subject.places() if subject.source.nbytes <= _WHOLE)
        announce((place for subject in subjects for place in subject.source.all_places()), samples)
    for number, subject in enumerate(subjects):
        if not number % _TOGETHER:
            some = subjects[number : number + _TOGETHER]
            fetch(_samples([each for each in some if not stream or each.source.nbytes > _WHOLE]))
        while stream and reached < len(subjects) and ahead < _STREAMED:
            one = subjects[reached].source
            one.expect(one.nbytes if one.nbytes <= _WHOLE else 0)
            ahead, reached = ahead + min(one.nbytes, _WHOLE), reached + 1
        yield subject
        ahead -= min(subject.source.nbytes, _WHOLE)


def are_elsewhere(subjects: Sequence[Sampled]) -> bool:
    """True if files of their checkpoint lie elsewhere."""
    return bool(subjects) and any(map(is_elsewhere, subjects[0].source.checkpoint.container.files))


def _samples(subjects: Iterable[Sampled]) -> dict[SourceFile, list[tuple[int, int]]]:
    """Return the ranges of each file that the samples of subjects are taken from."""
    wanted: dict[SourceFile, list[tuple[int, int]]] = {}
    for subject in subjects:
        for file, offset, nbytes in subject.places():
            wanted.setdefault(file, []).append((offset, nbytes))
    return wanted


_EXTENTS = 1_000
"""Places of one tensor that are announced."""

_TOGETHER = 100
"""Tensors elsewhere whose samples are fetched together."""

_WHOLE, _STREAMED = 8 << 20, 24 << 20
"""Bytes of a tensor elsewhere up to which it is fetched whole for its sample, and of all these at a time."""

AHEAD_ELSEWHERE = 8
"""Jobs that are under way at a time where bytes of the next tensors are fetched as well."""
