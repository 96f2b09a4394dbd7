"""Tar files: that of torch.save up to 0.1.10, and archives with a checkpoint in them, which is read where it lies.

Sources: nemo/core/connectors/save_restore_connector.py (`model_weights.ckpt` beside `model_config.yaml`, or a folder
`model_weights` of torch.distributed.checkpoint), allennlp/models/archival.py (`weights.th` beside `config.json`).
"""

from __future__ import annotations

import importlib
import posixpath
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.errors import FormatError, UnknownFormatError, UnsupportedError, about, listed, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import Identity, SourceFile, Window
from ckpt_cli.formats.signatures import beginning, is_legacy, is_pickle, is_safetensors, is_zip
from ckpt_cli.formats.torch_legacy import tar as of_torch
from ckpt_cli.model.checkpoint import Checkpoint, Container

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_WEIGHTS = {"model_weights.ckpt": "NeMo archive", "weights.th": "AllenNLP archive"}
"""The names of files with weights, and what has them."""

_OTHERS = (".pt", ".pth", ".ckpt", ".bin", ".th", ".safetensors")
"""The ends of the names of files that may be the only checkpoint of another archive."""

_DISTRIBUTED = "model_weights/.metadata"

_NAMED = 3
"""Files that are named."""

_READERS = (
    (is_zip, "ckpt_cli.formats.torch_zip.read"),
    (is_legacy, "ckpt_cli.formats.torch_legacy.read"),
    (is_pickle, "ckpt_cli.formats.torch_legacy.read"),
    (is_safetensors, "ckpt_cli.formats.safetensors.read"),
)
"""The formats that a file in an archive may have, in the order in which it is compared with them."""


class _Member(Window):
    """A file in an archive, which is as old and as whole as the archive."""

    @property
    def fd(self) -> int:
        """Return the file descriptor of the archive."""
        return self.whole.fd

    @property
    def writable(self) -> bool:
        """True if the archive was opened to be written."""
        return self.whole.writable

    @property
    def seen(self) -> Identity:
        """The identity of the archive when it was opened."""
        return self.whole.seen


@dataclass(frozen=True, slots=True)
class _Archive:
    """The container: the archive is the file, the checkpoint in it knows its checksums."""

    files: Sequence[SourceFile]
    inner: Container

    def seal(self, overlay: Overlay) -> None:
        """Add the patches of checksums of the file in it; a tar file has none of contents."""
        self.inner.seal(overlay)

    def close(self) -> None:
        """Close the archive."""
        self.files[0].close()


def read(file: SourceFile) -> Checkpoint:
    """Open a tar file as what it is; of an archive, the checkpoint in it.

    Raises UnknownFormatError for one without a checkpoint, UnsupportedError for one whose weights have to be unpacked.
    """
    with about(file.path):
        found = {posixpath.normpath(name): member for name, member in of_torch.files_in(file).items()}
        if set(of_torch.MEMBERS) <= found.keys():
            return of_torch.read(file)
        name = _weights(file, list(found))
        if name is None:
            return of_torch.read(file)  # which says what is missing
        return _opened(file, name, found)


def _weights(file: SourceFile, names: Sequence[str]) -> str | None:
    """Return the name of the file that has the weights; None where there is none."""
    for wanted in _WEIGHTS:
        name = next((name for name in names if posixpath.basename(name) == wanted), None)
        if name is not None:
            return name
    path = quoted(file.path)
    if any(name.endswith(_DISTRIBUTED) for name in names):
        raise UnsupportedError(
            "a NeMo archive whose weights are a folder of torch.distributed.checkpoint: unpack it first",
            hint=f"mkdir OUT && tar -xf {path} -C OUT, then name the folder model_weights in it",
        )
    others = [name for name in names if name.endswith(_OTHERS)]
    if len(others) > 1:
        raise UnknownFormatError(
            f"a tar file with {len(others)} checkpoints in it: {listed(others, _NAMED)}",
            hint=f"mkdir OUT && tar -xf {path} -C OUT unpacks it",
        )
    return others[0] if others else None


def _opened(file: SourceFile, name: str, found: dict[str, Window]) -> Checkpoint:
    """Open a file of the archive."""
    window = found[name]
    member = _Member(file, window.begin, window.size)
    head = beginning(member)
    reader = next((module for sniff, module in _READERS if sniff(head)), None)
    if reader is None:
        raise UnknownFormatError(f"a tar file whose {name} is not a checkpoint of torch.save or safetensors")
    try:
        inner: Checkpoint = importlib.import_module(reader).read(member)
    except FormatError as error:
        error.problem = f"{name} in it: {error.problem}"
        raise
    what = _WEIGHTS.get(posixpath.basename(name), "tar archive")
    beside = [other for other in found if other != name]
    also = f", beside {listed(beside, _NAMED)}" if beside else ""
    return replace(
        inner,
        format=of_torch.NAME,
        container=_Archive([file], inner.container),
        version=f"{what}, {name} is {inner.version}{also}",
        document=None,
    )
