"""The changes of what a tensor is over the checkpoints of a run: where it appears, and where its shape differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckpt_cli.facts import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """A change of what a tensor is."""

    file: int
    """The number of the file from which on it is so."""
    what: str


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tensor is in one checkpoint."""

    dtype: str
    layout: str
    shape: tuple[int, ...] | None
    part: tuple[int, ...]
    """The shape of the part of it that is followed."""
    reason: str = ""
    """Why it has no values that could be summarized; empty where it has."""


def events_of(kinds: Mapping[int, Kind], whole: Sequence[int]) -> Iterator[Event]:
    """Yield the changes of what a tensor is, from one to the next of the files that can be read."""
    last: Kind | None = None
    for place, step in enumerate(whole):
        now = kinds.get(step)
        if place and (now is None) != (last is None):
            yield Event(step, "appears" if last is None else "is gone")
        if now is not None and now.reason and not (last is not None and last.reason):
            yield Event(step, now.reason)
        if now is not None and last is not None and now is not last:
            yield from (Event(step, what) for what in _differences(last, now))
        last = now


def _differences(last: Kind, now: Kind) -> Iterator[str]:
    for what, before, after in (
        ("shape", _shape_text(last.shape), _shape_text(now.shape)),
        ("dtype", last.dtype, now.dtype),
        ("layout", last.layout, now.layout),
    ):
        if before != after:
            yield f"{what} {before} → {after}"


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else f"[{','.join(map(str, shape))}]"
