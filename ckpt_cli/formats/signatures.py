"""The first bytes of every kind of file that ckpt knows: formats that it reads, foreign ones, and packed files.

They stand here once: for the table of formats, for the name given to a foreign file, and for the scan, which also looks
into what no reader takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ckpt_cli import limits
from ckpt_cli.errors import TruncatedError, UnknownFormatError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import DOCUMENT, fetch, is_elsewhere
from ckpt_cli.files.source import ByteSource, SourceFile

HEAD = 600
"""Bytes from the beginning that identify a format; tar has its magic at byte 257."""

ZIP_RECORD, ZIP_END = b"PK\3\4", b"PK\5\6"
"""The local header of a record, and the end record, with which a zip file without records begins."""

NUMPY = b"\x93NUMPY"
GZIP, BZIP2, XZ, ZSTANDARD, LZ4 = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
SEVEN_ZIP, RAR, HDF5, GGUF = b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7", b"\x89HDF\r\n\x1a\n", b"GGUF"
PROTO = b"\x80"
"""The opcode that a pickle of protocol 2 and later begins with; the protocol follows."""

# --- what is read -----------------------------------------------------------------------------------------------------


def is_safetensors(head: bytes) -> bool:
    """True for a safetensors file: the length of a header and its brace."""
    return head[8:9] == b"{" and not head[:8].isalnum()


def is_json_object(head: bytes) -> bool:
    """True for a file that begins with a JSON object, an index for one."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" and head[8:9] != b"{"


def is_zip(head: bytes) -> bool:
    """True for a file that begins with a record, or is a zip file without any."""
    return head[:4] in (ZIP_RECORD, ZIP_END)


def is_npz(head: bytes) -> bool:
    """True for a zip file whose first record is an array."""
    return head[:4] == ZIP_RECORD and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy")


def is_npy(head: bytes) -> bool:
    """True for an array of numpy."""
    return head.startswith(NUMPY)


def is_tar(head: bytes) -> bool:
    """True for a tar file of POSIX or GNU."""
    return head[257:262] == b"ustar"


def is_old_tar(head: bytes) -> bool:
    """True for a tar file from before POSIX: no magic, but a header with its own checksum, signed or not."""
    digits = head[148:156].strip(b" \0")
    if len(head) < 512 or not head[0] or not digits.isdigit() or len(digits) > 7 or b"8" in digits or b"9" in digits:
        return False
    rest = head[:148] + head[156:512]
    unsigned = sum(rest) + 256
    return int(digits, 8) in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def is_lfs_pointer(head: bytes) -> bool:
    """True for the text that git LFS has in the place of a file."""
    return head.startswith(b"version https://git-lfs")


def is_legacy(head: bytes) -> bool:
    """True for a stream of torch.save from before 1.6: a pickle of its magic number, binary or, in protocol 0, text."""
    if head[:1] != b"L" and b"\x8a" not in head[:12]:  # so that other formats do not import what reads pickles
        return False
    from ckpt_cli.pickles.legacy_save import MAGIC_BINARY, MAGIC_TEXT

    return MAGIC_BINARY in head[:24] or head.startswith(MAGIC_TEXT)


def has_proto(head: bytes, protocols: bytes = b"\2\3\4\5") -> bool:
    """True for a pickle that begins with one of some protocols."""
    return head[:1] == PROTO and len(head) > 1 and head[1] in protocols


def is_pickle(head: bytes) -> bool:
    """True for a pickle that begins with a protocol, or as protocols 0 and 1 begin a dict, list, tuple or object."""
    if is_safetensors(head) and not any(head[4:8]):  # the length of a header, whatever its bytes look like
        return False
    if has_proto(head) or head[:1] not in _OLD_FIRST:
        return has_proto(head)
    return re.match(_OLD_PICKLE, head, re.VERBOSE) is not None


_OLD_FIRST = frozenset(bytes([byte]) for byte in b"(}]dlciILFSV")
_OLD_PICKLE = rb"""\([XT]..\0\0 | \(?(?: [dl]p\d+\n | [}\]][qru(.] | [dl)][.q] | [ci][A-Za-z_][\w.]*\n\w[\w.]*\n[(pq)]
    | [IL]-?\d+L?\n[.ILFSVNp(tcg] | F[-+.\dinfae]+\n[.ILFSVNp(tcg] | [SV][^\n]{0,400}\np\d+\n )"""


def is_dcp_metadata(head: bytes) -> bool:
    """True for a pickled `Metadata` of torch.distributed.checkpoint."""
    return head[:1] == PROTO and b"torch.distributed.checkpoint.metadata" in head[:64]


