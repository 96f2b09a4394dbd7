"""Checks of what a checkpoint says of itself, in whatever format."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckpt_cli.errors import CkptError, FormatError, UnsupportedError
from ckpt_cli.files.places import canonical, folder_of, join, name_of, names_in
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.ops.check.finding import Check, Occurrence
from ckpt_cli.ops.check.safetensors import MISALIGNED
from ckpt_cli.ops.ls import list_waste
from ckpt_cli.pickles.graph import Graph, Inline, RawString
from ckpt_cli.pickles.references import is_storage
from ckpt_cli.pickles.tensors.arguments import text_of

_PICKLE = {"unusual-global", "nested-pickle", "hidden-pickle"}
"""The warnings of `scan` about pickles; for containers there are checks of their own."""

_ITEMS = ".distcp"

_WASTE = 1 << 20
"""Unused bytes from which on they are reported."""


def _repeated(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for name, count in checkpoint.names.items():
        if count > 1:
            yield Occurrence(f"{_where(checkpoint)}: {name}", f"{count} entries have this name once flattened")


def _unreadable(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Tensors whose bytes are not where the metadata say: looked up one by one, as some formats do so only then."""
    if format_of(checkpoint).has_records:  # whose local headers have a check of their own
        return
    for tensor in all_strided(checkpoint.tensors):
        if tensor.storage is None or not tensor.numel:
            continue
        try:
            tensor.storage.extents(0, tensor.storage.nbytes)
        except UnsupportedError:  # compressed
            continue
        except CkptError as error:
            yield Occurrence(f"{_where(checkpoint)}: {tensor.name}", error.problem)


