"""Checks of zip files: those of torch.save, of torch.jit.save and torch.export.save, and numpy's."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_cli.dtypes import BY_STORAGE
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import name_of
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.signatures import is_zip
from ckpt_cli.formats.zip.layout import LOCAL, computed_offsets, local_header_in
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.pickles.graph import Global, Graph, PersistentId, RawString
from ckpt_cli.scanner.tolerant_zip import LooseZip, Member, unlisted, zips_within

_SMALL = 64
"""Bytes of a record that says one word, such as the alignment."""


@dataclass(frozen=True, slots=True)
class ZipFile:
    """One zip file of a checkpoint, as its directory and its local headers have it."""

    file: SourceFile
    where: str
    zips: tuple[LooseZip, ...]
    """The last one first; torch.distributed.checkpoint writes several into one file."""
    checkpoint: Checkpoint
    by_name: dict[str, Member]
    """The records of the last zip."""
    prefix: str
    """The name that torch takes for the folder of all records, with its slash; empty where there is no folder."""

    @property
    def saved(self) -> Graph | None:
        """The pickle of torch.save, where the file is one of its with a directory to go by; None for any other zip."""
        document = self.checkpoint.document
        if not self.zips or self.zips[0].faults:
            return None
        return document if format_of(self.checkpoint).has_records and isinstance(document, Graph) else None

    def note(self, name: str) -> bytes | None:
        """The content of a small record; None where it is missing or no small plain one."""
        member = self.by_name.get(self.prefix + name)
        if member is None or member.begin < 0 or member.method or member.nbytes > _SMALL:
            return None
        return self.file.read(member.begin, member.nbytes)


def zip_of(file: SourceFile, checkpoint: Checkpoint) -> ZipFile | None:
    """Return a file of a checkpoint as a zip; None where it is not a zip."""
    if not is_zip(file.read(0, min(4, file.size))):
        return None
    zips = tuple(zips_within(file))
    members = zips[0].members if zips else []
    folder, slash, _ = members[0].name.partition("/") if members else ("", "", "")
    by_name = {member.name: member for member in members}
    return ZipFile(file, name_of(file.path), zips, checkpoint, by_name, folder + slash if slash else "")


def _local_headers(subject: ZipFile) -> Iterator[Occurrence]:
    for found in subject.zips:
        for member in found.members:
            if member.faults:
                yield Occurrence(f"{subject.where}/{member.name}", f"the record {member.faults[0]}")


def _directory(subject: ZipFile) -> Iterator[Occurrence]:
    for found in subject.zips:
        for fault in found.faults:
            yield Occurrence(subject.where, fault)


def _unlisted(subject: ZipFile) -> Iterator[Occurrence]:
    for found in subject.zips:
        for begin, end in unlisted(found) if not found.faults else ():
            yield Occurrence(
                f"{subject.where} (byte {begin})", f"{end - begin} bytes between records, which nothing lists"
            )


def _trailing(subject: ZipFile) -> Iterator[Occurrence]:
    if subject.zips and subject.zips[0].end < subject.file.size:
        end = subject.zips[0].end
        yield Occurrence(
            f"{subject.where} (byte {end})",
            f"{subject.file.size - end} bytes follow the end of the zip file",
            hint=f"head -c {end} FILE > OUT makes a copy without them",
        )


def _outside(subject: ZipFile) -> Iterator[Occurrence]:
    if subject.saved is not None:
        for name in subject.by_name:
            if not name.startswith(subject.prefix):
                yield Occurrence(
                    f"{subject.where}/{name}", f"the record is not below {subject.prefix} as the others are"
                )


def _version(subject: ZipFile) -> Iterator[Occurrence]:
    if subject.saved is not None and not {subject.prefix + "version", subject.prefix + ".data/version"} & set(
        subject.by_name
    ):
        yield Occurrence(subject.where, "it has no version record, without which torch does not load it")


def _byteorder(subject: ZipFile) -> Iterator[Occurrence]:
    if subject.saved is not None and subject.prefix + "byteorder" not in subject.by_name:
        yield Occurrence(subject.where, "it has no byteorder record, so it is taken for little-endian")


def _storages(graph: Graph) -> dict[str, int]:
    """The keys of the storages that a pickle refers to, in its order, with their bytes; 0 where these are not plain."""
    found: dict[str, int] = {}
    for node in graph.persistent:
        key, nbytes = _storage(node)
        if key is not None:
            found.setdefault(key, nbytes)
    return found


def _storage(node: PersistentId) -> tuple[str | None, int]:
    pid = node.pid
    if type(pid) is not tuple or len(pid) < 5:
        return None, 0
    key = pid[2].text if type(pid[2]) is RawString else pid[2]
    if not isinstance(key, str) or type(pid[1]) is not Global or type(pid[4]) is not int:
        return None, 0
    dtype = BY_STORAGE.get(pid[1].name.removesuffix("Storage"))
    return key, dtype.nbytes(pid[4]) if dtype is not None else pid[4]


def _stray(subject: ZipFile) -> Iterator[Occurrence]:
    """Records of storages that the pickle does not refer to."""
    if subject.saved is None:
        return
    folder = subject.prefix + "data/"
    known = _storages(subject.saved)
    for name, member in subject.by_name.items():
        if name.startswith(folder) and name[len(folder) :] not in known:
            yield Occurrence(
                f"{subject.where}/{name}", f"no tensor refers to the record, which takes {member.stored} bytes"
            )


def _deflated(subject: ZipFile) -> Iterator[Occurrence]:
    if subject.saved is None:
        return
    folder = subject.prefix + "data/"
    packed = [member for name, member in subject.by_name.items() if member.method and name.startswith(folder)]
    if packed:
        yield Occurrence(subject.where, f"{len(packed)} storages are compressed, such as {packed[0].name}")


def _layout(subject: ZipFile) -> Iterator[Occurrence]:
    """The first storage that is elsewhere than where torch computes it to be."""
    if subject.saved is None or (subject.note(".format_version") or b"") < b"1":
        return
    alignment = int(text) if (text := subject.note(".storage_alignment") or b"64").isdigit() else 0
    folder = subject.prefix + "data/"
    storages = _storages(subject.saved)
    members = {key: subject.by_name.get(folder + key) for key in storages}
    first = next(iter(storages), None)
    if first is None:
        return
    start = members[first]
    if first != "0" or start is None or not alignment:
        yield Occurrence(f"{subject.where}/{folder}{first}", "the first storage of the pickle is not called 0")
        return
    sizes = ((folder + key, nbytes) for key, nbytes in storages.items())
    for name, offset in computed_offsets(start.begin, start.header, sizes, alignment):
        member = subject.by_name.get(name)
        if member is not None and member.begin != offset:
            yield Occurrence(f"{subject.where}/{name}", f"its data are at byte {member.begin}, torch computes {offset}")
            return


CHECKS: tuple[Check[ZipFile], ...] = (
    Check("local-header", "error", "a record's local header says otherwise than the directory, or is not there",
          _local_headers, "the file is damaged or made up: see ckpt scan FILE"),
    Check("directory", "error", "the directory at the end of a zip file contradicts itself", _directory,
          "the file is damaged or made up: see ckpt scan FILE"),
    Check("no-version", "error", "a zip file has no `version` record, so `torch.load` refuses it", _version,
          "zip it again with a record version that says 3"),
    Check("outside-prefix", "error", "records lie outside the folder of the others", _outside,
          "save it again with torch.save"),
    Check("layout", "error",
          "a zip file has a `.format_version` record, but not torch's layout: the offsets that torch computes for "
          "`map_location='meta'` and fake tensors are wrong", _layout,
          "save it again with torch.save; until then load it without map_location='meta'"),
    Check("compressed", "error",
          "storages are compressed: `torch.load(mmap=True)` silently takes the compressed bytes for values", _deflated,
          "save it again with torch.save; until then load it without mmap=True"),
    Check("trailing-bytes", "warning", "something follows the end of the file's format", _trailing),
    Check("unlisted-bytes", "warning", "a zip file has bytes that no record has", _unlisted, "ckpt scan FILE"),
    Check("stray-storage", "warning", "a zip file has a storage that no tensor refers to", _stray,
          "save it again with torch.save to be rid of them"),
    Check("no-byteorder", "note", "a zip file does not say its byte order", _byteorder),
)  # fmt: skip


def least_size(file: SourceFile) -> int | None:
    """The bytes that a torch zip file must have at least, by the pickle at its beginning; None where that is cut."""
    from ckpt_cli.errors import CkptError
    from ckpt_cli.pickles.read import read_pickle

    local = local_header_in(file.read(0, LOCAL.size)) if file.size >= LOCAL.size else None
    if local is None or local.method or local.size > file.size:
        return None
    if not file.read(LOCAL.size, local.name_length).endswith(b"/data.pkl"):
        return None
    begin = local.size
    try:
        graph = read_pickle(file.view(begin, file.size - begin))
    except CkptError:
        return None
    return begin + graph.nbytes + sum(_storages(graph).values())