def preface_size(file: ByteSource) -> int:
    """Return the bytes of JSON before the first array of numpy, by which a stream of arrays could pass for an index.

    0 for a file that does not begin so.
    """
    head = file.read(0, min(8, file.size))
    if head.lstrip()[:1] != b"{" or not any(head[4:]):  # zeros: the length of a safetensors header of 123 bytes
        return 0
    return file.read(0, min(limits.NPY_PREFACE, file.size)).find(b"\n" + NUMPY) + 1  # which no text in UTF-8 has in it


def beginning(file: ByteSource) -> bytes:
    """Return the bytes that decide the format: where JSON stands before arrays, those of the first array."""
    head = file.read(0, min(HEAD, file.size))
    begin = preface_size(file) if head.lstrip()[:1] == b"{" else 0
    return file.read(begin, min(HEAD, file.size - begin)) if begin else head


def documented(files: Sequence[SourceFile]) -> Iterator[SourceFile]:
    """Yield files; what readers read first of some that lie elsewhere is fetched together before the first of them."""
    for number, file in enumerate(files):
        if not number % _TOGETHER and is_elsewhere(file):
            some = files[number : number + _TOGETHER]
            fetch({each: [(0, min(DOCUMENT, each.size))] for each in some})
            fetch({each: _after_beginning(each) for each in some if is_elsewhere(each)})
        yield file


def _after_beginning(file: SourceFile) -> list[tuple[int, int]]:
    """Return where the document of a file goes on that is not all in its beginning."""
    head = file.read(0, min(HEAD, file.size))
    reached = min(DOCUMENT, file.size)
    if is_zip(head):
        begin = max(file.size - DOCUMENT, reached)
        return [(begin, file.size - begin)]
    end = 8 + int.from_bytes(head[:8], "little") if is_safetensors(head) else 0
    return [(reached, end - reached)] if reached < end <= min(_LONG, file.size) else []


_TOGETHER = 64
"""Files of a set that are fetched together."""

_LONG = 16 << 20
"""Bytes of a header up to which it is fetched with others."""


def is_hdf5(head: bytes) -> bool:
    """True for an HDF5 file."""
    return head.startswith(HDF5)


def is_msgpack(head: bytes) -> bool:
    """True for a map of msgpack, the first of whose keys is a short text."""
    after = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0) if head else 0
    if not after or len(head) < after + 2 or not (0xA1 <= head[after] <= 0xBF or head[after] == 0xD9):
        return False
    begin, size = after + 1, head[after] & 0x1F
    if head[after] == 0xD9:
        begin, size = after + 2, head[after + 1]
    return head[begin : begin + size].decode("latin-1").isprintable()


def is_onnx(head: bytes) -> bool:
    """True for a protobuf whose field 1 is a small version, followed by the producer's name or what takes its place.

    Field 2 is text (onnx/onnx.proto, `ModelProto`), where Core ML has a description.
    """
    if head[:1] != b"\x08" or not b"\2" <= head[1:2] <= b"\x20" or len(head) <= 8:
        return False
    if head[2:3] != b"\x12":
        return head[2:3] in (b"\x3a", b"\x42")
    return _field(head, 3).decode("utf-8", "replace").isprintable()


def _field(data: bytes, at: int) -> bytes:
    """The content of a protobuf's field whose length, a varint, begins there; as far as it is there."""
    size = shift = 0
    for place in range(at, min(at + 10, len(data))):
        size |= (data[place] & 0x7F) << shift
        shift += 7
        if data[place] < 0x80:
            return data[place + 1 : place + 1 + size]
    return b""


# --- what is only named -----------------------------------------------------------------------------------------------