def _stray_items(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Files of items beside those that the metadata of a distributed checkpoint name."""
    known = {canonical(file.path) for file in checkpoint.container.files}
    folders = {folder_of(path) for path in known if path.endswith(_ITEMS)}
    for folder in sorted(folders):
        for name in names_in(folder):
            if name.endswith(_ITEMS) and join(folder, name) not in known:
                yield Occurrence(name, "the metadata of the distributed checkpoint do not name the file")


def _no_tensors(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    if not checkpoint.tensors:
        yield Occurrence(_where(checkpoint), "there is no tensor in it")


def _unlisted(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Storages that the pickle refers to, and no entry: a part of it is not understood."""
    graph = checkpoint.document
    if not format_of(checkpoint).is_torch_save or not isinstance(graph, Graph) or "[1]" in checkpoint.top_level:
        return
    known = {view.storage.key for view in all_strided(checkpoint.tensors) if view.storage is not None}
    references = filter(is_storage, graph.persistent)
    for key in dict.fromkeys(text_of(node.pid[2]) for node in references if isinstance(node.pid, tuple)):
        if key is not None and key not in known:
            yield Occurrence(
                f"{_where(checkpoint)}: storage {key}", "the pickle refers to the storage, and no name does"
            )


def _byte_strings(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Strings that Python 2 wrote and that are not UTF-8, as which torch.load reads them."""
    graph = checkpoint.document
    if not isinstance(graph, Graph) or not format_of(checkpoint).is_torch_save:
        return
    found = [raw for raw in (_raw(node, graph.data) for node in graph.byte_strings) if not _is_utf8(raw)]
    if found:
        strings = "strings that are not UTF-8" if len(found) > 1 else "string that is not UTF-8"
        yield Occurrence(
            _where(checkpoint),
            f"Python 2 wrote {len(found)} byte {strings}, such as {found[0][:20]!r}: torch.load refuses the file "
            "unless it is given an encoding",
        )


def _raw(node: RawString | Inline, data: bytes | memoryview) -> bytes:
    return node.raw if isinstance(node, RawString) else bytes(data[node.offset : node.offset + node.nbytes])


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


_WEIGHTS = frozenset(("weight", "bias", "kernel", "gamma", "beta", "embedding"))
"""The last parts of names of trained weights."""


def _no_elements(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Weights that are placeholders: partitioned training (ZeRO-3) leaves tensors of shape [0] where they were.

    An empty tensor of another name is no fault, unless no tensor has any elements.
    """
    floats = [tensor for tensor in checkpoint.tensors if tensor.dtype.category == "float"]
    empty = [tensor for tensor in floats if _is_empty(tensor)]
    found = empty if len(empty) == len(floats) > 1 else [tensor for tensor in empty if _last(tensor) in _WEIGHTS]
    if found:
        has_ranks = checkpoint.is_set and not format_of(checkpoint).is_distributed  # whose optimizers have the weights
        is_usual = has_ranks or all(_last(tensor) == "bias" for tensor in found)
        have = "weights have" if len(found) > 1 else "weight has"
        yield Occurrence(
            _where(checkpoint),
            f"{len(found)} {have} no elements, such as {found[0].name} of shape {list(found[0].shape or ())}: "
            "placeholders, as ZeRO-3 saves weights that are partitioned",
            "note" if is_usual else "",
        )


def _last(tensor: Tensor) -> str:
    return tensor.name.rpartition(".")[2]


def _is_empty(tensor: Tensor) -> bool:
    is_plain = tensor.layout == "strided" and tensor.storage is not None
    return is_plain and tensor.shape is not None and not tensor.numel


def _local_shards(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """DTensors and ShardedTensors of which the file has only the part of one process."""
    found = [tensor for tensor in checkpoint.tensors if _is_part(tensor)]
    if found:
        first = found[0]
        part = first.parts[0] if first.parts else None
        what = f", {list(part.shape or ())} of {list(first.shape or ())}" if part is not None else ""
        rank = f"1 of {count}" if (count := _ranks(checkpoint)) else "one"
        yield Occurrence(
            _where(checkpoint),
            f"the file has only the part of {rank} process{'es' if count else ''} of {len(found)} distributed tensors, "
            f"such as {first.name}{what}",
        )


_RANK_FILE = re.compile(r".*world_size_(\d{1,6})_rank_\d+.*")
"""The files of ranks that verl and others write."""


def _ranks(checkpoint: Checkpoint) -> int | None:
    match = _RANK_FILE.fullmatch(_where(checkpoint))
    return int(match[1]) if match else None


def _is_part(tensor: Tensor) -> bool:
    """True if the parts of a distributed tensor have fewer elements than the whole."""
    if tensor.sharding is None or tensor.shape is None:
        return False
    return sum(part.numel for part in tensor.parts) < tensor.numel


def _waste(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    wasted = sum(waste.nbytes - waste.used for waste in list_waste(checkpoint))
    if wasted >= _WASTE:
        yield Occurrence(_where(checkpoint), f"{wasted} bytes of its storages are used by no tensor")


def _notes(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for note in checkpoint.notes:
        yield Occurrence(_where(checkpoint), note)


def _unread(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for part in checkpoint.unread:
        yield Occurrence(_where(checkpoint), part)


def _where(checkpoint: Checkpoint) -> str:
    return name_of(checkpoint.path)


CHECKS: tuple[Check[Checkpoint], ...] = (
    Check("same-name", "warning", "two entries of a pickle flatten to one name", _repeated, "ckpt ls -l FILE"),
    Check(
        "unreadable",
        "error",
        "the bytes of a tensor are not where the metadata say",
        _unreadable,
        "fetch or write the whole folder again",
    ),
    Check(
        "stray-items",
        "warning",
        "a folder has a `.distcp` that its `.metadata` does not name",
        _stray_items,
        "remove it if it is left from an earlier save",
    ),
    Check(
        "unread-bytes",
        "warning",
        "a file has bytes that belong to none of its arrays and pickles",
        _unread,
        "find out what wrote them: ckpt reads past them",
    ),
    MISALIGNED,
    Check("waste", "note", "storages are 1 MiB or more larger than their tensors", _waste, "ckpt ls --waste FILE"),
    Check("unlisted-storage", "warning", "the pickle refers to a storage that no entry has", _unlisted),
    Check(
        "byte-strings",
        "error",
        "Python 2 wrote a byte string that is not UTF-8, which `torch.load` refuses without an encoding",
        _byte_strings,
        "torch.load(…, encoding='latin1') reads it; ckpt reads it as it is",
    ),
    Check(
        "no-elements",
        "warning",
        "weights have no elements, as the placeholders of partitioned training; a note where only biases have none",
        _no_elements,
        "ckpt convert of the folder with all files of ranks writes them whole; or "
        "stage3_gather_16bit_weights_on_model_save",
    ),
    Check(
        "local-shard",
        "warning",
        "a file has only one process's part of distributed tensors (DTensor, ShardedTensor)",
        _local_shards,
        "the files of the other ranks have the rest: ckpt convert of their folder writes them whole, where the names "
        "are model_world_size_W_rank_R.pt; else load them with torch.distributed, and save it whole",
    ),
    Check("no-tensors", "note", "there is no tensor", _no_tensors, "ckpt ls -a FILE"),
    Check("oddity", "note", "what opening the file says of it", _notes),
)


def _dangerous(path: str) -> Iterator[Occurrence]:
    from ckpt_cli.ops.scan import scan

    try:
        findings = scan(path, loads=False).findings  # check asks about every file itself
    except FormatError:  # nothing that could hold a pickle
        return
    broken = any(found.code == "broken-zip" for found in findings)
    for found in findings:
        if found.severity == "error" and found.code != "too-many":
            yield Occurrence(found.where, found.message)
        elif found.code in _PICKLE and not (broken and found.code == "hidden-pickle"):
            yield Occurrence(found.where, found.message, "warning")


PICKLES: tuple[Check[str], ...] = (
    Check("dangerous", "error",
          "a pickle would run something dangerous if something else loaded it; a warning if it is only unusual",
          _dangerous, "do not load it; see ckpt scan FILE"),
)  # fmt: skip
"""Of one file, by its path."""
