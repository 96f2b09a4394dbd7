"""Checks of safetensors files, beyond what their reader refuses."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_cli.errors import CkptError
from ckpt_cli.files.places import exists, folder_of, join, name_of
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.safetensors.read import repeated_names
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.check.finding import Check, Occurrence

_FORMATS = ("pt", "tf", "flax", "mlx")
"""The values of `format` in the metadata that transformers accepts."""


def _where(checkpoint: Checkpoint) -> str:
    return name_of(checkpoint.path)


def _repeated(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    for name in repeated_names(checkpoint.container.files[0]):
        yield Occurrence(f"{_where(checkpoint)}: {name}", "the name is in the header twice; readers take the last")


def _no_format(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Metadata without a format that loaders know; a file without any metadata is taken for one of PyTorch.

    accelerate (`load_state_dict`) takes pt and refuses tf and flax later, huggingface_hub (`load_state_dict_from_file`)
    pt and mlx, transformers before version 5 pt, tf, flax and mlx; from version 5 on it does not look.
    """
    said = checkpoint.metadata.get("format")
    if said in _FORMATS or not checkpoint.metadata:
        return
    beside = exists(join(folder_of(checkpoint.path), "config.json"))
    what = "its metadata do not say" if said is None else "its metadata say another thing than"
    yield Occurrence(
        _where(checkpoint),
        f"{what} format: pt, without which accelerate, huggingface_hub and transformers before version 5 refuse it",
        "warning" if beside else "",
    )


def _dangling(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Metadata that look like an alias, `x.weight: y.weight`, of a tensor that is not there."""
    names = {entry.name for entry in checkpoint.entries}
    endings = {name.rpartition(".")[2] for name in names if "." in name}
    for dropped, kept in checkpoint.metadata.items():
        ending = kept.rpartition(".")[2]
        if (
            "." in kept
            and ending in endings
            and dropped.rpartition(".")[2] == ending
            and kept not in names
            and dropped not in names
        ):
            yield Occurrence(
                f"{_where(checkpoint)}: {dropped}", f"its metadata call it an alias of {kept}, which is not there"
            )


def _misaligned(checkpoint: Checkpoint) -> Iterator[Occurrence]:
    """Tensors whose bytes do not begin at a multiple of their element size."""
    odd: list[Tensor] = []
    if not format_of(checkpoint).is_mapped:
        return
    for tensor in checkpoint.tensors:
        if tensor.storage is None or not tensor.nbytes or tensor.alias_of is not None or tensor.dtype.bits < 16:
            continue
        try:
            extents = tensor.storage.extents(0, tensor.nbytes)
        except CkptError:  # compressed, or what another check reports
            continue
        if extents and extents[0].offset % min(tensor.dtype.bits // 8, 8):
            odd.append(tensor)
    if odd:
        yield Occurrence(
            _where(checkpoint),
            f"the bytes of {len(odd)} tensors, such as {odd[0].name}, are not aligned to their elements",
        )


CHECKS: tuple[Check[Checkpoint], ...] = (
    Check("repeated-name", "warning", "a safetensors header has a name twice", _repeated, "write the file again"),
    Check("dangling-alias", "warning", "safetensors metadata name an alias of a tensor that is not there", _dangling),
    Check("no-format", "note",
          "a safetensors file has metadata that do not say `format: pt`, so that accelerate, huggingface_hub and "
          "transformers before version 5 refuse it; a warning where a `config.json` is beside it", _no_format,
          "ckpt meta FILE format=pt adds it"),
)  # fmt: skip

MISALIGNED: Check[Checkpoint] = Check(
    "misaligned", "note", "tensors do not begin at a multiple of their element size: mapped, they are slow or refused",
    _misaligned, "write the file again",
)  # fmt: skip
"""Of files of every format."""
