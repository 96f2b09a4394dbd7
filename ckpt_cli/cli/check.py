"""`ckpt check`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_cli.cli.options import Baseline, File, FindingFormat, FindingStyle, Json, MoreFiles
from ckpt_cli.cli.output import Reply, style_of, talk
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.cli.several import all_files, reply_about
from ckpt_cli.errors import about
from ckpt_cli.ops.accepted import accept
from ckpt_cli.ops.check.run import check, codes
from ckpt_cli.render.check import check_block, to_json
from ckpt_cli.render.weights_only import aside

if TYPE_CHECKING:
    from ckpt_cli.ops.check.run import Report


def check_command(
    file: File,
    more: MoreFiles = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: CRCs, NaN, infinities, zeros.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="GLOB", help="Accept findings whose code matches; repeatable."),
    ] = None,
    baseline: Baseline = None,
    jobs: Jobs = 0,
    style: FindingFormat = FindingStyle.auto,
    json: Json = False,
) -> int:
    """Check that a checkpoint is complete and valid.

    Headers, ranges and records, the pickle, shards against their index, shapes against a config.json beside it, and
    what torch would refuse or misread. Exit 0 means that there is nothing but notes, 1 that there are errors or
    warnings, 2 that it is not a checkpoint or cannot be read.

    Example: ckpt check --deep model.pt && echo sound
    """
    layout = style_of(style, json=json)

    def ask(path: str) -> Reply:
        with about(path), workers(jobs) if deep else nullcontext() as executor, progress() as on_progress:
            report = check(path, executor, on_progress)
        with about(path):
            accept(report, allow or (), baseline)
        return Reply(
            check_block(report, layout),
            lambda: _sarif(report) if layout == "sarif" else to_json(report),
            0 if report.ok else 1,
            lambda: talk(aside(report, layout)),
        )

    return reply_about(all_files(file, more), layout, ask, _merged if layout == "sarif" else None)


def _sarif(report: Report) -> dict[str, object]:
    from ckpt_cli.render.sarif import to_sarif

    return to_sarif(report, "check", {code: meaning for code, _, meaning in codes()})


def _merged(logs: Sequence[tuple[str, dict[str, object]]]) -> object:
    from ckpt_cli.render.sarif import merged

    return merged("check", [log for _, log in logs])
