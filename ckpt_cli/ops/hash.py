"""The engine of `hash`: a digest of the content of each tensor, and of all of them.

The digest depends on dtype, shape and values alone, not on the container, the shards, the order of entries, strides or
ties. With H the hash function, a tensor's digest is

    H(json.dumps([dtype, shape]) + H(piece 0) + H(piece 1) + …)

where the pieces are 4 MiB each (the last one less) of its elements in row-major order, little-endian; so the pieces of
one huge tensor are hashed side by side. The list of a quantized tensor also has its quantizer; that of a tensor that is
made of others has its layout, shape and the digests of its parts. Of a tensor with others as attributes, the digest is
that of its own and a map of theirs. The checkpoint's digest is H(json.dumps({name: digest}, sort_keys=True)).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, LimitError, MalformedError, UnsupportedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import announce
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.places import open_file
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.select import left, whole_tensors
from ckpt_cli.parallel.announced import places_in
from ckpt_cli.parallel.map import grouped, in_file_order, run
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

PIECE = 4 << 20
"""Bytes of a piece: part of what the digest is, so it never changes."""

ALGORITHMS = ("blake3", "sha256")


class _Digest(Protocol):
    def update(self, data: memoryview | bytes, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


_New = Callable[[], _Digest]


@dataclass(frozen=True, slots=True)
class Hashes:
    """The answer."""

    algorithm: str
    checkpoint: str
    """The digest of all tensors, as hexadecimal digits."""
    tensors: dict[str, str]
    """That of each, by name."""

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each tensor, for a DataFrame."""
        return [{"name": name, "hash": digest} for name, digest in self.tensors.items()]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The differences between a checkpoint and a manifest."""

    differ: Sequence[str] = ()
    """Names whose content is another."""
    missing: Sequence[str] = ()
    """Names that the manifest has and the checkpoint has not."""
    new: Sequence[str] = ()
    """Names that only the checkpoint has."""

    @property
    def ok(self) -> bool:
        """True if there is no difference."""
        return not (self.differ or self.missing or self.new)

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each name that differs, for a DataFrame."""
        kinds = (("differs", self.differ), ("missing", self.missing), ("new", self.new))
        return [{"what": what, "name": name} for what, names in kinds for name in names]


@dataclass(slots=True)
class _Subject:
    """One distinct view whose bytes are hashed."""

    source: TensorReader
    head: bytes
    nbytes: int
    pieces: list[bytes] = field(default_factory=list)
    """The digests of its pieces, in order."""


_Piece = tuple[int, TensorReader, Chunk]
"""The number of a subject, what reads it, and a piece of it to be hashed."""


