"""The answer of `torch.load(weights_only=True)` about files: does it take one, and which names must it be allowed?"""

from __future__ import annotations

from dataclasses import field

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import beginnings
from ckpt_cli.files.source import ByteSource
from ckpt_cli.formats.signatures import HEAD, ZIP_RECORD, is_legacy, is_pickle, is_tar
from ckpt_cli.pickles.legacy_save import MAGIC
from ckpt_cli.scanner.judge import judge
from ckpt_cli.scanner.restricted_unpickler import BROKEN, RestrictedUnpickler

_PARTS = (".distcp", ".metadata")
"""The files of a distributed checkpoint, which torch.load is not given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer about one file."""

    where: str
    safe_globals: tuple[str, ...] = ()
    """The names that have to be allowed, as the file spells them, in order of first use."""
    problem: str = ""
    """The reason that no allowed name makes it load; empty where there is none."""

    @property
    def loads(self) -> bool:
        """True if `torch.load(weights_only=True)` takes the file as it is."""
        return not self.safe_globals and not self.problem


@dataclass(slots=True)
class WeightsOnly:
    """The answers about the files of a checkpoint or a folder that torch.load has to do with."""

    files: list[Verdict] = field(default_factory=list)

    def look(self, source: ByteSource, where: str) -> None:
        """Add the answer about one file."""
        verdict = verdict_of(source, where)
        if verdict is not None and len(self.files) < limits.SCAN_FILES:
            self.files.append(verdict)

    @property
    def loads(self) -> bool:
        """True if torch takes all of them as they are."""
        return all(verdict.loads for verdict in self.files)

    @property
    def safe_globals(self) -> list[str]:
        """The names that have to be allowed for any of them."""
        return list(dict.fromkeys(name for verdict in self.files for name in verdict.safe_globals))

    @property
    def problems(self) -> list[Verdict]:
        """The files that no allowed name makes load."""
        return [verdict for verdict in self.files if verdict.problem]

    @property
    def dangerous(self) -> list[str]:
        """Those of the names that run code, and that nobody should allow."""
        return [name for name in self.safe_globals if judge(*name.rpartition(".")[::2]).verdict == "dangerous"]


def verdict_of(source: ByteSource, where: str) -> Verdict | None:
    """Return the answer about a file; None for one that torch.load has nothing to do with, or that cannot be read."""
    if where.endswith(_PARTS):
        return None
    head = source.read(0, min(HEAD, source.size))
    try:
        if head.startswith(ZIP_RECORD):
            return _of_zip(source, where)
        if is_tar(head):
            return _of_tar(source, where)
        if is_legacy(head):
            return _of_legacy(source, where)
    except (FormatError, UnsupportedError):
        return None
    if is_pickle(head):
        return Verdict(where, problem="it is a plain pickle, not a file of torch.save")
    return None


def refusal_of(pickle: bytes | bytearray) -> str:
    """Return why torch would refuse the pickle of a zip file; empty where it takes it as it is."""
    found = RestrictedUnpickler(bytes(pickle))
    problem = found.load(0)
    return problem or (f"it names {', '.join(found.needed)}" if found.needed else "")


def _of_zip(source: ByteSource, where: str) -> Verdict | None:
    """The answer about a zip file, whose folder is that of its first record."""
    from ckpt_cli.formats.zip.container import prefix_of
    from ckpt_cli.formats.zip.read import ZipRecords

    records = ZipRecords(source)
    prefix = prefix_of(records)
    if f"{prefix}constants.pkl" in records.by_name:
        return Verdict(where, problem="it is a TorchScript archive")
    if f"{prefix}data.pkl" not in records.by_name:
        return None
    data = records.read(f"{prefix}data.pkl", limits.PICKLE_INFLATED)
    found = RestrictedUnpickler(data)
    return Verdict(where, problem=found.load(0), safe_globals=tuple(found.needed))


def _of_tar(source: ByteSource, where: str) -> Verdict | None:
    """The answer about a tar file: torch refuses any, but only those of its own are worth a word."""
    head = source.read(0, min(100, source.size)).partition(b"\0")[0].removeprefix(b"./")
    ours = head in (b"", b"sys_info", b"pickle", b"tensors", b"storages")
    return Verdict(where, problem="it is in the .tar format of torch 0.1") if ours else None


def _of_legacy(source: ByteSource, where: str) -> Verdict:
    """The answer about a stream: magic, version, facts of the system, the object, the keys of its storages."""
    for data in beginnings(source):
        verdict = _of_stream(data, where)
        if not verdict.problem.startswith(BROKEN):
            break
    return verdict


def _of_stream(data: memoryview, where: str) -> Verdict:
    """The answer about the beginning of a stream."""
    needed: dict[str, None] = {}
    position = 0
    for number in range(5):
        found = RestrictedUnpickler(data, legacy=True)
        problem = found.load(position)
        needed |= found.needed
        if not problem and number == 0 and found.root != MAGIC:
            problem = "it is a plain pickle, not a file of torch.save"
        if problem:
            return Verdict(where, tuple(needed), problem)
        position = found.end
    return Verdict(where, tuple(needed))
