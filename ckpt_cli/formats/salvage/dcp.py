"""Folders of torch.distributed.checkpoint whose files are cut or missing: the entries whose items are all there."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cli.errors import CkptError
from ckpt_cli.files.open import Opener
from ckpt_cli.files.places import join
from ckpt_cli.formats.dcp.read import METADATA, NAME, read_what_is_there
from ckpt_cli.formats.salvage.found import Lost, Salvaged


def salvage_distributed(folder: str, opener: Opener, whole: CkptError) -> Salvaged:
    """List what a folder has; raises `whole`, the error of opening it, where its `.metadata` or all items are lost."""
    file = opener.open(join(folder, METADATA))
    try:
        checkpoint, lost = read_what_is_there(folder, file, opener)
    except BaseException:
        file.close()
        raise
    if not checkpoint.entries or not lost:
        checkpoint.close()
        raise whole
    checkpoint = replace(checkpoint, format=f"{NAME} (cut)", notes=())
    return Salvaged(checkpoint, whole.problem, tuple(Lost(name, why) for name, why in lost.items()))
