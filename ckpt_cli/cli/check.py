"""`ckpt check`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from ckpt_cli.cli.options import Baseline, File, FindingFormat, FindingStyle, Json
from ckpt_cli.cli.output import answer, style_of, talk
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.errors import about
from ckpt_cli.ops.accepted import accept
from ckpt_cli.ops.check.run import check, codes
from ckpt_cli.render.check import check_text, to_json
from ckpt_cli.render.json import json_text
from ckpt_cli.render.weights_only import aside


def check_command(
    file: File,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: CRCs, NaN, infinities, zeros.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="GLOB", help="Accept findings whose code matches; repeatable."),
    ] = None,
    baseline: Baseline = None,
    jobs: Jobs = 0,
    style: FindingFormat = FindingStyle.auto,
    json: Json = False,
) -> None:
    """Check that a checkpoint is complete and valid.

    Headers, ranges and records, the pickle, shards against their index, shapes against a config.json beside it, and
    what torch would refuse or misread. Exit 0 means that there is nothing but notes, 1 that there are errors or
    warnings, 2 that it is not a checkpoint or cannot be read.

    Example: ckpt check --deep model.pt && echo sound
    """
    layout = style_of(style, json=json)
    with about(file), workers(jobs) if deep else nullcontext() as executor, progress() as on_progress:
        report = check(file, executor, on_progress)
    with about(file):
        accept(report, allow or (), baseline)
    if layout == "json":
        answer(json_text(to_json(report)))
    elif layout == "sarif":
        from ckpt_cli.render.sarif import to_sarif

        answer(json_text(to_sarif(report, "check", {code: meaning for code, _, meaning in codes()})))
    else:
        answer(check_text(report, layout))
        talk(aside(report, layout))
    raise typer.Exit(0 if report.ok else 1)
