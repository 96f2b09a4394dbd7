"""`ckpt hash`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.options import File, Format, Json, Style, opened
from ckpt_cli.cli.output import answer, style_of
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.ops.hash import Hashes, compare, hash_tensors, read_manifest
from ckpt_cli.render.hash import hashes_text, to_json, verdict_text, verdict_to_json
from ckpt_cli.render.json import json_text


class Algorithm(str, Enum):
    """The values of `--algorithm`."""

    blake3 = "blake3"
    sha256 = "sha256"


def hash_command(
    file: File,
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify", metavar="MANIFEST", help="Compare with what hash --json printed; exit 1 if it differs."
        ),
    ] = None,
    algorithm: Annotated[
        Algorithm, typer.Option("--algorithm", help="The hash function; that of MANIFEST if there is one.")
    ] = Algorithm.blake3,
    jobs: Jobs = 0,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Hash the content of each tensor, and of all.

    The same dtype, shape and values have the same hash, whatever the format, the shards, the order of entries, strides
    and ties. docs/hash.md defines it, so that anyone can compute it.

    Example: ckpt hash --json model.pt > model.json
    """
    layout = style_of(style, json=json)
    manifest = read_manifest(verify) if verify is not None else None
    chosen = manifest.algorithm if manifest is not None else str(algorithm.value)
    with opened(file) as checkpoint, workers(jobs) as executor, progress() as on_progress:
        found = hash_tensors(checkpoint, chosen, executor, on_progress)
    if manifest is not None:
        raise typer.Exit(_verified(file, manifest, found, layout))
    if layout == "json":
        answer(json_text(to_json(found)))
    else:
        answer(hashes_text(found, layout))


def _verified(file: str, manifest: Hashes, found: Hashes, layout: str) -> int:
    """Print the differences from the manifest; return the exit code."""
    verdict = compare(manifest, found)
    if layout == "json":
        answer(json_text(verdict_to_json(file, verdict)))
    else:
        answer(verdict_text(verdict, layout))
    return 0 if verdict.ok else 1
