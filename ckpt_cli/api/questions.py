"""Questions about checkpoints as functions, with the options of the commands: `diff`, `match`, `series`, `check`…"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, overload

from ckpt_cli.api.checkpoint import Checkpoint, texts
from ckpt_cli.api.checkpoint import open as open_
from ckpt_cli.api.request import path_of, request
from ckpt_cli.errors import UsageError, about

if TYPE_CHECKING:
    from ckpt_cli.model import checkpoint as model
    from ckpt_cli.ops.check.run import Report
    from ckpt_cli.ops.differences import Diff
    from ckpt_cli.ops.hash import Hashes, Verdict
    from ckpt_cli.ops.match import Match
    from ckpt_cli.ops.scan import Scan
    from ckpt_cli.ops.series import Series

Path = str | os.PathLike[str]
"""Where a checkpoint is."""


@contextmanager
def _reading(*given: Path | Checkpoint) -> Iterator[list[model.Checkpoint]]:
    """Context manager: the checkpoints, opened where a path is given, for one request."""
    with ExitStack() as stack:
        opened = [each if isinstance(each, Checkpoint) else stack.enter_context(open_(each)) for each in given]
        yield [stack.enter_context(each._reading()) for each in opened]


@contextmanager
def _one(given: Path | Checkpoint) -> Iterator[model.Checkpoint]:
    """Context manager: the same of one checkpoint."""
    with _reading(given) as (checkpoint,):
        yield checkpoint


@contextmanager
def _asked(given: Path | Checkpoint) -> Iterator[str]:
    """Context manager: a request about a path, or about that of an open checkpoint; errors say which it is."""
    with request(given._elsewhere if isinstance(given, Checkpoint) else None):
        path = given.path if isinstance(given, Checkpoint) else path_of(given)
        with about(path):
            yield path


def diff(
    a: Path | Checkpoint,
    b: Path | Checkpoint,
    *names: str,
    exclude: str | Sequence[str] = (),
    atol: float = 0,
    rtol: float = 0,
    equal_nan: bool = False,
    strip: str | Sequence[str] = (),
    sub: Sequence[tuple[str, str]] = (),
    first: int = 3,
    ignore_dtype: bool = False,
    quiet: bool = False,
    jobs: int = 0,
) -> Diff:
    """Compare two checkpoints by value, as `ckpt diff` with these options.

    `strip` takes prefixes from the names of both, then `sub` replaces in them: pairs of a regular expression and its
    replacement. `first` is the number of places of each tensor. `quiet` stops at the first difference.
    Raises CkptError, OSError.
    """
    from ckpt_cli.arrays.compare import Tolerance
    from ckpt_cli.ops.diff import Asked
    from ckpt_cli.ops.diff import diff as compare
    from ckpt_cli.ops.rename_rules import Rule
    from ckpt_cli.parallel.map import workers

    if not 0 <= first <= _PLACES or not (atol >= 0 and rtol >= 0):
        raise UsageError(f"first is 0 to {_PLACES}, atol and rtol are at least 0")
    rules = [Rule("strip", prefix) for prefix in texts(strip)] + [Rule("sub", pair) for pair in sub]
    asked = Asked(names, rules, quiet, texts(exclude), ignore_dtype)
    with _reading(a, b) as (one, other), workers(jobs) as executor:
        return compare(one, other, asked, Tolerance(atol, rtol, equal_nan, first), executor)


_PLACES = 1000
"""Places of a tensor that are listed at most."""


def match(a: Path | Checkpoint, b: Path | Checkpoint, *, of: str | None = None, other_of: str | None = None) -> Match:
    """Say whether `load_state_dict` would take one checkpoint in place of another, as `ckpt match` with these options.

    `b` may be what `ckpt ls --json` printed. `of` is the prefix of the state_dict in `a`, `other_of` that in `b`, empty
    for the whole file; without them the model's is found. Raises CkptError, OSError.
    """
    from ckpt_cli.ops.match import match as compare
    from ckpt_cli.ops.match_states import listing_of, state_of

    listing = None
    if not isinstance(b, Checkpoint):
        with about(os.fspath(b)):
            listing = listing_of(os.fspath(b), other_of)
    with _reading(a, *(() if listing is not None else (b,))) as (one, *other):
        return compare(state_of(one, of), listing or state_of(other[0], other_of, aliases=True))


def series(checkpoints: Path | Sequence[Path | Checkpoint], *names: str, fold: bool = False, jobs: int = 0) -> Series:
    """Follow tensors through the checkpoints of a run, as `ckpt series`; they are put in the order of their steps.

    A path may be the folder of a run, or a glob. Raises CkptError and OSError for a checkpoint that cannot be opened;
    one whose values cannot be read is in `files` with its error.
    """
    from ckpt_cli.ops.series import series as follow
    from ckpt_cli.ops.steps import Source, checkpoints_at
    from ckpt_cli.parallel.map import workers

    listed = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    given: list[Path | Checkpoint] = []
    for each in listed:
        given += [each] if isinstance(each, Checkpoint) else checkpoints_at(os.fspath(each))
    if not given:
        raise UsageError("series takes at least one checkpoint")
    sources = [
        Source(each.path if isinstance(each, Checkpoint) else os.fspath(each), partial(_one, each)) for each in given
    ]
    with workers(jobs) as executor:
        return follow(sources, names, executor, folded=fold)


def check(
    checkpoint: Path | Checkpoint,
    *,
    deep: bool = False,
    allow: str | Sequence[str] = (),
    baseline: Path | None = None,
    jobs: int = 0,
) -> Report:
    """Check that a checkpoint is complete and valid, as `ckpt check` with these options; see docs/check.md.

    `deep` reads every byte. `allow` has globs of codes, `baseline` is what `ckpt check --json` printed.
    Raises CkptError for what is no checkpoint, OSError.
    """
    from ckpt_cli.ops.accepted import accept
    from ckpt_cli.ops.check.run import check as examine
    from ckpt_cli.parallel.map import workers

    with _asked(checkpoint) as path, workers(jobs) if deep else nullcontext() as executor:
        report = examine(path, executor)
        accept(report, texts(allow), None if baseline is None else os.fspath(baseline))
    return report


def scan(checkpoint: Path | Checkpoint, *, allow: str | Sequence[str] = (), baseline: Path | None = None) -> Scan:
    """Find the code that would run if something else loaded a checkpoint, as `ckpt scan`; nothing is run.

    `allow` has globs of names or codes, `baseline` is what `ckpt scan --json` printed. Raises CkptError for what could
    hold no pickle, OSError.
    """
    from ckpt_cli.ops.accepted import accept
    from ckpt_cli.ops.scan import scan as search

    with _asked(checkpoint) as path:
        found = search(path)
        accept(found, texts(allow), None if baseline is None else os.fspath(baseline))
    return found


@overload
def hash(  # noqa: A001
    checkpoint: Path | Checkpoint,
    *names: str,
    exclude: str | Sequence[str] = (),
    verify: None = None,
    algorithm: str = "blake3",
    jobs: int = 0,
) -> Hashes: ...


@overload
def hash(  # noqa: A001
    checkpoint: Path | Checkpoint,
    *names: str,
    exclude: str | Sequence[str] = (),
    verify: Path,
    algorithm: str = "blake3",
    jobs: int = 0,
) -> Verdict: ...


def hash(  # noqa: A001
    checkpoint: Path | Checkpoint,
    *names: str,
    exclude: str | Sequence[str] = (),
    verify: Path | None = None,
    algorithm: str = "blake3",
    jobs: int = 0,
) -> Hashes | Verdict:
    """Hash the content of each tensor and of all, as `ckpt hash` with these options; docs/hash.md defines it.

    With `verify`, a file that `ckpt hash --json` wrote, return the differences from it. `algorithm` is `blake3` or
    `sha256`; that of the file where there is one. Raises CkptError, OSError.
    """
    from ckpt_cli.ops.hash import compare, hash_tensors, read_manifest
    from ckpt_cli.parallel.map import workers

    manifest = read_manifest(os.fspath(verify)) if verify is not None else None
    chosen = manifest.algorithm if manifest is not None else algorithm
    with _reading(checkpoint) as (opened,), workers(jobs) as executor:
        found = hash_tensors(opened, chosen, executor, names=names, exclude=texts(exclude))
    return found if manifest is None else compare(manifest, found)
