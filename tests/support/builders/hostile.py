"""Files made to harm whoever opens them, by name; none may cost much, and none may be answered wrongly.

`CASES` has them all. A file that must be refused says a part of what is then said of it; the others may open, because
a reader that runs nothing has nothing to fear from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from builders.hostile_archives import ARCHIVES
from builders.hostile_headers import HEADERS
from builders.hostile_pickles import PICKLES, SCALE
from builders.hostile_walks import WALKS
from builders.hostile_zips import ZIPS
from builders.pt import DEFLATED, archive, torch_records

CANARY = "canary"
"""The file, in the current folder, that appears when a pickle is run."""


@dataclass(frozen=True)
class Hostile:
    """One file."""

    name: str
    build: Callable[[], bytes]
    """Its content."""
    refused: str | None
    """A part of the error that it must end in; None where it may open."""
    scale: float = 1
    """By what the limits are multiplied that it meets: the pickles are made smaller, and the limits with them."""


def _in_zip(pickle: Callable[[], bytes]) -> Callable[[], bytes]:
    """A torch file around a pickle, which is compressed where it is long."""

    def build() -> bytes:
        records = torch_records(pickle(), {"0": bytes(64)})
        if len(records[0].content) > 1 << 20:
            records[0].method = DEFLATED
        return archive(records)

    return build


CASES = {
    **{name: Hostile(name, _in_zip(build), refused, SCALE) for name, build, refused in (*PICKLES, *WALKS)},
    **{name: Hostile(name, build, refused) for name, build, refused in (*ZIPS, *ARCHIVES, *HEADERS)},
}
"""Every hostile file by its name."""