class Known(Protocol):
    """A format that can be read."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def sniff(self) -> Callable[[bytes], bool]:
        """True for the first bytes of a file that is in it."""


def unknown(head: bytes, path: str, formats: Sequence[Known]) -> UnknownFormatError | TruncatedError:
    """Return the error for a file with these first bytes that is not in any of the formats."""
    if not head:
        return TruncatedError("the file is empty", path=path)
    looks = _look(head)
    if looks is None and (packed := next((kind for kind in _PACKED if head.startswith(kind.magic)), None)):
        return packed.error(head, path, formats)
    return UnknownFormatError(
        f"this looks like {looks}" if looks else "not a checkpoint of a kind that ckpt knows",
        path=path,
        hint="ckpt reads files of torch.save, safetensors, numpy and pickle" if not looks else None,
    )


def _is_tensorflow_index(head: bytes) -> bool:
    """A table whose first key is empty and holds the header of a bundle (tensorflow/core/util/tensor_bundle)."""
    return head[:2] == b"\0\0" and head[3:5] == b"\x08\x01" and head[5:8] == b"\x1a\x02\x08"


def _is_core_ml(head: bytes) -> bool:
    """A protobuf whose field 1 is a small version and field 2 a description, of an input or output with its name.

    mlmodel/format/Model.proto of coremltools: `Model`, `ModelDescription` and, in FeatureTypes.proto,
    `FeatureDescription`.
    """
    if head[:1] != b"\x08" or not b"\1" <= head[1:2] <= b"\x20" or head[2:3] != b"\x12":
        return False
    description = _field(head, 3)
    feature = _field(description, 1) if description[:1] in (b"\x0a", b"\x52") else b""
    name = _field(feature, 1) if feature[:1] == b"\x0a" else b""
    return bool(name) and name.decode("utf-8", "replace").isprintable()


def _is_saved_model(head: bytes) -> bool:
    """A protobuf whose field 1 is the version 1 and field 2 a graph with its tags (saved_model.proto)."""
    return head[:3] == b"\x08\x01\x12" and b"serve" in head


def _look(head: bytes) -> str | None:
    """Return a description of what a file with these first bytes looks like; None where it looks like nothing known."""
    return next((words for matches, words in _LOOKS_LIKE if matches(head)), None)


_LOOKS_LIKE: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (is_tar, "a tar file"),
    (lambda head: head[:4] == ZIP_RECORD, "a zip file"),
    (lambda head: head.startswith(GGUF), "a GGUF file, which is not read yet"),
    (lambda head: head.startswith(SEVEN_ZIP), "a 7z archive: unpack it first"),
    (lambda head: head.startswith(RAR), "a rar archive: unpack it first"),
    (_is_tensorflow_index, "the index of a TensorFlow checkpoint, which is not read"),
    (_is_saved_model, "a TensorFlow SavedModel, which is not read"),
    (_is_core_ml, "a Core ML model, which is not read"),
    (lambda head: head[4:8] == b"TFL3", "a TensorFlow Lite model, which is not read"),
    (lambda head: head[:4] in (b"lmgg", b"ggml", b"tjgg"), "a model of ggml from before GGUF, which is not read"),
    (lambda head: head[:8] == b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (
        is_lfs_pointer,
        "a git LFS pointer: fetch the real file with git lfs pull",
    ),
    (lambda head: head[:1] in b"<" and b"html" in head[:200].lower(), "a web page: the download got an error page"),
    (lambda head: head.lstrip()[:1] in (b"{", b"["), "a JSON file"),
    (lambda head: bool(head) and not any(head[:256]), "a file of zero bytes: a download or a copy that was cut short"),
    (lambda head: bool(head) and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head), "a text file"),
)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A way in which a whole file may be compressed."""

    magic: bytes
    words: str
    tool: str
    """The command that unpacks it with `-dc`."""
    suffixes: tuple[str, ...]
    inflate: Callable[[bytes], bytes] | None = None
    """The first bytes of what is inside, where that is cheap."""

    def error(self, head: bytes, path: str, formats: Sequence[Known]) -> UnknownFormatError:
        """Return the error that says what it is, what is inside, and how to unpack it."""
        inside = ""
        if self.inflate is not None:
            begin = self.inflate(head)
            known = next((known.name for known in formats if known.sniff(begin)), None)
            inside = f" with {_INSIDE.get(known, known) if known else _look(begin) or 'something'} inside"
            inside = inside if begin else ""
        from shlex import quote

        target = next((path.removesuffix(end) for end in self.suffixes if path.endswith(end)), f"{path}.unpacked")
        return UnknownFormatError(
            f"{self.words}{inside}: unpack it first",
            path=path,
            hint=f"{self.tool} -dc {quote(path)} > {quote(target)}",
        )


_INSIDE = {"zip": "a zip file", "npz": "numpy's npz", "legacy": "a torch.save file", "pickle": "a pickle",
           "npy": "a numpy array", "tar": "a tar file", "safetensors": "a safetensors file",
           "shards": "a JSON file"}  # fmt: skip
"""The description of each format inside of a compressed file."""


def _inflate_zlib(head: bytes) -> bytes:
    import zlib

    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(head, HEAD)
    except zlib.error:
        return b""


def _inflate_xz(head: bytes) -> bytes:
    try:
        import lzma

        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(head, HEAD)
    except (ImportError, ValueError, EOFError, OSError, RuntimeError):  # LZMAError is none of these
        return b""


_XZ_MEMORY = 128 << 20
"""Bytes of memory for looking into an xz file: what its strongest preset takes to unpack."""

_PACKED = (
    _Packed(GZIP, "a gzip file", "gzip", (".gz", ".tgz"), _inflate_zlib),
    _Packed(ZSTANDARD, "a zstandard file", "zstd", (".zst", ".zstd")),
    _Packed(XZ, "an xz file", "xz", (".xz",), _inflate_xz),
    _Packed(BZIP2, "a bzip2 file", "bzip2", (".bz2",)),
    _Packed(LZ4, "an lz4 file", "lz4", (".lz4",)),
)
