"""`ckpt scan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_cli.cli.options import Baseline, File, FindingFormat, FindingStyle, Json, MoreFiles
from ckpt_cli.cli.output import Reply, style_of, talk
from ckpt_cli.cli.several import all_files, reply_about
from ckpt_cli.errors import about
from ckpt_cli.ops.accepted import accept
from ckpt_cli.ops.scan import scan
from ckpt_cli.render.scan import scan_block, to_json
from ckpt_cli.render.weights_only import aside

if TYPE_CHECKING:
    from ckpt_cli.ops.scan import Scan


def scan_command(
    file: File,
    more: MoreFiles = None,
    every: Annotated[bool, typer.Option("-a", "--all", help="Add the names that do no harm.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="GLOB", help="Accept names or codes that match; repeatable.")
    ] = None,
    baseline: Baseline = None,
    style: FindingFormat = FindingStyle.auto,
    json: Json = False,
) -> int:
    """Show the code that would run if something else loaded it.

    Every name that a pickle in the file would import, with the call it feeds, and whatever else no ordinary
    checkpoint has: pickles in strings, streams after the first, records twice or out of place. Nothing is run. Exit 0
    means that there is nothing but notes, 1 that there are errors or warnings.

    Example: ckpt scan model.pt && echo harmless
    """
    layout = style_of(style, json=json)

    def ask(path: str) -> Reply:
        with about(path):
            found = scan(path)
            accept(found, allow or (), baseline)
        return Reply(
            scan_block(found, layout, every=every),
            lambda: _sarif(found) if layout == "sarif" else to_json(found),
            0 if found.ok else 1,
            lambda: talk(aside(found, layout)),
        )

    return reply_about(all_files(file, more), layout, ask, _merged if layout == "sarif" else None)


def _sarif(found: Scan) -> dict[str, object]:
    from ckpt_cli.render.sarif import SCAN_CODES, to_sarif

    return to_sarif(found, "scan", SCAN_CODES)


def _merged(logs: Sequence[tuple[str, dict[str, object]]]) -> object:
    from ckpt_cli.render.sarif import merged

    return merged("scan", [log for _, log in logs])
