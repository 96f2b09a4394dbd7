"""The engine of `check`: is a checkpoint complete and valid?

A file that is not a checkpoint raises; one that is recognized, but broken, is a finding.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import field
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.errors import ChangedError, CkptError, FormatError, LimitError, UnknownFormatError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import (
    folder_of,
    identity_at,
    is_file,
    is_folder,
    join,
    name_of,
    names_in,
    open_file,
    present,
    size_of,
)
from ckpt_cli.files.source import Identity, SourceFile
from ckpt_cli.files.unchanged import open_to_scan
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.open import one_file_in, read_one
from ckpt_cli.formats.registry import folder_kind, format_of
from ckpt_cli.formats.signatures import beginning, documented, is_json_object
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.check import entries, quantization, shards
from ckpt_cli.ops.check import hf_config as configs
from ckpt_cli.ops.check import optimizer as optimizers
from ckpt_cli.ops.check import safetensors as headers
from ckpt_cli.ops.check import zip as zips
from ckpt_cli.ops.check.finding import Check, Finding, Occurrence, Subject
from ckpt_cli.ops.check.unreadable import CHECKS as BROKEN
from ckpt_cli.ops.check.unreadable import broken_of
from ckpt_cli.ops.check.values import CHECKS as VALUES
from ckpt_cli.ops.check.values import Reading
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.scanner.weights_only import WeightsOnly

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.formats.runs.names import RunFile

CODES: tuple[Check[Any], ...] = (
    *BROKEN, *zips.CHECKS, *headers.CHECKS, *entries.CHECKS, *optimizers.CHECKS, *entries.PICKLES, *shards.CHECKS,
    *configs.CHECKS, *quantization.CHECKS, *VALUES,
)  # fmt: skip
"""Every code that there is; each has its own subject."""

_WORDS = re.compile(r"\b(?:FILE|NAME)\b")
"""The placeholders of a hint."""

_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(slots=True)
class Report:
    """The answer."""

    path: str
    deep: bool
    """True if every byte was read."""
    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    """Files of the checkpoint that were opened."""
    tensors: int = 0
    weights_only: WeightsOnly = field(default_factory=WeightsOnly)
    """The answers of torch's weights_only loader."""
    allowed: int = 0
    """The number of findings that were taken out because the user allowed them."""
    known: int = 0
    """The number of findings that were taken out because they are in the baseline."""

    @property
    def ok(self) -> bool:
        """True if there is nothing but notes."""
        return not self.count("error") and not self.count("warning")

    def count(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def rows(self) -> list[dict[str, str]]:
        """Return the findings as rows, for a DataFrame."""
        return [finding.facts() for finding in self.findings]


def check(path: str, executor: Executor | None = None, on_progress: OnProgress = lambda _, __: None) -> Report:
    """Check a file, an index or a folder; with an executor every byte is read on it.

    `on_progress` gets the bytes done and the bytes in all.

    Raises OSError for what cannot be read, UnknownFormatError for what is no checkpoint, UsageError for a folder of
    several, LimitError for what would take too much to look into.
    """
    report = Report(path, deep=executor is not None)
    with ExitStack() as opened:
        worker = _Worker(report, opened)
        try:
            worker.path(path, executor, on_progress)
            worker.weights_only()
        except (CkptError, OSError):
            worker.require_unchanged()
            raise
        worker.require_unchanged()
    report.findings.sort(key=lambda finding: _ORDER[finding.severity])
    return report


class _Worker:
    """One check under way."""

    def __init__(self, report: Report, opened: ExitStack) -> None:
        self.report = report
        self._opened = opened
        self._counts: Counter[tuple[str, str]] = Counter()
        self._reading = Reading() if report.deep else None
        self._identities: dict[str, Identity | None] = {}
        self._model: list[Checkpoint] | None = None
        """Of a run, the checkpoints of its model."""

    def path(self, path: str, executor: Executor | None, on_progress: OnProgress) -> None:
        """All of it."""
        found, complete = self._open(path)
        for checkpoint in found:
            for file in checkpoint.container.files if self._reading is not None else ():
                file.note_whole()
            self._inspect(checkpoint)
        self._configs(path, found if self._model is None else self._model, complete=complete)
        self.report.tensors = sum(len(checkpoint.tensors) for checkpoint in found)
        if self._reading is not None and executor is not None:
            self._run(VALUES, self._reading.read(executor, on_progress))
        self._close_counts()

    def require_unchanged(self) -> None:
        """Raise ChangedError where a file that was looked into is another one now, or has another content."""
        for path, identity in self._identities.items():
            if identity_at(path) != identity:
                raise ChangedError(path)

    def weights_only(self) -> None:
        """Ask of every file that was opened whether torch's weights_only loader takes it."""
        for path in self._identities:
            if is_file(path):
                with closing(open_to_scan(path)) as file:
                    self.report.weights_only.look(file, name_of(path))

    # --- opening

    def _open(self, path: str) -> tuple[list[Checkpoint], bool]:
        """The checkpoints that a path consists of, as far as they open, and whether that is all of them."""
        if not is_folder(path):
            with closing(open_file(path)) as file:
                index = is_json_object(beginning(file))
            return self._set(path) if index else self._single(path)
        names = names_in(path)
        kind = folder_kind(path, names)
        if kind is not None:
            return self._parts_of_run(path, names) if kind.is_run else self._single(path)
        from ckpt_cli.formats.sharded.names import index_in, whole_set

        index_name = index_in(path, names)
        if index_name is not None:
            return self._set(join(path, index_name))
        wanted = shards.wanted_of(names) or whole_set(names)
        if wanted is not None:
            return self._shards(path, "", wanted, {}, {})
        return self._single(join(path, one_file_in(path, names)))

    def _parts_of_run(self, path: str, names: Sequence[str]) -> tuple[list[Checkpoint], bool]:
        """The checkpoints that the folder of a run has side by side, each opened by itself."""
        from ckpt_cli.formats.ranks.names import rank_files
        from ckpt_cli.formats.runs.names import files_of, has_ranks
        from ckpt_cli.formats.runs.read import MODEL

        found: list[Checkpoint] = []
        self._model = []
        complete = True
        if has_ranks(path, names):
            from ckpt_cli.formats.ranks.listed import latest

            found += self._single(latest(path, names)[0])[0]
        elif ".metadata" in names:
            found += self._single(join(path, ".metadata"))[0]
        ranks = rank_files(names)
        if ranks:
            found += self._opened_by(path, lambda: _joined(path, sorted(ranks)))[0]
        for file in files_of(path, [name for name in names if name not in ranks]):
            try:
                opened, is_whole = self._part_of_run(path, file)
            except UnknownFormatError:
                if file.is_known:
                    raise
                continue
            found += opened
            if file.prefix == MODEL:
                self._model, complete = opened, is_whole
        return found, complete

    def _part_of_run(self, path: str, file: RunFile) -> tuple[list[Checkpoint], bool]:
        if file.kind == "index":
            return self._set(join(path, file.name))
        if file.kind == "shards":
            return self._shards(path, "", file.shards, {}, {})
        if file.kind == "json":
            return self._opened_by(join(path, file.name), lambda: _json(join(path, file.name)))
        return self._single(join(path, file.name))

    def _single(self, path: str) -> tuple[list[Checkpoint], bool]:
        return self._opened_by(path, lambda: open_checkpoint(path))

    def _opened_by(self, path: str, opening: Callable[[], Checkpoint]) -> tuple[list[Checkpoint], bool]:
        try:
            checkpoint = opening()
        except FormatError as error:
            self._identities[path] = identity_at(path)
            self._broken(path, error)
            return [], False
        self._opened.callback(checkpoint.close)
        self._identities.update((file.path, file.seen) for file in checkpoint.container.files)
        return [checkpoint], not any(note.startswith("one shard of ") for note in checkpoint.notes)

    def _set(self, path: str) -> tuple[list[Checkpoint], bool]:
        from ckpt_cli.formats.sharded.read import read_index

        with closing(Opener().open(path)) as file:
            try:
                weight_map, metadata = read_index(file)
            except FormatError as error:
                self._broken(path, error)
                return [], False
            self._identities[path] = file.seen
        names = list(dict.fromkeys(weight_map.values()))
        self.report.files += 1
        return self._shards(folder_of(path), name_of(path), names, weight_map, metadata)

    def _shards(
        self, folder: str, index: str, names: Sequence[str], weight_map: dict[str, str], metadata: dict[str, object]
    ) -> tuple[list[Checkpoint], bool]:
        beside = names_in(folder)
        there = set(beside) & set(names)
        lacking = [name for name in names if name not in there]
        beside += present(folder, lacking) if lacking else []  # a server without lists names few of them
        opened = self._open_shards(folder, [name for name in names if name in beside])
        strays = {name: self._beside(join(folder, name)) for name in shards.strays_of(names, beside)[: limits.SHARDS]}
        whole = {name: self._beside(join(folder, name)) for name in shards.whole_of(index, names, beside)}
        known = {name: checkpoint for name, checkpoint in strays.items() if checkpoint is not None}
        files = shards.ShardFiles(index, names, beside, weight_map, metadata, opened, known, whole)
        self._run(shards.CHECKS, files)
        return [*opened.values(), *(known[name] for name in files.instead)], files.complete

    def _beside(self, path: str) -> Checkpoint | None:
        """Open a file beside the shards that is no part of their set; None for one that is not a checkpoint."""
        opener = Opener()
        try:
            file = opener.open(path)
        except OSError:
            return None
        self._identities[path] = file.seen
        try:
            checkpoint = read_one(file)
        except FormatError:
            file.close()
            return None
        opener.release()
        self._opened.callback(checkpoint.close)
        return checkpoint

    def _open_shards(self, folder: str, names: Sequence[str]) -> dict[str, Checkpoint]:
        """Open shards; one that is not a checkpoint at all is a finding, as the index says that it is one."""
        opener = Opener()
        files = opener.open_all([join(folder, name) for name in names])
        for file in files:
            self._opened.callback(file.close)
            self._identities[file.path] = file.seen
        read = dict(zip(names, map(self._shard, documented(files)), strict=True))
        opener.release()
        return {name: checkpoint for name, checkpoint in read.items() if checkpoint is not None}

    def _shard(self, file: SourceFile) -> Checkpoint | None:
        try:
            return read_one(file)
        except FormatError as error:
            self._broken(file.path, error, part=True)
            return None

    def _broken(self, path: str, error: FormatError, *, part: bool = False) -> None:
        """Add the finding for an error of a reader; raise an error that is not the checkpoint's fault."""
        if isinstance(error, LimitError):
            raise error
        broken = broken_of(path, error)
        if isinstance(error, UnknownFormatError) or (is_file(path) and size_of(path) == 0):
            before = len(self.report.findings)
            if part or broken.is_late_zip:
                self._run(BROKEN, broken, path)
            if len(self.report.findings) == before:
                raise error
            return
        self._run(BROKEN, broken, path)
        if is_file(path):
            self._run(entries.PICKLES, path, path)

    # --- looking

    def _inspect(self, checkpoint: Checkpoint) -> None:
        self.report.files += len(checkpoint.container.files)
        is_beside = self._model is not None and all(
            checkpoint is not each for each in self._model
        )  # such as the state of a scheduler
        checks = [each for each in entries.CHECKS if not (is_beside and each.code == "no-tensors")]
        self._run((*checks, *optimizers.CHECKS), checkpoint, checkpoint.path)
        if format_of(checkpoint).has_header:
            self._run(headers.CHECKS, checkpoint, checkpoint.path)
        archives = []
        for file in checkpoint.container.files:
            archive = zips.zip_of(file, checkpoint)
            if archive is not None:
                self._run(zips.CHECKS, archive, file.path)
                archives.append(archive)
            if not format_of(checkpoint).has_header:
                self._run(entries.PICKLES, file.path, file.path)
        if self._reading is not None:
            self._reading.add(checkpoint, archives)

    def _configs(self, path: str, found: Sequence[Checkpoint], *, complete: bool) -> None:
        self._run(quantization.CHECKS, quantization.Quantized(name_of(path), found, complete))
        config, adapter = config_beside(path) or {}, config_beside(path, "adapter_config.json") or {}
        if found and (config or adapter):
            tensors = [tensor for checkpoint in found for tensor in checkpoint.tensors]
            subject = configs.Configured(name_of(path), tensors, configs.text_config(config), adapter, complete)
            self._run(configs.CHECKS, subject)

    def _run(self, checks: Sequence[Check[Subject]], subject: Subject, path: str = "") -> None:
        """Add what the checks find, of each code a bounded number; `path` is the file, where it is one alone."""
        for each in checks:
            for occurrence in each.find(subject):
                self._say(each, occurrence, path or self.report.path)

    def _say(self, each: Check[Subject], occurrence: Occurrence, path: str) -> None:
        severity = occurrence.severity or each.severity
        self._counts[severity, each.code] += 1
        if self._counts[severity, each.code] <= limits.CHECK_FINDINGS:
            words = {"FILE": path, "NAME": occurrence.name}
            hint = _WORDS.sub(lambda word: shlex.quote(words[word[0]]), occurrence.hint or each.hint)
            self.report.findings.append(
                Finding(severity, each.code, occurrence.where, occurrence.message, hint, file=path)
            )

    def _close_counts(self) -> None:
        """Say of each code how many were left out."""
        for (severity, code), count in self._counts.items():
            if count > limits.CHECK_FINDINGS:
                where = name_of(self.report.path)
                more = f"and {count - limits.CHECK_FINDINGS} more"
                self.report.findings.append(Finding(severity, code, where, more, "", file=self.report.path))


def codes() -> Iterator[tuple[str, str, str]]:
    """Yield every code with its severity and its meaning, for docs/check.md."""
    for each in CODES:
        yield each.code, each.severity, each.meaning


def _json(path: str) -> Checkpoint:
    """Open a JSON file that is a part of a run."""
    from ckpt_cli.formats.runs.json_values import read_json

    opener = Opener()
    file = opener.open(path)
    with closed_on_error([file]):
        checkpoint = read_json(file)
    opener.release()
    return checkpoint


def _joined(path: str, names: Sequence[str]) -> Checkpoint:
    """Open the files of ranks in the folder of a run as what they are together."""
    from ckpt_cli.formats.open import read_one
    from ckpt_cli.formats.ranks.placed import read_folder

    opener = Opener()
    checkpoint = read_folder(path, names, opener, read_one)
    opener.release()
    return checkpoint
