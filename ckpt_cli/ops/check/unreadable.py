"""Checks of files that no reader opens: what is the matter, and how much is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from ckpt_cli.errors import CkptError, FormatError, MalformedError, RanksError, ShortStorageError, TruncatedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import is_file, name_of, open_file
from ckpt_cli.formats.sharded.names import is_index
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.check.zip import least_size
from ckpt_cli.scanner.tolerant_zip import LooseZip, zips_within

_FETCH = "fetch or copy it again; no tool can bring back what is missing"
_SALVAGE = (
    "fetch or copy it again; ckpt ls --salvage FILE lists what is whole, ckpt convert --salvage FILE OUT writes it"
)


@dataclass(frozen=True, slots=True)
class Broken:
    """A file that a reader refused."""

    path: str
    where: str
    error: FormatError

    late_zip: LooseZip | None
    """The torch zip file in it that something follows or precedes; None where there is no such file."""

    @property
    def is_late_zip(self) -> bool:
        """True if a torch zip is in it, but not at its begin."""
        found = self.late_zip
        return found is not None and found.begin > 0


def broken_of(path: str, error: FormatError) -> Broken:
    """A file, or a folder, with the error of its reader."""
    if error.path is not None and is_file(error.path):
        path = error.path  # of a folder or a set: the one file of it
    return Broken(path, name_of(path), error, _late_zip(path))


def _late_zip(path: str) -> LooseZip | None:
    try:
        with closing(open_file(path)) as file:
            found = next(zips_within(file), None)
            if found is None or not any(member.name.endswith("/data.pkl") for member in found.members):
                return None
            return found if found.begin > 0 or found.end < file.size else None
    except (CkptError, OSError):
        return None


def _truncated(broken: Broken) -> Iterator[Occurrence]:
    if type(broken.error) is not TruncatedError or broken.late_zip is not None:
        return
    needed, size = None, 0
    if is_file(broken.path):
        with closing(open_file(broken.path)) as file:
            needed, size = least_size(file), file.size
    missing = f"; {needed - size} bytes at least are missing" if needed is not None and needed > size else ""
    hint = _SALVAGE if "--salvage" in (broken.error.hint or "") else ""
    yield Occurrence(broken.where, broken.error.problem + missing, hint=hint)


def _short(broken: Broken) -> Iterator[Occurrence]:
    if isinstance(broken.error, ShortStorageError):
        yield Occurrence(broken.where, broken.error.problem)


def _malformed(broken: Broken) -> Iterator[Occurrence]:
    if type(broken.error) is MalformedError and broken.late_zip is None:
        index = "ckpt index FILE writes it again from its shards" if is_index(broken.where) else ""
        yield Occurrence(broken.where, broken.error.problem, hint=broken.error.hint or index)


def _ranks(broken: Broken) -> Iterator[Occurrence]:
    if isinstance(broken.error, RanksError):
        yield Occurrence(broken.where, broken.error.problem, hint=broken.error.hint or "")


def _leading(broken: Broken) -> Iterator[Occurrence]:
    found = broken.late_zip
    if found is not None and found.begin > 0:
        yield Occurrence(
            broken.where,
            f"{found.begin} bytes stand before the zip file, so that torch does not load it",
            hint=f"tail -c +{found.begin + 1} FILE > OUT makes a copy without them",
        )


def _far_end(broken: Broken) -> Iterator[Occurrence]:
    """A zip whose end record lies too far from the end of the file to be found by everyone."""
    found = broken.late_zip
    if found is not None and found.begin == 0:
        with closing(open_file(broken.path)) as file:
            rest = file.size - found.end
        yield Occurrence(
            f"{broken.where} (byte {found.end})",
            f"{rest} bytes follow the end of the zip file, too many for readers to find it",
            hint=f"head -c {found.end} FILE > OUT makes a copy without them",
        )


def _not_one(broken: Broken) -> Iterator[Occurrence]:
    """Find a part of a set that is not a checkpoint, such as an error page that was saved in its place."""
    known = (TruncatedError, ShortStorageError, MalformedError, RanksError)
    if type(broken.error) not in known and broken.late_zip is None:
        yield Occurrence(broken.where, broken.error.problem)


CHECKS: tuple[Check[Broken], ...] = (
    Check("truncated", "error", "a file ends early: a write, a copy or a download was cut short", _truncated, _FETCH),
    Check("short-storage", "error",
          "a storage has fewer bytes than its tensors need, or none: `torch.load(mmap=True)` silently reads beyond it",
          _short, _FETCH),
    Check("malformed", "error", "a file breaks the rules of its format: header, ranges, views, pickle", _malformed,
          "ckpt scan FILE shows whether it was made to deceive"),
    Check("ranks", "error",
          "files of ranks are missing, are of several saves, or do not add up to the model that they are parts of",
          _ranks, "ckpt ls --files FILE lists the files as they are"),
    Check("leading-bytes", "error", "something stands before a zip file", _leading),
    Check("far-end", "error", "too many bytes follow a zip file for its end to be found", _far_end),
    Check("no-checkpoint", "error", "a shard is not a checkpoint, such as a saved error page or a git LFS pointer",
          _not_one, _FETCH),
)  # fmt: skip