def hash_tensors(
    checkpoint: Checkpoint,
    algorithm: str,
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
    *,
    names: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Hashes:
    """Hash the tensors that `names` select and `exclude` does not, on an executor; no name selects all.

    `on_progress` gets the bytes done and in all.

    Raises UnsupportedError where two tensors have one name, and for a strided view of packed elements.
    """
    new = _new(algorithm)
    with about(checkpoint.path):
        for file in checkpoint.container.files if not names else ():
            file.note_whole()
        hasher = _Hasher(checkpoint, algorithm)
        tensors = left(checkpoint, whole_tensors(checkpoint, names, "hash"), exclude)
        for tensor in tensors:
            hasher.add(tensor)
        hasher.read(executor, on_progress)
        found: dict[str, str] = {}
        for tensor in tensors:
            if tensor.name in found:
                raise UnsupportedError(f"it has two tensors called {tensor.name!r}, so a name does not say which")
            found[tensor.name] = hasher.digest(tensor)
    return Hashes(algorithm, _hex(new, json.dumps(found, sort_keys=True).encode()), found)


def _new(algorithm: str) -> _New:
    if algorithm == "sha256":
        from hashlib import sha256

        return sha256
    from blake3 import blake3

    return blake3


def _hex(new: _New, data: bytes) -> str:
    digest = new()
    digest.update(data)
    return digest.hexdigest()


class _Hasher:
    """The tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, algorithm: str) -> None:
        self._checkpoint = checkpoint
        self._algorithm = algorithm
        self._new = _new(algorithm)
        self._budget = Budget.of(checkpoint)
        self._subjects: dict[object, _Subject] = {}
        self._known: dict[int, str] = {}
        """Digests by the identity of the tensor or part."""

    def add(self, tensor: Tensor) -> None:
        """Ask for the bytes of a tensor, or of its parts."""
        for part in tensor.attributes if tensor.storage is not None else tensor.parts:
            self.add(part)
        if tensor.storage is None:
            return
        if (key := self._key(tensor)) not in self._subjects:
            region = Region.of(tensor)
            self._budget.read_parts(tensor, Region.of)
            self._budget.read(tensor, region)
            source = _source(self._checkpoint, tensor, region)
            self._subjects[key] = _Subject(source, self._head(tensor), source.nbytes)

    def _key(self, tensor: Tensor) -> object:
        return tensor.view or id(tensor)

    def _head(self, tensor: Tensor) -> bytes:
        facts: list[object] = [tensor.dtype.name, tensor.shape]
        if tensor.quantizer is not None:
            from ckpt_cli.arrays.quantized import parameters

            scales, zeros = parameters(self._checkpoint, tensor)
            facts.append([tensor.quantizer.scheme, tensor.quantizer.axis, scales.tolist(), zeros.tolist()])
        return json.dumps(facts).encode()

    def read(self, executor: Executor, on_progress: OnProgress) -> None:
        """Hash every piece, in the order of the files."""
        subjects = in_file_order(
            self._subjects.values(), lambda subject: subject.source.place, self._checkpoint.container.files
        )
        total = sum(subject.nbytes for subject in subjects)
        done = 0

        announce(place for one in subjects for place in one.source.all_places())
        items = (item for number, one in enumerate(subjects) for item in _pieces(number, one.source))
        work = partial(_hash_job, self._algorithm)
        for nbytes, answers in run(grouped(items, PIECE), work, executor, places=places_in):
            for number, digest in answers:
                subjects[number].pieces.append(digest)
            done += nbytes
            on_progress(done, total)

    def digest(self, tensor: Tensor) -> str:
        """Return the digest of a tensor whose pieces have been hashed."""
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = self._digest(tensor)
        return known

    def _digest(self, tensor: Tensor) -> str:
        if tensor.storage is not None:
            subject = self._subjects[self._key(tensor)]
            found = _hex(self._new, subject.head + b"".join(subject.pieces))
            attributes = {part.name: self.digest(part) for part in tensor.attributes}
            return _hex(self._new, json.dumps([found, attributes], sort_keys=True).encode()) if attributes else found
        facts: list[object] = [tensor.layout, tensor.shape]
        facts.append({part.name: self.digest(part) for part in tensor.parts} if tensor.parts else tensor.dtype.name)
        return _hex(self._new, json.dumps(facts, sort_keys=True).encode())


def _hash_job(algorithm: str, job: list[_Piece]) -> tuple[int, list[tuple[int, bytes]]]:
    """Return the bytes of a job, and the digest of each piece by the number of its subject."""
    new = _new(algorithm)
    nbytes = sum(source.dtype.nbytes(chunk.end - chunk.begin) for _, source, chunk in job)
    return nbytes, [(number, _hash_piece(new(), source, chunk)) for number, source, chunk in job]


def _hash_piece(digest: _Digest, source: TensorReader, chunk: Chunk) -> bytes:
    try:
        for data in source.pieces(chunk):
            digest.update(data)
    except CkptError as error:
        error.path = error.path or source.path
        raise
    return digest.digest()


def _source(checkpoint: Checkpoint, tensor: Tensor, region: Region) -> TensorReader:
    """Return a reader of the elements as they are hashed.

    Those that have no bytes of their own are hashed as the bytes of whole blocks, quantized ones as their integers.
    """
    from ckpt_cli.arrays.codec import as_bytes

    if tensor.dtype.numpy is None:
        tensor = as_bytes(tensor)
        region = Region.of(tensor)
    elif tensor.layout == "quantized":
        from ckpt_cli.arrays.quantized import integers

        tensor = integers(tensor)
    return TensorReader(checkpoint, tensor, region)


def _pieces(number: int, source: TensorReader) -> Iterator[tuple[_Piece, int]]:
    """Yield the pieces of a view with what each adds to a job, cut at the same places however its bytes are stored."""
    most = PIECE // source.dtype.itemsize
    cuts = ((at, min(at + most, source.numel)) for at in range(0, source.numel, most))
    for chunk in source.chunks(cuts):
        yield (number, source, chunk), source.cost(chunk)


# --- manifests -------------------------------------------------------------------------------------------------------


def read_manifest(path: str) -> Hashes:
    """Read what `hash --json` printed; raises MalformedError for anything else, LimitError for what is far too long."""
    with closing(open_file(path)) as file:
        if file.size > limits.INDEX_JSON:
            raise LimitError("too long for a manifest", path=path)
        text = file.read(0, file.size)
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError(
            "not a manifest: it is not JSON", path=path, hint="ckpt hash --json FILE writes one"
        ) from None
    if not (isinstance(parsed, dict) and parsed.get("algorithm") in ALGORITHMS and _is_map(parsed.get("tensors"))):
        raise MalformedError(
            "not a manifest: it lacks the algorithm or the tensors", path=path, hint="ckpt hash --json FILE writes one"
        )
    return Hashes(parsed["algorithm"], str(parsed.get("checkpoint", "")), parsed["tensors"])


def _is_map(tensors: object) -> bool:
    return isinstance(tensors, dict) and all(isinstance(digest, str) for digest in tensors.values())


def compare(manifest: Hashes, found: Hashes) -> Verdict:
    """Return the differences between a manifest and a checkpoint."""
    old, new = manifest.tensors, found.tensors
    return Verdict(
        differ=[name for name in old if name in new and old[name].lower() != new[name]],
        missing=[name for name in old if name not in new],
        new=[name for name in new if name not in old],
    )
