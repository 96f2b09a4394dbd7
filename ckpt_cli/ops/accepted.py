"""Findings of `scan` and `check` that the user accepts: those allowed by a pattern, and those of a baseline."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from fnmatch import translate
from typing import TYPE_CHECKING

from ckpt_cli.errors import UsageError
from ckpt_cli.files.places import is_folder, name_of, open_file
from ckpt_cli.ops.check.finding import Finding
from ckpt_cli.scanner.judge import judge

if TYPE_CHECKING:
    from ckpt_cli.ops.check.run import Report
    from ckpt_cli.ops.scan import Scan

_NOTHING = {"path": "", "findings": []}
"""What a list of several files says of one that is not in it."""

_BASELINE = 64 * 2**20
"""Bytes of a baseline that is read."""

_Key = tuple[str, str, str]
"""The code, the place within the file, and the message, by which a finding is known again."""


def accept(found: Scan | Report, allowed: Sequence[str], baseline: str | None) -> None:
    """Take out the findings that are allowed or in the baseline, and count them.

    Raises UsageError for a baseline that is not what `--json` of the same command printed, OSError for one that cannot
    be read.
    """
    known = (
        _known(baseline, "deep" if hasattr(found, "deep") else "pickles", found.path)
        if baseline is not None
        else Counter()
    )
    patterns = [_Pattern(text) for text in allowed]
    kept = []
    for finding in found.findings:
        if any(pattern.accepts(finding) for pattern in patterns):
            found.allowed += 1
            continue
        key = (finding.code, place_in_file(finding.where, found.path), finding.message)
        if known[key]:
            known[key] -= 1
            found.known += 1
        else:
            kept.append(finding)
    found.findings[:] = kept


class _Pattern:
    """A glob over imported names and codes."""

    def __init__(self, text: str) -> None:
        self._matches = re.compile(translate(text)).match
        plain = re.split(r"[*?\[]", text, maxsplit=1)[0]
        self._is_plain = plain == text
        self._fixed = plain.rpartition(".")[0]
        """The modules that are spelled out before the first wildcard."""

    def accepts(self, finding: Finding) -> bool:
        """True for a finding of a name or a code that matches; a wildcard never stands for a dangerous name."""
        if self._matches(finding.code) and (self._is_plain or finding.severity != "error"):
            return True
        if not finding.name or not self._matches(finding.name):
            return False
        if self._is_plain or finding.severity != "error":
            return True
        rest = finding.name[len(self._fixed) :].lstrip(".") if self._fixed else finding.name
        parts = rest.split(".")
        return all(
            judge(".".join(parts[begin:-1]), parts[-1]).verdict != "dangerous" for begin in range(len(parts) - 1)
        )


def place_in_file(where: str, path: str) -> str:
    """Return the place of a finding within the file at `path`, without what the file's own name changes in it.

    The folder in a file of torch.save is called as the file was; the findings of a folder keep the names of its files.
    """
    name = name_of(path)
    rest = where.removeprefix(name)
    if rest == where or (rest and rest[0] not in "/: ("):
        return where
    stem = name.rpartition(".")[0] or name
    return "/" + rest.removeprefix(f"/{stem}/") if rest.startswith(f"/{stem}/") else rest


def _known(baseline: str, key: str, path: str) -> Counter[_Key]:
    """The findings of a baseline, which must have the key that the output of the command has.

    Of the output about several files it is what was found in the one at `path`.
    """
    if is_folder(baseline):
        raise UsageError("a baseline is a file that --json printed, and this is a folder", path=baseline)
    with closing(open_file(baseline)) as file:
        if file.size > _BASELINE:
            raise UsageError(f"a baseline of {file.size} bytes is too large", path=baseline)
        data = file.read(0, file.size)
    try:
        said = json.loads(data)
        if isinstance(said, list) and said:
            said = next((each for each in said if each["path"] == path and "error" not in each), {key: 0, **_NOTHING})
        if not isinstance(said, Mapping) or key not in said:
            raise ValueError
        path = said["path"]
        findings = [(each["code"], each["where"], each["message"]) for each in said["findings"]]
        if not all(isinstance(text, str) for text in (path, *(text for each in findings for text in each))):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError("not a baseline: it is not what this command printed with --json", path=baseline) from None
    return Counter((code, place_in_file(where, path), message) for code, where, message in findings)
