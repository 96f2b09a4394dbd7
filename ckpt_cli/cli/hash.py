"""`ckpt hash`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.options import AsFiles, Exclude, File, Format, Json, NamesAndFiles, Style, opened
from ckpt_cli.cli.output import Reply, style_of
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.cli.several import parted, reply_about
from ckpt_cli.ops.hash import Hashes, compare, hash_tensors, read_manifest
from ckpt_cli.render.hash import hashes_block, to_json, verdict_block, verdict_to_json


class Algorithm(str, Enum):
    """The values of `--algorithm`."""

    blake3 = "blake3"
    sha256 = "sha256"


def hash_command(
    file: File,
    names: NamesAndFiles = None,
    exclude: Exclude = None,
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify", metavar="MANIFEST", help="Compare with what hash --json printed; exit 1 if it differs."
        ),
    ] = None,
    algorithm: Annotated[
        Algorithm, typer.Option("--algorithm", help="The hash function; that of MANIFEST if there is one.")
    ] = Algorithm.blake3,
    as_files: AsFiles = False,
    jobs: Jobs = 0,
    style: Format = Style.auto,
    json: Json = False,
) -> int:
    """Hash the content of each tensor, and of all.

    The same dtype, shape and values have the same hash, whatever the format, the shards, the order of entries, strides
    and ties. docs/hash.md defines it, so that anyone can compute it. With NAMEs or --exclude, the hash of all is that
    of the tensors that are selected.

    Example: ckpt hash --json model.pt > model.json
    """
    layout = style_of(style, json=json)
    manifest = read_manifest(verify) if verify is not None else None
    chosen = manifest.algorithm if manifest is not None else str(algorithm.value)
    files, selected = parted(file, names)

    def ask(path: str) -> Reply:
        with opened(path, as_files=as_files) as checkpoint, workers(jobs) as executor, progress() as on_progress:
            found = hash_tensors(checkpoint, chosen, executor, on_progress, names=selected, exclude=exclude or ())
        if manifest is not None:
            return _verified(path, manifest, found)
        return Reply(hashes_block(found), lambda: to_json(found))

    return reply_about(files, layout, ask)


def _verified(path: str, manifest: Hashes, found: Hashes) -> Reply:
    """Return the differences from the manifest; there should be none."""
    verdict = compare(manifest, found)
    return Reply(verdict_block(verdict), lambda: verdict_to_json(path, verdict), 0 if verdict.ok else 1)
